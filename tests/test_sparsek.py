"""SparseK: the operator by a solver, fast against plain over many shapes. Leaks and the cache are in test_leaks.py."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from mainrun_nb import sparsek_stream
from mainrun_nb.attention import AttnCommon, TokenInfo, build_attention
from mainrun_nb.config import InputError, SparseKAttnConfig, load_config
from mainrun_nb.models import build_model
from mainrun_nb.sparsek import PlainSparseK, Selection, ages, competitors, sparsek, sparsek_plain, sparsek_tau
from mainrun_nb.sparsek_stream import Grid, Plan, SparseKAttention, SparseKCache, first_place, sparsek_fast

torch.set_num_threads(1)


def tensors(B: int, H: int, T: int, D: int = 8, spread: float = 1.0, ties: bool = False, dtype=torch.double, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, T, D, dtype=dtype, generator=g) for _ in range(3))
    u = torch.randn(B, H, T, dtype=dtype, generator=g) * spread
    return [x.requires_grad_() for x in (q, k, v, (u * 2).round() / 2 if ties else u)]


def some_titles(B: int, T: int, share: float = 0.06, seed: int = 1) -> Tensor:
    return (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share).long().cumsum(1)


def layer(context: int = 80, width: int = 24, position: str = "rope", gate: bool = False, drop: float = 0.0, **section) -> SparseKAttention:
    torch.manual_seed(0)
    cfg = SparseKAttnConfig(**(dict(n_head=2, k=3, candidates=9, window=5, chunk=8) | section))
    return build_attention("sparsek", width, cfg, AttnCommon(context, dropout=drop, position=position, output_gate=gate))


# --- the operator ---


def test_operator_is_the_quadratic_program():
    optimize = pytest.importorskip("scipy.optimize")
    for seed, k in itertools.product(range(6), (1, 2, 4)):
        z = torch.randn(7, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) * (seed + 0.3)
        target = z.numpy()
        best = optimize.minimize(
            lambda p, target=target: ((p - target) ** 2).sum(),
            [k / 7] * 7,
            jac=lambda p, target=target: 2 * (p - target),
            bounds=[(0, 1)] * 7,
            constraints={"type": "eq", "fun": lambda p, k=k: p.sum() - k, "jac": lambda p: [1.0] * 7},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert torch.allclose(sparsek(z, k), torch.tensor(best.x), atol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 17), (5, 1000)])
def test_operator_over_rows_of_any_shape(shape):
    z = torch.randn(shape, dtype=torch.double) * 2
    for k in (0, 1, shape[-1] // 2, shape[-1], shape[-1] + 3):
        p = sparsek(z, k)
        assert p.shape == z.shape and p.min() >= 0 and p.max() <= 1
        assert torch.allclose(p.sum(-1), torch.full(shape[:-1], float(min(k, shape[-1])), dtype=torch.double))
        assert torch.equal(p, torch.stack([sparsek(row, k) for row in z.view(-1, shape[-1])]).view(shape))  # rows do not mix


def test_threshold_is_exact_where_float32_sums_are_not():
    z = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + 1000).float()
    low, high = z.double().min() - 1, z.double().max()
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if (z.double() - mid).clamp(0, 1).sum() > 64 else (low, mid)
    assert abs(sparsek_tau(z, 64) - high) < 1e-9


def test_gradient_with_ties_and_absent_entries():
    z = torch.tensor([0.5, 0.5, 0.5, -torch.inf, 0.2, -torch.inf], dtype=torch.double, requires_grad=True)
    g = torch.tensor([1.0, 2.0, 6.0, 100.0, 3.0, 100.0], dtype=torch.double)
    (grad,) = torch.autograd.grad(sparsek(z, 2), z, g)
    assert torch.allclose(grad, torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0], dtype=torch.double))


# --- fast = plain ---

RULES = [Selection(4, 16, 8, 8), Selection(3, 4, 3, 16), Selection(2, 8, 21, 8), Selection(1, 1, 1, 1), Selection(8, 64, 5, 32)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 9, 33, 64, 83])
def test_fast_is_plain(rule, T):
    for H, titled, (spread, ties) in itertools.product((1, 3), (False, True), ((0.02, False), (1.0, True), (4.0, False))):
        inputs, titles = tensors(2, H, T, spread=spread, ties=ties), some_titles(2, T) if titled else None
        g = torch.randn(2, H, T, 8, dtype=torch.double)
        plain, fast = sparsek_plain(*inputs, rule, titles), sparsek_fast(*inputs, rule, titles)[0]
        assert torch.allclose(plain, fast, atol=1e-11)
        wanted, found = torch.autograd.grad(plain, inputs, g), torch.autograd.grad(fast, inputs, g)
        for a, b in zip(wanted, found, strict=True):
            assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("titled", [False, True])
def test_fast_is_plain_in_float32_over_many_blocks(titled):
    rule, inputs = Selection(16, 64, 32, 64), tensors(2, 4, 700, D=16, dtype=torch.float32)
    titles = some_titles(2, 700, 0.005) if titled else None
    assert len(Grid(rule, 2, 4, 700).blocks(torch.device("cpu"), 2**17)) > 1
    g = torch.randn(2, 4, 700, 16)
    plain, fast = sparsek_plain(*inputs, rule, titles), sparsek_fast(*inputs, rule, titles)[0]
    assert torch.allclose(plain, fast, atol=1e-5)
    for a, b in zip(torch.autograd.grad(plain, inputs, g), torch.autograd.grad(fast, inputs, g), strict=True):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("titled", [False, True])
@pytest.mark.parametrize("ways", [3, 16])
def test_the_wide_search_of_a_gpu_finds_the_same_thresholds(titled, ways, monkeypatch):
    rule, inputs = Selection(3, 9, 5, 8), tensors(2, 2, 150, ties=True)
    titles = some_titles(2, 150) if titled else None
    plan = lambda: Plan.of(inputs[3].detach(), titles, Grid(rule, 2, 2, 150)).choice  # noqa: E731
    narrow = plan()
    monkeypatch.setattr(sparsek_stream, "first_place", lambda fails, n, like, _: first_place(fails, n, like, ways))
    for name, a, b in zip(narrow._fields, narrow, plan(), strict=True):
        assert torch.equal(a, b), name


def test_chunk_changes_nothing():
    inputs = tensors(1, 2, 150)
    outs = [sparsek_fast(*inputs, Selection(4, 16, 8, chunk))[0] for chunk in (1, 7, 16, 64, 150, 400)]
    assert all(torch.allclose(outs[0], y, atol=1e-12) for y in outs[1:])


def test_a_short_text_is_dense_attention():
    rule = Selection(8, 32, 8, 8)
    for T, titles in ((16, None), (16, some_titles(2, 16, 0.2)), (17, None)):
        inputs = tensors(2, 2, T)
        out, sure = sparsek_fast(*inputs, rule, titles)
        assert torch.allclose(out, sparsek_plain(*inputs, rule, titles), atol=1e-12) and sure == 1
        assert torch.autograd.grad(out.sum(), inputs[3])[0].shape == (2, 2, T)


def test_threshold_rises_and_the_certificate_tells_the_truth():
    for spread in (0.05, 0.3, 1.0, 3.0):
        u, rule = tensors(2, 2, 200, spread=spread)[3].detach(), Selection(4, 16, 8, 16)
        choice = Plan.of(u, None, Grid(rule, 2, 2, 200)).choice
        tau, exact, crowded = (x.view(2, 2, -1)[..., :200] for x in (choice.pivot - choice.rest, choice.exact, choice.crowded))
        assert (tau.diff()[tau[..., :-1] > -torch.inf] >= -1e-9).all()
        z, rank = competitors(u, Selection(4, 200, 8))
        whole, left_out = sparsek_tau(z, 4), z.masked_fill(rank < 16, -torch.inf).amax(-1)
        assert torch.equal(crowded, left_out > -torch.inf)
        assert torch.equal(exact[crowded], (tau >= left_out)[crowded])
        assert torch.equal(exact[crowded], ((tau - whole).abs() < 1e-9)[crowded])
        share = sparsek_fast(*tensors(2, 2, 200)[:3], u, rule)[1]
        assert torch.isclose(share.double(), exact[crowded].double().mean())


def test_dropout_is_the_masks_own_gradient():
    rule, inputs = Selection(2, 6, 4, 4), tensors(1, 1, 15, D=3)

    def dropped(*x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return sparsek_fast(*x, rule, drop=0.4)[0]

    assert torch.autograd.gradcheck(dropped, inputs)
    sure = sparsek_fast(*inputs, rule)[0]
    torch.manual_seed(0)
    many = [x.detach().expand(4000, -1, -1, *x.shape[3:]) for x in inputs]
    mean = sparsek_fast(*many, rule, drop=0.3)[0].mean(0, keepdim=True)
    assert torch.allclose(mean, sure, atol=0.08) and not torch.allclose(dropped(*inputs), sure)


def test_runs_on_shapes_alone():
    """Nothing reads a value on the host: what memory prediction needs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        attn = build_attention("sparsek", 32, SparseKAttnConfig(n_head=2, k=4, window=8, chunk=16), AttnCommon(100, dropout=0.1))
        x = torch.randn(2, 100, 32, requires_grad=True)
        attn(x, TokenInfo(torch.arange(100), torch.zeros(2, 100, dtype=torch.long))).sum().backward()
        assert x.grad is not None and attn.score.weight.grad is not None


@pytest.mark.parametrize("titled", [False, True])
def test_the_rule_studied_beside_ours_is_its_definition(titled, benchmark):
    """benchmarks/sparsek.py: weights times gates, for every candidate whose gate is above zero."""
    study = benchmark("sparsek")
    k, C, w, T = 2, 7, 4, 50
    titles, rule = some_titles(2, T, 0.04) if titled else None, Selection(C, C, w, 8)
    for seed, spread in enumerate((0.3, 1.0, 4.0)):
        q, key, v, u = tensors(2, 2, T, spread=spread, seed=seed)
        with study.all_above_zero(k):
            found = sparsek_fast(q, key, v, u, rule, titles)[0]
        z, _ = competitors(u, Selection(k, C, w), titles)
        age, same = ages(T, titles)
        gate = torch.where(same & (age >= 0) & (age < w), 1.0, sparsek(z, k))
        weight = gate * (q @ key.transpose(-1, -2) / 8**0.5).exp()
        wanted = weight @ v / weight.sum(-1, keepdim=True)
        assert torch.allclose(found, wanted, atol=1e-11)
        mix = torch.randn_like(wanted)
        for a, b in zip(*(torch.autograd.grad((y * mix).sum(), (q, key, v, u)) for y in (found, wanted)), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


# --- the layer ---


def test_the_layer_is_the_plain_one_computed_fast():
    attn = layer(drop=0.1).eval()
    plain = PlainSparseK(24, attn.cfg, attn.common).eval()
    plain.load_state_dict(attn.state_dict())
    x, info = torch.randn(2, 80, 24), TokenInfo(torch.arange(80), some_titles(2, 80))
    torch.testing.assert_close(attn(x, info), plain(x, info), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="PlainSparseK keeps no cache"):
        plain.make_cache(2)
    with pytest.raises(NotImplementedError):
        plain(x, info, attn.make_cache(2))


def test_scripts_find_what_was_in_one_module():
    from mainrun_nb import sparsek as old

    assert (old.SparseKAttention, old.SparseKCache, old.sparsek_fast) == (SparseKAttention, SparseKCache, sparsek_fast)
    with pytest.raises(AttributeError, match="no attribute 'sparsek_slow'"):
        _ = old.sparsek_slow


def test_scorer_learns_in_bf16_too():
    for amp in (False, True):
        attn = layer()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            y = attn(torch.randn(2, 80, 24), TokenInfo(torch.arange(80)))
        y.float().square().sum().backward()
        assert attn.score.weight.grad.abs().max() > 1e-4 and attn.sharpness.grad.abs().min() > 0
        assert 0 <= attn.certificate <= 1


def test_position_slope_prefers_later_tokens():
    same = torch.ones(1, 60, 24)
    attn = layer(epsilon=1e-3, position="learned")
    with torch.no_grad():
        u = attn.cfg.epsilon * torch.arange(60.0)[None, None]
        z, rank = competitors(u, attn.rule)
        assert (rank[0, 0, 59, 52:55] < 3).all()  # the last three that left the window
        assert torch.isfinite(attn(same, TokenInfo(torch.arange(60)))).all()


@pytest.mark.parametrize(
    "section, words",
    [
        (dict(candidates=2), "at least k"),
        (dict(candidates=3), "more than k"),
        (dict(n_head=5), "n_head"),
        (dict(intermediate_dim=10, n_head=4), "divide"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(section, words):
    with pytest.raises(InputError, match=words) as refused:
        layer(**section)
    assert "\n" not in str(refused.value)


def test_settings_out_of_range_are_refused():
    for key, value in dict(k=0, window=0, chunk=0, candidates=-1, epsilon=-1).items():
        with pytest.raises(InputError, match=key):
            load_config(overrides=[f"attn_configs.sparsek.{key}={value}"])


def test_a_gpt_with_sparsek_trains():
    settings = dict(n_head=2, k=4, window=6, chunk=16)
    overrides = [f"attn_configs.sparsek.{key}={value}" for key, value in settings.items()]
    overrides += [f"model_configs.gpt.{key}" for key in ("attention_layer=sparsek", "d_model=16", "hidden_layer=16", "n_layer=2")]
    overrides += ["hyperparams.context_length=48", "hyperparams.title_mask=true"]
    torch.manual_seed(0)
    model = build_model(load_config(overrides=overrides), 20)
    assert sum(isinstance(m, SparseKAttention) for m in model.modules()) == 2
    idx = torch.randint(1, 20, (4, 49))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(8):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
