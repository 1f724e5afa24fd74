"Maximal update parametrisation and the best rate at each width, on more cases than chapter 33c shows."

import csv
import math

import numpy as np
import pytest
import torch

from mainrun_nb.case import stand_in
from mainrun_nb.config import InputError, tiny
from mainrun_nb.data import Batches
from mainrun_nb.models import build_model, count_parameters
from mainrun_nb.scaling import branch, fit_critical, runs_table
from mainrun_nb.trainer import make_state, prepare_data, take_step, train
from mainrun_nb.width import coordinate_check, fit_rates, mup


@pytest.fixture(scope="module")
def data():
    return prepare_data(tiny())


def state_of(data, width, *more):
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")] + [f"attn_configs.causal.n_head={width // 8}"]
    cfg = tiny(*shape, "hyperparams.scheduler=none", "hyperparams.warmup=0", "hyperparams.lr=0.01", *more)
    return make_state(cfg, data.tokenizer.vocab_size, torch.device("cpu")), Batches(data.train_ids, cfg.hyperparams), cfg.hyperparams


OPTIONS = [["hyperparams.optimizer=adam"], ["hyperparams.optimizer=muon", "hyperparams.adamw_lr=0.005"],
           ["hyperparams.optimizer=adamw", "model_configs.gpt.tied=false"],
           ["hyperparams.optimizer=adamw", "model_configs.gpt.position=rope", "model_configs.gpt.activation_function=swiglu"],
           ["hyperparams.optimizer=adamw", "model_configs.gpt.norm=rmsnorm", "model_configs.gpt.bias=false"]]


@pytest.mark.parametrize("more", OPTIONS, ids=lambda more: "-".join(m.split(".")[-1] for m in more))
def test_in_maximal_update_parametrisation_the_changes_do_not_depend_on_the_width(data, more):
    changes = {}
    for width in (32, 128):
        state, *rest = state_of(data, width, *more)
        mup(state.model, state.optimizer, 32)
        changes[width] = coordinate_check(state, *rest)
    standard = coordinate_check(*state_of(data, 128, *more))
    ratios = {part: changes[128][part] / changes[32][part] for part in standard}
    assert all(0.55 < ratio < 1.8 for ratio in ratios.values()), ratios
    assert standard["mlp 2"] > 2 * changes[128]["mlp 2"] and standard["logits"] > 2 * changes[128]["logits"]


def test_at_the_base_width_nothing_changes_not_even_a_bit(data):
    found = []
    for parametrised in (False, True):
        state, batches, hp = state_of(data, 16, "hyperparams.optimizer=muon")
        if parametrised:
            mup(state.model, state.optimizer, 16)
        for _ in range(3):
            take_step(state, state.model, batches, slice(None), hp, 3)
        found.append([p.clone() for p in state.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_average_of_the_weights_begins_where_the_parametrisation_has_put_them(data):
    state, batches, hp = state_of(data, 64, "hyperparams.optimizer=muon", "hyperparams.ema=0.5")
    mup(state.model, state.optimizer, 16, state.ema)
    before = {name: p.clone() for name, p in state.model.named_parameters()}
    take_step(state, state.model, batches, slice(None), hp, 2)
    for name, p in state.model.named_parameters():
        torch.testing.assert_close(state.ema.average[name], (before[name] + p) / 2)


def test_rates_close_together_widen_the_interval():
    narrow = [fit_rates([{**r, "lr": 0.013 * (r["lr"] / 0.013) ** share} for r in planned(0.0, 0.004)]) for share in (1, 1e-2, 1e-4)]
    wide = [math.log(law.intervals["best 32"][1] / law.intervals["best 32"][0]) for law in narrow]
    assert wide[1] == pytest.approx(wide[0] / 100, rel=0.01) and wide[2] == pytest.approx(wide[0] / 1e4, rel=0.01)


def test_a_check_leaves_no_hook_and_the_mode_as_it_was(data):
    state, batches, hp = state_of(data, 16)
    coordinate_check(state, batches, hp, steps=1)
    assert state.step == 1 and state.model.training and not any(m._forward_hooks for m in state.model.modules())


@pytest.mark.parametrize(("more", "message"), [
    (["hyperparams.optimizer=adagrad"], "found Adagrad"), (["model_configs.gpt.init_method=kaiming"], "found kaiming"),
    (["model_configs.gpt.embedding_cutoff=20"], "embedding_cutoff=20"),
    (["model_configs.gpt.d_model=32"], "as wide as d_model=32, found 16"), (["attn_configs.causal.intermediate_dim=8"], "found 8, 16"),
])
def test_what_has_no_rule_is_refused_and_nothing_is_changed(data, more, message):
    state = state_of(data, 16, *(["hyperparams.optimizer=adamw"] if "optimizer" not in more[0] else []), *more)[0]
    before = [p.clone() for p in state.model.parameters()]
    with pytest.raises(InputError, match=message):
        mup(state.model, state.optimizer, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))


def test_letters_and_case_apart_have_no_rule():
    cfg = tiny("model_configs.gpt.d_model=16", "model_configs.gpt.hidden_layer=16", "attn_configs.causal.n_head=2", "tokenizer.kind=cased",
               "hyperparams.optimizer=adamw")
    state = make_state(cfg, 60, torch.device("cpu"), pairs=stand_in(20))
    with pytest.raises(InputError, match="letters and case apart"):
        mup(state.model, state.optimizer, 8)


def planned(exponent, noise, seed=0, widths=(32, 80, 192), steps=2, seeds=2, centre=0.013):
    """Runs at powers of two around the best rates, which follow a power of the width."""
    rng, rows = np.random.default_rng(seed), []
    for w in widths:
        best = math.log2(centre) + exponent * math.log2(w / widths[0])
        for k in [round(best) + i for i in range(-steps, steps + 1) for _ in range(seeds)]:
            loss = 2.1 * w**-0.04 * math.exp(0.012 * (k - best) ** 2 + noise * rng.normal())
            rows.append({"n": w * w, "d": 1e5, "width": w, "lr": 2.0**k, "loss": loss})
    return rows


@pytest.mark.parametrize(("exponent", "noise", "seeds", "widths"), [
    (-1.0, 0.002, 2, (32, 80, 192)), (0.0, 0.004, 1, (32, 80, 192)), (-0.5, 0.002, 3, (64, 128)), (0.3, 0.001, 1, (8, 32, 128, 512)),
])
def test_the_intervals_of_the_best_rates_hold_what_was_planted_in_ninety_of_a_hundred_repeats(exponent, noise, seeds, widths):
    truth = {"exponent": exponent} | {f"best {w}": 0.013 * (w / widths[0]) ** exponent for w in widths}
    fits = [fit_rates(planned(exponent, noise, seed, widths, seeds=seeds)).intervals for seed in range(100)]
    held = {key: sum(fit[key][0] <= value <= fit[key][1] for fit in fits) for key, value in truth.items()}
    assert min(held.values()) >= 90, held


def test_best_rates_from_rows_a_csv_and_a_table_of_pandas(tmp_path):
    import pandas as pd

    rows = planned(-0.7, 0.001)
    table = pd.DataFrame([*rows, {"n": 1.0}])  # a run without a loss
    table.to_csv(tmp_path / "study.csv", index=False)
    laws = [fit_rates(source) for source in (rows, table, tmp_path / "study.csv", runs_table(rows))]
    assert all(law == laws[0] for law in laws)
    far = [{**rows[0], "lr": rows[0]["lr"] / 64, "loss": 9.0}, {**rows[0], "lr": rows[0]["lr"] * 999, "loss": math.inf}]
    assert fit_rates([*rows, *far]) == laws[0]  # far from the best, or diverged
    assert fit_rates(rows[::-1]).exponent == pytest.approx(laws[0].exponent)


@pytest.mark.parametrize(("change", "message"), [
    (lambda rows: [{**r, "width": None} for r in rows], r"width \(width\)"),
    (lambda rows: [r for r in rows if r["width"] == 80], "found 1"),
    (lambda rows: [{**r, "loss": 4 / r["loss"]} for r in rows], "is the best"),
    (lambda rows: [{**r, "lr": -1} for r in rows], "above 0"),
    (lambda rows: [r for r in rows if r["width"] != 192 or r["lr"] < 0.004], "at width 192 the greatest of"),
    (lambda rows: [{**r, "lr": r["lr"] ** math.log2(10)} for r in rows] * 2, "found 1 of 5 within a factor 4 of 1e-06 at width 32"),
    (lambda rows: [r if r["width"] != 80 or r["lr"] < 2**-6.5 else {**r, "lr": 1.0} for r in rows if r["width"] != 80 or r["lr"] > 2**-8.5],
     "found 2 of 3 within a factor 4 of 0.0078125 at width 80"),
    (lambda rows: [{**r, "lr": 0.01 * (1 + 1e-15 * round(math.log2(r["lr"])))} for r in rows], "tell 3 of them"),
])
def test_runs_that_do_not_show_a_best_rate_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        fit_rates(change(planned(-0.5, 0.0)))


def test_a_run_s_folder_gives_its_rate_and_width(tmp_path):
    train(tiny("hyperparams.max_steps=2", "hyperparams.lr=0.004"), tmp_path / "run", progress=False)
    row, = runs_table(tmp_path)
    assert (row["lr"], row["width"]) == (0.004, tiny().model_configs.gpt.hidden_layer)


# --- the studies ---


def test_a_branch_leaves_its_run_as_it_was_and_learns_more_from_more_rows(data):
    state, batches, hp = state_of(data, 16, "hyperparams.optimizer=muon", "hyperparams.adamw_lr=0.01")
    for _ in range(2):
        take_step(state, state.model, batches, slice(None), hp, 2)
    before, rates = [p.clone() for p in state.model.parameters()], [g["lr"] for g in state.optimizer.param_groups]
    short, long = (branch(state, data.train_ids[1000:], hp, 4, more) for more in (4, 64))
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True)) and state.step == 2
    assert [g["lr"] for g in state.optimizer.param_groups] == rates
    moved = [sum(float((a - b).square().sum()) for a, b in zip(before, model.parameters(), strict=True)) for model in (short, long)]
    assert 0 < moved[0] < moved[1]


def test_the_critical_batch_by_loss_from_a_run_s_folder(tmp_path):
    train(tiny("hyperparams.max_steps=40", "hyperparams.grad_accum=2"), tmp_path / "run", progress=False)
    try:
        assert fit_critical(tmp_path / "run").names == ("L",)
    except InputError as e:  # noise without signal, in so few steps
        assert "above 0" in str(e)
    with pytest.raises(InputError, match="three different losses"):
        fit_critical([(5.0, 10), (4.0, 20), (4.0, 30)])
    with pytest.raises(InputError, match="above 0"):
        fit_critical([(5.0, 10), (4.0, 20), (3.0, math.inf)])


@pytest.fixture
def study(benchmark):
    """benchmarks/width.py."""
    return benchmark("width")


def test_the_sweep_over_rates_goes_on_until_each_best_rate_is_known(study):
    rows, best = [], {"standard": lambda w: 8.2 + math.log2(w / 32), "mup": lambda w: 10.8, "mupnarrow": lambda w: 8.2}
    while names := study.left(rows):
        optimizer, parametrisation, width, rate, seed = names[0].split("-")
        rows.append({"name": names[0], "loss": str(2 + 0.02 * (int(rate) - best[parametrisation](int(width))) ** 2)})
    assert len({row["name"] for row in rows}) == len(rows) < 11 * 9
    for curve in study.curves():
        middle, found = round(best[curve[1]](curve[2])), [row["name"] for row in rows]
        assert all(study.named(*curve, k, study.SEED) in found for k in range(middle - 2, middle + 3))
    spoilt = [{"name": study.named("adamw", "standard", 32, k, study.SEED), "loss": loss} for k, loss in ((7, "2.1"), (6, "inf"))]
    assert study.left(spoilt)[:3] == [study.named("adamw", "standard", 32, k, study.SEED) for k in (8, 5, 9)]


def test_a_run_of_the_width_study_is_the_one_its_name_says(study, monkeypatch):
    small = ["data.source=synthetic", "hyperparams.num_titles=400", "hyperparams.vocab_size=300"]
    monkeypatch.setattr(study, "BASE", [*study.BASE, *small])
    monkeypatch.setattr(study, "STEPS", 3)
    few = prepare_data(study.configured("adamw", 32, 7, 1))
    names = "standard-32-6", "standard-32-6", "standard-32-7", "mup-32-6"
    one, again, other, narrow = (study.measure(f"muon-{name}-1", few) for name in names)
    assert one["loss"] == again["loss"] not in (other["loss"], narrow["loss"]) and one["lr"] == 2**-6 and one["d"] == 3 * 8 * 64
    assert study.measure("adamw-mup-192-7-1", few)["loss"] == study.measure("adamw-standard-192-7-1", few)["loss"]
    checked = study.measure("adamw-mup-32-1", few)
    assert checked == study.check("adamw", "mup", 32, 1, few) != study.check("adamw", "standard", 64, 1, few)


def test_the_committed_tables_are_what_their_scripts_say(root, study):
    changes = list(csv.DictReader((root / "benchmarks" / "results" / "coordinates.csv").open()))
    keys = {(r["optimizer"], r["parametrisation"], int(r["width"]), int(r["seed"])) for r in changes}
    assert len(keys) == len(changes) == 2 * 2 * len(study.CHECKED) * len(study.CHECK_SEEDS)
    assert {w for _, _, w, _ in keys} == set(study.CHECKED)
    assert all(r["command"] == study.command_of(study.named(*key)) for r, key in ((r, tuple(r.values())[:4]) for r in changes))
    rows, sizes = list(csv.DictReader((root / "benchmarks" / "results" / "width.csv").open())), {}
    assert len({r["name"] for r in rows}) == len(rows) and not study.left(rows)
    for r in rows:
        assert r["command"].endswith(r["name"]) and r["name"] == study.named(
            r["optimizer"], r["parametrisation"], int(r["width"]), round(-math.log2(float(r["lr"]))), int(r["seed"]))
        sizes.setdefault(int(r["width"]), set()).add(int(r["n"]))
    for width, found in sizes.items():
        model = build_model(study.configured("adamw", width, 7, 1, "data.source=synthetic"), 2000)
        assert found == {count_parameters(model, embeddings=False)}
