"""The ledger of full runs, and the runner that keeps it."""

import csv
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch

from mainrun_nb.config import load_config
from mainrun_nb.models import build_model, count_parameters
from mainrun_nb.scaling import runs_table

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "sweeps" / "results.csv"
TINY = """
hyperparams: {num_titles: 300, vocab_size: 400, context_length: 16, batch_size: 4, max_steps: 3, evals_per_epoch: 1, optimizer: adamw}
model_configs: {gpt: {d_model: 16, hidden_layer: 16, n_layer: 1}}
attn_configs: {causal: {n_head: 2}}
data: {source: synthetic}
tokenizer: {kind: bpe}
"""


def ledger() -> list[dict[str, str]]:
    with LEDGER.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def recipes(benchmark, tmp_path, monkeypatch):
    """benchmarks/recipes.py, working in a folder of its own on a study of three runs, the second of which cannot be."""
    module = benchmark("recipes")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "tiny.yaml").write_text(TINY)
    runs = {"one": [], "impossible": ["attn_configs.causal.n_head=3"], "two": ["hyperparams.lr=0.01"]}
    study = {name: ("tiny.yaml", more) for name, more in runs.items()}
    for name, value in {"ROOT": tmp_path, "LEDGER": tmp_path / "sweeps" / "results.csv", "STUDIES": {"tiny": lambda: study}}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HN_TITLES", "not-used.txt")
    return module


def test_every_run_gets_a_row_and_only_once(recipes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tiny"])
    recipes.main()
    rows = list(recipes.read_ledger().values())
    ended = [("one", "finished", "1337"), ("impossible", "failed", "1337"), ("two", "finished", "1337")]
    assert [(r["name"], r["status"], r["seed"]) for r in rows] == ended
    assert "3 heads do not divide" in rows[1]["error"] and not rows[1]["val/loss"]
    assert rows[0]["val/loss"] != rows[2]["val/loss"] and 0 < float(rows[0]["val/coverage"]) <= 1
    assert rows[0]["lossless"] == "True" and 0 < float(rows[0]["reference/kneser_ney"]) < float(rows[0]["reference/unigram"])
    assert rows[0]["command"] == "mainrun-train --config tiny.yaml --out sweeps/runs/tiny-one-1337"
    assert [r["d"] for r in runs_table(recipes.LEDGER)] == [3 * 4 * 16] * 2  # the scaling chapter reads it
    capfd.readouterr()
    recipes.main()
    assert capfd.readouterr().out == "" and list(recipes.read_ledger().values()) == rows


def test_seeds_and_several_at_a_time(recipes, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tiny", "--only", "one", "--seeds", "1", "2", "--jobs", "2"])
    recipes.main()
    rows = recipes.read_ledger()
    assert set(rows) == {("tiny", "one", "1"), ("tiny", "one", "2")}
    one, two = rows["tiny", "one", "1"], rows["tiny", "one", "2"]
    assert one["val/loss"] != two["val/loss"] and one["sha256"] == two["sha256"]
    assert two["command"].endswith("sweeps/runs/tiny-one-2 hyperparams.seed=2") and int(two["threads"]) <= max(1, os.cpu_count() // 2)


def test_a_dry_run_runs_nothing_and_a_changed_command_is_refused(recipes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipes.py", "tiny", "--only", "one", "--dry"])
    recipes.main()
    assert capsys.readouterr().out.strip() == "mainrun-train --config tiny.yaml --out sweeps/runs/tiny-one-1337"
    assert recipes.read_ledger() == {}
    recipes.add_row({"study": "tiny", "name": "one", "seed": 1337, "status": "finished", "command": "mainrun-train --config other.yaml"})
    with pytest.raises(SystemExit, match="tiny one 1337: the ledger's row is of another command"):
        recipes.main()


def test_what_was_failed_and_what_only_interrupted(recipes, tmp_path):
    log = tmp_path / "run.log"
    log.write_text("step 3\nhyperparams.lr: must be above 0\n\n")
    assert recipes.failure(2, log) == "hyperparams.lr: must be above 0"
    assert recipes.failure(-9, log) == "killed by SIGKILL"
    for code in (130, 143, -2, -15):
        with pytest.raises(SystemExit):
            recipes.failure(code, log)
    log.write_text("run: another process is at work in this folder; choose another --out\n")
    with pytest.raises(SystemExit):
        recipes.failure(2, log)


@pytest.mark.parametrize("name", ["final", "control"])
def test_what_is_said_of_the_recipes_is_in_the_ledger(name):
    rows = [r for r in ledger() if (r["study"], r["name"], r["status"]) == ("full", name, "finished")]
    config = shlex.split(rows[0]["command"])[2]
    first = next(r for r in rows if r["seed"] == "1337")
    assert f"{float(first['val/loss']):.4f} nats per character" in (ROOT / config).read_text()
    loss = sum(float(r["val/loss"]) for r in rows) / len(rows)
    line = next(text for text in (ROOT / "README.md").read_text().splitlines() if text.startswith(f"| [{name}]({config})"))
    assert f"**{loss:.3f}**" in line and line.endswith(f"| {len(rows)} |")


@pytest.mark.skipif(not LEDGER.exists(), reason="no full runs yet")
def test_the_ledger_tells_what_was_run():
    rows = ledger()
    assert len({(r["study"], r["name"], r["seed"]) for r in rows}) == len(rows) > 0
    for row in rows:
        program, *words = shlex.split(row["command"])
        if row["study"] == "untouched":
            trained = next(r for r in rows if (r["study"], r["name"], r["seed"]) == ("full", row["name"], row["seed"]))
            assert program == "mainrun-eval" and words[0] == shlex.split(trained["command"])[4]
            continue
        assert program == "mainrun-train" and words[0] == "--config" and words[2] == "--out"
        cfg = load_config(ROOT / words[1], words[4:])
        assert str(cfg.hyperparams.seed) == row["seed"] and str(cfg.hyperparams.batch_size) == row["batch_size"]
        assert row["status"] in ("finished", "failed")
        if row["status"] == "finished":
            assert 0.5 < float(row["val/loss"]) < 3 and 0 < float(row["val/coverage"]) <= 1 and len(row["sha256"]) == 12


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps" / "sota").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_keep_to_their_track(path):
    cfg = load_config(path)
    with torch.device("meta"):
        parameters = count_parameters(build_model(cfg, cfg.hyperparams.vocab_size))
    small = path.stem.startswith("small")
    assert parameters <= 4_000_000 if small else 27_000_000 <= parameters <= 50_000_000
    hp = cfg.hyperparams
    assert (hp.epochs, hp.num_titles, hp.val_frac, cfg.data.seed) == (7, 100_000, 0.1, 1337)
