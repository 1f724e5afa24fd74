"""The trial notebook: the same run as the command line's, to the last bit, as a document; and honest about what it was not given."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun_nb.config import RunError, load_config
from mainrun_nb.sweep import run_sweep
from mainrun_nb.trainer import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["hyperparams.num_titles=1500", "hyperparams.max_steps=8", "hyperparams.evals_per_epoch=1", "hyperparams.device=cpu"]
COUNTED = ("val/loss", "val/challenge_loss", "val/coverage", "val/bits_per_byte", "train/loss", "steps", "parameters", "seed")


def papermill(out: Path, *args: str, cwd: Path = ROOT, notebook: str = "sweeps/trial.ipynb") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", notebook, str(out), "--no-progress-bar", "-k", "python3", *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)


def outputs(path: Path) -> str:
    """All that the notebook shows, as text."""
    return json.dumps([c.get("outputs", []) for c in json.loads(path.read_text())["cells"]])


def counted(result: dict) -> dict:
    return {k: result.get(k) for k in COUNTED}


def test_a_trial_is_the_same_run(tmp_path):
    """Against the trainer called from here, with the same settings."""
    settings = json.dumps({"overrides": TINY, "out": str(tmp_path / "run"), "seed": 7})
    done = papermill(tmp_path / "out.ipynb", "-p", "config", "sweeps/base/quickstart.yaml", "-y", settings)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    cfg = load_config(ROOT / "sweeps/base/quickstart.yaml", [*TINY, "hyperparams.seed=7"])
    straight = train(cfg, tmp_path / "straight", progress=False)
    assert counted(result) == counted(straight.metrics) and result["seed"] == 7
    shown = outputs(tmp_path / "out.ipynb")
    assert shown.count('"image/png"') == 2, "the live curve and the final one"
    assert str(result["val/loss"]) in shown and '"error"' not in shown and '"name": "stderr"' not in shown


@pytest.mark.slow
def test_a_trial_is_the_same_run_as_on_the_command_line(tmp_path):
    """Opened standalone, too: in its own folder, with its overrides as one string, as a person would write them."""
    args = ["-p", "config", "sweeps/base/quickstart.yaml", "-p", "overrides", " ".join(TINY), "-p", "out"]
    done = papermill(tmp_path / "a.ipynb", *args, str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr[-2000:]
    done = papermill(tmp_path / "b.ipynb", *args, str(tmp_path / "b"), cwd=ROOT / "sweeps", notebook="trial.ipynb")
    assert done.returncode == 0, done.stderr[-2000:]
    code = "from sys import argv as a; from mainrun_nb.cli import train_cli; train_cli(*a[3:], config=a[1], out=a[2])"
    command = [sys.executable, "-c", code, "sweeps/base/quickstart.yaml", str(tmp_path / "c"), *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b, c = (json.loads((tmp_path / name / "result.json").read_text()) for name in "abc")
    assert counted(a) == counted(b) == counted(c)
    assert counted(json.loads(done.stdout.splitlines()[-1])) == counted(a)


@pytest.mark.slow
@pytest.mark.parametrize("args, says", [
    (["-p", "confg", "x.yaml"], "InputError: unknown parameter 'confg'. Did you mean 'config'?"),
    (["-p", "overrides", "hyperparams.lrr=1"], "hyperparams.lrr"),
    (["-p", "config", "none.yaml"], "none.yaml"),
    (["-p", "overrides", "tracking.name=hf_" + "a1" * 10], "InputError: overrides: holds a key, or what looks like one; remove"),
])  # fmt: skip
def test_a_mistake_is_an_error_in_the_notebook(tmp_path, args, says):
    done = papermill(tmp_path / "out.ipynb", *args, "-p", "out", str(tmp_path / "run"))
    assert done.returncode != 0 and says in done.stderr
    assert says.removeprefix("InputError: ") in outputs(tmp_path / "out.ipynb").replace('\\"', '"')
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_of_notebooks_keeps_the_one_that_failed(tmp_path):
    """A run whose loss explodes, a setting that is refused, and a good one; the good one is what --fast makes of it."""
    (tmp_path / "search.yaml").write_text("method: grid\nparameters: {hyperparams.lr: {values: [1.0e+9, 1.0e-3]}}")
    (tmp_path / "modes.yaml").write_text("method: grid\nparameters: {attn_configs.causal.n_head: {values: [7]}}")
    base = ROOT / "sweeps/base/quickstart.yaml"
    settings = [*TINY[:1], "hyperparams.max_steps=14", *TINY[2:]]
    board = run_sweep(tmp_path / "search.yaml", base, tmp_path / "out", jobs=2, overrides=settings, progress=False)
    assert [t.status for t in board.trials] == ["failed", "complete"] and "finite" in board.trials[0].error
    assert "finite" in outputs(tmp_path / "out" / "trial-0000" / "out.ipynb")
    fast = run_sweep(tmp_path / "search.yaml", base, tmp_path / "fast", jobs=2, fast=True, overrides=settings, progress=False)
    assert [(t.status, t.value, t.evaluations) for t in fast.trials] == [(t.status, t.value, t.evaluations) for t in board.trials]
    assert counted(fast.best.metrics) == counted(board.best.metrics)
    assert fast.trials[0].error == board.trials[0].error.replace("/out/", "/fast/")
    for i, quick in enumerate((False, True)):
        with pytest.raises(RunError, match=r"no trial is complete \(1 invalid\); trial 0: .*7 heads do not divide"):
            run_sweep(tmp_path / "modes.yaml", base, tmp_path / f"m{i}", fast=quick, overrides=settings, progress=False)
