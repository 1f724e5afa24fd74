"""A GPT written a second time, naively and from the papers, to judge the first one by: one head at a time, whole T x T tables.

It shares no code with the package. From the package it takes the configuration and the names under which weights are stored,
and, where the papers leave a choice, what the chapters say they chose. In float64 it is the truth; in lower precision it shows
how much error plain code makes there.
"""
import math
from collections.abc import Mapping

import torch
from torch import Tensor


def paper_sets(kind: str, i: int, l: int, c: int = 1, vert: int = 0) -> tuple[set[int], set[int]]:  # noqa: E741
    """Child et al. 2019, section 4.3, as printed: A_i^(1) and A_i^(2) of `strided` (l: stride) and `fixed` (c: summary columns).

    `vert` is the paper's "multiple distinct subblocks of length c": 0 is the printed one, the last c columns of each block of l.
    """
    past = range(i + 1)
    if kind == "strided":
        return set(range(max(0, i - l), i + 1)), {j for j in past if (i - j) % l == 0}
    t = l - (vert + 1) * c
    return {j for j in past if j // l == i // l}, {j for j in past if t <= j % l < t + c}


def keys_of(cfg, h: int, i: int) -> set[int]:
    """What query i of head h attends to, with what the chapter changes in the paper's sets.

    A window holds l keys (the paper's l + 1), and a separate summary head sees the blocks before its own, and itself.
    """
    l, c, kind = cfg.local_attn_ctx, cfg.vertsize, cfg.attn_type  # noqa: E741
    if kind == "all":
        return set(range(i + 1))
    verts, two = cfg.num_verts if kind == "fixed" else 1, kind != "local" and not cfg.merged
    near, far = paper_sets("fixed" if kind == "fixed" else "strided", i, l, c, (h // 2 if two else h) % verts)
    near.discard(i - l)
    if kind == "local":
        return near
    if cfg.merged:
        return near | far
    if kind == "fixed":
        far = {j for j in far if j // l < i // l} | {i}
    return far if h % 2 else near


def sparsek_threshold(z: Tensor, here: Tensor, k: int) -> Tensor:
    """tau with sum clip(z - tau, 0, 1) = k over the entries that are `here`, by bisection, then solved where the line is known.

    The last step is differentiable. -inf where no more than k entries are here.
    """
    with torch.no_grad():
        low = z.masked_fill(~here, math.inf).amin(-1, keepdim=True).nan_to_num(posinf=0) - 1
        high = z.masked_fill(~here, -math.inf).amax(-1, keepdim=True).nan_to_num(neginf=0)
        for _ in range(70):
            mid = (low + high) / 2
            more = ((z - mid).clamp(0, 1) * here).sum(-1, keepdim=True) > k
            low, high = torch.where(more, mid, low), torch.where(more, high, mid)
        slack = 1e-9 if z.dtype == torch.double else 1e-6
        inside, ones = here & (z - high > slack) & (z - high < 1 - slack), here & (z - high >= 1 - slack)
    n = inside.sum(-1, keepdim=True)
    tau = ((z * inside).sum(-1, keepdim=True) + ones.sum(-1, keepdim=True) - k) / n.clamp(min=1)
    tau = torch.where(n > 0, tau, high)
    return torch.where(here.sum(-1, keepdim=True) > k, tau, -math.inf)


def sparsek_gates(u: Tensor, same: Tensor, k: int, candidates: int, window: int) -> tuple[Tensor, float]:
    """Scores (B, T) and who shares a title (B, T, T) to gates (B, T, T): 1 for the window, p for the k best older tokens, else 0.

    Equal scores: the later token is the better one. Also the least lead of a k-th best over the next: where it is within rounding,
    the choice is not defined.
    """
    place = torch.arange(u.shape[1])
    age = place[:, None] - place
    older, z = same & (age >= window), u[:, None, :].expand(same.shape)  # (B, query, key)
    better = (u[:, None, :] > u[:, :, None]) | ((u[:, None, :] == u[:, :, None]) & (place > place[:, None]))  # (B, key, other)
    rank = (better[:, None] & older[:, :, None, :]).sum(-1)  # how many older tokens beat this one: (B, query, key)
    tau = sparsek_threshold(z, older & (rank < candidates), k)
    chosen = older & (rank < k)
    last, first = z.masked_fill(~chosen, math.inf).amin(-1), z.masked_fill(~(older & (rank == k)), -math.inf).amax(-1)
    gate = torch.where(chosen, (z - tau).clamp(0, 1), 0)
    return torch.where(same & (age >= 0) & (age < window), 1.0, gate), float((last - first).detach().min())


def rdrop_loss(logits: list[Tensor], targets: Tensor, r: float = 0.0) -> Tensor:
    """Mean cross-entropy over tokens and passes, plus r / 2 (KL(p, q) + KL(q, p)) per token (Liang et al. 2021, alpha = 2 r)."""
    logp = [z - z.exp().sum(-1, keepdim=True).log() for z in (z - z.detach().amax(-1, keepdim=True) for z in logits)]
    loss = sum(-lp.gather(-1, targets[..., None]).mean() for lp in logp) / len(logp)
    if r:
        p, q = logp
        kl = (p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)
        loss = loss + r / 2 * kl.mean()
    return loss


class Oracle:
    """The model of a `Config`, from the weights of a `state_dict`, in their precision."""

    def __init__(self, cfg, weights: Mapping[str, Tensor], pairs: list[tuple[int, int]] | None = None) -> None:
        """`pairs`: where letters and case are apart, the piece and the class of each id."""
        self.m = getattr(cfg.model_configs, cfg.hyperparams.model_architecture)
        self.a = getattr(cfg.attn_configs, self.m.attention_layer)
        self.title_mask = cfg.hyperparams.title_mask
        unet = cfg.hyperparams.model_architecture == "unet_gpt"
        self.widths = list(self.m.hidden_layer_list) if unet else [self.m.hidden_layer] * self.m.n_layer
        self.bridges = (len(self.widths) - 1) // 2 if unet and self.m.skip_connections else 0
        self.weights, self.used = dict(weights), set()
        self.wide = torch.promote_types(next(iter(weights.values())).dtype, torch.float32)
        self.pairs = pairs and torch.tensor(pairs).T  # (2, V)
        self.margin, self.tables = math.inf, {}  # the narrowest decision of SparseK's choice so far; masks

    def w(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def linear(self, x: Tensor, name: str, bias: bool | None = None) -> Tensor:
        y = x @ self.w(f"{name}.weight").T
        return y + self.w(f"{name}.bias") if (self.m.bias if bias is None else bias) else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = x.to(self.wide)
        if self.m.norm == "rmsnorm":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w(f"{name}.weight")
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w(f"{name}.weight")
        return x + self.w(f"{name}.bias") if self.m.bias else x

    def act(self, x: Tensor) -> Tensor:
        x, kind = x.to(self.wide), self.m.activation_function
        if kind == "swiglu":
            a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            return a / (1 + (-a).exp()) * b
        if kind == "relu":
            return torch.where(x > 0, x, 0)
        inner = torch.erf(x / math.sqrt(2)) if kind == "gelu" else torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return x * (1 + inner) / 2

    def turn(self, x: Tensor) -> Tensor:
        """RoPE on (B, T, D): coordinates m and m + D/2 turn together, by p * 10000^(-2m/D)."""
        half, x = x.shape[-1] // 2, x.to(self.wide)
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-2 * torch.arange(half, dtype=torch.double) / (2 * half))
        cos, sin, a, b = angle.cos().to(x), angle.sin().to(x), x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def mask(self, h: int, T: int) -> Tensor:
        """(T, T) of head h, True where query i attends to key j."""
        if (h, T) not in self.tables:
            rows = [keys_of(self.a, h, i) if self.m.attention_layer == "sparse" else set(range(i + 1)) for i in range(T)]
            self.tables[h, T] = torch.tensor([[j in keys for j in range(T)] for keys in rows])
        return self.tables[h, T]

    def scores(self, x: Tensor, name: str, h: int) -> Tensor:
        """(B, T): sharpness times the cosine between token and direction times sqrt(d), plus the slope."""
        x, w = x.to(self.wide), self.w(f"{name}.score.weight")[h]
        unit = x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12) * math.sqrt(x.shape[-1])
        u = (unit * (w / w.pow(2).sum().sqrt())).sum(-1) * self.w(f"{name}.sharpness")[h]
        return u + self.a.epsilon * torch.arange(x.shape[1])

    def gate(self, x: Tensor, name: str, h: int, same: Tensor) -> Tensor:
        """(B, T, T): the weight's factor, 0 or 1 but for SparseK."""
        if self.m.attention_layer != "sparsek":
            return (same & self.mask(h, x.shape[1])).to(self.wide)
        a = self.a
        gate, lead = sparsek_gates(self.scores(x, name, h), same, a.k, a.candidates or 4 * a.k, a.window)
        self.margin = min(self.margin, lead)
        return gate

    def attention(self, x: Tensor, name: str, same: Tensor) -> Tensor:
        H = self.a.n_head
        D, heads, qkv = (self.a.intermediate_dim or x.shape[-1]) // H, [], self.linear(x, f"{name}.qkv")
        for h in range(H):
            q, k, v = (qkv[..., (part * H + h) * D : (part * H + h + 1) * D] for part in range(3))
            if self.m.position == "rope":
                q, k = self.turn(q), self.turn(k)
            scores = (q @ k.transpose(1, 2)).to(self.wide) / math.sqrt(D)
            gate = self.gate(x, name, h, same)
            top = scores.detach().masked_fill(gate == 0, -math.inf).amax(-1, keepdim=True)
            weight = gate * (scores - top).clamp(max=0).exp()
            y = (weight / weight.sum(-1, keepdim=True)) @ v
            if self.m.output_gate:
                y = y / (1 + (-self.linear(x, f"{name}.gate")[..., h : h + 1]).exp())
            heads.append(y)
        return self.linear(torch.cat(heads, -1), f"{name}.out")

    def residual(self, x: Tensor, name: str, branch) -> Tensor:
        pre = self.m.norm_type == "pre"
        y = branch(self.norm(x, f"{name}.norm") if pre else x)
        y = x + (y * self.w(f"{name}.scale.gamma") if self.m.layer_scale else y)
        return y if pre else self.norm(y, f"{name}.norm")

    def block(self, x: Tensor, n: int, same: Tensor) -> Tensor:
        at, mlp = f"blocks.{n}.attn", f"blocks.{n}.mlp"
        x = self.residual(x, at, lambda z: self.attention(z, f"{at}.inner", same))
        return self.residual(x, mlp, lambda z: self.linear(self.act(self.linear(z, f"{mlp}.inner.up")), f"{mlp}.inner.out"))

    def vectors(self) -> Tensor:
        """Of all ids or pieces: (V, d_model)."""
        if "embed.tokens.weight" in self.weights:
            return self.w("embed.tokens.weight")
        common, rare, expand = (self.w(f"embed.tokens.{name}.weight") for name in ("common", "rare", "expand"))
        made = torch.cat([common, rare @ expand.T])
        return made + self.spelled(len(made)) @ expand.T if self.m.embedding_ngrams else made

    def spelled(self, n: int) -> Tensor:
        """What the decimal numbers below n, which stand for pieces, get from their runs of two to five characters: (n, rank)."""
        texts, table = [f"⟨{i}⟩" for i in range(n)], self.w("embed.tokens.ngrams.table.weight")
        runs = [[t[a:b] for a in range(len(t)) for b in range(a + 2, min(a + 5, len(t)) + 1) if b - a < len(t)] for t in texts]
        having = {run: sum(run in own for own in runs) for own in runs for run in own}
        kept = sorted(having, key=lambda run: (-having[run], run))[: self.m.embedding_ngrams]
        rows = [[kept.index(run) for run in set(own) if run in kept] for own in runs]
        return torch.stack([table[own].sum(0) / max(1, len(own)) ** 0.5 for own in rows])

    def shifted(self, x: Tensor, idx: Tensor) -> Tensor:
        """Each token's vector with its share of the one before, token by token; an <eos> closes what was before, if titles are apart."""
        rows = []
        for row, ids in zip(x, idx.tolist(), strict=True):
            share = 1 / (1 + torch.exp(-(row @ self.w("shift.gate.weight")[0])[:, None] - self.w("shift.bias")))
            alone = [t == 0 or (self.title_mask and ids[t] == 1) for t in range(len(ids))]
            rows.append(torch.stack([v if alone[t] else v + share[t] * row[t - 1] for t, v in enumerate(row)]))
        return torch.stack(rows)

    def features(self, idx: Tensor) -> Tensor:
        """(B, T) to (B, T, d_model)."""
        T, d, last = idx.shape[1], self.m.d_model, self.widths[-1]
        number = (idx == 1).cumsum(1) if self.title_mask else torch.zeros_like(idx)  # <eos>, id 1, opens a title
        same = number[:, :, None] == number[:, None, :]
        if self.pairs is None:
            x = self.vectors()[idx]
        else:
            x = self.vectors()[self.pairs[0][idx]] + self.w("embed.cases.weight")[self.pairs[1][idx]]
        if self.m.position == "learned":
            x = x + self.w("embed.positions.weight")[:T]
        x = x if self.widths[0] == d else self.linear(x, "embed.project")
        x = self.shifted(x, idx) if self.m.token_shift else x
        kept, embedding = [], x
        for n, width in enumerate(self.widths):
            if n and width != self.widths[n - 1]:
                x = self.linear(x, f"between.{n - 1}")
            if n >= len(self.widths) - self.bridges:
                x = x + kept[len(self.widths) - 1 - n]
            if self.m.embedding_skips:
                x = self.w("skips.stream")[n] * x
                if n and width == self.widths[0]:
                    x = x + self.w("skips.embedding")[self.widths[1:n].count(width)] * embedding
            x = self.block(x, n, same)
            kept.append(x)
        x = self.norm(x, "norm") if self.m.norm_type == "pre" else x
        return x if last == d else self.linear(x, "project")

    def adaptive(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the common ids, and of the rare ones, by the vectors of all and one for all rare ones (Grave et al. 2017)."""
        cutoff = len(self.w("embed.tokens.common.weight"))
        scores, rare = (hidden @ self.vectors().T).to(self.wide), (hidden @ self.w("rare_head.any_rare").T).to(self.wide)
        total = torch.cat([scores[..., :cutoff], rare], -1).logsumexp(-1, keepdim=True)
        return scores[..., :cutoff] - total, rare - total + scores[..., cutoff:].log_softmax(-1)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """(B, T, d) to (B, T, V). With pairs: the piece's, and the logarithm of p(id | piece), a softmax over its ids."""
        head = self.vectors() if self.m.tied else self.w("head.weight")
        logits = torch.cat(self.adaptive(hidden), -1) if "rare_head.any_rare" in self.weights else hidden @ head.T
        if self.pairs is None:
            return logits
        piece, case = self.pairs
        told = self.linear(head, "case_head.of_piece", bias=False)  # (pieces, width)
        x = (self.linear(hidden, "case_head.of_state", bias=True)[..., None, :] + told).to(self.wide)
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        score = self.linear(x, "case_head.classes", bias=True)[..., piece, case].to(self.wide)  # (B, T, V)
        logp = torch.empty_like(score)
        for u in set(piece.tolist()):
            mine = piece == u
            logp[..., mine] = score[..., mine].log_softmax(-1)
        return logits.to(self.wide)[..., piece] + logp

    def logits(self, idx: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        return self.logits_of(self.features(idx))
