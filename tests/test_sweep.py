"""Sweeps: the same points whoever runs them, every end on record, and nothing lost to a kill, a crash or a lost node."""
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mainrun_nb import files
from mainrun_nb import sweep as sw
from mainrun_nb import trials as tr
from mainrun_nb.check import check_files
from mainrun_nb.checkpoint import split_digest
from mainrun_nb.config import InputError, RunError, config_yaml, find_file, flatten, load_config
from mainrun_nb.memory import estimate_memory
from mainrun_nb.search import evaluations, grid_points, override, random_point, read_board, read_search, read_trials
from mainrun_nb.sweep import examine, promote, run_sweep
from mainrun_nb.trainer import Interrupted, train

ROOT = Path(__file__).resolve().parents[1]
BASE = """
hyperparams: {num_titles: 1500, vocab_size: 500, epochs: 50, context_length: 32, batch_size: 16, optimizer: adamw, max_steps: 20,
              evals_per_epoch: 4, device: cpu}
model_configs: {gpt: {d_model: 32, hidden_layer: 32, n_layer: 1, dropout: 0.1}}
attn_configs: {causal: {n_head: 2}}
data: {source: synthetic}
tokenizer: {kind: bpe}
"""
LRS = "parameters: {hyperparams.lr: {values: [1.0e-3, 1.0e-2, 3.0e-2, 0.1, 0.3, 1.0]}}"
LOG_LR = "parameters: {hyperparams.lr: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0}}"


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


def search_of(tmp_path: Path, text: str) -> Path:
    (tmp_path / "search.yaml").write_text(text)
    return tmp_path / "search.yaml"


class Pretend:
    """An engine whose trials write what a real one would, at once: the loss is the distance of the learning rate from 0.03."""

    here = True
    pause = 0.0  # between evaluations
    rows = 5
    running: list[Path] = []

    def __init__(self, jobs, address=None, gpus=()):
        self.pool = ThreadPoolExecutor(jobs)

    def submit(self, folder, base, overrides, fast):
        return self.pool.submit(self.trial, Path(folder), load_config(base, overrides))

    def trial(self, folder, cfg):
        (folder / "run").mkdir(exist_ok=True)
        lr, done = cfg.hyperparams.lr, 0
        if lr == 0.3:
            raise ValueError("a bug\nin two lines")
        with open(folder / "run" / "metrics.jsonl", "w") as log:
            for done in range(1, self.rows + 1):
                log.write(json.dumps({"event": "validation_step", "step": done, "val/loss": abs(lr - 0.03) + 1 / done}) + "\n")
                log.flush()
                time.sleep(self.pause)
                if (folder / "stop").exists():
                    return {"status": "failed", "error": "stopped by hand", "seconds": 1.0}
        if lr == 1.0:
            return {"status": "failed", "error": "the loss was not finite", "seconds": 1.0}
        result = {"val/loss": abs(lr - 0.03) + 1 / self.rows, "val/coverage": 0.9, "data": {}}
        result["val/challenge_loss"] = None if cfg.hyperparams.batch_size > 16 else 1.5
        (folder / "run" / "result.json").write_text(json.dumps(result))
        return {"status": "complete", "error": "", "seconds": 1.0}

    def close(self):
        self.pool.shutdown()


@pytest.fixture
def pretend(monkeypatch):
    """run_sweep with pretended trials."""
    monkeypatch.setattr(Pretend, "pause", 0.0)
    monkeypatch.setitem(sw.ENGINES, "pretend", Pretend)
    return lambda *args, **kwargs: run_sweep(*args, **{"engine": "pretend", "fast": True, "progress": False, **kwargs})


# --- which points ---


@pytest.mark.parametrize("text", [f"method: grid\n{LRS}", f"method: random\n{LOG_LR}"], ids=["grid", "random"])
def test_the_same_trials_with_any_number_of_workers(tmp_path, base, pretend, text):
    one, two = (pretend(search_of(tmp_path, text), base, tmp_path / f"j{j}", jobs=j, trials=6) for j in (1, 3))
    assert [t.params for t in one.trials] == [t.params for t in two.trials]
    assert [(t.status, t.value) for t in one.trials] == [(t.status, t.value) for t in two.trials]
    assert len(one.trials) == 6 and len({str(t.params) for t in one.trials}) == 6


def test_another_seed_other_points(tmp_path, base, pretend):
    a, b = (pretend(search_of(tmp_path, f"method: random\n{LOG_LR}"), base, tmp_path / str(s), trials=3, seed=s) for s in (0, 1))
    assert not {str(t.params) for t in a.trials} & {str(t.params) for t in b.trials}


BAYES = f"method: bayes\nearly_terminate: {{type: median, min_iter: 2}}\n{LOG_LR}"


def test_bayes_is_reproducible_also_when_killed_anywhere(tmp_path, base, pretend, monkeypatch):
    """A sweep of twelve, and one that dies at each of several places in its bookkeeping and is resumed: the same twelve trials."""
    search = search_of(tmp_path, BAYES)
    whole = pretend(search, base, tmp_path / "whole", trials=12)

    class Killed(BaseException):
        pass

    def dying(where, after):
        real, calls = getattr(sw.Chooser, where), []

        def method(self, *args):
            calls.append(1)
            if len(calls) == after and where != "point":
                raise Killed
            value = real(self, *args)
            if len(calls) == after:
                raise Killed
            return value

        return method

    places = [("point", 3), ("tell", 2), ("behind", 7), ("point", 2), ("tell", 3)]
    for i, (where, after) in enumerate(places):
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(sw.Sweep, "interrupt", lambda sweep: None)
            m.setattr(sw.Chooser, where, dying(where, after))
            pretend(search, base, tmp_path / "cut", trials=12, resume=i > 0)
    cut = pretend(search, base, tmp_path / "cut", trials=12, resume=True)
    assert [(t.params, t.status, t.evaluations) for t in cut.trials] == [(t.params, t.status, t.evaluations) for t in whole.trials]
    assert whole.counts.get("pruned") and whole.best.number >= 4, "the history was not used"


def test_lists_and_odd_values_reach_the_configuration(tmp_path):
    text = ("method: grid\nparameters: {model_configs.unet_gpt.hidden_layer_list: {values: [[64, 32, 64], [32, 32, 32]]}, "
            "hyperparams.amp_bool: {value: true}}")
    points = list(grid_points(read_search(search_of(tmp_path, text), load_config())))
    cfg = load_config(None, [override(k, v) for k, v in points[1].items()])
    assert cfg.model_configs.unet_gpt.hidden_layer_list == [32, 32, 32] and cfg.hyperparams.amp_bool is True


def test_whole_steps_stay_whole(tmp_path):
    text = "parameters: {hyperparams.batch_size: {distribution: q_log_uniform_values, min: 16, max: 256, q: 16}}"
    search = read_search(search_of(tmp_path, text), load_config())
    sizes = {random_point(search, i, 0)["hyperparams.batch_size"] for i in range(50)}
    assert all(isinstance(s, int) and s % 16 == 0 for s in sizes) and len(sizes) > 5
    load_config(None, [override("hyperparams.batch_size", s) for s in sizes])


@pytest.mark.parametrize("text, says", [
    ("parameters: {hyperparams.lrate: {value: 1}}", "Did you mean 'hyperparams.lr'"),
    ("metod: grid", "Did you mean 'method'"),
    ("parameters: {hyperparams.lr: 0.1}", "expected value, values, min and max, or a distribution"),
    ("parameters: {hyperparams.lr: {values: []}}", "at least one value"),
    ("parameters: {hyperparams.lr: {values: [1, 2], probabilities: [0.5, 0.6]}}", "add up to 1"),
    ("parameters: {hyperparams.lr: {values: [1, 2], probabilities: [a, b]}}", "add up to 1"),
    ("parameters: {hyperparams.lr: {values: [1, 2], probabilities: 0.5}}", "add up to 1"),
    ("parameters: {hyperparams.lr: {values: [1, 2], probabilites: [0.5, 0.5]}}", "Did you mean 'probabilities'"),
    ("parameters: {hyperparams.lr: {value: 1, valeus: 2}}", "unknown key 'valeus'"),
    ("parameters: {hyperparams.lr: {min: 1, max: 2, step: 1}}", "unknown key 'step'"),
    ("method: bayes\nparameters: {hyperparams.lr: {values: [1, 2], probabilities: [0.5, 0.5]}}", "does not look at probabilities"),
    ("early_terminate: {type: hyperband, min_iter: 10, max_iter: 5}\nparameters: {hyperparams.lr: {value: 1}}", "no evaluation to look at"),
    ("parameters: {hyperparams.lr: {values: [1, 2], probabilities: [1.5, -0.5]}}", "add up to 1"),
    ("parameters: {hyperparams.lr: {min: 1.0}}", "'max'"),
    ("parameters: {hyperparams.lr: {min: [1], max: 2}}", "min: expected a number, found [1]"),
    ("parameters: {hyperparams.lr: {min: 0, max: .inf}}", "max: expected a number, found inf"),
    ("parameters: {hyperparams.epochs: {distribution: int_uniform, min: 1.5, max: 3}}", "min: expected a whole number, found 1.5"),
    ("parameters: {hyperparams.batch_size: {distribution: log_uniform, min: 16, max: 2048}}", "q_log_uniform_values would not"),
    ("parameters: {hyperparams.lr: {distribution: q_uniform, min: 0, max: 1, q: 0}}", "q: expected a number above 0, found 0"),
    ("parameters: {hyperparams.lr: {distribution: categorical, min: 1, max: 2}}", "'min' does not go with categorical"),
    ("parameters: {hyperparams.lr: {distribution: normal, values: [1, 2]}}", "'values' does not go with normal"),
    ("parameters: [hyperparams.lr]", "parameters: expected a mapping"),
    ("metric: val/loss\nparameters: {hyperparams.lr: {value: 1}}", "metric: expected a mapping, found 'val/loss'"),
    ("metric: {nmae: val/loss}\nparameters: {hyperparams.lr: {value: 1}}", "Did you mean 'name'"),
    ("early_terminate: hyperband\nparameters: {hyperparams.lr: {value: 1}}", "early_terminate: expected a mapping"),
    ("early_terminate: {type: hyperband, eta: 1}\nparameters: {hyperparams.lr: {value: 1}}", "eta: expected a number above 1"),
    ("early_terminate: {type: hyperband, min_iter: 0}\nparameters: {hyperparams.lr: {value: 1}}", "min_iter: expected a whole"),
    ("early_terminate: {type: median, min_iter: '3'}\nparameters: {hyperparams.lr: {value: 1}}", "found '3'"),
    ("parameters: {hyperparams.lr: {distribution: log_uniform_values, min: 0, max: 1}}", "min: expected a number above 0, found 0"),
    ("metric: {name: loss}\nparameters: {hyperparams.lr: {value: 1}}", "val/loss"),
    ("early_terminate: {type: hyperban}\nparameters: {hyperparams.lr: {value: 1}}", "hyperband, median"),
    ("early_terminate: {type: hyperband, miniter: 3}\nparameters: {hyperparams.lr: {value: 1}}", "Did you mean 'min_iter'"),
    ("method: grid", "needs 'parameters'"), ("parameters: {}", "at least one"),
    ("- a list", "search.yaml"),
    ("a: [", "search.yaml"),
])  # fmt: skip
def test_bad_search_files_are_refused_before_anything_runs(tmp_path, base, text, says):
    with pytest.raises(InputError) as e:
        run_sweep(search_of(tmp_path, text), base, tmp_path / "out", fast=True, progress=False)
    assert says in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong, says", [
    ({"engine": "lokal"}, "Did you mean 'local'"), ({"jobs": 0}, "jobs: must be 1 or more"), ({"trials": 0}, "trials"),
    ({"seed": -1}, "seed: must be 0 or more"), ({"overrides": ["data.source=/nowhere/titles.txt"]}, "/nowhere/titles.txt"),
    ({"address": "auto"}, "engine local: does not take --address"),
    ({"engine": "wandb", "resume": True, "jobs": 2, "seed": 1, "address": "auto"}, "does not take --resume, --jobs, --seed, --address"),
])  # fmt: skip
def test_bad_arguments_are_refused(tmp_path, base, wrong, says):
    with pytest.raises(InputError, match=says):
        run_sweep(search_of(tmp_path, LRS), base, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


# --- every end on record ---


def test_every_end_is_recorded_as_what_it_is(tmp_path, base, pretend):
    """Three learning rates, one of which crashes the watcher and one the run; heads that do not fit; a budget of a megabyte."""
    text = """
method: grid
parameters:
  hyperparams.lr: {values: [0.01, 0.3, 1.0]}
  attn_configs.causal.n_head: {values: [2, 3]}
  hyperparams.memory_budget_gb: {values: [null, 0.001]}
"""
    board = pretend(search_of(tmp_path, text), base, tmp_path / "out", jobs=2)
    found = {tuple(t.params.values()): (t.status, t.error) for t in board.trials}
    assert board.counts == {"complete": 1, "failed": 2, "invalid": 6, "skipped": 3}
    assert found[0.3, 2, None] == ("failed", "ValueError: a bug in two lines")
    assert found[1.0, 2, None] == ("failed", "the loss was not finite")
    assert "heads" in found[0.01, 3, None][1] and found[0.01, 2, 0.001][1].startswith("memory: a step needs")
    assert [asdict["status"] for asdict in map(vars, read_trials(tmp_path / "out"))] == [t.status for t in board.trials]
    assert len((tmp_path / "out" / "leaderboard.csv").read_text().splitlines()) == 13
    assert "1 complete, 2 failed, 6 invalid, 3 skipped" in board.table()


@pytest.mark.parametrize("early", [
    "{type: median, min_iter: 1}", "{type: hyperband, min_iter: 1, max_iter: 9, eta: 3}", "{type: hyperband, max_iter: 4, s: 2, eta: 2.0}",
])  # fmt: skip
def test_who_is_behind_is_pruned(tmp_path, base, pretend, monkeypatch, early):
    monkeypatch.setattr(Pretend, "pause", 0.25)
    good = [0.031, 0.029, 0.032, 0.028, 0.033, 0.027, 0.034, 0.026]
    text = f"method: grid\nearly_terminate: {early}\nparameters: {{hyperparams.lr: {{values: {[*good, 0.9, 0.91, 0.92, 0.93]}}}}}"
    board = pretend(search_of(tmp_path, text), base, tmp_path / "out", jobs=4)
    bad = [t for t in board.trials if t.params["hyperparams.lr"] > 0.5]
    pruned = [t for t in bad if t.status == "pruned"]
    assert len(pruned) >= 3 and board.best.params["hyperparams.lr"] < 0.04
    for t in pruned:
        assert t.value == t.evaluations[-1] and len(t.evaluations) < Pretend.rows
    finished = [(t.folder(tmp_path / "out") / "run" / "result.json").exists() for t in pruned]
    assert not all(finished), "none was really stopped"


def test_trials_at_a_time_share_the_memory(monkeypatch):
    settings = ["model_configs.gpt.n_layer=1", "hyperparams.vocab_size=1000", "hyperparams.device=cpu"]
    needed = estimate_memory(load_config(overrides=settings)).peak_bytes
    monkeypatch.setattr("mainrun_nb.memory.machine_memory", lambda: 2 * needed)
    assert [examine(None, settings, jobs)[0] for jobs in (0, 1, 4)] == ["running", "running", "skipped"]


def test_a_second_ctrl_c_is_not_taken_for_a_good_point(monkeypatch):
    monkeypatch.setattr(sw, "can_run", lambda *args: (_ for _ in ()).throw(Interrupted("stopped at once", 2)))
    with pytest.raises(Interrupted):
        examine(None, ["hyperparams.device=cpu"])


def test_a_missing_metric_is_an_error(tmp_path, base, pretend):
    search = search_of(tmp_path, f"method: grid\nmetric: {{name: val/bits_per_byte}}\n{LRS}")
    with pytest.raises(RunError, match="without 'val/bits_per_byte'; it has val/loss, val/coverage, val/challenge_loss$"):
        pretend(search, base, tmp_path / "out")


def test_a_batch_too_large_for_the_challenges_loss_fails_alone(tmp_path, base, pretend):
    text = "method: grid\nmetric: {name: val/challenge_loss}\nparameters: {hyperparams.batch_size: {values: [32, 16]}}"
    board = pretend(search_of(tmp_path, text), base, tmp_path / "out")
    assert [(t.status, t.value) for t in board.trials] == [("failed", None), ("complete", 1.5)]
    assert board.trials[0].error.startswith("val/challenge_loss: no window fits")


def test_a_sweep_without_a_complete_trial_has_failed(tmp_path, base, pretend):
    search = search_of(tmp_path, "method: grid\nparameters: {attn_configs.causal.n_head: {values: [3, 5]}}")
    why = "model_configs.gpt with attn_configs.causal: n_head: 3 heads"
    with pytest.raises(RunError, match=rf"no trial is complete \(2 invalid\); trial 0: {why}"):
        pretend(search, base, tmp_path / "out")
    assert len((tmp_path / "out" / "leaderboard.csv").read_text().splitlines()) == 3


def test_titles_that_the_search_chooses_are_a_matter_of_the_trial(tmp_path, base, pretend):
    search = search_of(tmp_path, "method: grid\nparameters: {data.source: {values: [synthetic, /nowhere/titles.txt]}}")
    assert len(pretend(search, base, tmp_path / "out", overrides=["data.source=/nowhere/titles.txt"]).trials) == 2


def test_a_search_ends_at_its_target(tmp_path, base, pretend):
    """Trials 0 to 2 lie at distances of 0.029, 0.02 and 0 from the best learning rate, and one evaluation short of a fifth."""
    search, out = search_of(tmp_path, f"method: grid\nmetric: {{target: 0.215}}\n{LRS}"), tmp_path / "out"
    with pytest.warns(UserWarning, match="trial 2 has reached the target of 0.215; no more were started"):
        board = pretend(search, base, out)
    assert [t.params["hyperparams.lr"] for t in board.trials] == [0.001, 0.01, 0.03] and board.counts == {"complete": 3}
    with pytest.warns(UserWarning, match="trial 2"):
        assert len(pretend(search, base, out, resume=True).trials) == 3


def test_run_cap_bounds_a_sweep(tmp_path, base, pretend):
    search = search_of(tmp_path, f"method: grid\nrun_cap: 2\n{LRS}")
    assert len(pretend(search, base, tmp_path / "capped").trials) == 2
    assert len(pretend(search, base, tmp_path / "asked", trials=3).trials) == 3


def test_a_grid_of_fifty_million_points_starts_at_once(tmp_path, base, pretend):
    search = search_of(tmp_path, "method: grid\nparameters: {hyperparams.seed: {min: 0, max: 50000000}}")
    assert [t.params["hyperparams.seed"] for t in pretend(search, base, tmp_path / "out", trials=2).trials] == [0, 1]


def test_a_log_is_not_filled_with_bars(tmp_path, base, pretend, monkeypatch, capsys):
    monkeypatch.setattr(Pretend, "pause", 0.3)
    pretend(search_of(tmp_path, LRS), base, tmp_path / "out", trials=1, progress=True)
    assert 1 <= capsys.readouterr().err.count("\r") <= 3


# --- folders ---


def test_two_sweeps_do_not_share_a_folder(tmp_path, base, pretend):
    search = search_of(tmp_path, f"method: grid\n{LRS}")
    with ThreadPoolExecutor(1) as pool:
        Pretend.pause = 0.3
        first = pool.submit(pretend, search, base, tmp_path / "out", trials=2)
        wait_for(lambda: (tmp_path / "out" / "trial-0000").exists() or first.done())
        with pytest.raises(InputError, match="another process"):
            pretend(search, base, tmp_path / "out", trials=2, resume=True)
        with pytest.raises(InputError, match="already holds a sweep"):
            pretend(search, base, tmp_path / "out", trials=2)
        assert first.result().counts == {"complete": 2}


def test_a_resumed_sweep_must_be_the_same_and_may_grow(tmp_path, base, pretend):
    search = search_of(tmp_path, f"method: grid\n{LRS}")
    pretend(search, base, tmp_path / "out", trials=2)
    with pytest.raises(InputError, match=r"--resume cannot change hyperparams.epochs \(50 there, 3 here\)$"):
        pretend(search, base, tmp_path / "out", resume=True, overrides=["hyperparams.epochs=3"])
    base.write_text(BASE.replace("epochs: 50", "epochs: 49"))
    with pytest.raises(InputError, match=r"hyperparams.epochs \(50 there, 49 here\)"):
        pretend(search, base, tmp_path / "out", resume=True)
    base.write_text(BASE)
    assert len(pretend(search, base, tmp_path / "out", trials=4, resume=True).trials) == 4


def test_a_sweep_of_an_earlier_version_goes_on(tmp_path, base, pretend):
    """When it was written, a setting was not there yet, and names were kept in the case in which they were given."""
    search, out = search_of(tmp_path, f"method: grid\n{LRS}"), tmp_path / "out"
    pretend(search, base, out, trials=2)
    record = json.loads((out / "sweep.json").read_text())
    record["configuration"]["hyperparams.optimizer"] = "AdamW"
    del record["configuration"]["hyperparams.amp_bool"], record["seal"], record["sweep"]
    (out / "sweep.json").write_text(json.dumps(record))
    kept = yaml.safe_load((out / "base.yaml").read_text())
    kept["hyperparams"]["optimizer"] = "AdamW"
    del kept["hyperparams"]["amp_bool"]
    (out / "base.yaml").write_text(yaml.safe_dump(kept))
    assert len(pretend(search, base, out, trials=3, resume=True).trials) == 3


def title_files(tmp_path: Path) -> tuple[str, str, str]:
    """Three files of titles, as settings: one, the same elsewhere, and another."""
    files = {"mine": "Ask HN: number {}", "moved": "Ask HN: number {}", "others": "Show HN: number {}"}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{text.format(i)}\n" for i in range(1600)))
    mine, moved, others = (f"data.source={tmp_path / name}.txt" for name in files)
    return mine, moved, others


def test_a_sweep_goes_on_with_the_titles_it_was_begun_with(tmp_path, base, pretend, monkeypatch):
    """Wherever they lie, and however a path is given: here also by HN_TITLES, which another shell may not have."""
    search, out, (mine, moved, others) = search_of(tmp_path, f"method: grid\n{LRS}"), tmp_path / "out", title_files(tmp_path)
    monkeypatch.setenv("HN_TITLES", mine.partition("=")[2])
    given = "data.source=${oc.env:HN_TITLES,hackernews}"
    pretend(search, base, out, trials=2, overrides=[given])
    monkeypatch.setenv("HN_TITLES", others.partition("=")[2])
    before = {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    with pytest.raises(InputError, match=r"out: the titles are not those that the sweep was begun with; '.*others.txt' has changed .*$"):
        pretend(search, base, out, trials=3, resume=True, overrides=[given])
    assert before == {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    assert len(pretend(search, base, out, trials=3, resume=True, overrides=[moved]).trials) == 3
    Path(moved.partition("=")[2]).write_text(Path(others.partition("=")[2]).read_text())
    with pytest.raises(InputError, match="titles are not those that the sweep was begun with"):
        pretend(search, base, out, trials=4, resume=True, overrides=[moved])


@pytest.mark.parametrize("dimension", ["hyperparams.lr: {values: [0.01, 0.02]}", "data.max_chars: {values: [9, 20]}"])
@pytest.mark.parametrize("claims", ["nothing", "result", "log"])
def test_where_no_digest_is_kept_the_trials_say_which_titles_they_had(tmp_path, base, pretend, dimension, claims):
    """A sweep from before digests were kept, and one whose search chooses the titles, of each of its choices."""
    search, out = search_of(tmp_path, f"parameters: {{{dimension}}}\nmethod: grid"), tmp_path / "out"
    mine, moved, others = title_files(tmp_path)
    for trial in pretend(search, base, out, overrides=[mine]).trials:
        titles, run = split_digest(load_config(base, [mine, *trial.overrides])), trial.folder(out) / "run"
        if claims == "result":
            (run / "result.json").write_text(json.dumps({"val/loss": 1.0, "data": {"sha256": titles}}))
        elif claims == "log":
            identity = {"run": "a", "config": "b", "tokenizer": "c", "titles": titles[:16]}
            (run / "metrics.jsonl").write_text(json.dumps({"event": "hyperparameters_configured", "identity": identity}) + "\n")
    record = json.loads((out / "sweep.json").read_text())
    assert bool(record.pop("titles")) == dimension.startswith("hyperparams")
    (out / "sweep.json").write_text(json.dumps({k: v for k, v in record.items() if k != "seal"}))
    if claims != "nothing":
        with pytest.raises(InputError, match="titles are not those that the sweep was begun with; '.*others.txt'"):
            pretend(search, base, out, resume=True, overrides=[others])
    assert len(pretend(search, base, out, resume=True, overrides=[moved]).trials) == 2
    assert bool(json.loads((out / "sweep.json").read_text())["titles"]) == dimension.startswith("hyperparams")


def test_damaged_folders_say_so_in_one_line(tmp_path, base, pretend):
    search, out = search_of(tmp_path, f"method: grid\n{LRS}"), tmp_path / "out"
    pretend(search, base, out, trials=2)
    (out / "trial-0001" / "trial.json").write_text("{")
    with pytest.raises(InputError, match="trial-0001"):
        pretend(search, base, out, trials=2, resume=True)
    (out / "trial-0001" / "trial.json").unlink()
    assert pretend(search, base, out, trials=2, resume=True).counts == {"complete": 2}, "a removed trial is run again"
    (out / "optuna.db").write_bytes(b"not a database" * 100)  # of an earlier version; nothing reads it
    assert pretend(search, base, out, trials=3, resume=True).counts == {"complete": 3}
    for cut in ("", "{", "[]"):
        (out / "sweep.json").write_text(cut)
        with pytest.raises(InputError, match="sweep.json: is damaged; remove it, and mainrun-sweep --resume"):
            pretend(search, base, out, resume=True)
    (out / "sweep.json").unlink()
    with pytest.raises(InputError, match="already holds a sweep"):
        pretend(search, base, out)
    assert pretend(search, base, out, trials=4, resume=True).counts == {"complete": 4}
    with pytest.raises(InputError, match="cannot be created"):
        pretend(search, base, tmp_path / "search.yaml" / "out")
    with pytest.raises(InputError, match="not the folder of a sweep"):
        read_board(tmp_path)


# --- real processes ---

RUN = """
import sys
from mainrun_nb.sweep import run_sweep
search, base, out, fast = sys.argv[1:]
run_sweep(search, base, out, fast=fast == "fast", progress=False)
"""


def events(folder: Path) -> list[dict]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(what, seconds: float = 90.0) -> None:
    """Until `what()` is true; looking at a folder while others write in it, it may find a file gone."""
    end = time.monotonic() + seconds

    def true() -> bool:
        try:
            return what()
        except FileNotFoundError:
            return False

    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def processes_in(folder: Path) -> list[str]:
    """The command lines of the processes that speak of a folder, kernels included."""
    import psutil

    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and (str(folder) in " ".join(p.cmdline()) or str(folder) in p.environ().get("SWEEP_TEST", "")):
                found.append(" ".join(p.cmdline()))
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("signum, mode", [
    (signal.SIGKILL, "fast"),
    pytest.param(signal.SIGINT, "fast", marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, "notebook", marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, "notebook", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_sweep_cut_short_goes_on(tmp_path, base, signum, mode):
    """Its running trial continues from its checkpoint, in its folder, as trial 0; no orphan trains on; the number is the same."""
    base.write_text(BASE.replace("max_steps: 20", "max_steps: 150, save_every: 5"))
    search, out = search_of(tmp_path, "method: grid\nparameters: {hyperparams.lr: {values: [1.0e-2]}}"), tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(search), str(base), str(out), mode]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SWEEP_TEST": str(out)}, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(out.glob("trial-0000/run/checkpoints/*/*"))) > 2)
    process.send_signal(signum)
    complaint = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if signum == signal.SIGKILL else 1)
    if signum == signal.SIGINT:
        assert "stopped by SIGINT; --resume goes on" in complaint
    wait_for(lambda: not processes_in(out), 30)
    assert read_trials(out)[0].status == "running" and not (out / "trial-0000" / "run" / "result.json").exists()
    reached = max(e.get("step", 0) for e in events(out / "trial-0000"))
    board = run_sweep(search, base, out, fast=mode == "fast", resume=True, progress=False)
    assert [(t.number, t.status) for t in board.trials] == [(0, "complete")]
    resumed = next(e["step"] for e in events(out / "trial-0000") if e["event"] == "run_resumed")
    assert reached - 6 <= resumed <= reached
    straight = train(load_config(base, ["hyperparams.lr=0.01"]), tmp_path / "straight", progress=False)
    assert board.best.value == straight.loss and board.best.evaluations == evaluations(out / "trial-0000", "val/loss")


def test_a_folder_that_is_still_in_use_is_left_for_the_next_time(tmp_path, base, monkeypatch):
    """An orphan that will not end: its trial is no more final than it was, and is run when the folder is free."""
    search, out = search_of(tmp_path, "parameters: {hyperparams.lr: {value: 0.01}}"), tmp_path / "out"
    monkeypatch.setattr(tr, "wait_for_folder", partial(tr.wait_for_folder, seconds=0.5))
    (out / "trial-0000" / "run").mkdir(parents=True)
    with open(out / "trial-0000" / "run" / ".lock", "a") as orphan:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="trial-0000: another process is still training in this folder; end it, and --resume"):
            run_sweep(search, base, out, trials=1, fast=True, progress=False)
    assert [t.status for t in read_trials(out)] == ["running"]
    assert run_sweep(search, base, out, trials=1, fast=True, resume=True, progress=False).counts == {"complete": 1}


def test_a_crash_is_recorded_and_the_sweep_goes_on(tmp_path, base):
    """Without notebooks here; with them in test_trial.py."""
    search = search_of(tmp_path, "method: grid\nparameters: {hyperparams.lr: {values: [1.0e+9, 1.0e-2]}}")
    board = run_sweep(search, base, tmp_path / "out", jobs=2, fast=True, progress=False)
    assert [t.status for t in board.trials] == ["failed", "complete"]
    assert "finite" in board.trials[0].error
    assert board.best.value == train(load_config(base, ["hyperparams.lr=0.01"]), tmp_path / "straight", progress=False).loss


@pytest.mark.slow
def test_pruning_really_stops_a_process(tmp_path, base):
    base.write_text(BASE.replace("max_steps: 20", "max_steps: 1500").replace("evals_per_epoch: 4", "evals_per_epoch: 1"))
    values = [0.01, 0.011, 0.012, 0.009, 1.0e-7]
    text = f"method: grid\nearly_terminate: {{type: median, min_iter: 1}}\nparameters: {{hyperparams.lr: {{values: {values}}}}}"
    board = run_sweep(search_of(tmp_path, text), base, tmp_path / "out", jobs=2, fast=True, progress=False)
    assert [t.status for t in board.trials][-1] == "pruned"
    assert max(e.get("step", 0) for e in events(tmp_path / "out" / "trial-0004")) < 1000


def test_a_promoted_recipe_says_what_it_is(tmp_path, base, pretend):
    search = search_of(tmp_path, f"method: grid\n{LRS}")
    pretend(search, base, tmp_path / "out", trials=2)
    best = tmp_path / "out" / "trial-0001" / "run"
    data = {"source": "/a/b/titles.txt.gz", "n_titles": 1500, "sha256": "ab" * 32}
    result = {"val/loss": 1.2, "seed": 7, "parameters": 1234, "steps": 20, "data": data, "commit": "c0ffee"}
    best.joinpath("result.json").write_text(json.dumps(result))
    best.joinpath("config.yaml").write_text(config_yaml(load_config(base, ["data.source=/a/b/titles.txt.gz", "hyperparams.seed=7"])))
    text = promote(tmp_path / "out", "best", tmp_path / "sota").read_text()
    for part in ("# val/loss: 1.200000", "# seed: 7", "# data: titles.txt.gz, 1500 titles, split abababababababab", "# commit: c0ffee"):
        assert part in text
    assert "/a/b" not in text and yaml.safe_load(text)["data"]["source"] == "${oc.env:HN_TITLES,hackernews}"
    hub = ["data.source=hf:owner/set", "data.revision=v2", "tracking.backends=[wandb]", f"hyperparams.log_file={tmp_path}/log.jsonl"]
    told = sw.labels(read_trials(tmp_path / "out")[1], load_config(base, hub).tracking, "out")
    best.joinpath("config.yaml").write_text(config_yaml(load_config(base, [*hub, *told, "hyperparams.seed=7"])))
    best.joinpath("result.json").write_text(json.dumps({**result, "data": {**data, "source": "hf:owner/set"}}))
    text = promote(tmp_path / "out", "shared", tmp_path / "sota").read_text()
    assert "# data: hf:owner/set, 1500 titles" in text and "trial-0001" not in text and str(tmp_path) not in text
    assert yaml.safe_load(text)["data"] == {"source": "hf:owner/set", "revision": "v2"} and "tracking" not in yaml.safe_load(text)
    with pytest.raises(InputError, match="exists"):
        promote(tmp_path / "out", "best", tmp_path / "sota")
    with pytest.raises(InputError, match="not the folder of a sweep"):
        promote(tmp_path, "best", tmp_path / "sota")


# --- other engines ---


class FakeWandb(SimpleNamespace):
    """Exactly the calls that are used: sweep, agent, init as a context with config and log."""

    def __init__(self, points):
        super().__init__(asked=None, logged=[], points=points, stop=None)

    def sweep(self, sweep, entity=None, project=None):
        self.asked, self.project = sweep, project
        return "id"

    def agent(self, sweep_id, function=None, entity=None, project=None, count=None):
        assert sweep_id == "id"
        for point in self.points[:count]:
            self.config = point
            function()

    def init(self):
        return self

    def log(self, numbers):
        self.logged.append(numbers)
        if self.stop and self.config == self.points[0]:
            raise self.stop

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


@pytest.fixture
def wandb_sweep(tmp_path, base, monkeypatch):
    """A sweep of W&B's over two learning rates, with pretended trials."""
    def sweep(fake, search=LOG_LR):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setattr(sw, "LocalEngine", Pretend)
        return run_sweep(search_of(tmp_path, search), base, tmp_path / "out", trials=2, engine="wandb", fast=True)

    return sweep


def test_a_whole_number_of_wandbs_is_one(wandb_sweep):
    """Its server draws 16.0 where `q` is 8.0, and looks at the target; the file's run_cap gives way to the trials that were asked for."""
    text = ("run_cap: 7\nproject: theirs\nmetric: {target: 99}\n"
            "parameters: {hyperparams.batch_size: {distribution: q_uniform, min: 8, max: 16, q: 8.0}}")  # fmt: skip
    fake = FakeWandb([{"hyperparams.batch_size": 16.0}, {"hyperparams.batch_size": 8}])
    assert [t.params for t in wandb_sweep(fake, text).trials] == [{"hyperparams.batch_size": 16}, {"hyperparams.batch_size": 8}]
    assert fake.asked["run_cap"] == 2 and fake.project == "theirs"


POINTS = [{"hyperparams.lr": 0.01}, {"hyperparams": {"lr": 0.02, "unasked": 1}}]  # dotted as in the file, and nested


def test_wandb_engine_with_a_stub(wandb_sweep):
    fake = FakeWandb(POINTS)
    board = wandb_sweep(fake)
    assert [(t.status, t.params) for t in board.trials] == [("complete", {"hyperparams.lr": 0.01}), ("complete", {"hyperparams.lr": 0.02})]
    assert fake.asked["method"] == "random" and fake.asked["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert sum("val/coverage" in n for n in fake.logged) == 2 and len(fake.logged) == 2 * Pretend.rows


@pytest.mark.parametrize("stop, ends", [
    (Exception, ("pruned", "stopped by W&B")), (OSError("no network"), ("failed", "OSError: no network")),
])  # fmt: skip
def test_a_wandb_trial_that_is_thrown_out_has_ended(wandb_sweep, monkeypatch, stop, ends):
    """W&B's agent throws a bare Exception into the thread of a run that is to stop."""
    monkeypatch.setattr(Pretend, "pause", 0.3)
    fake = FakeWandb(POINTS)
    fake.stop = stop
    board = wandb_sweep(fake)
    assert [(t.status, t.error) for t in board.trials] == [ends, ("complete", "")]
    assert board.trials[0].value == board.trials[0].evaluations[-1] and len(board.trials[0].evaluations) == 2


def test_a_wandb_trial_stopped_by_hand_or_without_the_metric_has_failed(tmp_path, wandb_sweep, monkeypatch):
    real = Pretend.trial

    def trial(self, folder, cfg):
        if folder.name == "trial-0000":
            (folder / "stop").touch()
        return real(self, folder, cfg)

    monkeypatch.setattr(Pretend, "trial", trial)
    search = "metric: {name: val/challenge_loss}\nparameters: {hyperparams: {parameters: {batch_size: {values: [8, 16, 32]}}}}"
    with pytest.raises(RunError, match="no trial is complete"):
        wandb_sweep(FakeWandb([{"hyperparams": {"batch_size": n}} for n in (16, 32)]), search)
    assert [(t.status, t.error[:26]) for t in read_trials(tmp_path / "out")] == [
        ("failed", "stopped by hand"), ("failed", "val/challenge_loss: no win")]  # fmt: skip


def test_wandb_engine_without_a_key(tmp_path, base, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        run_sweep(search_of(tmp_path, LOG_LR), base, tmp_path / "out", engine="wandb")
    assert not (tmp_path / "out").exists()


def test_ray_missing_says_what_to_install(tmp_path, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'mainrun_nb\[ray\]'"):
        run_sweep(search_of(tmp_path, LRS), base, tmp_path / "out", engine="ray", fast=True)


@pytest.mark.slow
def test_ray_on_two_nodes_one_of_which_dies(tmp_path, base):
    """The trials of the lost node are run again from their checkpoints; every number is that of the local engine."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    base.write_text(BASE.replace("max_steps: 20", "max_steps: 1200, save_every: 10"))
    text, out = "method: grid\nparameters: {hyperparams.lr: {values: [1.0e-2, 2.0e-2]}}", tmp_path / "out"
    os.environ["PYTHONPATH"] = str(ROOT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed, pool = cluster.add_node(num_cpus=1), ThreadPoolExecutor(1)
    try:
        future = pool.submit(run_sweep, search_of(tmp_path, text), base, out, jobs=2, engine="ray", fast=True,
                             address=cluster.address, progress=False)
        wait_for(lambda: all(len(list(out.glob(f"trial-000{i}/run/checkpoints/*/*"))) > 4 for i in (0, 1)))
        cluster.remove_node(doomed, allow_graceful=False)
        board = future.result(timeout=400)
        assert board.counts == {"complete": 2}
        resumed = [any(e["event"] == "run_resumed" for e in events(t.folder(out))) for t in board.trials]
        assert sorted(resumed) == [False, True]
        for t in board.trials:
            straight = train(load_config(base, [f"hyperparams.lr={t.params['hyperparams.lr']}"]), tmp_path / f"s{t.number}", progress=False)
            assert t.value == straight.loss
    finally:  # Ray first: a sweep that still waits for its node would keep the pool for ever
        ray.shutdown()
        cluster.shutdown()
        pool.shutdown()


# --- the shipped searches ---

SEARCHES = {"batch_size": "baseline", "gpt": "gpt", "unet": "unet", "sparse": "sparse", "sparse_gpt": "sparse", "precision": "sparse",
            "sparsek": "sparsek"}


def test_the_seven_iterations_are_there():
    assert {p.stem for p in (ROOT / "sweeps" / "assessed").glob("*.yaml")} == set(SEARCHES)


@pytest.mark.parametrize("name", SEARCHES)
def test_shipped_searches_read_and_start(name, monkeypatch):
    """Every search names its base in its header, and its first points could run on a large machine."""
    monkeypatch.setenv("HN_TITLES", "titles.txt")
    path, base = ROOT / "sweeps" / "assessed" / f"{name}.yaml", ROOT / "sweeps" / "base" / f"{SEARCHES[name]}.yaml"
    text = path.read_text()
    assert text.startswith("#") and f"sweeps/base/{base.name}" in text and "coverage" in text
    search = read_search(path, load_config(base))
    points = [p for p, _ in zip(grid_points(search), range(40), strict=False)] if search.method == "grid" else [
        random_point(search, i, 0) for i in range(10)]  # fmt: skip
    for point in points[:: max(1, len(points) // 4)]:
        found = examine(base, [override(k, v) for k, v in point.items()], jobs=0)
        assert found == ("running", ""), (point, found)


WORTH = {"tune": "sota/small", "seeds": "sota/small", "own": "quickstart"}  # search: the base that its header names


@pytest.mark.parametrize("name", WORTH)
def test_searches_worth_running_go_by_name_and_hold_what_their_base_says(name, monkeypatch):
    monkeypatch.setenv("HN_TITLES", "titles.txt")
    base, text = find_file(WORTH[name], "base", "sota"), find_file(f"search/{name}", "search").read_text()
    assert text.startswith("#") and f"--config {WORTH[name]} " in text and f"mainrun-sweep search/{name} " in text
    search, settings = read_search(f"search/{name}", load_config(base)), flatten(load_config(base))
    for d in search.dimensions:  # what the base says is among the values, or between the ends
        own = settings[d.key]
        assert d.key == "hyperparams.seed" or (own in d.values if d.values else d.draw(0.01) < own < d.draw(0.99)), d.key
    assert examine(base, [override(k, v) for k, v in random_point(search, 0, 0).items()], jobs=0) == ("running", "")


def test_an_assessed_search_is_found_under_its_old_name():
    """They lay in sweeps/search/ once: the bare name works as before, a path is answered with where it is now."""
    assert find_file("batch_size", "search", "assessed").parent.name == "assessed"
    assert {p.stem for p in (ROOT / "sweeps" / "search").glob("*.yaml")} == set(WORTH)
    for old in ("search/batch_size", "sweeps/search/batch_size.yaml"):
        with pytest.raises(InputError, match="Did you mean 'assessed/batch_size'"):
            read_search(old, load_config())


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_every_value_of_a_shipped_search_can_run(name, monkeypatch):
    """Each value of each dimension, beside the first values of the others; and forty random points."""
    monkeypatch.setenv("HN_TITLES", "titles.txt")
    path, base = ROOT / "sweeps" / "assessed" / f"{name}.yaml", ROOT / "sweeps" / "base" / f"{SEARCHES[name]}.yaml"
    search = read_search(path, load_config(base))
    points = [random_point(search, i, 1) for i in range(40)]
    points += [{**{e.key: e.values[0] for e in search.dimensions}, d.key: v} for d in search.dimensions for v in d.values]
    for point in points:
        found = examine(base, [override(k, v) for k, v in point.items()], jobs=0)
        assert found == ("running", ""), (point, found)




# --- amended, retried, stopped ---


def test_a_failed_trial_runs_again_when_asked_or_when_its_folder_is_removed(tmp_path, base, pretend, monkeypatch):
    """Also in a Bayesian sweep, whose history is the trials that there are."""
    for method, early in (("grid", ""), ("bayes", "early_terminate: {type: median, min_iter: 1}")):
        search, out = search_of(tmp_path, f"method: {method}\n{early}\n{LRS}"), tmp_path / method
        before = pretend(search, base, out)
        failed = [t for t in before.trials if t.status == "failed"]
        assert len(before.trials) == 6 and failed
        with monkeypatch.context() as m:
            m.setattr(Pretend, "trial", lambda *a: {"status": "complete", "error": "", "seconds": 1.0} if wrote(a[1]) else None)
            subprocess.run(["rm", "-r", failed[0].folder(out)], check=True)
            removed = pretend(search, base, out, resume=True)
            assert removed.trials[failed[0].number].status == "complete" and removed.counts.get("failed", 0) == len(failed) - 1
            again = pretend(search, base, out, resume=True, retry="failed")
            assert "failed" not in again.counts and all(again.trials[t.number].params == t.params for t in failed[1:])
    with pytest.raises(InputError, match="Did you mean 'failed'"):
        pretend(search, base, out, resume=True, retry="faild")
    with pytest.raises(InputError, match="goes with --resume"):
        pretend(search, base, tmp_path / "new", retry="failed")


def wrote(folder) -> bool:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "result.json").write_text('{"val/loss": 1.0}')
    return True


def test_the_first_trials_all_failed(tmp_path, base, pretend):
    search = search_of(tmp_path, "method: grid\nparameters: {hyperparams.lr: {values: [0.3, 1.0, 0.01]}}")
    with pytest.raises(RunError, match="first 2 trials failed; trial 0: ValueError: a bug in two lines; --resume --retry failed"):
        pretend(search, base, tmp_path / "out", failures=2)
    assert len(read_trials(tmp_path / "out")) == 2
    assert pretend(search, base, tmp_path / "out", resume=True, failures=0).counts == {"complete": 1, "failed": 2}


def test_a_full_disk_is_no_end(tmp_path, base, pretend, monkeypatch):
    search, full = search_of(tmp_path, f"method: grid\n{LRS}"), "run/metrics.jsonl: No space left on device"
    with monkeypatch.context() as m, pytest.raises(RunError, match="No space left on device; make room, and --resume goes on"):
        m.setattr(Pretend, "trial", lambda *a: {"status": "failed", "error": full, "seconds": 1.0})
        pretend(search, base, tmp_path / "out", trials=2)
    assert [t.status for t in read_trials(tmp_path / "out")] == ["running"]
    old = read_trials(tmp_path / "out")[0]  # as an earlier version left it
    old.status, old.error = "failed", full
    old.save(tmp_path / "out")
    assert pretend(search, base, tmp_path / "out", trials=2, resume=True).counts == {"complete": 2}
    with monkeypatch.context() as m, pytest.raises(RunError, match="base.yaml: could not be written .No space left on device.$"):
        m.setattr(files, "write_forced", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        pretend(search, base, tmp_path / "new", trials=2)


def test_a_sweep_grows_and_its_copies_do_not_count(tmp_path, base, pretend):
    out = tmp_path / "a?x=1%{b}"
    assert len(pretend(search_of(tmp_path, "method: grid\n" + LRS.replace("0.3, 1.0", "0.02")), base, out).trials) == 5
    subprocess.run(["cp", "-r", out / "trial-0001", out / "trial-0001 copy"], check=True)
    grown = "method: grid\ndescription: more\n" + LRS.replace(
        "[1.0e-3, 1.0e-2, 3.0e-2, 0.1, 0.3, 1.0]", "[0.5, 0.02, 0.1, 3.0e-2, 1.0e-2, 1.0e-3]")
    board = pretend(search_of(tmp_path, grown), base, out, resume=True)
    assert [t.params["hyperparams.lr"] for t in board.trials] == [1e-3, 1e-2, 3e-2, 0.1, 0.02, 0.5]
    with pytest.raises(InputError, match=r"--resume cannot change hyperparams.lr.values \(\[0.5, .* there, \[9\] here\)"):
        pretend(search_of(tmp_path, "method: grid\nparameters: {hyperparams.lr: {values: [9]}}"), base, out, resume=True)
    with pytest.raises(InputError, match="is the best, but its run is not whole"):
        promote(out, "best", tmp_path / "sota")


def test_jobs_are_cut_to_the_gpus(tmp_path, base, pretend, monkeypatch):
    monkeypatch.setattr(sw, "visible_gpus", lambda: {"4": 10**12, "6": 10**12})
    seen = []
    monkeypatch.setattr(Pretend, "__init__", lambda self, jobs, address, gpus: (seen.append((jobs, list(gpus))),
                                                                                 setattr(self, "pool", ThreadPoolExecutor(jobs)))[1])
    base.write_text(BASE.replace("device: cpu", "device: auto"))
    with pytest.warns(UserWarning, match="jobs: 5 were asked for, but there are 2 GPUs; 2 at a time"):
        pretend(search_of(tmp_path, f"method: grid\n{LRS}"), base, tmp_path / "out", trials=2, jobs=5)
    assert seen == [(2, ["4", "6"])]


def test_files_of_two_sweeps_are_not_taken_for_one(tmp_path, base, pretend):
    """The same search, base and trial numbers: only the ids tell whose a file is; one flipped bit breaks a seal."""
    search, out, other = search_of(tmp_path, f"method: grid\n{LRS}"), tmp_path / "out", tmp_path / "other"
    pretend(search, base, out, trials=3)
    pretend(search, base, other, trials=3)
    files = {name: (out / name).read_bytes() for name in ("sweep.json", "base.yaml", "trial-0001/trial.json")}

    def refused(name: str, content: bytes, words: str) -> None:
        (out / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            pretend(search, base, out, trials=3, resume=True)
        (out / name).write_bytes(files[name])

    stranger = (other / "trial-0001/trial.json").read_bytes()
    refused("trial-0001/trial.json", stranger, "trial-0001/trial.json: is of sweep .* sweep.json of")
    refused("sweep.json", (other / "sweep.json").read_bytes(), "sweep.json: is of sweep .*, and trial-0000/trial.json of sweep")
    refused("base.yaml", files["base.yaml"].replace(b"epochs: 50", b"epochs: 5"), "base.yaml: is not the .* sweep.json: hyperparams.epochs")
    refused("sweep.json", files["sweep.json"].replace(b"minimize", b"maximize"), "sweep.json: is damaged")
    (out / "sweep.json").unlink()
    pretend(search, base, out, trials=4, resume=True)
    assert len({t.sweep for t in read_trials(out)}) == 1, "a record that was lost gets the trials' id"


# --- killed and amended ---


class Inline:
    """An engine that trains in the sweep's own process. A run with seed 2 fails until there is a file `mended` beside the sweep."""

    here = True

    def __init__(self, jobs, address=None, gpus=()):
        pass

    def submit(self, folder, base, overrides, fast):
        future, cfg = Future(), load_config(base, overrides)
        try:
            if cfg.hyperparams.seed == 2 and not (Path(folder).parents[1] / "mended").exists():
                raise ValueError("the disk is away")
            train(cfg, Path(folder) / "run", progress=False, resume=True)
            future.set_result({"status": "complete", "error": "", "seconds": 0.0})
        except Exception as e:
            future.set_exception(e)
        return future

    def close(self):
        pass


def test_a_trial_may_set_what_only_its_run_knows(tmp_path, base, monkeypatch):
    """`auto` and an interpolation: config.yaml says what they were, and mainrun-check does not take it for another run's."""
    monkeypatch.setitem(sw.ENGINES, "inline", Inline)
    source = "'${oc.env:MAINRUN_SOURCE,synthetic}'"
    search = search_of(tmp_path, f"parameters: {{hyperparams.amp_dtype: {{value: auto}}, data.source: {{value: {source}}}}}")
    short = ["hyperparams.max_steps=2"]
    board = run_sweep(search, base, tmp_path / "out", trials=1, engine="inline", fast=True, progress=False, overrides=short)
    own = load_config(board.best.folder(tmp_path / "out") / "run" / "config.yaml")
    assert (own.hyperparams.amp_dtype, own.data.source) == ("bf16", "synthetic") != tuple(board.best.params.values())
    assert {f.state for f in check_files(tmp_path / "out")} == {"whole"}


def staged(search, base, out, trials, retry):
    """A stage of a sweep, begun or gone on with."""
    sw.ENGINES["inline"] = Inline
    run_sweep(search, base, out, trials=int(trials) or None, engine="inline", fast=True, progress=False, resume=Path(out).exists(),
              retry=retry or None, failures=0)


STAGED = "import sys; sys.path.insert(0, 'tests'); from test_sweep import staged; print('on', flush=True); staged(*sys.argv[1:])"


def killed(args: list[str], trial: Path, pause: float, midway: bool) -> None:
    """Run a stage in a process of its own and kill it, so many seconds after a trial has begun, or it or a later one has a checkpoint."""
    reached = "run/checkpoints/*/*" if midway else "trial.json"
    with subprocess.Popen([sys.executable, "-c", STAGED, *args], cwd=ROOT, stdout=subprocess.PIPE) as process:
        wait_for(lambda: any(str(p) > str(trial) for p in trial.parent.glob(f"trial-*/{reached}")) or process.poll() is not None, 300)
        time.sleep(pause)
        assert process.poll() is None, "it had ended before it was killed"
        process.kill()


def staged_searches(tmp_path: Path, method: str) -> list[tuple[str, str, str]]:
    """Search file, trials and --retry of three stages: the beginning, more values (of a random search more trials too), a retry."""
    lr = "{values: [0.001, 0.01, 0.03, 0.1]}" if method == "grid" else "{distribution: log_uniform_values, min: 1.0e-4, max: 0.1}"
    found = []
    for name, seeds, trials, retry in (("a", [1, 2], 8, ""), ("b", [1, 2, 3, 4, 5], 20, ""), ("b", [], 20, "failed")):
        if seeds:
            (tmp_path / f"{name}.yaml").write_text(
                f"method: {method}\nparameters: {{hyperparams.lr: {lr}, hyperparams.seed: {{values: {seeds}}}}}")
        found.append((str(tmp_path / f"{name}.yaml"), "0" if method == "grid" else str(trials), retry))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grid", "random"])
def test_killed_amended_and_resumed_is_never_killed(tmp_path, base, method):
    """Twenty real trials, killed at five random moments, amended twice: each is what it is where nothing was killed, to the last bit."""
    base.write_text(BASE.replace("max_steps: 20", "max_steps: 120, save_every: 5"))
    rng, stages = random.Random(method), staged_searches(tmp_path, method)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    for i, (search, trials, retry) in enumerate(stages):
        for name in ("whole", "cut"):
            args, out = [search, str(base), str(tmp_path / name / "sweep"), trials, retry], tmp_path / name / "sweep"
            if retry:
                (tmp_path / name / "mended").touch()
            moments = sorted(rng.sample([range(2, 7), range(9, 17)][i], [2, 3][i])) if name == "cut" and i < 2 else []
            for k, number in enumerate(moments):
                killed(args, out / f"trial-{number:04d}", rng.uniform(0, 0.5), midway=k > 0)
            staged(*args)
    whole, cut = (read_trials(tmp_path / name / "sweep") for name in ("whole", "cut"))
    assert len(whole) == 20 and {t.status for t in whole} == {"complete"} and len({t.value for t in whole}) == 20
    assert [(t.params, t.value, t.evaluations, t.error) for t in cut] == [(t.params, t.value, t.evaluations, t.error) for t in whole]
    resumed = sum(e["event"] == "run_resumed" for t in cut for e in events(t.folder(tmp_path / "cut" / "sweep")))
    assert resumed, "no run was cut short"


def test_a_setting_that_the_search_varies_is_said_to_have_no_effect(tmp_path, base, pretend):
    with pytest.warns(UserWarning, match="hyperparams.lr=0.5: has no effect, the search varies it"):
        board = pretend(search_of(tmp_path, LRS), base, tmp_path / "out", overrides=["hyperparams.lr=0.5", "hyperparams.seed=7"], trials=2)
    assert len(board.trials) == 2 and 0.5 not in {t.params["hyperparams.lr"] for t in board.trials}
