"""The scripts of benchmarks/: that `make bench` can run them, and that they run to their end, in small."""
import argparse
import json
import re
import subprocess
import sys

import pytest

from mainrun_nb import attention, config

SMALL = dict(num_titles=600, epochs=1, vocab_size=300, context_length=32, batch_size=4)


class Parsed(Exception):
    """Raised where a script has read its arguments."""


def test_every_script_of_make_bench_needs_no_argument(root, benchmark, monkeypatch):
    said = subprocess.run(["make", "--just-print", "bench"], cwd=root, capture_output=True, text=True, check=True).stdout
    scripts = re.search(r"for f in (.+?); do echo .*python \$f ", said)[1].split()
    assert {"benchmarks/attention.py", "benchmarks/sparsek.py", "benchmarks/training.py"} < set(scripts)
    parse = argparse.ArgumentParser.parse_args

    def stop(self):
        parse(self)  # leaves the program where something is required
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for script in scripts:
        module = benchmark(script.split("/")[1].removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script])
        if hasattr(module, "argparse"):  # others take no arguments
            with pytest.raises(Parsed):
                module.main()


def test_the_runs_of_the_sparsek_study_train_under_both_rules(benchmark, monkeypatch, tmp_path):
    study = benchmark("sparsek")
    monkeypatch.setattr(config, "GROUPS", dict(config.GROUPS))  # the study registers an attention of its own
    monkeypatch.setattr(attention, "ATTENTIONS", dict(attention.ATTENTIONS))
    monkeypatch.setattr(study, "HYPER", study.HYPER | SMALL)
    monkeypatch.setattr(study, "GPT", study.GPT | dict(d_model=24, hidden_layer=24, n_layer=1))
    monkeypatch.setattr(study, "RESULTS", tmp_path / "sparsek.json")
    monkeypatch.setenv("HN_TITLES", "synthetic")
    monkeypatch.setattr(sys, "argv", ["sparsek.py", "runs", "--seeds", "1"])
    study.main()
    rules = json.loads((tmp_path / "sparsek.json").read_text())["runs"]["rules"]
    assert list(rules) == list(study.LAYERS) and all(found["1"]["steps"] > 5 and found["1"]["val/loss"] > 1 for found in rules.values())
    assert rules["k best"]["1"]["val/loss"] != rules["all above zero"]["1"]["val/loss"]


@pytest.mark.parametrize("rows", [64, 1024])
def test_the_loss_study_holds_its_budget_against_chunks_that_it_measures(benchmark, monkeypatch, tmp_path, rows):
    study = benchmark("loss")
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    given = ["--rows", str(rows), "--rounds", "1", "--width", "16", "--vocab", "50", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["loss.py", *given])
    assert study.main() in (0, 1)
    verdict = json.loads((tmp_path / "loss.json").read_text())["verdict"]
    assert len(verdict) == 4 and all(f"ours, {rows // 8} rows" in what for what in verdict)


def test_a_table_takes_rows_of_its_own_columns_only(benchmark, tmp_path):
    rows, path = benchmark("_rows"), tmp_path / "study.csv"
    rows.add_rows(path, {"a": 1, "b": 2}, {"b": 4, "a": 3})
    for other in ({"b": 2, "a": 1}, {"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(SystemExit, match="has other columns"):
            rows.add_rows(path, other)
    path.write_text("a,b\n")  # of a study that was stopped
    with pytest.raises(SystemExit, match="has other columns"):
        rows.add_rows(path, {"b": 2, "a": 1})
    rows.add_rows(path, {"a": 1, "b": 2})
    assert rows.read_rows(path) == [{"a": "1", "b": "2"}]
