"""Files of different runs in one folder are never taken for one; what may differ goes on and is said; a log keeps its past."""
import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_training import assert_same_run, tiny

from mainrun_nb import cli
from mainrun_nb.check import check_files
from mainrun_nb.checkpoint import Identity, list_checkpoints, load_checkpoint, load_run, read_checkpoint, read_sealed
from mainrun_nb.config import InputError, load_config, save_config
from mainrun_nb.generate import generate
from mainrun_nb.runtime import Processes
from mainrun_nb.tracking import as_event, plot_curves, read_events, run_id
from mainrun_nb.trainer import evaluate_run, make_state, train

SHORT = ("hyperparams.max_steps=10", "hyperparams.evals_per_epoch=2", "hyperparams.keep_checkpoints=2")


def quick(run_dir, *more, resume=False, until=None):
    """Train a short run; `until`: the power fails after that step."""
    def cut(event):
        if event["event"] == "training_step" and event["step"] == until:
            raise EOFError

    if until:
        with pytest.raises(EOFError):
            train(tiny(*SHORT, *more), run_dir, resume=resume, progress=False, on_event=cut)
        return None
    return train(tiny(*SHORT, *more), run_dir, resume=resume, progress=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two finished runs that differ in the seed, and a half one with the first one's settings."""
    root = tmp_path_factory.mktemp("pair")
    quick(root / "a")
    quick(root / "b", "hyperparams.seed=7", "hyperparams.num_titles=1100")
    quick(root / "half", until=8)
    return root


@pytest.fixture
def copy(pair, tmp_path):
    """Copies of them, to be spoilt."""
    def make(name="a"):
        return shutil.copytree(pair / name, tmp_path / name)
    return make


def said(call):
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def refused(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), e.value


def bad(run_dir):
    return {f.file: f.state for f in check_files(run_dir) if f.state != "whole"}


# --- what every file carries ---


def test_every_file_that_can_names_its_run(pair):
    result, log = read_sealed(pair / "a" / "result.json"), read_events(pair / "a")
    own = result["identity"]
    assert len(own["run"]) == 32 and set(own) == set(asdict(Identity("", "", "", "")))
    assert log[0]["identity"] == own and {"torch", "commit", "threads"} <= log[0]["made_with"].keys()
    for path in list_checkpoints(pair / "a"):
        mark = read_checkpoint(path).mark
        assert mark["identity"] == own and mark["made_with"]["torch"] == torch.__version__
    assert result["data"]["sha256"].startswith(own["titles"])
    assert read_sealed(pair / "b" / "result.json")["identity"]["run"] != own["run"] and bad(pair / "a") == {}


# --- the cases that were taken for one run ---


@pytest.mark.parametrize("resume", [False, True])
def test_a_half_run_that_lost_its_configuration_is_not_taken_for_new(copy, resume):
    run_dir = copy("half")
    (run_dir / "config.yaml").unlink()
    before = sorted(p for p in run_dir.rglob("*") if p.is_file())
    refused(lambda: quick(run_dir, "hyperparams.max_steps=4", resume=resume), "no config.yaml", "choose another --out")
    assert sorted(p for p in run_dir.rglob("*") if p.is_file()) == before
    assert bad(run_dir)["config.yaml"] == "missing"


def test_another_configuration_is_put_into_a_folder_with_an_old_result(copy):
    run_dir = copy()
    save_config(tiny(*SHORT, "hyperparams.seed=7"), run_dir / "config.yaml")
    refused(lambda: quick(run_dir, "hyperparams.seed=7", resume=True), "config.yaml", "hyperparams.seed (1337 at its start, 7 now)")


def test_a_result_from_before_there_were_ids_is_known_by_its_seed(copy, pair):
    run_dir = make_old(copy())
    result = json.loads((run_dir / "result.json").read_text())
    (run_dir / "result.json").write_text(json.dumps({**result, "seed": 7}))
    refused(lambda: quick(run_dir, resume=True), "result.json", "seed 7")


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "tokenizer/tokenizer.json", "checkpoints/step-00000010", "config.yaml"])
def test_a_file_of_another_run_is_refused_by_every_command(copy, pair, name):
    run_dir = copy()
    shutil.rmtree(run_dir / name) if (run_dir / name).is_dir() else (run_dir / name).unlink()
    (shutil.copytree if (pair / "b" / name).is_dir() else shutil.copy)(pair / "b" / name, run_dir / name)
    for call in (lambda: quick(run_dir, resume=True), lambda: evaluate_run(run_dir), lambda: generate(run_dir), lambda: load_run(run_dir)):
        refused(call, str(run_dir / name), "put the run's own back")
    found = bad(run_dir)
    assert set(found.values()) == {"of another run"} and all(file.startswith(name) for file in found)


def test_the_dashboards_id_of_another_run_is_refused(copy, pair):
    run_dir, own, other = copy(), *(read_sealed(pair / name / "result.json")["identity"] for name in "ab")
    known = run_id(run_dir, own)
    assert run_id(run_dir, own) == known and bad(run_dir) == {}
    text = (run_dir / "tracking.json").read_text()
    (run_dir / "tracking.json").write_text(text.replace(known, "0" * 8))
    assert bad(run_dir) == {"tracking.json": "damaged"}
    (run_dir / "tracking.json").write_text(json.dumps({"id": "0" * 8}))  # from before it said whose it is
    assert bad(run_dir) == {} and run_id(run_dir, own) == "0" * 8
    (run_dir / "tracking.json").unlink()
    run_id(run_dir, other)
    for call in (lambda: quick(run_dir, resume=True), lambda: evaluate_run(run_dir), lambda: load_run(run_dir)):
        refused(call, "tracking.json", "put the run's own back or remove this one")
    assert bad(run_dir) == {"tracking.json": "of another run"}


def test_an_edited_configuration_is_refused_and_the_setting_named(copy):
    run_dir = copy()
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("n_head: 2", "n_head: 4"))
    refused(lambda: evaluate_run(run_dir), "config.yaml", "attn_configs.causal.n_head (2 at its start, 4 now)")
    for cut in ("", text[: text.index("model_configs")]):  # still valid YAML, and all that is gone would be a default
        (run_dir / "config.yaml").write_text(cut)
        refused(lambda: load_run(run_dir), "config.yaml", "is not the one")
        assert bad(run_dir) == {"config.yaml": "of another run"}
    (run_dir / "config.yaml").write_text("# tidied up\n" + text.replace("save_every: 2", "save_every: 5"))
    assert said(lambda: evaluate_run(run_dir)) == []  # a setting that decides no number


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(copy):
    run_dir = copy()
    last = list_checkpoints(run_dir)[-1]
    shutil.rmtree(last)
    shutil.copytree(list_checkpoints(run_dir)[-1], last)
    with pytest.warns(UserWarning, match="it is that of step"):
        assert load_checkpoint(run_dir).step < 10


def test_one_digit_changed_in_a_manifest_or_result(copy):
    run_dir = copy()
    early = list_checkpoints(run_dir)[0] / "manifest.json"
    early.write_text(early.read_text().replace('"threads": 1', '"threads": 2'))
    result = run_dir / "result.json"
    result.write_text(result.read_text().replace('"val/loss": ', '"val/loss": 1'))
    assert {str(early.relative_to(run_dir)), "result.json"} <= bad(run_dir).keys() and set(bad(run_dir).values()) == {"damaged"}
    assert read_checkpoint(list_checkpoints(run_dir)[-1]).step == 10
    (found,) = [w for w in said(lambda: quick(run_dir, resume=True)) if "result.json" in w]
    assert "is damaged" in found and "written again" in found and "result.json" not in bad(run_dir)


# --- what may differ ---


@pytest.fixture
def titled(tmp_path):
    """A run on a file of titles that has moved since."""
    titles, moved = tmp_path / "titles.txt", tmp_path / "moved.txt"
    titles.write_text("".join(f"A title about the number {i}\n" for i in range(1000)))
    settings = (f"data.source={titles}",)
    quick(tmp_path / "run", *settings, until=8)
    titles.rename(moved)
    return tmp_path / "run", titles, moved


def test_titles_are_known_by_their_digest_wherever_they_lie(titled, monkeypatch):
    run_dir, titles, moved = titled
    monkeypatch.delenv("HN_TITLES", raising=False)
    refused(lambda: evaluate_run(run_dir), str(titles))
    assert evaluate_run(run_dir, overrides=[f"data.source={moved}"])["step"] == 6
    monkeypatch.setenv("HN_TITLES", str(moved))
    assert any("HN_TITLES" in w for w in said(lambda: evaluate_run(run_dir)))
    other = moved.with_name("other.txt")
    other.write_text(moved.read_text().replace("number 7", "digit 7"))
    refused(lambda: quick(run_dir, f"data.source={other}", resume=True), "titles are not those", str(other))
    refused(lambda: evaluate_run(run_dir, overrides=[f"data.source={other}"]), "no longer holds the titles of this run")
    whole = quick(run_dir, f"data.source={moved}", resume=True)
    refused(lambda: quick(run_dir, f"data.source={other}", resume=True), "titles are not those")  # finished: not the old result either
    assert quick(run_dir, f"data.source={moved}", resume=True).metrics == whole.metrics


def test_other_threads_are_said_in_one_line(copy, pair):
    run_dir = copy("half")
    torch.set_num_threads(2)
    try:
        told = [w for w in said(lambda: quick(run_dir, resume=True)) if "goes on with" in w]
    finally:
        torch.set_num_threads(1)
    assert len(told) == 1 and "threads 2 instead of 1" in told[0] and "\n" not in told[0]
    resumed = next(e for e in read_events(run_dir) if e["event"] == "run_resumed")
    assert resumed["changed"] == "threads 2 instead of 1"
    again = copy()
    assert said(lambda: quick(again, resume=True)) == []


def test_each_shard_of_the_data_keeps_its_stream(pair):
    """Saved by two processes: gone back to by one and by three, twice each, the draws are the same."""
    cfg, state = tiny(*SHORT), load_checkpoint(pair / "a").state
    mine = make_state(cfg, 400, torch.device("cpu"))
    other = torch.Generator().manual_seed(5).get_state()
    saved = {**state, "rng": [state["rng"][0], {"cpu": other, "cuda": None}], "optimizer": mine.optimizer.state_dict()}

    def draws(rank, count):
        mine.load(mine.model.state_dict(), saved, Processes(rank, count), 1337)
        return torch.rand(3).tolist()

    three = [draws(rank, 3) for rank in range(3)]
    assert three == [draws(rank, 3) for rank in range(3)] and len({tuple(d) for d in three}) == 3
    assert draws(0, 1) == three[0] and torch.equal(mine.idle_rng[0]["cpu"], other)
    kept = mine.state_dict(Processes())["rng"]
    assert len(kept) == 2 and torch.equal(kept[1]["cpu"], other)


# --- from before there were ids ---


def make_old(run_dir):
    """The folder as a version without ids left it."""
    for path in [run_dir / "result.json", *run_dir.glob("checkpoints/*/manifest.json")]:
        if path.exists():
            content = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("identity", "seal", "mark", "files")}))
    events = read_events(run_dir)
    lines = [json.dumps({k: v for k, v in e.items() if k not in ("identity", "made_with")}) + "\n" for e in events]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir


def test_a_folder_from_before_there_were_ids_goes_on_and_gets_one(copy, pair):
    run_dir = make_old(copy("half"))
    assert len([w for w in said(lambda: evaluate_run(run_dir)) if "could not be checked" in w]) == 1
    told = said(lambda: quick(run_dir, resume=True, until=9))
    assert len([w for w in told if "could not be checked" in w]) == 1
    quick(run_dir, resume=True)
    assert_same_run(pair / "a", run_dir)
    assert read_sealed(run_dir / "result.json")["identity"] and bad(run_dir) == {}
    shutil.copy(make_old(copy()) / "metrics.jsonl", run_dir / "metrics.jsonl")
    refused(lambda: load_run(run_dir), "metrics.jsonl", "from before there were ids")


# --- the log ---


SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in ("zero", "head", "noise")]


@pytest.mark.parametrize("damage", ["flip", "tail", "gone", *SLOW])
def test_a_damaged_log_keeps_what_is_readable_and_says_what_is_not(copy, pair, damage):
    run_dir = copy("half")
    log = run_dir / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if b'"training_step"' in line and b'"step": 3,' in line)
    spoilt = {"flip": [*lines[:third], lines[third].replace(b'"train/loss": ', b'"train/loss": 1'), *lines[third + 1 :]],
              "zero": [*lines[:third], b"\0" * len(lines[third]), *lines[third + 1 :]],
              "tail": [*lines[:third], lines[third][:30]], "head": [lines[0][:-9] + b"\n", *lines[1:]],
              "noise": [b"\xff\xfe", bytes(range(256))], "gone": []}[damage]
    log.unlink() if damage == "gone" else log.write_bytes(b"".join(spoilt))
    assert damage == "gone" or said(lambda: read_events(log)) or damage == "tail"
    told = [w for w in said(lambda: quick(run_dir, resume=True)) if "metrics.jsonl" in w]
    assert len(told) == 1 and ("damaged lines set aside" in told[0] or damage == "gone")
    lost = {"flip": {3}, "zero": {3, 4}, "tail": {3, 4, 5, 6}, "head": set(), "noise": set(range(1, 7)), "gone": set(range(1, 7))}[damage]
    events = read_events(run_dir)
    assert set(range(1, 11)) - {e["step"] for e in events if e["event"] == "training_step"} == lost
    kinds = [e["event"] for e in events]
    assert kinds.count("hyperparameters_configured") == kinds.count("dataset_info") == 1 and kinds[-1] == "run_finished"
    resumed = next(e for e in events if e["event"] == "run_resumed")
    assert resumed["missing_steps"] == len(lost) and all(as_event(line) for line in log.read_bytes().splitlines())
    curve = plot_curves(events).axes[0].lines[0].get_ydata()
    assert any(y != y for y in curve) == (damage in ("flip", "zero", "tail"))  # a gap between steps that are there
    evaluate_run(run_dir)
    assert json.loads((run_dir / "result.json").read_text())["val/loss"] == json.loads((pair / "a" / "result.json").read_text())["val/loss"]


# --- commands ---


def command(capsys, call):
    """Exit code, output and errors of a command."""
    code = 0
    try:
        call()
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


def test_check_says_the_state_of_each_file_and_ends_with_its_code(copy, capsys, tmp_path):
    run_dir = copy()
    code, out, _ = command(capsys, lambda: cli.check_cli(str(run_dir)))
    assert code == 0 and len(out.splitlines()) == 6 + 3 * len(list_checkpoints(run_dir))
    (run_dir / "samples.txt").write_text("mine\n")
    (run_dir / "curves.png").unlink()
    code, out, _ = command(capsys, lambda: cli.check_cli(str(run_dir)))
    assert code == 1 and "damaged         samples.txt" in out and "missing         curves.png" in out
    for path in ("nowhere", ""):
        code, _, err = command(capsys, lambda path=path: cli.check_cli(str(tmp_path / path)))
        assert code == 2 and err.count("\n") == 1
    half = copy("half")
    assert command(capsys, lambda: cli.check_cli(str(half)))[0] == 0  # not finished is no fault
    shutil.rmtree(half / "checkpoints")
    assert bad(half) == {"checkpoints": "missing"}


def test_resume_needs_no_config_and_eval_names_its_step(copy, capsys, pair):
    run_dir = copy("half")
    code, _, err = command(capsys, lambda: cli.train_cli("hyperparams.lr=0.5", out=str(run_dir), resume=True))
    assert code == 2 and "hyperparams.lr (0.003 there, 0.5 here)" in err
    code, out, _ = command(capsys, lambda: cli.train_cli(out=str(run_dir), resume=True))
    assert code == 0 and json.loads(out.splitlines()[-1])["steps"] == 10
    assert_same_run(pair / "a", run_dir)
    assert json.loads(command(capsys, lambda: cli.eval_cli(str(run_dir)))[1])["step"] == 10
    code, _, err = command(capsys, lambda: cli.train_cli(out=str(run_dir) + "x", resume=True))
    assert code == 2 and "--config is required" in err
    Path(run_dir, "samples.txt").unlink()
    assert command(capsys, lambda: cli.train_cli(out=str(run_dir), resume=True))[0] == 0


def test_without_a_checkpoint_a_run_begins_anew(copy, pair):
    run_dir = copy("half")
    shutil.rmtree(run_dir / "checkpoints")
    shutil.rmtree(run_dir / "tokenizer")
    assert len([w for w in said(lambda: quick(run_dir, resume=True)) if "begins anew" in w]) == 1
    assert_same_run(pair / "a", run_dir)
    assert load_config(run_dir / "config.yaml").hyperparams.max_steps == 10
