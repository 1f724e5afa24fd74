"""The console commands: bad input gives one line, exit code 2 and nothing written; good input gives what the README promises."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun_nb import cli
from mainrun_nb.config import load_config
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.trainer import make_plan, prepare_data

ROOT = Path(__file__).resolve().parents[1]
QUICK = str(ROOT / "sweeps/base/quickstart.yaml")
SEARCH = str(ROOT / "sweeps/assessed/batch_size.yaml")
TINY = ["hyperparams.num_titles=1500", "hyperparams.max_steps=12", "hyperparams.batch_size=8", "hyperparams.vocab_size=500",
        "model_configs.gpt.d_model=32", "model_configs.gpt.hidden_layer=32", "model_configs.gpt.n_layer=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def refuse(capsys, *overrides, config=QUICK, out="run"):
    """The one line with which the command refuses this input; checks the exit code and that nothing was left behind."""
    before = sorted(Path.cwd().iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.train_cli(*overrides, config=config, out=out)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2, stderr
    assert stderr.count("\n") == 1 and stderr.startswith("mainrun-train: "), stderr
    assert sorted(Path.cwd().iterdir()) == before
    return stderr


@pytest.mark.parametrize(("override", "says"), [
    ("hyperparams.bath_size=64", "Did you mean 'batch_size'"),
    ("hyperparam.batch_size=64", "Did you mean 'hyperparams'"),
    ("hyperparams.batch_size=many", "must be of type int, found 'many'"),
    ("hyperparams.batch_size=0", "above 0"),
    ("hyperparams.context_length=-1", "2 or more"),
    ("hyperparams.context_length=1", "2 or more"),
    ("hyperparams.val_frac=0", "between 0 and 1"),
    ("hyperparams.val_frac=1", "between 0 and 1"),
    ("hyperparams.warmup=1.5", "at least 0 and below 1"),
    ("hyperparams.optimizer=adamww", "Did you mean 'adamw'"),
    ("hyperparams.scheduler=cosin", "Did you mean 'cosine'"),
    ("tokenizer.kind=bbpe", "Did you mean 'bpe'"),
    ("model_configs.gpt.attention_layer=casual", "Did you mean 'causal'"),
    ("hyperparams.model_architecture=gtp", "Did you mean 'gpt'"),
    ("attn_configs.causal.n_head=5", "5 heads do not divide"),
    ("hyperparams.batch_size=100000", "the stream has"),
    ("data.source=nowhere.txt", "nowhere.txt"),
    ("tracking.backends=[wandbb]", "Did you mean 'wandb'"),
    ("nonsense", "expected section.key=value"),
])
def test_bad_settings(override, says, capsys):
    assert says in refuse(capsys, *TINY, override)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("empty.txt", b"", "empty.txt"),
    ("one.txt", b"One title\n", "1 title"),
    ("few.txt", b"A title\nAnother title\nA third\n", "hyperparams.num_titles=3"),
    ("binary.txt", bytes(range(256)) * 8, "binary.txt"),
    ("data.csv", b"name,url\nx,y\n", "title"),
    ("data.jsonl", b"{not json}\n", "data.jsonl"),
    ("data.parquet", b"PAR1 not really", "data.parquet"),
    ("data.gz", b"not gzip", "data.gz"),
])
def test_bad_data(name, content, says, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert says in refuse(capsys, *TINY, f"data.source={name}")


@pytest.mark.parametrize(("content", "says"), [
    (None, "no such file"), (b"a: [1", "not valid YAML"), (b"- 1\n", "mapping"), (b"\xff\xfe\x00", "c.yaml"),
    (b"hyperparams: 3", "section"),
])
def test_bad_config(content, says, tmp_path, capsys):
    if content is not None:
        (tmp_path / "c.yaml").write_bytes(content)
    assert says in refuse(capsys, config="c.yaml")


def test_bad_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "not a writable folder" in refuse(capsys, *TINY, out="file/run")
    assert "/proc" in refuse(capsys, *TINY, out="/proc/mainrun")
    assert "--out is required" in refuse(capsys, out="")


def test_train_evaluate_write(tmp_path, capsys):
    """The three commands on one small run; the folder is then refused, resumed, and refused with other settings."""
    cli.train_cli(*TINY, config=QUICK, out="run")
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert result == json.loads(Path("run/result.json").read_text())
    assert "validation loss" in shown.err and "floor of the grammar" in shown.err and "run/curves.png" in shown.err
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")
    cli.eval_cli("run")
    scored = json.loads(capsys.readouterr().out)
    assert scored["val/loss"] == result["val/loss"] > scored["val/floor"]
    Path("other.txt").write_text("Ask HN: Who is hiring?\nShow HN: A tiny thing\n" * 5)
    cli.eval_cli("run", titles="other.txt")
    assert json.loads(capsys.readouterr().out)["val/challenge_loss"] is None  # no whole window: not 0.0
    cli.generate_cli("run", prompt="Show HN:", n=3, seed=1)
    titles = capsys.readouterr().out.splitlines()
    assert len(titles) == 3 and all(t.startswith("Show HN:") for t in titles)
    assert "already holds a run" in refuse(capsys, *TINY)
    cli.train_cli(*TINY, config=QUICK, out="run", resume=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_a_run_is_not_scored_on_titles_that_it_was_trained_on(capsys):
    """The same file with its lines in another order would put most of the training titles into the validation half."""
    titles = sample_titles(1500, seed=1)
    Path("mine.txt").write_text("\n".join(titles))
    cli.train_cli(*TINY, "data.source=mine.txt", config=QUICK, out="run")
    cli.eval_cli("run")
    Path("mine.txt").write_text("\n".join(sorted(titles)))
    with pytest.raises(SystemExit) as stop:
        cli.eval_cli("run")
    assert stop.value.code == 2 and "no longer holds the titles of this run" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted([*ROOT.glob("sweeps/base/*.yaml"), *ROOT.glob("sweeps/sota/*.yaml")]), ids=lambda p: p.stem)
def test_the_smoke_test_has_enough_titles_for_every_configuration(path):
    """What `--test` sets must leave a batch to train on."""
    cfg = load_config(path, ["data.source=synthetic", *cli.TEST_BUDGET])
    assert make_plan(cfg.hyperparams, len(prepare_data(cfg).train_ids)).max_steps == 3


@pytest.mark.parametrize(("call", "says"), [
    (lambda: cli.eval_cli("nowhere"), "not a run folder"),
    (lambda: cli.generate_cli("nowhere"), "not a run folder"),
    (lambda: cli.sweep_cli(SEARCH, config=QUICK, out="sweep", engine="wandb", resume=True), "does not take --resume"),
    (lambda: cli.sweep_cli(SEARCH, "data.source=nowhere.txt", config=QUICK, out="sweep"), "nowhere.txt"),
])
def test_other_commands_refuse(call, says, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(("name", "says"), [("a/b", "--promote: must be a name"), ("mine", "sweeps/sota/mine.yaml: exists")])
def test_a_name_for_the_best_trial_is_refused_before_the_sweep(name, says, capsys, monkeypatch):
    monkeypatch.setattr("mainrun_nb.sweep.run_sweep", lambda *args, **kwargs: pytest.fail("the sweep ran"))
    Path("sweeps/sota").mkdir(parents=True)
    Path("sweeps/sota/mine.yaml").touch()
    with pytest.raises(SystemExit) as stop:
        cli.sweep_cli(SEARCH, config=QUICK, out="sweep", promote=name)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1


def test_recipes_with_a_dot_in_their_name_are_copied_each(capsys):
    names = ["gpt-0.9", "gpt-0.95", "gpt-0.yaml"]
    Path("sweeps/sota").mkdir(parents=True)
    for name in names:
        Path(f"sweeps/sota/{name}.yaml").write_text(f"# {name}\n")
    cli.configs_cli(copy="mine")
    assert [Path(f"mine/sota/{name}.yaml").read_text() for name in names] == [f"# {name}\n" for name in names]
    cli.configs_cli(name="gpt-0.95", copy="alone")
    assert [p.name for p in Path("alone/sota").iterdir()] == ["gpt-0.95.yaml"]


def test_console_scripts():
    """The installed commands themselves: help, and an error without a traceback."""
    script = Path(sys.executable).with_name("mainrun-train")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    run = lambda *args: subprocess.run([script, *args], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: E731
    assert "--resume" in run("--help").stdout
    bad = run("--config", QUICK, "--out", "run", "hyperparams.lr=fast")
    assert bad.returncode == 2 and "hyperparams.lr" in bad.stderr and "Traceback" not in bad.stderr
