"""Optimizers, schedules and the training step: what must hold for each of them, beyond the chapter's own checks."""
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from mainrun_nb.config import Config, InputError, load_config
from mainrun_nb.models import build_model
from mainrun_nb.optim import (
    EMA,
    OPTIMIZERS,
    SCHEDULERS,
    Muon,
    StepResult,
    accumulate,
    autocast,
    build_optimizer,
    lr_factor,
    make_scaler,
    parameter_groups,
    rates_as_tensors,
    set_lr,
    step_and_select,
    train_step,
    whole_state,
)

torch.set_num_threads(1)
NAMES = sorted(OPTIMIZERS)
V, T, B = 60, 16, 8


def config(**hyperparams) -> Config:
    """A GPT of a few thousand parameters."""
    shape = ["d_model=16", "hidden_layer=24", "n_layer=2", "dropout=0.0"]
    cfg = load_config(None, ["hyperparams.context_length=16", "attn_configs.causal.n_head=2", *(f"model_configs.gpt.{s}" for s in shape)])
    vars(cfg.hyperparams).update(hyperparams)
    return cfg


HP = config().hyperparams


def setup(seed: int = 0, **hyperparams):
    """Model, optimizer and hyperparameters, the same for the same seed."""
    cfg = config(**{"lr": 0.01, "weight_decay": 0.1, "momentum": 0.5, **hyperparams})
    torch.manual_seed(seed)
    model = build_model(cfg, V)
    return model, build_optimizer(model, cfg.hyperparams), cfg.hyperparams


def batch(seed: int, rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets: (rows, T) each."""
    return tuple(torch.randint(V, (2, rows, T), generator=torch.Generator().manual_seed(seed)))


def same(a, b) -> bool:
    """Whether two nested structures hold the same values, tensors to the bit (nan equals nan)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) if isinstance(a, torch.Tensor) else a == b


def poison(model: nn.Module) -> None:
    """Make the next loss not a number."""
    with torch.no_grad():
        model.blocks[0].mlp.inner.up.weight[0, 0] = math.nan


# --- parameter groups ---


@pytest.mark.parametrize("name", ["adamw", "muon"])  # Muon alone has groups of its own
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(name, tied):
    cfg = config(optimizer=name, weight_decay=0.1)
    cfg.model_configs.gpt.tied = tied
    cfg.model_configs.gpt.layer_scale = 0.1
    model = build_model(cfg, V)
    groups = build_optimizer(model, cfg.hyperparams).param_groups
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(group["initial_lr"] == group["lr"] for group in groups)
    for group in groups:
        embeddings_of_muon = name == "muon" and group["name"] == "tables"
        assert (group["weight_decay"] > 0) == (group["name"] in ("matrices", "head") or embeddings_of_muon)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("cutoff", "ngrams"), [(0, 0), (20, 0), (20, 30)])
def test_kinds_of_parameters(tied, cutoff, ngrams):
    cfg = config()
    gpt = cfg.model_configs.gpt
    gpt.embedding_ngrams = ngrams
    gpt.tied, gpt.embedding_cutoff, gpt.token_shift, gpt.embedding_skips = tied, cutoff, True, True
    model = build_model(cfg, V)
    kinds = {id(p): kind for kind, ps in parameter_groups(model).items() for p in ps}
    for name, p in model.named_parameters():
        expected = "tables" if name.startswith("embed.tokens") or name.startswith("embed.positions") else None
        expected = "head" if name == "embed.tokens.expand.weight" else expected
        expected = expected or ("head" if name == "head.weight" else "matrices" if p.ndim == 2 and len(p) > 1 else "vectors")
        assert kinds[id(p)] == expected, name


def test_frozen_parameters_are_left_out():
    model = build_model(config(), V)
    model.embed.positions.weight.requires_grad_(False)
    assert all(p is not model.embed.positions.weight for ps in parameter_groups(model).values() for p in ps)


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest():
    model, optimizer, hp = setup(optimizer="Muon", lr=0.02, weight_decay=0.3, muon_momentum=0.9, adamw_lr=1e-3, betas=[0.8, 0.95])
    muon, adamw = optimizer.parts
    assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
    matrices = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "tokens" not in name and "positions" not in name}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == matrices
    assert [(g["lr"], g["weight_decay"], g["momentum"]) for g in muon.param_groups] == [(0.02, 0.3, 0.9)]
    assert {g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in adamw.param_groups} == {
        "tables": (1e-3, hp.adamw_weight_decay, (0.8, 0.95)), "vectors": (1e-3, 0.0, (0.8, 0.95)),
    }
    set_lr(optimizer, 0.5)
    assert muon.param_groups[0]["lr"] == 0.01 and adamw.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_numbers_on_a_cpu_and_tensors_move_the_weights_as_far(name):
    """A captured step needs rates in memory that stays; on a CPU nothing changes: numbers, before a load and after."""
    found = []
    for tensors in (False, True):
        model, optimizer, hp = setup(optimizer=name, momentum=0.5)
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
        if tensors:
            rates_as_tensors(optimizer, "cpu")
        rates = [group["lr"] for group in optimizer.param_groups]
        for t in range(4):
            set_lr(optimizer, lr_factor(t, 4, hp))
            train_step(model, optimizer, *batch(t), hp)
        assert all((group["lr"] is rate) == tensors for group, rate in zip(optimizer.param_groups, rates, strict=True))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        state = optimizer.state_dict()
        assert all(type(group["lr"]) is float for group in state["param_groups"])
        optimizer.load_state_dict({**state, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]})
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            assert isinstance(group["lr"], torch.Tensor) == tensors and float(group["lr"]) == pytest.approx(saved["lr"] / 2)
    torch.testing.assert_close(*found, rtol=0, atol=1e-3 if name == "muon" else 1e-6)  # Muon's gradients are rounded to bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_a_state_saved_on_a_gpu_goes_on_on_a_cpu(name):
    """Its settings for the GPU stay there, and the next step is what it would have been."""
    model, optimizer, hp = setup(optimizer=name, momentum=0.5)
    train_step(model, optimizer, *batch(0), hp)
    state, weights = copy.deepcopy((whole_state(optimizer), model.state_dict()))
    elsewhere = copy.deepcopy(state)
    for group in elsewhere["param_groups"]:
        group |= {"lr": torch.tensor(group["lr"]), **({"capturable": True} if "capturable" in group else {})}
    after = []
    for saved in (state, elsewhere):
        model, optimizer, hp = setup(optimizer=name, momentum=0.5)
        model.load_state_dict(weights)
        optimizer.load_state_dict(saved)
        set_lr(optimizer, 0.5)
        train_step(model, optimizer, *batch(1), hp)
        after.append(model.state_dict())
    assert same(*after)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**state, "param_groups": state["param_groups"][:-1]})


def test_muon_scale_and_decoupled_decay():
    """W <- (1 - lr wd) W - lr sqrt(max(1, n / m)) UV': with the gradient an orthogonal matrix, UV' is known up to Muon's band."""
    for n, m in [(12, 4), (4, 12)]:
        q = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))[0]
        q = q if n > m else q.T.contiguous()
        layer = nn.Linear(m, n, bias=False)
        before = layer.weight.detach().clone()
        optimizer = build_optimizer(layer, config(optimizer="muon", lr=0.1, weight_decay=0.5).hyperparams)
        layer.weight.grad = q.clone()
        optimizer.step()
        update = (before * (1 - 0.1 * 0.5) - layer.weight.detach()) / (0.1 * math.sqrt(max(1, n / m)))
        assert torch.linalg.svdvals(update).sub(1).abs().max() < 0.5
        assert torch.cosine_similarity(update.flatten(), q.flatten(), 0) > 0.99


def test_muon_looks_ahead():
    """After gradients -3 Q and Q the momentum B still points along -Q; mu B + (1 - mu) G, which Nesterov follows, along Q."""
    layer = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(layer, config(optimizer="muon", lr=1.0, muon_momentum=0.5).hyperparams)
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for gradient in (-3 * q, q):
        before, layer.weight.grad = layer.weight.detach().clone(), gradient
        optimizer.step()
    assert torch.cosine_similarity((before - layer.weight.detach()).flatten(), q.flatten(), 0) > 0.99


def test_adafactor_equals_torch():
    reference, model = build_model(config(), V), build_model(config(optimizer="adafactor"), V)
    model.load_state_dict(reference.state_dict())
    ours = build_optimizer(model, config(optimizer="adafactor", lr=0.03).hyperparams)
    theirs = torch.optim.Adafactor(reference.parameters(), lr=0.03)
    for step in range(5):
        for optimizer, m in [(ours, model), (theirs, reference)]:
            m(*batch(step))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- names ---


def test_names_set_after_loading():
    """In any case, as in a file; an unknown one is answered with those that are known, in one line."""
    assert type(setup(optimizer="ADAMW")[1]) is torch.optim.AdamW
    assert lr_factor(5, 10, config(scheduler="Cosine").hyperparams) == 0.5
    for key, build, known in [
        ("optimizer", lambda: setup(optimizer="lion"), OPTIMIZERS),
        ("scheduler", lambda: lr_factor(0, 10, config(scheduler="poly").hyperparams), SCHEDULERS),
    ]:
        with pytest.raises(InputError, match=f"hyperparams.{key}: must be one of") as error:
            build()
        assert ", ".join(known) in str(error.value) and "\n" not in str(error.value)


# --- schedules ---


@pytest.mark.parametrize(("name", "steps"), [("cosine", 7), ("linear", 7), ("step", 7), ("none", 7), ("cosine", 1), ("linear", 1)])
def test_schedules_equal_torch(name, steps):
    s = torch.optim.lr_scheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    peer = {
        "cosine": lambda: s.CosineAnnealingLR(optimizer, T_max=steps),
        "linear": lambda: s.LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
        "step": lambda: s.StepLR(optimizer, step_size=3, gamma=0.7),
        "none": lambda: s.LambdaLR(optimizer, lambda t: 1.0),
    }[name]()
    hp = config(scheduler=name, step_size=3, gamma=0.7).hyperparams
    for t in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * lr_factor(t, steps, hp), abs=1e-12)
        optimizer.step()
        peer.step()


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_schedules_rise_then_never_rise_again(name):
    tails = itertools.product([0.0, 0.3, 0.99], ["sqrt", "linear"]) if name == "wsd" else [(0.3, "sqrt")]  # which no other one reads
    for warmup, (decay, shape), steps in itertools.product([0.0, 0.1, 0.9], tails, [1, 3, 40]):
        hp = replace(HP, scheduler=name, warmup=warmup, decay=decay, decay_shape=shape, step_size=10)
        factors = [lr_factor(t, steps, hp) for t in range(steps + 3)]
        start = round(warmup * steps)
        assert all(0 <= f <= 1 for f in factors)
        assert factors[:start] == sorted(factors[:start]) and factors[start:] == sorted(factors[start:], reverse=True)
        assert start == steps or factors[start] == 1


def test_wsd_falls_over_the_last_share_of_all_steps():
    hp = replace(HP, scheduler="wsd", warmup=0.2, decay=0.4, decay_shape="linear")
    assert [lr_factor(t, 10, hp) for t in (0, 1, 2, 6, 7, 8, 9, 10)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.75, 0.5, 0.25, 0])


# --- the step ---


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_changes_nothing(name):
    model, optimizer, hp = setup(optimizer=name)
    ema = EMA(model, 0.9)
    assert train_step(model, optimizer, *batch(0), hp, ema=ema).ok
    poison(model)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), ema.state_dict()])
    result = train_step(model, optimizer, *batch(1), hp, ema=ema)
    assert not result.ok and not result.loss.isfinite()
    assert same(before, [model.state_dict(), optimizer.state_dict(), ema.state_dict()])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_first_step_leaves_no_trace(name):
    """Whether a GPU's way of refusing (select) or the CPU's, the next steps are those of a fresh optimizer."""
    results = []
    for refuse in [False, True]:
        model, optimizer, hp = setup(optimizer=name)
        if refuse:
            for part in getattr(optimizer, "parts", [optimizer]):
                for p in model.parameters():
                    p.grad = torch.full_like(p, math.nan)
                step_and_select(part, torch.tensor(False))
        for t in range(2):
            train_step(model, optimizer, *batch(t), hp)
        results.append(model.state_dict())
    assert same(*results)


def test_an_infinite_loss_with_a_finite_gradient_is_refused_too():
    class Odd(nn.Linear):
        def forward(self, x, y):
            return None, super().forward(x).sum() + math.inf

    model = Odd(3, 1)
    before = copy.deepcopy(model.state_dict())
    hp = config().hyperparams
    assert not train_step(model, build_optimizer(model, hp), torch.ones(2, 3), torch.ones(2), hp).ok
    assert same(before, model.state_dict())


@pytest.mark.parametrize(("accum", "amp", "scaled"), [(1, False, False), (2, False, True), (1, True, True), (2, True, False)])
def test_gradients_are_zeroed_on_every_path(accum, amp, scaled):
    """A gradient left behind by anything else, an overflow included, must not leak into the step; nor may the step leave one."""
    weights = []
    for leftover in [None, 1.0, math.inf]:
        model, optimizer, hp = setup(optimizer="adamw", grad_accum=accum, amp_bool=amp)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
        for p in model.parameters() if leftover else ():
            p.grad = torch.full_like(p, leftover)
        for t in range(3):
            assert train_step(model, optimizer, *batch(t), hp, scaler).ok
            assert all(p.grad is None for p in model.parameters())
        weights.append(model.state_dict())
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])


def test_an_error_in_the_forward_pass_does_not_poison_the_next_step():
    model, optimizer, hp = setup(grad_accum=2)
    twin, twin_optimizer, _ = setup(grad_accum=2)
    x, y = batch(0)
    broken = x.clone()
    broken[-1, -1] = V  # out of the vocabulary: the second micro-batch fails, after the first has left its gradient
    with pytest.raises(IndexError):
        train_step(model, optimizer, broken, y, hp)
    train_step(model, optimizer, x, y, hp)
    train_step(twin, twin_optimizer, x, y, hp)
    assert same(model.state_dict(), twin.state_dict())


def test_training_goes_on_after_an_overflow():
    """The assessment's mixed precision froze here: an infinite gradient, never zeroed, made every later step an overflow."""
    model, optimizer, hp = setup(optimizer="adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20)  # overflows float32 once
    results = [train_step(model, optimizer, *batch(0), hp, scaler) for _ in range(12)]
    oks = [bool(r.ok) for r in results]
    assert not oks[0] and all(oks[2:])
    assert results[-1].loss < results[0].loss - 0.1


def test_the_scale_cancels():
    """Loss, norms and update are those without a scaler (a power of two is exact)."""
    plain, scaled = setup(grad_accum=2), setup(grad_accum=2)
    a = train_step(*plain[:2], *batch(0), plain[2])
    b = train_step(*scaled[:2], *batch(0), scaled[2], torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert same(vars(a), vars(b)) and same(plain[0].state_dict(), scaled[0].state_dict())


@pytest.mark.parametrize("name", ["adamw", "muon"])  # the gradient knows of no optimizer: see the next test
def test_accumulation_equals_the_large_batch(name):
    runs = []
    for accum in [1, 8]:
        model, optimizer, hp = setup(optimizer=name, grad_accum=accum)
        runs.append([train_step(model, optimizer, *batch(t), hp) for t in range(4)])
    for run in runs[1:]:
        torch.testing.assert_close(run[0].grad_norm, runs[0][0].grad_norm)
        for one, many in zip(runs[0], run, strict=True):
            torch.testing.assert_close(many.loss, one.loss, rtol=0, atol=1e-5)


def test_accumulated_gradients_equal_the_large_batch():
    grads = []
    for accum in [1, 2, 4, 8]:
        model, _, hp = setup(grad_accum=accum)
        accumulate(model, *batch(0), hp)
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=0, atol=1e-5)


def test_micro_norm_is_the_first_micro_batchs_own():
    model, optimizer, hp = setup(grad_accum=4)
    x, y = batch(0)
    alone, alone_optimizer, alone_hp = setup()
    expected = train_step(alone, alone_optimizer, x[:2], y[:2], alone_hp)
    result = train_step(model, optimizer, x, y, hp)
    torch.testing.assert_close(result.micro_norm, expected.grad_norm)
    assert expected.micro_norm is None and result.micro_norm > result.grad_norm


def test_a_batch_that_does_not_divide_is_refused():
    model, optimizer, hp = setup(grad_accum=3)
    with pytest.raises(InputError, match="grad_accum: must divide the 8 rows"):
        train_step(model, optimizer, *batch(0), hp)


def test_clipping_scales_the_gradient_and_zero_only_measures():
    """With plain SGD the update shows the gradient that was used."""
    updates, norms = [], []
    for clip in [0.0, 0.01, 1e6]:
        model, optimizer, hp = setup(optimizer="sgd", lr=1.0, weight_decay=0.0, momentum=0.0, grad_clip=clip)
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        norms.append(train_step(model, optimizer, *batch(0), hp).grad_norm)
        updates.append((before - nn.utils.parameters_to_vector(model.parameters()).detach()).norm())
    assert norms[0] == norms[1] == norms[2] > 0.01
    torch.testing.assert_close(updates, [norms[0], torch.tensor(0.01), norms[0]], rtol=1e-3, atol=1e-5)


def test_r_drop_reaches_the_model():
    cfg = config(r_drop=2.0)
    cfg.model_configs.gpt.dropout = 0.3
    losses = []
    for r_drop in [0.0, 2.0]:
        torch.manual_seed(0)
        model, hp = build_model(cfg, V), copy.copy(cfg.hyperparams)
        hp.r_drop = r_drop
        torch.manual_seed(1)
        losses.append(train_step(model, build_optimizer(model, hp), *batch(0), hp).loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_round_bitwise(name, tmp_path):
    """Three steps, a save, three more; or a fresh model and optimizer, a load, and the same three: equal to the bit."""
    model, optimizer, hp = setup(optimizer=name)
    ema = EMA(model, 0.9)
    for t in range(3):
        set_lr(optimizer, lr_factor(t, 6, hp))
        train_step(model, optimizer, *batch(t), hp, ema=ema)
    torch.save([model.state_dict(), whole_state(optimizer), ema.state_dict()], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, other_optimizer, _ = setup(seed=9, optimizer=name)
    other_ema = EMA(other, 0.9)
    for target, state in zip([other, other_optimizer, other_ema], saved, strict=True):
        target.load_state_dict(state)
    for t in range(3, 6):
        for m, o, e in [(model, optimizer, ema), (other, other_optimizer, other_ema)]:
            set_lr(o, lr_factor(t, 6, hp))
            train_step(m, o, *batch(t), hp, ema=e)
    assert same(model.state_dict(), other.state_dict()) and same(ema.state_dict(), other_ema.state_dict())
    assert same(optimizer.state_dict(), other_optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_can_be_simulated(name):
    """Chapter 22 runs it on tensors without values."""
    with FakeTensorMode():
        model, optimizer, hp = setup(optimizer=name, grad_accum=2, amp_bool=True, r_drop=1.0)
        ema = EMA(model, 0.9)
        x = torch.zeros(B, T, dtype=torch.long)
        for _ in range(2):
            result = train_step(model, optimizer, x, x, hp, ema=ema)
    assert isinstance(result, StepResult) and result.loss.shape == ()
    assert name == "sgd" or optimizer.state


# --- precision ---


def test_precisions():
    for amp, dtype in [(False, "bf16"), (True, "bf16"), (False, "fp16")]:
        hp = config(amp_bool=amp, amp_dtype=dtype).hyperparams
        assert make_scaler(hp, "cpu") is None
        with autocast(hp, "cpu"):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == (torch.bfloat16 if amp else torch.float32)
    with pytest.raises(InputError, match="hyperparams.amp_dtype: fp16 needs CUDA.*use bf16"):
        make_scaler(config(amp_bool=True, amp_dtype="fp16").hyperparams, "cpu")


def test_bf16_follows_fp32():
    losses = []
    for amp in [False, True]:
        model, optimizer, hp = setup(optimizer="adamw", amp_bool=amp)
        losses.append([train_step(model, optimizer, *batch(0), hp).loss for _ in range(20)])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    a, b = map(torch.stack, losses)
    assert a[-1] < a[0] - 0.2 and (a - b).abs().max() < 0.05


# --- EMA ---


def test_ema_swaps_back_whatever_happens():
    model, optimizer, hp = setup()
    ema = EMA(model, 0.5)
    train_step(model, optimizer, *batch(0), hp, ema=ema)
    weights, average = copy.deepcopy(model.state_dict()), copy.deepcopy(ema.state_dict())
    with pytest.raises(KeyError), ema.swapped():
        assert same({k: v for k, v in model.state_dict().items() if k in average}, average) and not same(model.state_dict(), weights)
        raise KeyError
    assert same(model.state_dict(), weights) and same(ema.state_dict(), average)


def test_ema_has_the_names_of_the_bare_model():
    class Wrapped(nn.Module):  # as DistributedDataParallel and torch.compile name things
        def __init__(self, key: str, inner: nn.Module) -> None:
            super().__init__()
            self.add_module(key, inner)

    model = build_model(config(), V)
    for keys in [("module",), ("_orig_mod",), ("module", "_orig_mod"), ("_orig_mod", "module")]:
        wrapped: nn.Module = model
        for key in keys:
            wrapped = Wrapped(key, wrapped)
        assert EMA(wrapped, 0.9).state_dict().keys() == dict(model.named_parameters()).keys()


# --- two processes ---

SHARED = [("adamw", False), ("adafactor", True), ("muon", True), ("sgd", True)]


def _losses(model, optimizer, hp, rows: slice) -> list[StepResult]:
    """Four steps on the given rows of each batch."""
    return [train_step(model, optimizer, *(part[rows] for part in batch(t)), hp) for t in range(4)]


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, zero in SHARED:
        cfg = config(optimizer=name, lr=0.01, weight_decay=0.1, grad_accum=2, zero_optimizer=zero)
        torch.manual_seed(0)
        model = build_model(cfg, V)
        optimizer = build_optimizer(model, cfg.hyperparams, world_size=2)
        half = B // 2
        results = _losses(DistributedDataParallel(model), optimizer, cfg.hyperparams, slice(rank * half, (rank + 1) * half))
        state, weights = whole_state(optimizer), {k: v.clone() for k, v in model.state_dict().items()}
        if rank == 1:  # its loss alone is not finite: both must refuse
            model.register_forward_hook(lambda module, args, out: (None, out[1] + math.inf))
        refused = train_step(DistributedDataParallel(model), optimizer, *(part[:half] for part in batch(9)), cfg.hyperparams)
        assert not refused.ok and same(weights, model.state_dict())
        torch.save([[vars(r) for r in results], weights, state], f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Same losses, same weights on both, the same verdict, and a sharded state that a single process can load."""
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for name, _ in SHARED:
        (results, weights, state), (others, other_weights, _) = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        assert same(results, others) and same(weights, other_weights)
        model, optimizer, hp = setup(optimizer=name, momentum=0.0, grad_accum=4)
        for ours, theirs in zip(_losses(model, optimizer, hp, slice(None)), results, strict=True):
            torch.testing.assert_close(theirs["loss"], ours.loss, rtol=0, atol=1e-5)
            torch.testing.assert_close(theirs["grad_norm"], ours.grad_norm, rtol=5e-3, atol=0)
        assert {k: sorted(v) for k, v in state["state"].items()} == {k: sorted(v) for k, v in optimizer.state_dict()["state"].items()}
        optimizer.load_state_dict(state)
        assert train_step(model, optimizer, *batch(5), hp).ok


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_model_and_optimizer_goes_on_alike(name):
    torch.manual_seed(0)
    cfg = config(optimizer=name)
    model = build_model(cfg, V)
    both = (model, build_optimizer(model, cfg.hyperparams))
    x = torch.randint(V, (4, 9))
    take = lambda model, optimizer: train_step(model, optimizer, x[:, :-1], x[:, 1:], cfg.hyperparams)  # noqa: E731
    take(*both)
    again = copy.deepcopy(both)
    for pair in (both, again):
        torch.manual_seed(1)
        take(*pair)
    for a, b in zip(both[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
