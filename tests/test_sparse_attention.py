"""Sparse attention over many shapes: fast against plain, refusals, engines, precision. Leaks and the cache are in test_leaks.py."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mainrun_nb.sparse_attention as S
from mainrun_nb.attention import AttnCommon, CausalAttention, TokenInfo, build_attention
from mainrun_nb.config import CausalAttnConfig, InputError, SparseAttnConfig, load_config
from mainrun_nb.sparse_attention import (
    SHORT,
    SparseAttention,
    attend_blocks,
    attend_masked,
    attend_sparse,
    block_sparse_pieces,
    check_sparse,
    count_pairs,
    dense_pieces,
    sparse_mask,
)

PATTERNS = [
    dict(attn_type="local"),
    dict(attn_type="strided"),
    dict(attn_type="strided", merged=True),
    dict(attn_type="fixed", vertsize=1, num_verts=1),
    dict(attn_type="fixed", vertsize=2, num_verts=2),
    dict(attn_type="fixed", vertsize=3, num_verts=1, merged=True),
    dict(attn_type="fixed", vertsize=1, num_verts=3, merged=True),
]
IDS = ["-".join(str(v) for v in p.values()) for p in PATTERNS]


def settings(pattern: dict, n_head: int = 4, span: int = 6, tile: int = 3) -> SparseAttnConfig:
    return SparseAttnConfig(**{"n_head": n_head, "local_attn_ctx": span, "sparseblocksize": tile, "num_verts": 1, "vertsize": 1} | pattern)


def random_titles(B: int, T: int) -> torch.Tensor:
    return (torch.rand(B, T) < 0.15).cumsum(1)


def gap(fast, plain, *inputs: torch.Tensor) -> float:
    "The largest difference between two functions, over the output and all gradients."
    inputs = [x.detach().requires_grad_() for x in inputs]
    g = torch.randn_like(inputs[0])
    results = [(y := f(*inputs), *torch.autograd.grad(y, inputs, g)) for f in (fast, plain)]
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_fast_equals_plain(pattern):
    "Outputs and gradients to 1e-5 on lengths, batches, heads and tiles that are multiples of nothing, with and without titles."
    torch.manual_seed(0)
    for (span, tile), T, (B, D) in itertools.product([(3, 3), (6, 3), (12, 4)], [1, 5, 12, 31, 67], [(1, 5), (3, 8)]):
        cfg = settings(pattern, n_head=6 if pattern.get("num_verts") == 3 else 4, span=span, tile=tile)
        if any(S.broken_rules(cfg, 100).values()):
            continue
        qkv = [torch.randn(B, cfg.n_head, T, D) for _ in range(3)]
        for titles in (None, random_titles(B, T)):
            found = gap(lambda *x: attend_blocks(*x, cfg, titles), lambda *x: attend_masked(*x, cfg, titles), *qkv)  # noqa: B023
            assert found < 1e-5, (span, tile, T, B, titles is not None, found)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_every_route_of_attend_sparse_is_the_pattern(pattern):
    "Short rows (one masked call), large batches (blocks although short) and long rows, all against the definition."
    torch.manual_seed(0)
    cfg = settings(pattern, n_head=6, span=16, tile=8)
    for B, T in [(1, 60), (2, SHORT), (24, 130), (1, SHORT + 3)]:
        qkv = [torch.randn(B, 6, T, 4) for _ in range(3)]
        for titles in (None, random_titles(B, T)):
            found = gap(lambda *x: attend_sparse(*x, cfg, titles), lambda *x: attend_masked(*x, cfg, titles), *qkv)  # noqa: B023
            assert found < 1e-5, (B, T, titles is not None, found)
    assert S.blocks_pay(cfg, (24, 6, 130, 4), "cpu") and not S.blocks_pay(cfg, (1, 6, 60, 4), "cpu")


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_the_portable_engine_is_the_same_function(pattern, monkeypatch):
    "Without the CPU's kernel (another device, another version of torch) the results do not change."
    monkeypatch.setattr(S, "has_flash", lambda device: False)
    torch.manual_seed(0)
    cfg, qkv = settings(pattern), [torch.randn(2, 4, 31, 5) for _ in range(3)]
    for titles in (None, random_titles(2, 31)):
        assert gap(lambda *x: attend_blocks(*x, cfg, titles), lambda *x: attend_masked(*x, cfg, titles), *qkv) < 1e-5  # noqa: B023


@pytest.mark.parametrize("fn", [attend_blocks, attend_sparse], ids=["blocks", "short"])
def test_gradients_whatever_the_strides(fn):
    "An expanded gradient (of a plain sum) and inputs whose channels are not adjacent."
    torch.manual_seed(0)
    cfg, titles = settings(PATTERNS[4]), random_titles(2, 25)
    for layout in [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT]:
        q, k, v = (layout(torch.randn(2, 4, 25, 8)).requires_grad_() for _ in range(3))
        fast = torch.autograd.grad(fn(q, k, v, cfg, titles).sum(), (q, k, v))
        plain = torch.autograd.grad(attend_masked(q, k, v, cfg, titles).sum(), (q, k, v))
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_bfloat16_is_close_to_float32(pattern):
    torch.manual_seed(0)
    cfg, titles = settings(pattern), random_titles(2, 41)
    qkv = [torch.randn(2, 4, 41, 8) for _ in range(3)]
    for fn in (attend_blocks, attend_sparse):
        for numbers in (None, titles):
            y = fn(*(x.bfloat16() for x in qkv), cfg, numbers)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), fn(*qkv, cfg, numbers), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_pieces_tile_the_mask(pattern):
    "Seen as lists of pairs, the pieces are the mask, without repetition; also as one piece per set of heads."
    cfg, T = settings(pattern, n_head=6), 42
    at = torch.arange(T)
    number = at.view(1, 1, T, 1).expand(1, 6, T, 1)
    want = sparse_mask(cfg, at, at)
    sources = {"text": number, "self": number, "summary": S.summary_of(number, cfg)}
    for pieces in (block_sparse_pieces(cfg, T), dense_pieces(cfg, want)):
        count = torch.zeros_like(want, dtype=torch.int)
        for p in pieces:
            rows = p.rows(number[:, p.heads])
            cols = rows if p.source == "self" else p.cols(sources[p.source][:, p.heads]).mT
            on = torch.ones_like(rows * cols, dtype=torch.bool) if p.mask is None else p.mask.expand((rows * cols).shape)
            on = on.tril() if p.causal else on
            heads = torch.arange(6)[p.heads].view(-1, 1, 1)
            count.index_put_([x.expand(on.shape)[on] for x in (heads, rows, cols)], torch.tensor(1, dtype=torch.int), accumulate=True)
        assert torch.equal(count, want.int())
    assert count_pairs(cfg, T) == pytest.approx(want.sum().item() / 6)


@pytest.mark.parametrize("span", [3, 5, 8])
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p["attn_type"] != "local"], ids=[n for n in IDS if n != "local"])
def test_two_layers_connect_every_earlier_pair(pattern, span):
    pattern = pattern | ({"vertsize": 1} if span < 4 else {})
    cfg = settings(pattern, n_head=6, span=span, tile=1)
    check_sparse(cfg, 41)
    at = torch.arange(41)
    step = sparse_mask(cfg, at, at)
    if cfg.merged and cfg.num_verts == 1:
        step = step[:1]  # a merged head does it alone
    step = step.any(0).float()
    assert torch.equal(step @ step > 0, torch.ones(41, 41).tril().bool())


# ---- the layer ----


def build(pattern: dict, context: int = 300, n_head: int = 4, **common) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = settings(pattern, n_head=n_head)
    return build_attention("sparse", 8 * n_head, cfg, AttnCommon(context, **common))


def test_the_layer_built_is_the_one_asked_for():
    layer = build(PATTERNS[1])
    assert type(layer) is SparseAttention
    assert type(build_attention("causal", 32, CausalAttnConfig(n_head=4), AttnCommon(8))) is CausalAttention
    assert not any("bias" in name for name in layer.state_dict() if "." not in name)


def test_all_is_causal_attention():
    layer = build(dict(attn_type="all"), context=50)
    dense = build_attention("causal", 32, CausalAttnConfig(n_head=4), AttnCommon(50))
    dense.load_state_dict(layer.state_dict())
    x, info = torch.randn(2, 50, 32), TokenInfo(torch.arange(50), random_titles(2, 50))
    torch.testing.assert_close(layer(x, info), dense(x, info))
    q, k, v = (torch.randn(2, 4, 50, 8) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend_sparse(q, k, v, layer.cfg), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("T", [40, SHORT + 20])
def test_dropout_drops_in_training_only(T):
    "Dropout changes the output in training, never in evaluation; two draws differ; the mean over draws is the undropped output."
    layer = build(PATTERNS[5], dropout=0.3)
    x, info = torch.randn(1, T, 32), TokenInfo(torch.arange(T))
    layer.eval()
    still = layer(x, info)
    assert torch.equal(still, layer(x, info))
    layer.train()
    with torch.no_grad():
        draws = torch.stack([layer(x, info) for _ in range(100)])
    assert not torch.equal(draws[0], draws[1])
    error = (draws.mean(0) - still).abs() / (draws.std(0) / 10 + 1e-6)
    assert error.mean() < 1.5


def test_autocast_keeps_training_finite_and_in_bfloat16():
    layer = build(PATTERNS[4], n_head=4)
    x = torch.randn(2, SHORT + 30, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, TokenInfo(torch.arange(SHORT + 30)))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert torch.isfinite(x.grad).all() and layer.qkv.weight.grad.dtype == torch.float32


# ---- refusals ----

REFUSED = [
    (dict(vertsize=128), "vertsize: 128 summary columns do not fit into a block of local_attn_ctx 32"),
    (dict(vertsize=8, num_verts=8, n_head=16), "num_verts: 8 sets of vertsize 8 are 64 columns"),
    (dict(num_verts=16, vertsize=1), "num_verts: 16 sets cannot be dealt to the 4 heads"),
    (dict(num_verts=16, vertsize=1, merged=True), "num_verts: 16 sets cannot be dealt to the 8 heads"),
    (dict(sparseblocksize=128), "sparseblocksize: tiles of 128 do not divide local_attn_ctx 32"),
    (dict(sparseblocksize=24), "sparseblocksize: tiles of 24"),
    (dict(local_attn_ctx=512), "local_attn_ctx: 512 is more than the context of 256"),
    (dict(n_head=7), "n_head: separate heads alternate between two patterns, 7 is odd"),
    (dict(n_head=1, attn_type="strided"), "n_head: separate heads"),
    (dict(n_bctx=2), "n_bctx: a context of 256 has 8 tiles"),
    (dict(n_bctx=0), "n_bctx"),
    (dict(attn_type="local", merged=True), "merged: attn_type 'local' is one pattern"),
]


@pytest.mark.parametrize("wrong,message", REFUSED, ids=[str(w) for w, _ in REFUSED])
def test_impossible_combinations_are_refused_by_the_rule_they_break(wrong, message):
    cfg = replace(SparseAttnConfig(), **wrong)
    with pytest.raises(InputError) as e:
        build_attention("sparse", cfg.n_head * 8, cfg, AttnCommon(256))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_possible_combinations_are_not_refused():
    for kind in ("all", "local", "strided", "fixed"):
        check_sparse(load_config(overrides=[f"attn_configs.sparse.attn_type={kind}"]).attn_configs.sparse, 128)
    check_sparse(SparseAttnConfig(n_head=7, attn_type="local", vertsize=128), 256)  # no heads to alternate, no summaries
    check_sparse(SparseAttnConfig(n_head=3, merged=True, num_verts=3, n_bctx=5), 130)


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_no_table_is_ever_built(pattern):
    "No tensor alive during forward and backward is as large as one T x T table of one head."
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    T = 2048
    cfg = settings(pattern, n_head=6, span=48, tile=24)
    q, k, v = (torch.randn(1, 6, T, 4, requires_grad=True) for _ in range(3))
    with Watch():
        attend_sparse(q, k, v, cfg).sum().backward()
    assert largest < T * T * 4 / 8
