"""Single parts against oracles that nobody here wrote: entmax, the papers' index sets, torch's Muon, transformers' schedules, DESIGN 6.

Whole models are in `test_fuzz`.
"""
import itertools
import json
import math

import pytest
import torch
from oracle_gpt import Oracle, paper_sets, sparsek_gates, sparsek_threshold
from torch import Tensor, nn

from mainrun_nb.attention import attend_fast
from mainrun_nb.checkpoint import load_run
from mainrun_nb.config import InputError, SparseAttnConfig, load_config, tiny
from mainrun_nb.data import load_titles, split_titles
from mainrun_nb.evaluate import evaluate
from mainrun_nb.optim import build_optimizer, lr_factor
from mainrun_nb.sparse_attention import attend_blocks, attend_sparse, sparse_mask
from mainrun_nb.sparsek import Selection, sparsek, sparsek_plain, sparsek_tau
from mainrun_nb.sparsek_stream import SparseKCache, sparsek_fast
from mainrun_nb.trainer import train

torch.set_num_threads(1)

# --- SparseK's operator: entmax's budget solver ---


def rows(n: int, spread: float = 1.0, dtype: torch.dtype = torch.double, seed: int = 0, count: int = 50) -> Tensor:
    return (torch.randn(count, n, generator=torch.Generator().manual_seed(seed)).double() * spread).to(dtype)


def by_entmax(z: Tensor, k: int) -> Tensor:
    """p by bisection: entmax 1.3, `budget_bisect`."""
    entmax = pytest.importorskip("entmax")
    return entmax.budget_bisect(z, budget=torch.tensor(float(k), dtype=z.dtype), n_iter=100)


def value_and_gradient(operator, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    p = operator(z)
    return p.detach(), torch.autograd.grad((p * weight).sum(), z)[0]


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("n", [2, 3, 17, 200])
def test_sparsek_is_the_budgeted_sparsemax(n, spread):
    for k in {1, 2, n // 2, n - 1} - {0}:
        z, g = rows(n, spread, seed=n + k), rows(n, seed=n)
        ours, theirs = (value_and_gradient(f, z, g) for f in (lambda z: sparsek(z, k), lambda z: by_entmax(z, k)))  # noqa: B023
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-11)


def test_sparsek_of_one_is_sparsemax():
    entmax = pytest.importorskip("entmax")
    for n, spread in itertools.product((1, 2, 9, 100), (0.01, 1.0, 10.0)):
        z, g = rows(n, spread, seed=n), rows(n, seed=3)
        ours, theirs = (value_and_gradient(f, z, g) for f in (lambda z: sparsek(z, 1), entmax.sparsemax))
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("step", [0.5, 0.25, 1 / 3])
def test_sparsek_of_ties(step):
    """Scores on a grid; gradients where no gate stands exactly at 0 or 1, for there it has two of them."""
    for n, k in [(4, 2), (12, 3), (40, 7)]:
        z, g = (rows(n, 1.0, seed=n) / step).round() * step, rows(n, seed=1)
        ours, theirs = (value_and_gradient(f, z, g) for f in (lambda z: sparsek(z, k), lambda z: by_entmax(z, k)))  # noqa: B023
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-11)
        slack = z - sparsek_tau(z, k)[:, None]
        smooth = (torch.minimum(slack.abs(), (slack - 1).abs()) > 1e-6).all(1)
        assert smooth.any()
        torch.testing.assert_close(ours[1][smooth], theirs[1][smooth], rtol=0, atol=1e-11)
        same = z[:, :, None] == z[:, None, :]
        assert ((ours[0][:, :, None] - ours[0][:, None, :]).abs()[same] == 0).all()  # equal scores, equal gates


@pytest.mark.parametrize("size", [1e-12, 1e6, 1e12])
@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0])
def test_sparsek_of_extreme_scores(size, shift):
    """All scores nearly equal, far apart, or far from zero: what float64 can still tell apart is told apart."""
    z = rows(30, size) + shift * 1e3 * size
    for k in (1, 5, 29):
        p, room = sparsek(z, k), 64 * float(z.abs().max()) * 2e-16 + 1e-11
        torch.testing.assert_close(p, by_entmax(z, k), rtol=0, atol=room)
        assert (p.sum(1) - k).abs().max() <= 30 * room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparsek_in_low_precision_is_the_rounded_truth(dtype):
    for n, k, spread in [(5, 2, 1.0), (64, 9, 3.0), (1000, 50, 0.5), (2000, 64, 0.01)]:
        z, g = rows(n, spread, dtype, seed=n, count=20), rows(n, 1.0, dtype, seed=1, count=20)
        p, grad = value_and_gradient(lambda z: sparsek(z, k), z, g)  # noqa: B023
        truth, true_grad = value_and_gradient(lambda z: by_entmax(z, k), z.double(), g.double())  # noqa: B023
        assert p.dtype == grad.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(p.double(), truth, rtol=eps, atol=1e-7)
        torch.testing.assert_close(grad.double(), true_grad, rtol=2 * eps, atol=2 * eps)


def test_sparsek_of_entries_that_take_no_part():
    """-inf: the others are chosen among as if alone."""
    z = rows(20, seed=4)
    out = torch.rand(z.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    for k in (1, 3, 9):
        p = sparsek(z.masked_fill(out, -math.inf), k)
        assert not p[out].any()
        for row, p_row, gone in zip(z, p, out, strict=True):
            left = row[~gone]
            wanted = by_entmax(left[None], k)[0] if len(left) > k else torch.ones_like(left)
            torch.testing.assert_close(p_row[~gone], wanted, rtol=0, atol=1e-11)


def test_sparsek_keeps_its_sum_at_any_size():
    z = torch.full((5,), 1e16, dtype=torch.double)
    torch.testing.assert_close(sparsek(z, 2), torch.full_like(z, 0.4))


def test_sparsek_of_an_infinite_score():
    z = torch.tensor([0.5, 0.2, 0.1, math.inf])
    torch.testing.assert_close(sparsek(z, 2), torch.cat((sparsek(z[:3], 1), torch.ones(1))))


def test_sparsek_of_nothing():
    assert sparsek(torch.zeros(3, 0), 2).shape == (3, 0)


def test_sparsek_of_nan():
    try:
        assert sparsek(torch.tensor([math.nan, 0.5, 0.2]), 1).isnan().any()
    except InputError:
        pass


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 600.0), (torch.float16, 4104.0), (torch.float32, 2.0**25 + 8)], ids=str)
def test_sparsek_of_large_ties_beside_absent_entries(dtype, size):
    z = torch.tensor([size, size, -math.inf, -math.inf], dtype=dtype)
    torch.testing.assert_close(sparsek(z, 1).double(), torch.tensor([0.5, 0.5, 0, 0]).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sparsek_far_from_the_k_th_place(dtype):
    """Winners and losers of any size, infinite ones too, do not change what the others share."""
    middle, size = torch.tensor([0.5, 0.25, 0.0], dtype=torch.double), float(torch.finfo(dtype).max)
    for far, k in itertools.product((100.0, size, math.inf), (1, 2)):
        z = torch.cat((torch.tensor([far] * 2), middle, torch.tensor([-far] * 2))).to(dtype)
        torch.testing.assert_close(sparsek(z, 2 + k), torch.cat((torch.ones(2), sparsek(middle, k), torch.zeros(2))).to(dtype))
        assert torch.equal(sparsek(z, 1), torch.tensor([0.5] * 2 + [0] * 5, dtype=dtype))  # equal winners share
        assert not sparsek(z, 0).any()
        assert torch.equal(sparsek(z, 7), (z > -math.inf).to(dtype))  # k or fewer take part
    none = torch.full((2, 3), -math.inf, dtype=dtype)
    assert not sparsek(none, 2).any() and sparsek_tau(none, 2).tolist() == [-math.inf] * 2
    spoiled = torch.stack((z.nan_to_num(neginf=math.nan), z))
    assert sparsek(spoiled, 2)[0].isnan().all() and torch.equal(sparsek(spoiled, 2)[1], sparsek(z, 2))


def test_sparsek_of_differences_below_rounding():
    z = torch.tensor([1e16 + 2, 1e16, 1e-30, 0, -1e16], dtype=torch.double)
    assert sparsek(z, 1).tolist() == [1, 0, 0, 0, 0] and sparsek(z, 3).tolist() == [1, 1, 0.5, 0.5, 0]


# --- SparseK's attention: the definition, with ties ---

HARD = {"1e16": [1e16, 1e16 + 4, -1e16], "1e-30": [1e-30, 0.0, 2e-30], "infinite": [math.inf], "no number": [math.nan]}


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize("kind", HARD)
def test_streamed_and_cached_sparsek_is_plain_for_hard_scores(kind, titled):
    for seed, (T, hard_share) in enumerate(itertools.product((12, 60), (0.02, 0.2, 0.9))):
        g = torch.Generator().manual_seed(seed)
        rule, titles = Selection(4, 9, 7, 8), (torch.rand(2, T, generator=g) < 0.05).cumsum(1) if titled else None
        q, k, v = torch.randn(3, 2, 2, T, 4, dtype=torch.double, generator=g)
        u, values = torch.randn(2, 2, T, dtype=torch.double, generator=g), torch.tensor(HARD[kind], dtype=torch.double)
        u = torch.where(torch.rand(u.shape, generator=g) < hard_share, values[torch.randint(len(values), u.shape, generator=g)], u)
        cache = SparseKCache(2, 2, 4, rule, dtype=torch.double)
        numbers = torch.zeros(2, T, dtype=torch.long) if titles is None else titles
        inputs = [x.requires_grad_() for x in (q, k, v, u)]
        plain, (fast, _) = sparsek_plain(*inputs, rule, titles), sparsek_fast(*inputs, rule, titles)
        for found in (fast, cache.extend(q, k, v, u, numbers)):
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-12, equal_nan=True)
        fine = ~plain.isnan().any(-1)[..., None]
        if kind == "no number":
            older = torch.stack([u[..., : max(0, t + 1 - rule.window)].isnan().any(-1) for t in range(T)], -1)
            assert titled or torch.equal(fine[..., 0], ~older)  # from the moment it leaves the window
            continue
        assert fine.all()
        mix = torch.randn(fast.shape, dtype=torch.double, generator=g)
        for a, b in zip(*(torch.autograd.grad((y * mix).sum(), inputs) for y in (plain, fast)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(12))
def test_sparsek_attention_is_its_definition_with_equal_scores(seed):
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    B, H, T, D = pick(1, 3), pick(1, 3), pick(1, 70), pick(1, 9)
    k = pick(1, 6)
    rule = Selection(k, k + pick(1, 12), pick(1, 9), pick(1, 20))
    q, key, v = torch.randn(3, B, H, T, D, dtype=torch.double, generator=g)
    u = torch.randn(7, dtype=torch.double, generator=g)[torch.randint(7, (B, H, T), generator=g)]  # seven different scores
    titles = (torch.rand(B, T, generator=g) < 0.08).cumsum(1) if seed % 2 else None
    same = torch.ones(B, T, T, dtype=torch.bool) if titles is None else titles[:, :, None] == titles[:, None, :]
    tensors = [x.requires_grad_() for x in (q, key, v, u)]
    gate = torch.stack([sparsek_gates(u[:, h], same, rule.k, rule.candidates, rule.window)[0] for h in range(H)], 1)
    weight = gate * (q @ key.transpose(-1, -2) / D**0.5).exp()
    wanted = weight @ v / weight.sum(-1, keepdim=True)
    fast, sure = sparsek_fast(*tensors, rule, titles)
    mix = torch.randn(wanted.shape, dtype=torch.double, generator=g)
    truth = torch.autograd.grad((wanted * mix).sum(), tensors)
    for found in (sparsek_plain(*tensors, rule, titles), fast):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
        for ours, theirs in zip(torch.autograd.grad((found * mix).sum(), tensors), truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert certificate(u.detach(), same, rule) == pytest.approx(float(sure), abs=1e-6)


def certificate(u: Tensor, same: Tensor, rule: Selection) -> float:
    """Of the queries with more older tokens than may compete, the share whose threshold is that of all their older tokens."""
    T = u.shape[-1]
    age = torch.arange(T)[:, None] - torch.arange(T)
    older = (same & (age >= rule.window))[:, None].expand(-1, u.shape[1], -1, -1)
    z = u[:, :, None, :].expand(older.shape)
    best = z.masked_fill(~older, -math.inf).topk(min(rule.candidates, T), -1).values
    some, whole = sparsek_threshold(best, best > -math.inf, rule.k), sparsek_threshold(z, older, rule.k)
    crowded = older.sum(-1) > rule.candidates
    right = ((some - whole).abs() < 1e-8)[..., 0]
    return float(right[crowded].double().mean()) if crowded.any() else 1.0


@pytest.mark.parametrize("d", [1e-1, 1e-4, 1e-8])
def test_an_overtaken_token_leaves_with_a_jump(d):
    """As chapter 12 says: with k places, the k-th best has a gate of at least 1 / (C - k + 1), and at a swap the next one has the same."""
    rule, v = Selection(1, 4, 1, 4), torch.tensor([1.0, -1.0, 0.0], dtype=torch.double).view(1, 1, 3, 1)
    q, found = torch.zeros_like(v), []
    for sign in (1, -1):
        u = torch.tensor([[[0.5 + sign * d, 0.5 - sign * d, 0.0]]], dtype=torch.double)
        cached = SparseKCache(1, 1, 1, rule, dtype=torch.double).extend(q, q, v, u, torch.zeros(1, 3, dtype=torch.long))
        found.append(torch.stack([sparsek_plain(q, q, v, u, rule), sparsek_fast(q, q, v, u, rule)[0], cached])[..., 2, 0].flatten())
    gate = 0.5 + d
    torch.testing.assert_close(found[0] - found[1], torch.full((3,), 2 * gate / (1 + gate), dtype=torch.double))
    for seed, (k, C) in itertools.product(range(20), ((1, 4), (3, 9), (5, 6))):
        z = torch.randn(C, dtype=torch.double, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values
        assert sparsek(z, k)[k - 1] >= 1 / (C - k + 1) - 1e-12
        z[k] = z[k - 1]  # about to be overtaken
        assert sparsek(z, k)[k - 1] == sparsek(z, k)[k] > 0.99 / (C - k + 1)


# --- sparse attention: the paper's sets, and DeepSpeed's layouts ---

SHAPES = [(1, 1, 1), (2, 1, 2), (4, 1, 1), (4, 2, 2), (5, 1, 3), (6, 2, 1), (7, 3, 2), (8, 2, 4), (8, 8, 1)]  # l, c, num_verts


def mask_of(cfg: SparseAttnConfig, T: int) -> list[list[set[int]]]:
    """Per head and query, the keys that `sparse_mask` allows."""
    at = torch.arange(T)
    return [[set(row.nonzero().flatten().tolist()) for row in head] for head in sparse_mask(cfg, at, at)]


@pytest.mark.parametrize(("l", "c", "verts"), SHAPES)
def test_merged_heads_attend_to_the_papers_union(l, c, verts):  # noqa: E741
    """As printed: for `strided`, the key i - l that the window leaves out belongs to the other set."""
    for kind in ("strided", "fixed"):
        cfg = SparseAttnConfig(n_head=5, attn_type=kind, merged=True, local_attn_ctx=l, vertsize=c, num_verts=verts)
        for h, head in enumerate(mask_of(cfg, 4 * l + 3)):
            for i, keys in enumerate(head):
                assert keys == set.union(*paper_sets(kind, i, l, c, h % verts if kind == "fixed" else 0)), (kind, h, i)


@pytest.mark.parametrize(("l", "c", "verts"), SHAPES)
def test_separate_heads_attend_to_one_of_the_papers_sets(l, c, verts):  # noqa: E741
    """Two changes, both the chapter's: a window holds l keys where the paper's A_i^(1) has l + 1, and a summary head sees the
    summaries of earlier blocks and itself, where the paper's A_i^(2) has those of its own block too and not itself."""
    for kind in ("strided", "fixed"):
        cfg = SparseAttnConfig(n_head=8, attn_type=kind, local_attn_ctx=l, vertsize=c, num_verts=verts)
        for h, head in enumerate(mask_of(cfg, 4 * l + 3)):
            for i, keys in enumerate(head):
                near, far = paper_sets(kind, i, l, c, h // 2 % verts if kind == "fixed" else 0)
                if kind == "strided":
                    assert keys == (far if h % 2 else near - {i - l}), (kind, h, i)
                else:
                    assert keys == ({j for j in far if j // l < i // l} | {i} if h % 2 else near), (kind, h, i)
    local = SparseAttnConfig(n_head=2, attn_type="local", local_attn_ctx=l)
    assert all(keys == paper_sets("strided", i, l)[0] - {i - l} for head in mask_of(local, 3 * l) for i, keys in enumerate(head))


LAYOUTS = [(1, 4, 1, 4), (2, 4, 1, 3), (2, 4, 2, 2), (3, 2, 1, 1), (4, 6, 3, 2), (1, 1, 1, 1)]


@pytest.mark.parametrize(("block", "local", "few", "patterns"), LAYOUTS)
def test_merged_fixed_is_deepspeeds_fixed_layout(block, local, few, patterns):
    """`FixedSparsityConfig(block, num_local_blocks, num_global_blocks, num_different_global_patterns, attention="unidirectional")`:

    windows of num_local_blocks blocks, each seen causally from within; the num_global_blocks that represent a window are its last
    ones in pattern 0, those before in pattern 1, ..., seen by all that comes later; head h has pattern h mod the number of patterns.
    """
    heads, windows = 5, 3
    n = local * windows
    cfg = SparseAttnConfig(n_head=heads, attn_type="fixed", merged=True, local_attn_ctx=local * block, vertsize=few * block,
                           num_verts=patterns)
    for h, head in enumerate(mask_of(cfg, n * block)):
        first = local - (1 + h % patterns) * few
        layout = {(r, c) for r in range(n) for c in range(n) if r // local == c // local and c <= r}
        layout |= {(r, c) for r in range(n) for c in range(r) if first <= c % local < first + few}
        for i, keys in enumerate(head):
            assert keys == {j for j in range(i + 1) if (i // block, j // block) in layout}, (h, i)


def test_a_mask_of_some_rows_is_those_rows():
    """Queries that continue a text, as from a cache."""
    at = torch.arange(29)
    for kind, merged in [("all", False), ("local", False), ("strided", True), ("strided", False), ("fixed", True), ("fixed", False)]:
        cfg = SparseAttnConfig(n_head=4, attn_type=kind, merged=merged, local_attn_ctx=6, vertsize=2, num_verts=2)
        assert torch.equal(sparse_mask(cfg, at[11:17], at[:17]), sparse_mask(cfg, at, at)[:, 11:17, :17])


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize("kind", ["all", "local", "strided", "fixed"])
@pytest.mark.parametrize("T", [5, 8, 9])
def test_no_attention_minds_strides_or_length(T, kind, titled):
    """The CPU kernel takes a last stride of 1 for granted; RoPE makes others for heads of size 2, and padding keeps them."""
    for merged, order in itertools.product((False, True), ((0, 1, 4, 2, 3), (0, 1, 2, 4, 3))):  # heads innermost; numbers by column
        cfg = SparseAttnConfig(n_head=2, attn_type=kind, merged=merged, local_attn_ctx=4, sparseblocksize=2, vertsize=1, num_verts=1)
        sizes = dict(zip(order, (3, 2, 2, T, 2), strict=True))
        stored = torch.randn([sizes[d] for d in range(5)], generator=torch.Generator().manual_seed(0))
        titles = (torch.arange(T) > 2).long().expand(2, T) if titled else None
        for attend in (attend_blocks, attend_sparse, lambda q, k, v, *_: attend_fast(q, k, v)):
            found = [gradients_too(attend, x, cfg, titles) for x in (stored.permute(order), stored.permute(order).contiguous())]
            for ours, wanted in zip(*found, strict=True):
                torch.testing.assert_close(ours, wanted)


def gradients_too(attend, qkv: Tensor, cfg: SparseAttnConfig, titles: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of its sum, which come in with strides of 0."""
    inputs = [x.requires_grad_() for x in qkv.detach().unbind(0)]
    out = attend(*inputs, cfg, titles)
    return [out.detach(), *torch.autograd.grad(out.sum(), inputs)]


# --- evaluation: DESIGN 6 in thirty lines, on trained models ---


@torch.no_grad()
def honest(logits, tokens: list[int], context: int) -> float:
    """Summed nats: one unscored <eos> (id 1) first, then every token once, in windows of `context` tokens, the tail included."""
    total = 0.0
    for start in range(0, len(tokens), context):
        scored = tokens[start : start + context]
        seen = [1, *tokens][start : start + len(scored)]
        z = logits(torch.tensor([seen]))[0].double()
        total += sum(float(row.exp().sum().log() - row[token]) for row, token in zip(z - z.max(), scored, strict=True))
    return total


@torch.no_grad()
def challenge(logits, tokens: list[int], context: int, batch: int) -> tuple[float, float]:
    """Summed nats and coverage of the challenge's evaluate(): whole batches only, each followed by one token that is skipped."""
    total, scored, span = 0.0, 0, batch * context + 1
    for start in range(0, len(tokens) - span + 1, span):
        piece = torch.tensor(tokens[start : start + span])
        z = logits(piece[:-1].view(batch, context)).double().log_softmax(-1)
        total -= float(z.gather(-1, piece[1:].view(batch, context, 1)).sum())
        scored += batch * context
    return total, scored / len(tokens)


RUNS = {
    "causal": ["hyperparams.title_mask=true", "model_configs.gpt.position=rope"],
    "bottleneck": ["attn_configs.causal.intermediate_dim=8", "hyperparams.ema=0.9"],
    "strided": ["attn_configs.sparse.attn_type=strided"],
    "fixed": ["attn_configs.sparse.attn_type=fixed", "attn_configs.sparse.merged=true", "hyperparams.title_mask=true"],
    "sparsek": ["model_configs.gpt.attention_layer=sparsek", "attn_configs.sparsek.n_head=2", "attn_configs.sparsek.k=3",
                "attn_configs.sparsek.window=4", "attn_configs.sparsek.chunk=8"],
    "unet": ["hyperparams.model_architecture=unet_gpt", "model_configs.unet_gpt.hidden_layer_list=[32,16,32]",
             "model_configs.unet_gpt.skip_connections=true", "model_configs.unet_gpt.d_model=24"],
}
SPARSE = ["model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.n_head=2", "attn_configs.sparse.local_attn_ctx=8",
          "attn_configs.sparse.sparseblocksize=4", "attn_configs.sparse.vertsize=2", "attn_configs.sparse.num_verts=1"]


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A trained run: its result, configuration, model, validation titles and their tokens, read without our stream."""
    name = request.param
    cfg = tiny("hyperparams.max_steps=30", "hyperparams.num_titles=600", "hyperparams.vocab_size=400",
               *(SPARSE if name in ("strided", "fixed") else []), *RUNS[name])
    folder = tmp_path_factory.mktemp("oracle") / name
    train(cfg, folder, progress=False)
    cfg, model, tokenizer = load_run(folder)
    titles = split_titles(load_titles(cfg), cfg)[1]
    tokens = [i for title in titles for i in (*tokenizer.encode(title), 1)]
    return name, json.loads((folder / "result.json").read_text()), cfg, model, titles, tokens


def test_evaluation_on_trained_runs(run):
    name, result, cfg, model, titles, tokens = run
    T, B = cfg.hyperparams.context_length, cfg.hyperparams.batch_size
    assert len(tokens) % T, "no tail to score"
    chars, n_bytes = len("<eos>".join(titles) + "<eos>"), len(("<eos>".join(titles) + "<eos>").encode())
    logits = lambda idx: model(idx)[0]  # noqa: E731
    nats = honest(logits, tokens, T)
    ids = torch.tensor(tokens)
    for batch in (1, 5, B):
        found, (unfair, coverage) = evaluate(model, ids, titles, T, batch), challenge(logits, tokens, T, batch)
        assert found.nats_per_char == pytest.approx(nats / chars, rel=1e-6)
        assert found.nats_per_token == pytest.approx(nats / len(tokens), rel=1e-6)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
        assert (found.n_tokens, found.n_chars, found.n_bytes) == (len(tokens), chars, n_bytes)
        assert found.challenge_loss == pytest.approx(unfair / chars, rel=1e-6) and found.coverage == pytest.approx(coverage)
    assert result["val/loss"] == pytest.approx(nats / chars, rel=1e-6)
    assert result["val/challenge_loss"] == pytest.approx(unfair / chars, rel=1e-6)
    assert result["val/coverage"] == pytest.approx(coverage)


def test_trained_runs_say_what_the_independent_model_says(run):
    """The recorded loss again, from the weights alone, in float64."""
    name, result, cfg, model, titles, tokens = run
    oracle = Oracle(cfg, {key: w.double() for key, w in model.state_dict().items()})
    nats = honest(oracle.logits, tokens, cfg.hyperparams.context_length)
    near_ties = 1e-3 if name == "sparsek" else 1e-5  # float32 may choose another token where two scores are within rounding
    assert result["val/loss"] == pytest.approx(nats / len("<eos>".join(titles) + "<eos>"), rel=near_ties)


# --- Muon ---


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Jordan et al. 2024: X <- a X + (b A + c A A) X with A = X X', from X = G / |G|."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


SHAPES_OF_MUON = [(24, 8), (8, 24), (16, 16), (24, 8)]


def muon_setup(seed: int = 0):
    """Layers without biases, our optimizer over them, and a stream of gradients."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in SHAPES_OF_MUON)
    hp = load_config(overrides=["hyperparams.optimizer=muon", "hyperparams.lr=0.02", "hyperparams.weight_decay=0.3",
                                "hyperparams.muon_momentum=0.9"]).hyperparams
    return layers, build_optimizer(layers, hp), [[torch.randn(s) for s in SHAPES_OF_MUON] for _ in range(6)]


def test_muon_is_the_published_update():
    """B <- mu B + (1 - mu) G, the look ahead, Newton-Schulz, sqrt(max(1, n / m)), decoupled decay; ours iterates in bfloat16."""
    layers, optimizer, stream = muon_setup()
    momenta = [torch.zeros_like(p, dtype=torch.double) for p in layers.parameters()]
    for grads in stream:
        updates = []
        for p, g, momentum in zip(layers.parameters(), grads, momenta, strict=True):
            p.grad = g.clone()
            momentum.mul_(0.9).add_(0.1 * g.double())
            updates.append(0.02 * max(1, g.shape[0] / g.shape[1]) ** 0.5 * newton_schulz(0.9 * momentum + 0.1 * g.double()))
        before = [p.detach().double() for p in layers.parameters()]
        optimizer.step()
        for p, w, update in zip(layers.parameters(), before, updates, strict=True):
            assert (p.double() - (w * (1 - 0.02 * 0.3) - update)).norm() < 0.03 * update.norm()


def test_muon_is_torchs():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    layers, optimizer, stream = muon_setup()
    twin = nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in SHAPES_OF_MUON)
    twin.load_state_dict(layers.state_dict())
    theirs = torch.optim.Muon(twin.parameters(), lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=True, ns_steps=5)
    for grads in stream:
        for p, q, g in zip(layers.parameters(), twin.parameters(), grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        theirs.step()
        for p, q in zip(layers.parameters(), twin.parameters(), strict=True):
            assert (p - q).norm() < 0.01 * 0.02 * q.norm(), "more than rounding in bfloat16"


# --- schedules ---


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("total", [40, 100, 1000])
def test_schedules_are_transformers(total, warmup):
    """After the warm-up, step for step (1 - sqrt(x) turns a rounding of 1e-16 in x into 1e-8). In it, ours begins at 1 / (W + 1) and
    not at 0: it is theirs with a warm-up of W + 1, one step ahead."""
    transformers = pytest.importorskip("transformers")
    W, decay = round(warmup * total), 0.2

    def theirs(make, **settings) -> list[float]:
        schedule = make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **settings)
        return [schedule.lr_lambdas[0](step) for step in range(total + 1)]

    stable = dict(num_training_steps=total, num_decay_steps=round(decay * total))
    cases = {
        ("cosine", "sqrt"): (transformers.get_cosine_schedule_with_warmup, dict(num_training_steps=total)),
        ("linear", "sqrt"): (transformers.get_linear_schedule_with_warmup, dict(num_training_steps=total)),
        ("wsd", "linear"): (transformers.get_wsd_schedule, dict(stable, decay_type="linear")),
        ("wsd", "sqrt"): (transformers.get_wsd_schedule, dict(stable, decay_type="1-sqrt")),
    }
    for (name, shape), (make, settings) in cases.items():
        hp = load_config(overrides=[f"hyperparams.{s}" for s in (f"scheduler={name}", f"warmup={warmup}", f"decay={decay}",
                                                                f"decay_shape={shape}")]).hyperparams
        ours = [lr_factor(step, total, hp) for step in range(total + 1)]
        assert ours[W:] == pytest.approx(theirs(make, num_warmup_steps=W, **settings)[W:], abs=1e-7), name
        ahead = theirs(make, num_warmup_steps=W + 1, **settings)
        assert ours[:W] == pytest.approx(ahead[1 : W + 1], abs=1e-12), name
