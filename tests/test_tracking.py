"""W&B and Trackio for real, without a network; and a run that none of them can stop."""
import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun_nb import tracking
from mainrun_nb.config import NAMES, TINY, InputError, RunError, flatten, load_config, tiny
from mainrun_nb.tracking import Tracker, check_tracking, plot_curves, read_events, register_backend, wandb_mode
from mainrun_nb.trainer import train

ROOT = Path(__file__).resolve().parents[1]
SMALLER = [
    *(f"hyperparams.{s}" for s in ["num_titles=600", "vocab_size=400", "max_steps=6", "save_every=2"]),
    *(f"model_configs.gpt.{s}" for s in ["d_model=16", "hidden_layer=16", "n_layer=1"])]


def smaller(*more):
    return tiny(*SMALLER, *more)


class Recorded:
    """A backend that remembers what it was told, and fails where it should."""

    fails: set[str] = set()
    runs: list = []

    def __init__(self, run_dir, cfg, run_id):
        self.id, self.numbers, self.described, self.files, self.code = run_id, [], {}, [], None
        self.act("start")
        self.runs.append(self)

    def act(self, name):
        if name in self.fails:
            raise ConnectionError(f"{name}: no network\nand a long trace")

    def describe(self, fields):
        self.act("describe")
        self.described |= fields

    def log(self, step, numbers):
        self.act("log")
        self.numbers.append((step, numbers))

    def finish(self, files, exit_code):
        self.act("finish")
        self.files, self.code = [f.name for f in files], exit_code


@pytest.fixture
def recorded(monkeypatch):
    backend = type("Recorded", (Recorded,), {"fails": set(), "runs": []})
    monkeypatch.setattr(tracking, "BACKENDS", dict(tracking.BACKENDS))
    monkeypatch.setitem(NAMES, "backend", list(NAMES["backend"]))
    register_backend("recorded", backend)
    return backend


def test_a_backend_hears_everything_a_dashboard_needs(tmp_path, recorded):
    result = train(smaller("tracking.backends=[recorded]"), tmp_path, progress=False)
    run = recorded.runs[0]
    logged = {k for _, numbers in run.numbers for k in numbers}
    assert {"train/loss", "train/nats_per_char", "val/loss", "val/challenge_loss", "val/coverage", "lr", "grad_norm", "tokens_per_second",
            "memory_bytes"} <= logged
    assert [s for s, n in run.numbers if "train/loss" in n] == [1, 2, 3, 4, 5, 6]
    assert {"device_info", "dataset_info", "model_configured", "model_info", "memory_estimate"} <= run.described.keys()
    assert set(run.files) == {"config.yaml", "metrics.jsonl", "result.json", "curves.png", "samples.txt"} and run.code == 0
    assert run.numbers[-1][1]["val/loss"] == result.loss


def test_a_resumed_run_keeps_its_id_and_a_broken_one_says_so(tmp_path, recorded):
    def power_cut(event):
        if event.get("step") == 5:
            raise EOFError

    with pytest.raises(EOFError):
        train(smaller("tracking.backends=[recorded]"), tmp_path, progress=False, on_event=power_cut)
    train(smaller("tracking.backends=[recorded]"), tmp_path, resume=True, progress=False)
    first, second = recorded.runs
    assert first.id == second.id == json.loads((tmp_path / "tracking.json").read_text())["id"]
    assert first.code == 1 and "result.json" not in first.files and second.code == 0
    assert [s for s, n in second.numbers if "train/loss" in n] == [5, 6]


def test_trackers_that_fail_warn_once_each_and_stop_nothing(tmp_path, recorded):
    places = ("start", "describe", "log", "finish")
    for where in places:
        register_backend(where, type(where, (Recorded,), {"fails": {where}, "runs": []}))
    with pytest.warns(UserWarning, match="tracking: ") as caught:
        result = train(smaller(f"tracking.backends=[{','.join(places)},recorded]"), tmp_path, progress=False)
    said = [str(w.message) for w in caught if "tracking" in str(w.message)]
    told = [f"tracking: {where} failed (ConnectionError: {where}: no network); the run goes on without it" for where in places]
    assert sorted(said) == sorted(told)
    assert result.metrics["steps"] == 6 and len([e for e in read_events(tmp_path) if e["event"] == "training_step"]) == 6
    assert recorded.runs[0].code == 0 and len(recorded.runs[0].files) == 5


def test_what_is_wrong_with_the_tracking_is_said_before_anything_starts(tmp_path, monkeypatch):
    for overrides, words in [(["tracking.backends=[wandbb]"], "found 'wandbb'. Did you mean 'wandb'"),
                             (["hyperparams.log_file=/no/such/folder/x.jsonl"], "hyperparams.log_file: /no/such/folder"),
                             ([f"hyperparams.log_file={tmp_path}"], "hyperparams.log_file")]:
        with pytest.raises(InputError, match=re.escape(words)):
            train(smaller(*overrides), tmp_path / "run", progress=False)
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package 'trackio': pip install trackio"):
        train(smaller("tracking.backends=[trackio]"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_online_wants_a_key_and_auto_takes_what_there_is(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode("auto") == "offline"
    with pytest.raises(InputError, match="online needs a W&B key"):
        check_tracking(smaller("tracking.backends=[wandb]", "tracking.mode=online"))
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert wandb_mode("auto") == "online" and wandb_mode("offline") == "offline"
    check_tracking(smaller("tracking.backends=[wandb]", "tracking.mode=online"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"


def test_a_log_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    tracker = Tracker(tmp_path, smaller())
    tracker.files[tmp_path / "metrics.jsonl"].close()
    tracker.files[tmp_path / "metrics.jsonl"] = open("/dev/full", "w")
    with pytest.raises(RunError, match=re.escape(f"{tmp_path}/metrics.jsonl: the log cannot be written (No space left on device)")):
        tracker.log("training_step", step=1)
    tracker.close()


def log_two(run_dir: Path, log_file: Path, resume_step: int | None = None) -> None:
    """Log two steps more than a run has, also to a second log."""
    run_dir.mkdir(exist_ok=True)
    tracker = Tracker(run_dir, smaller(f"hyperparams.log_file={log_file}"), resume_step)
    for step in (1, 2):
        tracker.log("training_step", step=(resume_step or 0) + step)
    tracker.close()


@pytest.mark.parametrize("target", ["there.jsonl", "new.jsonl", "second"])
def test_a_second_log_that_is_a_link_stays_one(target, tmp_path):
    """To a file, to one that is not there yet, and to another link."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there.jsonl").touch()
    (tmp_path / "elsewhere" / "second").symlink_to("there.jsonl")
    (link := tmp_path / "log.jsonl").symlink_to(Path("elsewhere") / target)
    check_tracking(smaller(f"hyperparams.log_file={link}"))
    assert (tmp_path / "elsewhere" / target).exists() == (target != "new.jsonl") and link.is_symlink()
    for step, steps in ((None, [1, 2]), (1, [1, 2, 3])):
        log_two(tmp_path / "run", link, step)
        assert [e["step"] for e in read_events(link)] == steps
    assert link.is_symlink() and (tmp_path / "elsewhere" / "second").is_symlink()
    assert link.read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "open file"])
def test_what_a_process_holds_open_is_added_to_and_never_replaced(kind, tmp_path):
    """As /dev/stderr is: a link to a link in /proc. An open file that were replaced would be lost to who holds it."""
    ends, errors = os.pipe(), open(tmp_path / "err.txt", "a+")  # noqa: SIM115
    errors.write("a warning\n")
    errors.flush()
    (link := tmp_path / "stderr").symlink_to(f"/proc/self/fd/{ends[1] if kind == 'pipe' else errors.fileno()}")
    with errors:
        log_two(tmp_path / "run", link)
        log_two(tmp_path / "run", link, resume_step=1)
        errors.seek(0)
        lines = os.read(ends[0], 10**4).decode().splitlines() if kind == "pipe" else errors.read().splitlines()[1:]
    _ = [os.close(end) for end in ends]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3] and link.is_symlink()


def test_a_second_log_that_leads_nowhere_is_one_line(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("no/such/folder")
    for name in ("a", "c", "a/log.jsonl"):
        with pytest.raises(InputError, match=r"log_file: .* cannot be written \(.*\)$"):
            train(smaller(f"hyperparams.log_file={tmp_path / name}"), tmp_path / "run", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"] and all(p.is_symlink() for p in tmp_path.iterdir())


def test_curves_of_a_run_without_steps_and_of_one_with_gaps():
    assert plot_curves([]).axes
    steps = [{"event": "training_step", "step": s, "lr": 0.1, "train/nats_per_char": None if s == 2 else 1.0} for s in (1, 2, 3)]
    assert len(plot_curves(steps).axes[0].lines[0].get_xdata()) == 3


# --- for real ---


def wandb_records(run_dir, kind):
    """The records of one kind in the files that W&B wrote, oldest file first."""
    from wandb.proto import wandb_internal_pb2 as pb

    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, message = path.read_bytes(), 7, b""
        while at < len(data):  # LevelDB's log: blocks of 32 KiB, in them pieces with a header of checksum, length and kind
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, piece = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            message += data[at + 7 : at + 7 + length]
            at += 7 + length
            if piece in (1, 4):  # whole, or the last piece
                record, message = pb.Record.FromString(message), b""
                if record.WhichOneof("record_type") == kind:
                    yield getattr(record, kind)


# W&B and Trackio start threads and services, so a run with them is cut off and resumed in a process of its own.
RUN = """
import sys
from mainrun_nb.config import load_config
from mainrun_nb.trainer import train

out, stop, *overrides = sys.argv[1:]
def listen(event):
    if event.get("step") == int(stop):
        raise EOFError
try:
    train(load_config(overrides=overrides), out, progress=False, on_event=listen)
except EOFError:
    print("cut")
    train(load_config(overrides=overrides), out, resume=True, progress=False)
"""


def run_apart(folder, backends, stop, env):
    overrides = [*TINY, *SMALLER, f"tracking.backends=[{backends}]"]
    done = subprocess.run([sys.executable, "-c", RUN, folder / "run", str(stop), *overrides], cwd=ROOT,
                          capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of a run that told whom there was to tell, was cut off at step 5, and went on from step 4."""
    folder = tmp_path_factory.mktemp("told")
    backends = ",".join(name for name in ("wandb", "trackio") if importlib.util.find_spec(name))
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = run_apart(folder, backends, 5, env)
    assert done.stdout == "cut\n", "a backend talks on stdout"
    return folder


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_and_resumed(told):
    run_dir, known = told / "run", json.loads((told / "run" / "tracking.json").read_text())["id"]
    assert {r.run_id for r in wandb_records(run_dir, "run")} == {known}
    config = {}
    for found in [*(r.config for r in wandb_records(run_dir, "run")), *wandb_records(run_dir, "config")]:
        for item in found.update:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    sent = flatten(load_config(run_dir / "config.yaml"))
    assert {k.split(".")[0] for k in sent} <= config.keys() and config["hyperparams"]["lr"] == 0.003
    assert set(config["hyperparams"]) == {k.split(".")[1] for k in sent if k.startswith("hyperparams.")}
    assert config["dataset_info"]["n_titles"] == 600
    rows = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.item} for r in wandb_records(run_dir, "history")]
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 5, 5, 6]
    assert any({"val/loss", "val/challenge_loss", "val/coverage"} <= r.keys() for r in rows)
    assert any("curves" in key for r in rows for key in r)
    assert [a.name for a in wandb_records(run_dir, "artifact") if a.type == "run"][-1] == f"run-{known}"


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_on_this_machine_and_resumed(told):
    known = json.loads((told / "run" / "tracking.json").read_text())["id"]
    with sqlite3.connect(next((told / "trackio").glob("*.db"))) as db:
        rows = db.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"run-{known}"}
    assert [step for _, step, metrics in rows if "train/loss" in json.loads(metrics)] == [1, 2, 3, 4, 5, 5, 6]
    assert any("val/loss" in json.loads(metrics) for _, _, metrics in rows)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_online_with_nobody_there_stops_nothing(tmp_path):
    env = {"WANDB_MODE": "", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_apart(tmp_path, "wandb", 0, env)
    assert done.stderr.count("tracking: wandb failed") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
