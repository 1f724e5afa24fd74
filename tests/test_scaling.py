"Noise scale and scaling laws where the answer is known, on more cases than the chapter shows."

import ast
import csv
import json
import math
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from mainrun_nb.checkpoint import run_lock
from mainrun_nb.config import InputError, tiny
from mainrun_nb.data import read_split
from mainrun_nb.evaluate import attention_distance
from mainrun_nb.models import build_model
from mainrun_nb.repetition import RepetitionLaw, effective_tokens, fit_repetition, until_best
from mainrun_nb.rescore import evaluate_run
from mainrun_nb.scaling import (
    ScalingLaw,
    compute_optimal,
    fit_batches,
    fit_branches,
    fit_chinchilla,
    fit_power_law,
    frontier,
    logged_noise,
    noise_parts,
    noise_scale,
    runs_table,
)
from mainrun_nb.trainer import prepare_data, train

SMALLER = ["hyperparams.vocab_size=300", "hyperparams.num_titles=800", "hyperparams.context_length=16", "hyperparams.batch_size=8",
           "model_configs.gpt.d_model=16", "model_configs.gpt.hidden_layer=16", "model_configs.gpt.n_layer=1"]


@pytest.mark.parametrize(("small", "big"), [(1, 2), (2, 64), (0.5, 8)])
def test_the_parts_undo_the_formula(small, big):
    grad_sq, trace = noise_parts(3 + 7 / small, 3 + 7 / big, small, big)
    assert grad_sq == pytest.approx(3) and trace == pytest.approx(7)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_noise_scale_does_not_depend_on_units(scale):
    rng = np.random.default_rng(0)
    small, big = 5 + rng.random(50), 3 + rng.random(50)
    one, other = noise_scale(small, big, 2, 16), noise_scale(scale * small, scale * big, 2, 16)
    assert other.b_simple == pytest.approx(one.b_simple) and other.low == pytest.approx(one.low) and other.high == pytest.approx(one.high)


def test_correlated_steps_widen_the_band_where_blocks_are_drawn():
    rng = np.random.default_rng(0)
    drift = 1 + np.repeat(rng.random(20), 20)  # stretches of 20 steps that share their noise
    small, big = 10 * drift, 2 + 3 * drift
    alone, blocks = (noise_scale(small, big, 1, 4, block=b) for b in (1, 20))
    assert blocks.high - blocks.low > 2 * (alone.high - alone.low) > 0
    assert blocks.b_simple == alone.b_simple


@pytest.mark.parametrize("bad", [([1.0, math.nan], [1.0, 1.0], 1, 2), ([], [], 1, 2), ([1.0, 2.0], [1.0, 1.0], 2, 2)])
def test_norms_that_say_nothing_are_refused(bad):
    with pytest.raises(InputError, match="noise scale"):
        noise_scale(*bad)


def test_a_run_with_micro_batches_logs_its_noise_and_stands_in_the_table(tmp_path):
    run = train(tiny(*SMALLER, "hyperparams.grad_accum=2", "hyperparams.max_steps=12"), tmp_path / "a", progress=False)
    found = logged_noise(run.run_dir, stretches=3)
    assert [step for step, _, _ in found] == [4, 8, 12] and all(s.low <= s.b_simple <= s.high for _, _, s in found)
    events = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "training_step"]
    same = noise_scale([e["micro_grad_norm"] ** 2 for e in steps[:4]], [e["grad_norm"] ** 2 for e in steps[:4]], 4, 8)
    assert same.b_simple == found[0][2].b_simple
    row, = runs_table(tmp_path)
    assert row["name"] == "a" and row["d"] == 12 * 8 * 16 and row["c"] == 6 * row["n"] * row["d"] and row["seed"] == 1337
    assert row["n"] == run.metrics["parameters_non_embedding"] and row["loss"] == run.loss and 0 < row["epochs"] < 1


def test_the_padding_of_rows_of_whole_titles_is_no_token(tmp_path):
    cfg = tiny(*SMALLER, "hyperparams.rows=titles", "hyperparams.title_mask=true", "hyperparams.context_length=32", "hyperparams.epochs=3",
               "hyperparams.max_steps=null", "model_configs.gpt.position=rope")
    with pytest.warns(UserWarning, match="titles are cut"):
        data = train(cfg, tmp_path / "a", progress=False).metrics["data"]
    row, = runs_table(tmp_path)
    assert data["rows_padding"] > 0 and row["d"] == pytest.approx(row["epochs"] * data["tokens_per_epoch"])
    steps = json.loads((tmp_path / "a" / "result.json").read_text())["steps"]
    assert row["d"] == pytest.approx(steps * 8 * 32 * (1 - data["rows_padding"])) and 2.7 < row["epochs"] <= 3


def test_a_run_without_micro_batches_says_what_is_missing(tmp_path):
    run = train(tiny(*SMALLER, "hyperparams.max_steps=1"), tmp_path / "a", progress=False)
    with pytest.raises(InputError, match="grad_accum"):
        logged_noise(run.run_dir)


@pytest.mark.parametrize(("alpha", "beta", "floor"), [(0.5, 0.2, 0.9), (0.15, 0.6, 1.2)])  # the chapter has Hoffmann's own
def test_known_exponents_come_back_at_any_scale(alpha, beta, floor):
    for low in (1e4, 1e8):
        n, d = (a.ravel() for a in np.meshgrid(np.geomspace(low, 1000 * low, 5), np.geomspace(10 * low, 1e4 * low, 5)))
        truth = ScalingLaw(("N", "D"), (low**alpha, (10 * low) ** beta), (alpha, beta), floor)
        found = fit_chinchilla(n, d, truth(n, d), draws=0)
        assert (*found.exponents, found.floor) == pytest.approx((alpha, beta, floor), abs=2e-2)
        assert found(n, d) == pytest.approx(truth(n, d), rel=1e-3)


def test_one_run_that_diverged_does_not_steer_the_fit():
    x = np.geomspace(1e4, 1e7, 12)
    loss = 2e1 / x**0.2 * np.exp(0.003 * np.random.default_rng(0).normal(size=12))
    spoilt = np.where(np.arange(12) == 11, 3 * loss, loss)
    cases = [(loss, 0.01), (spoilt, 0.01), (spoilt, 10)]
    clean, robust, least_squares = (fit_power_law(x, y, delta=delta, draws=0).exponents[0] for y, delta in cases)
    assert clean == pytest.approx(0.2, abs=0.005) and robust == pytest.approx(0.2, abs=0.02) and abs(least_squares - 0.2) > 0.05


def test_intervals_hold_the_truth_most_of_the_time():
    x, held = np.geomspace(1e4, 1e7, 10), 0
    for seed in range(40):
        loss = 2e1 / x**0.2 * np.exp(0.02 * np.random.default_rng(seed).normal(size=10))
        low, high = fit_power_law(x, loss, "N", draws=60, seed=seed).intervals["exponent N"]
        held += low <= 0.2 <= high
    assert 30 <= held  # a bootstrap of ten runs is a little too sure of itself


def test_the_best_split_balances_both_terms():
    law = ScalingLaw(("N", "D"), (400.0, 400.0), (0.3, 0.3), 1.0)
    n, d = compute_optimal(law, np.array([6e12, 6e18]))
    assert n == pytest.approx([1e6, 1e9]) and d == pytest.approx([1e6, 1e9])  # a law that treats both alike


def test_a_batch_law_is_exact_and_refuses_two_sizes():
    law = fit_batches([2, 8, 32, 128], [100 * (1 + 20 / b) for b in (2, 8, 32, 128)])
    assert (law.min_steps, law.critical) == pytest.approx((100, 20)) and law.low <= 20.001 and law.high >= 19.999
    with pytest.raises(InputError, match="three"):
        fit_batches([2, 4], [2, 1])


@pytest.mark.parametrize("critical", [3.0, 60.0, 900.0])
def test_branches_are_a_sweep_in_small(critical):
    sizes = [4, 16, 64, 256, 1024]
    ends = [5.0 - 1.5 / (1 + b / critical) for b in sizes]
    law = fit_branches(sizes, ends, start=5.0, rows=8192)
    assert law.critical == pytest.approx(critical) and law.low <= 1.001 * critical and law.high >= 0.999 * critical
    assert 8192 / 64 / law.steps(64) == pytest.approx(5.0 - ends[2])  # the progress of its steps


@pytest.mark.parametrize(("ends", "says"), [([4.0, 4.1, 5.0], "of 64 rows"), ([4.0, math.nan, 4.5], "of 16 rows"), ([4.0, 4.1], "three")])
def test_branches_that_say_nothing_are_refused(ends, says):
    with pytest.raises(InputError, match=says):
        fit_branches([4, 16, 64][: len(ends)], ends, start=5.0, rows=1024)


def test_every_fit_takes_the_runs_in_place_of_numbers(tmp_path):
    law, rng = ScalingLaw(("N", "D"), (40.0, 30.0), (0.3, 0.25), 0.8), np.random.default_rng(0)
    n, d = 10 ** rng.uniform(4, 7, 20), 10 ** rng.uniform(5, 8, 20)
    rows = [{"n": a, "d": b, "loss": float(law(a, b)), "name": i} for i, (a, b) in enumerate(zip(n, d, strict=True))]
    assert fit_chinchilla(rows, draws=5) == fit_chinchilla(n, d, law(n, d), draws=5)
    assert fit_power_law(rows, name="C", draws=0) == fit_power_law(6 * n * d, law(n, d), "C", draws=0)
    for call in (lambda: fit_chinchilla(tmp_path), lambda: fit_power_law(tmp_path / "none.csv", name="N"), lambda: fit_chinchilla([])):
        with pytest.raises(InputError, match="no finished run|no such file"):
            call()
    best, rows = frontier(rows), runs_table(rows)
    assert all(any(r["c"] <= row["c"] and r["loss"] <= row["loss"] for r in best) for row in rows)
    assert [r["loss"] for r in best] == sorted((r["loss"] for r in best), reverse=True)


@pytest.mark.parametrize("source", [5, None, 2.5])
def test_what_is_no_table_is_refused(source):
    with pytest.raises(InputError, match="needs a path, a table of pandas or rows, found"):
        runs_table(source)


def test_numbers_without_losses_are_refused_in_one_line():
    import pandas as pd

    for numbers in ([1e4, 1e5, 1e6], np.array([1e4, 1e5, 1e6]), pd.Series([1e4, 1e5, 1e6]), {"n": [1e4], "loss": [2.0]}):
        for fit in (fit_power_law, fit_chinchilla):
            with pytest.raises(InputError, match="needs rows with names.*losses as well") as e:
                fit(numbers)
            assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="table of runs: float"):
        runs_table([{"n": [1, 2], "d": 1, "loss": 2.0}])


def test_what_pandas_has_for_nothing_is_a_gap():
    import pandas as pd

    rows = [{"n": 1e4, "d": 1e5, "loss": 3.0, "seed": 1, "lr": 0.1, "name": "a"}, {"n": 1e5, "d": 1e5, "loss": 2.5, "lr": None},
            {"n": 1e6, "d": 1e5, "loss": None, "seed": 3, "name": None}]
    table = pd.DataFrame(rows)
    assert table.convert_dtypes()["lr"][1] is pd.NA
    assert runs_table(table.convert_dtypes()) == runs_table(table) == runs_table(rows)


def test_runs_that_do_not_decide_a_law_are_refused():
    law, rng = ScalingLaw(("N", "D"), (40.0, 30.0), (0.3, 0.25), 0.8), np.random.default_rng(0)
    n = np.geomspace(1e4, 1e7, 10)
    for d in (20 * n, 20 * n**0.5, 20 * n * np.exp(0.01 * rng.normal(size=10))):
        with pytest.raises(InputError, match="of N and D one follows the other"):
            fit_chinchilla(n, d, law(n, d) * np.exp(0.003 * rng.normal(size=10)))
    n, d = np.array([1e5, 1e6, 1e7] * 2), np.array([1e6, 1e8, 1e7] * 2)  # three sizes, each with two seeds, for five parameters
    with pytest.raises(InputError, match="5 different runs, found 3 of N, 3 of D in 3"):
        fit_chinchilla(n, d, law(n, d))
    assert fit_power_law([1e4, 1e5], [5, 4]).intervals == fit_power_law([1, 2, 3], [5, 4, 3.5], floor=True).intervals == {}
    low, high = fit_power_law([1e4, 1e5] * 3, [5, 4, 5.1, 4.1, 4.9, 3.9]).intervals["exponent x"]
    assert low < high


def test_a_ledger_with_unknown_columns_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("val/loss,n\n1.5,100\n")
    with pytest.raises(InputError, match="d or tokens"):
        runs_table(path)
    path.write_text("val/loss,n,d\n1.5,many,100\n")
    with pytest.raises(InputError, match="many"):
        runs_table(path)


def test_a_row_of_a_study_is_measured_again_by_its_command(benchmark, root, monkeypatch, capsys, tmp_path):
    study, small = benchmark("scaling"), ["data.source=synthetic", "hyperparams.num_titles=600", "hyperparams.vocab_size=300"]
    configured = study.configured
    monkeypatch.setattr(study, "configured", lambda *shape: configured(*shape, *small))
    monkeypatch.setattr(study, "SIZES", [(24, 2, 2), (32, 2, 2)])
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setenv("HN_TITLES", "none")
    monkeypatch.setattr("sys.argv", ["scaling.py", "runs"])
    study.main()
    rows = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    assert len({row["command"] for row in rows}) == len(rows) == 2 * 3 + 2 + 2
    capsys.readouterr()
    for row in rows[1], rows[-1]:
        monkeypatch.setattr("sys.argv", shlex.split(row["command"])[1:])
        study.main()
        again = ast.literal_eval(capsys.readouterr().out)
        assert {k: str(v) for k, v in again.items() if k != "cpu_seconds"} == {k: row[k] for k in again if k != "cpu_seconds"}
    assert list(csv.DictReader((tmp_path / "scaling.csv").open())) == rows
    monkeypatch.setattr("sys.argv", ["scaling.py", "runs", "--run", "width=25"])
    with pytest.raises(SystemExit, match="runs width=25: no row of this study"):
        study.main()


@pytest.mark.parametrize("name", ["scaling", "batches", "branches"])
def test_each_committed_row_has_its_command(benchmark, root, name):
    study = benchmark("scaling")
    rows = list(csv.DictReader((root / "benchmarks" / "results" / f"{name}.csv").open()))
    assert len({row["command"] for row in rows}) == len(rows)
    for row in rows:
        _, script, kind, _, *key = shlex.split(row["command"])
        assert script == "benchmarks/scaling.py" and study.STUDIES[kind][1] == f"{name}.csv"
        assert study.is_row(row, dict(part.split("=") for part in key)), row


def test_the_committed_study_is_what_its_script_says(benchmark, root):
    study = benchmark("scaling")
    rows = list(csv.DictReader((root / "benchmarks" / "results" / "scaling.csv").open()))
    assert len({(r["width"], r["steps"], r["seed"]) for r in rows}) == len(rows) >= len(study.SIZES) * len(study.SHARES)
    for width, layers, heads in study.SIZES:
        model = build_model(study.configured(width, layers, heads, "data.source=synthetic"), 2000)
        body = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))
        assert {int(r["n"]) for r in rows if r["width"] == str(width)} == {body}


TRUTH = RepetitionLaw({4.6e5: 1.05, 1.83e6: 0.95}, factor=23.0, exponent=0.3, r_star=5.0)


def planned(law, noise, seed=0, scale=1.0):
    """Rows of a study of 1 to 16 passes over five numbers of tokens, with losses of a law and noise."""
    plan = [(share, passes) for share in (16, 8, 4, 2) for passes in (1, 2, 4, 7)] + [(1, 1), (16, 16)]
    runs, rng = [(n, scale * 1.13e6 / share, passes) for n in law.levels for share, passes in plan], np.random.default_rng(seed)
    noises = np.exp(noise * rng.normal(size=len(runs)))
    return [{"n": n, "d": u * p, "tokens_per_epoch": u, "loss": law(n, u, u * p) * e} for (n, u, p), e in zip(runs, noises, strict=True)]


def planted(law):
    """What the intervals of a fit should hold."""
    return {"r_star": law.r_star, "factor": law.factor, "exponent": law.exponent} | {f"level {n:.0f}": v for n, v in law.levels.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("r_star", "noise"), [(5.0, 0.003), (15.39, 0.003), (2.0, 0.006)])
def test_the_intervals_hold_the_planted_law_in_ninety_of_a_hundred_repeats(r_star, noise):
    truth = replace(TRUTH, r_star=r_star)
    fits = [fit_repetition(planned(truth, noise, seed), draws=100, seed=seed).intervals for seed in range(100)]
    held = {key: sum(fit[key][0] <= value <= fit[key][1] for fit in fits) for key, value in planted(truth).items()}
    assert min(held.values()) >= 90, held


@pytest.mark.parametrize(("r_star", "exponent", "sizes", "scale"), [(1.0, 0.5, 1, 1.0), (40.0, 0.2, 3, 1e3), (8.0, 0.35, 2, 1e-2)])
def test_a_known_law_of_repetition_comes_back_at_any_scale(r_star, exponent, sizes, scale):
    levels = {10.0 ** (5 + k): 1.2 - 0.1 * k for k in range(sizes)}
    truth = RepetitionLaw(levels, 0.5 * (scale * 1e5) ** exponent, exponent, r_star)
    found = fit_repetition(planned(truth, 0.0, scale=scale), draws=0)
    assert (found.r_star, found.exponent) == pytest.approx((r_star, exponent), rel=1e-2) and found.levels == pytest.approx(levels, rel=1e-2)
    assert found.rms < 1e-5 and found.intervals == {}


def test_passes_as_good_as_fresh_ones_or_worth_nothing_are_told_at_the_bounds():
    fresh = fit_repetition(planned(replace(TRUTH, r_star=1e6), 0.0), draws=0)
    assert fresh.r_star > 300 and fresh.worth(7) == pytest.approx(7, rel=0.02)
    spent = fit_repetition(planned(replace(TRUTH, r_star=0.01), 0.0), draws=0)
    assert spent.worth(7) == pytest.approx(1, abs=0.03)
    assert effective_tokens([10, 10, 10], [5, 10, 30], 1e6) == pytest.approx([5, 10, 30], rel=1e-5)


def test_one_run_of_a_study_that_diverged_does_not_steer_the_law_of_repetition():
    rows = planned(TRUTH, 0.002)
    rows[9]["loss"] *= 2
    assert fit_repetition(rows, draws=0).r_star == pytest.approx(5, rel=0.1)
    assert not 4.5 < fit_repetition(rows, delta=10, draws=0).r_star < 5.5


def test_a_law_of_repetition_from_a_folder_a_csv_and_a_table_of_pandas(tmp_path):
    import pandas as pd

    rows = planned(TRUTH, 0.002)
    table = pd.DataFrame([*rows, {"name": "failed"}])  # a row of gaps
    table.to_csv(tmp_path / "study.csv", index=False)
    sources = rows, table, tmp_path / "study.csv", str(tmp_path / "study.csv"), runs_table(table)
    laws = [fit_repetition(source, draws=5) for source in sources]
    assert all(law == laws[0] for law in laws)
    with pytest.raises(InputError, match="three numbers of different tokens"):
        fit_repetition(rows[:5])
    with pytest.raises(InputError, match="above 0"):
        fit_repetition([*rows, {**rows[0], "loss": 0.0}])
    with pytest.raises(InputError, match=r"found 1\.9 to 2\.0 passes"):  # all as often: R and the factor are one
        fit_repetition([{**row, "d": row["tokens_per_epoch"] * (1.9 + 0.1 * (i % 2))} for i, row in enumerate(rows)])
    one = [row for row in rows if row["n"] == rows[0]["n"]]
    with pytest.raises(InputError, match=r"found 3 in 12 runs \(3 different\) of 1 size$"):
        fit_repetition([one[i] for i in (0, 5, 10)] * 4)


def test_scores_without_a_training_are_left_out_of_the_table(root):
    rows = runs_table(root / "sweeps" / "results.csv")
    assert len(rows) > 40 and all(row["n"] > 0 and row["d"] > 0 for row in rows)


@pytest.fixture
def repetition(benchmark, tmp_path, monkeypatch):
    """benchmarks/repetition.py, writing into a folder of its own."""
    study = benchmark("repetition")
    monkeypatch.setattr(study, "ROWS", tmp_path / "results" / "repetition.csv")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return study


def test_a_run_of_the_repetition_study_is_the_one_its_command_makes(repetition, tmp_path):
    cfg = tiny(*SMALLER, "data.train_share=0.3", "hyperparams.epochs=3", "hyperparams.max_steps=null", "hyperparams.amp_bool=true")
    run = train(cfg, tmp_path / "a", progress=False)
    found = repetition.measure(cfg, prepare_data(tiny(*SMALLER)))
    row, = runs_table(tmp_path)
    assert found["loss"] == run.loss and (found["n"], found["d"]) == (row["n"], row["d"])
    assert found["tokens_per_epoch"] == run.metrics["data"]["tokens_per_epoch"] and 2.9 < row["epochs"] <= 3


def test_the_repetition_study_is_whole_affordable_and_shared_between_processes(repetition, monkeypatch):
    runs = repetition.study()
    names = [run["name"] for run in runs]
    assert len(set(names)) == len(names) == 50 and sum(run["minutes"] for run in runs) < 170
    commands = [[part for part in shlex.split(run["command"]) if "sweeps/runs/" not in part] for run in runs]
    assert len(set(map(tuple, commands))) == 50
    made = []
    monkeypatch.setattr(repetition, "measure", lambda cfg, data: made.append(cfg) or {"n": 1, "loss": 1.234567, "cpu_seconds": 60.0})
    monkeypatch.setattr(repetition, "load_config", lambda path, overrides: overrides)
    (repetition.ROOT / "sweeps" / "runs" / f"repetition-{names[0]}").mkdir(parents=True)
    with run_lock(repetition.ROOT / "sweeps" / "runs" / f"repetition-{names[0]}"):  # another process is at the first
        for run in runs[:2] + runs[:2]:
            repetition.make(run, None)
    assert made == [runs[1]["overrides"]] and repetition.done() == {names[1]}
    repetition.make(runs[0], None)
    assert [row["loss"] for row in csv.DictReader(repetition.ROWS.open())] == ["1.23457"] * 2 and repetition.done() == set(names[:2])


def test_the_committed_runs_of_the_repetition_study_are_those_that_it_names(benchmark, root):
    runs = {run["name"]: run for run in benchmark("repetition").study()}
    with (root / "benchmarks" / "results" / "repetition.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["name"] for row in rows) == sorted(runs)
    for row in rows:
        run = runs[row["name"]]
        assert row["command"] == run["command"] and not row["commit"].endswith("+")
        assert run["passes"] * 0.95 < float(row["d"]) / float(row["tokens_per_epoch"]) <= run["passes"]


def test_what_lies_before_the_turn_is_kept_whatever_the_order():
    row = {"n": 1e5, "tokens_per_epoch": 1e4}
    rows = [{**row, "name": str(k), "d": k * 1e4, "loss": loss} for k, loss in ((1, 2.0), (2, 1.5), (4, 1.6), (7, 1.9))]
    rows += [{"name": "other", "n": 1e5, "tokens_per_epoch": 2e4, "d": 14e4, "loss": 3.0}, {**rows[3], "name": "larger", "n": 2e5}]
    for given in (rows, rows[::-1]):
        assert {r["name"] for r in until_best(given)} == {"1", "2", "other", "larger"}
    assert len(until_best(rows[:1])) == 1


def test_what_is_not_trained_on_counts_nowhere(tmp_path):
    (tmp_path / "titles.txt").write_text("".join(f"Show HN: the number {i % 300}\n" for i in range(600)))
    cfg = tiny(*SMALLER, f"data.source={tmp_path / 'titles.txt'}", "hyperparams.num_titles=600", "data.train_share=0.1")
    result = train(cfg, tmp_path / "run", progress=False).metrics
    again, (whole, val, _) = evaluate_run(tmp_path / "run"), read_split(cfg)
    references = {k: v for k, v in result["data"].items() if k.startswith("reference/")}
    assert references and references == {k: again[k] for k in references}
    read, account = set(whole[: len(whole) // 10]), result["data"]["account"]
    assert account["val_in_train"] == again["account"]["val_in_train"] == sum(title in read for title in val) < len(val) / 2
    with pytest.raises(InputError, match=r"data\.train_share=1: has been decided by training"):
        evaluate_run(tmp_path / "run", overrides=["data.train_share=1"])


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half"])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match=r"data\.train_share"):
        tiny(f"data.train_share={share}")


def test_attention_distance_refuses_other_layers():
    cfg = tiny(*SMALLER, "model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.n_head=2", "attn_configs.sparse.num_verts=1",
               "attn_configs.sparse.local_attn_ctx=16", "attn_configs.sparse.sparseblocksize=16")
    with pytest.raises(InputError, match="causal"):
        attention_distance(build_model(cfg, 300), torch.arange(100))
