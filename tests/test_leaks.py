"""Nothing leaks: no logit depends on a later token, nor, with the title mask, on another title; and the cache changes nothing.

The one place where this is proved. Every attention in the registry is tried, in both of its forms where it has two, with both kinds
of positions, with and without the title mask, over head counts, options, widths and lengths that divide nothing, in float32,
bfloat16 and under autocast. A leaky attention, kept here only, shows that the very same checks can fail.
"""
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mainrun_nb.models  # noqa: F401  registers every attention that ships
from mainrun_nb import attention, sparse_attention
from mainrun_nb.attention import Attention, CausalAttention, TokenInfo
from mainrun_nb.config import CausalAttnConfig, GPTConfig, RunError, load_config
from mainrun_nb.data import IGNORED, joined_chars, title_rows, token_stream
from mainrun_nb.evaluate import evaluate, validation_metrics
from mainrun_nb.gpt import GPT
from mainrun_nb.synthetic import floor_nats, sample_titles

CONTEXT, VOCAB, EOS = 61, 40, 1
SPARSE = dict(local_attn_ctx=8, sparseblocksize=4, vertsize=2, num_verts=1)
NARROW = SPARSE | dict(local_attn_ctx=4, sparseblocksize=2)  # more than eight blocks, so that a piece of `fixed` takes in several
SPARSEK = dict(k=3, candidates=9, window=4, chunk=5)
OPTIONS: dict[str, list[dict]] = {  # of each attention's own section
    "causal": [dict(n_head=1), dict(n_head=4), dict(n_head=6, intermediate_dim=12)],
    "sparse": [
        dict(attn_type="all", n_head=3), dict(SPARSE, attn_type="local", n_head=3), dict(SPARSE, attn_type="strided", n_head=2),
        dict(SPARSE, attn_type="strided", n_head=3, merged=True), dict(NARROW, attn_type="fixed", n_head=4, num_verts=2),
        dict(NARROW, attn_type="fixed", n_head=2, merged=True, vertsize=1), dict(SPARSE, attn_type="fixed", n_head=2, intermediate_dim=8),
    ],
    "sparsek": [
        dict(SPARSEK, n_head=1), dict(SPARSEK, n_head=4, epsilon=0.1), dict(n_head=6, k=6, candidates=40, window=9, chunk=8),
        dict(n_head=2, intermediate_dim=8, k=1, candidates=2, window=1, chunk=16),
    ],
}
CASES = [(name, i) for name in attention.ATTENTIONS for i in range(len(OPTIONS.get(name, [{}])))]
FORMS = [(name, i, blocks) for name, i in CASES for blocks in ([False, True] if name == "sparse" else [False])]  # sparse attention has two
MODELS = [  # of the model around it; taken in turn
    dict(norm="rmsnorm", output_gate=True), dict(norm_type="post", activation_function="swiglu"), dict(bias=False, hidden_layer=48),
]
PRECISIONS = ["float32", "bfloat16", "autocast"]


def build(name: str, case: int, position: str = "learned", title_mask: bool = False, seed: int = 0, **more) -> GPT:
    """A small model with weights large enough that every dependence shows."""
    torch.manual_seed(seed)
    schema = attention.ATTENTIONS[name][1]
    shape = dict(d_model=24, hidden_layer=24, n_layer=2, dropout=0.0, attention_layer=name, position=position)
    shape |= MODELS[(case + seed) % len(MODELS)] | more
    model = GPT(GPTConfig(**shape), schema(**OPTIONS.get(name, [{}])[case]), VOCAB, CONTEXT, title_mask).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def rows(rng: random.Random, T: int, eos: float = 0.1) -> torch.Tensor:
    """A batch of token ids of an odd shape, (B, T), with `<eos>` here and there."""
    B = rng.randint(1, 3)
    idx = [[EOS if rng.random() < eos else rng.randrange(2, VOCAB) for _ in range(T)] for _ in range(B)]
    return torch.tensor(idx)


def lengths(rng: random.Random) -> list[int]:
    """A few lengths that divide nothing, and the longest there is."""
    return [1, 2, rng.choice([7, 11, 13, 17]), rng.choice([23, 29, 37, 43]), CONTEXT]


@torch.no_grad()
def no_future(model: GPT, idx: torch.Tensor, times: list[int]) -> None:
    """Fail if a logit before t changes, by a single bit, when everything from t on is replaced."""
    logits = model(idx)[0]
    assert logits.isfinite().all()
    for t in times:
        other = idx.clone()
        other[:, t:] = 2 + (other[:, t:] + torch.randint_like(other[:, t:], 1, VOCAB - 2)) % (VOCAB - 2)
        assert torch.equal(model(other)[0][:, :t], logits[:, :t]), f"a logit before {t} of {idx.shape[1]} changed"


@torch.no_grad()
def own_title_only(model: GPT, idx: torch.Tensor) -> None:
    """Fail if a logit changes when tokens of another title change."""
    logits = model(idx)[0]
    numbers = (idx == EOS).cumsum(1)
    for n in range(int(numbers.max()) + 1):
        other = torch.where((numbers == n) & (idx != EOS), 2 + (idx + 5) % (VOCAB - 2), idx)
        changed = model(other)[0]
        assert torch.equal(changed[numbers != n], logits[numbers != n]), f"title {n} is seen from another"


def no_gradient(model: GPT, titles: torch.Tensor | None, T: int, i: int) -> None:
    """Fail if the gradient of hidden state i is anything but exactly zero for a later embedding, or for another title's."""
    x = torch.randn(2, T, model.widths()[0], requires_grad=True)
    y = model.run_blocks(x, TokenInfo(torch.arange(T), titles), None)
    (dx,) = torch.autograd.grad(y[:, i].square().sum(), x)
    assert dx[:, i].abs().sum() > 0, "nothing reaches the output at all"
    assert not dx[:, i + 1 :].any(), f"output {i} depends on later inputs"
    assert titles is None or not dx[titles != titles[:, i : i + 1]].any(), f"output {i} depends on another title"


@torch.no_grad()
def cache_changes_nothing(model: GPT, idx: torch.Tensor, rng: random.Random) -> None:
    """Fail if feeding a text in pieces gives other hidden states than feeding it whole."""
    T, cache, parts, at = idx.shape[1], model.make_cache(len(idx)), [], 0
    while at < T:
        n = min(rng.choice([1, 1, 2, 5, 19]), T - at)
        parts.append(model.features(idx[:, at : at + n], cache))
        at += n
    whole = model.features(idx)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


@pytest.fixture
def blocks(request, monkeypatch):
    """Sparse attention by blocks beyond the fourth token, where for short rows it prefers one dense masked call."""
    if request.param:
        monkeypatch.setattr(sparse_attention, "SHORT", 4)


every_form = pytest.mark.parametrize(("name", "case", "blocks"), FORMS, indirect=["blocks"])
every_position = pytest.mark.parametrize("position", ["learned", "rope"])
every_mask = pytest.mark.parametrize("title_mask", [False, True], ids=["rows", "titles"])


@every_form
@every_position
@every_mask
def test_no_logit_changes_when_a_later_token_or_another_title_does(name, case, blocks, position, title_mask):
    rng = random.Random(f"{name}{case}")
    for seed, precision in enumerate(PRECISIONS):
        model = build(name, case, position, title_mask, seed)
        model = model.bfloat16() if precision == "bfloat16" else model
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
            for T in lengths(rng)[3 if seed else 0 : 4 if seed else 5]:
                no_future(model, rows(rng, T), rng.sample(range(T), min(T, 4)))
            if title_mask:
                own_title_only(model, rows(rng, rng.choice([13, 37, CONTEXT]), eos=0.15))


@every_form
@every_position
@every_mask
def test_gradients_of_the_future_and_of_other_titles_are_exactly_zero(name, case, blocks, position, title_mask):
    rng = random.Random(f"{name}{case}")
    model = build(name, case, position, title_mask)
    for T in lengths(rng)[2:]:
        titles = (torch.rand(2, T) < 0.1).long().cumsum(1) if title_mask else None
        for i in {0, T // 2, rng.randrange(T)}:
            no_gradient(model, titles, T, i)


@every_form
@every_position
@every_mask
def test_the_cache_changes_nothing(name, case, blocks, position, title_mask):
    rng = random.Random(f"{name}{case}")
    model = build(name, case, position, title_mask)
    for T in lengths(rng)[1::2]:
        cache_changes_nothing(model, rows(rng, T), rng)


@torch.no_grad()
def padding_is_not_seen(model: GPT, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fail if what fills up a row changes a hidden state that counts, or the loss, by a single bit."""
    counted, seen = y != IGNORED, model.features(x)
    for filling in (EOS, 2, VOCAB - 1):
        other = torch.where(counted, x, filling)
        assert torch.equal(model.features(other)[counted], seen[counted]), "a title sees what fills up its row"
        assert torch.equal(model(other, y)[1], model(x, y)[1])


def padding_gets_no_gradient(model: GPT, x: torch.Tensor, y: torch.Tensor) -> None:
    """Fail if the loss depends on the input where nothing is counted."""
    vectors = []
    model.embed.tokens.register_forward_hook(lambda module, inputs, out: vectors.append(out.requires_grad_()) or out.retain_grad())
    model(x, y)[1].backward()
    gradient = vectors[0].grad.abs().sum(-1)
    assert (gradient[y == IGNORED] == 0).all() and (gradient[y != IGNORED] > 0).any()


@every_form
@every_position
def test_rows_of_whole_titles_see_neither_each_other_nor_what_fills_them_up(name, case, blocks, position):
    rng = random.Random(f"{name}{case}")
    model = build(name, case, position, title_mask=True)
    titles = [[*(rng.randrange(2, VOCAB) for _ in range(rng.choice([0, 1, 5, 17, 30]))), EOS] for _ in range(12)]
    x, y = title_rows(torch.tensor([i for title in titles for i in title]), CONTEXT)
    assert (y == IGNORED).any() and (x == EOS).sum() == len(titles)
    padding_is_not_seen(model, x, y)
    padding_gets_no_gradient(model, x, y)
    own_title_only(model, x)
    if position == "rope":  # where a title stands in its row is no matter
        alone = torch.tensor([[EOS, *max(titles, key=len)[:-1]]])
        row = next(r for r in range(len(x)) if alone[0].tolist() in [x[r, i : i + alone.shape[1]].tolist() for i in range(CONTEXT)])
        at = next(i for i in range(CONTEXT) if x[row, i : i + alone.shape[1]].tolist() == alone[0].tolist())
        with torch.no_grad():
            whole, own = model.features(x[row : row + 1])[:, at : at + alone.shape[1]], model.features(alone)
        if name == "causal":  # the patterns of the others depend on the place in the row
            torch.testing.assert_close(whole, own, rtol=1e-3, atol=1e-4 * own.abs().max().item())


def test_every_attention_of_the_registry_has_its_options_here():
    assert set(OPTIONS) == {"causal", "sparse", "sparsek"} <= set(attention.ATTENTIONS)


# --- the checks can fail ---


class Leaky(Attention):
    """Sees the next token, very faintly."""

    share = 1e-4
    make_cache = CausalAttention.make_cache

    def attend(self, q, k, v, info, cache, x):
        if cache is not None:
            k, v, _ = cache.append(k, v, info.titles)
        ahead = F.pad(v, (0, 0, 0, 1))[:, :, 1:][:, :, -q.shape[2] :]
        return F.scaled_dot_product_attention(q, k, v, is_causal=cache is None) + self.share * ahead


@pytest.fixture
def leaky(monkeypatch):
    """The leaky attention in the registry, for one test."""
    monkeypatch.setitem(attention.ATTENTIONS, "leaky", (Leaky, CausalAttnConfig))
    monkeypatch.setitem(OPTIONS, "leaky", [dict(n_head=2)])


def test_a_faint_leak_is_caught_by_every_check(leaky, monkeypatch):
    rng, idx = random.Random(0), rows(random.Random(0), 23, eos=0.2)
    with pytest.raises(AssertionError, match="a logit before"):
        no_future(build("leaky", 0), idx, [5, 11])
    with pytest.raises(AssertionError, match="depends on later inputs"):
        no_gradient(build("leaky", 0), None, 23, 11)
    with pytest.raises(AssertionError, match="is seen from another"):
        own_title_only(build("leaky", 0, title_mask=True), idx)
    with pytest.raises(AssertionError, match="a title sees what fills up its row"):
        padding_is_not_seen(build("leaky", 0, title_mask=True), idx, torch.where(torch.arange(23) < 19, idx, IGNORED))
    with pytest.raises(AssertionError):
        cache_changes_nothing(build("leaky", 0), idx, rng)
    monkeypatch.setattr(Leaky, "share", 0.0)  # causal, but it knows nothing of titles
    with pytest.raises(AssertionError, match="depends on another title"):
        no_gradient(build("leaky", 0), torch.tensor([[0] * 11 + [1] * 12] * 2), 23, 15)


class Bytes:
    """Three special tokens, then one per byte."""

    vocab_size, eos_id = 259, EOS

    def encode_titles(self, titles):
        import numpy as np

        return np.concatenate([np.append(np.frombuffer(t.encode(), np.uint8).astype(np.int32) + 3, EOS) for t in titles])


@pytest.mark.parametrize("name", ["leaky", "causal"])
def test_a_trained_leak_falls_through_the_floor(name, leaky, monkeypatch):
    monkeypatch.setattr(Leaky, "share", 1.0)
    train, val = sample_titles(400, seed=1), sample_titles(60, seed=2)
    ids, val_ids = (token_stream(titles, Bytes()) for titles in (train, val))
    small = ["d_model=48", "hidden_layer=48", "n_layer=1", "dropout=0", "init_method=xavier"]
    cfg = load_config(overrides=["data.source=synthetic", "hyperparams.context_length=64", "hyperparams.batch_size=4",
                                 *(f"model_configs.gpt.{s}" for s in small)])
    torch.manual_seed(0)
    model = GPT(replace(cfg.model_configs.gpt, attention_layer=name), CausalAttnConfig(n_head=2), Bytes.vocab_size, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        at = step * 8 * 64 % (len(ids) - 8 * 64 - 1)
        batch = ids[at : at + 8 * 64 + 1]
        _, loss = model(batch[:-1].view(8, 64), batch[1:].view(8, 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if name == "leaky":
        with pytest.raises(RunError, match="leak"):
            validation_metrics(model, val_ids, val, cfg)
        assert evaluate(model, val_ids, val, 64, 4).total_nats < 0.8 * floor_nats(val)
    else:
        metrics = validation_metrics(model, val_ids, val, cfg)
        assert metrics["val/loss"] > metrics["val/floor"] == pytest.approx(floor_nats(val) / joined_chars(val))
