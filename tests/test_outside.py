"""The world outside a laptop: streams that are closed or full, keys in the environment, poorer file systems, files that are traps."""
import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mainrun_nb import checkpoint, console, files, formats, sources
from mainrun_nb.config import InputError, RunError, load_config, read_yaml, save_config, scrubbed, tiny
from mainrun_nb.files import atomic_write, check_file_name
from mainrun_nb.tracking import Tracker, check_tracking, read_events

ROOT = Path(__file__).resolve().parents[1]
SECRET = "sesame-Street-9"
SMALL = ["hyperparams.max_steps=4", "hyperparams.num_titles=1000", "hyperparams.vocab_size=400"]


def script(name: str) -> str:
    """A console command that is installed beside this Python."""
    found = Path(sys.executable).with_name(name)
    if not found.exists():
        pytest.skip("the package is not installed beside this Python")
    return str(found)


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """A line for the shell, with this checkout's package."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=known, capture_output=True, text=True, timeout=120)


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, "-c", code, *args], env=known, capture_output=True, text=True, timeout=120)


# --- streams ---


STREAMS = {"2>/dev/full": 0, ">/dev/full": 1, "<&- >&- 2>&-": 0, "2>&-": 0, ">&-": 0, ">/dev/full 2>/dev/full": 1, "2>&1 | head -c 1": 0}


@pytest.mark.parametrize("streams", [pytest.param(s, marks=pytest.mark.slow if i > 2 else ()) for i, s in enumerate(STREAMS)])
def test_a_run_ends_with_its_result_whatever_its_streams_are(streams, tmp_path):
    save_config(tiny(*SMALL), tmp_path / "c.yaml")
    done = shell(f"set -o pipefail; {script('mainrun-train')} --config c.yaml --out run {streams}", tmp_path)
    assert done.returncode == STREAMS[streams], done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4
    assert {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "tokenizer", "result.json", "samples.txt", "curves.png"}
    assert [e["event"] for e in read_events(tmp_path / "run")][-1] == "run_finished"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("line", "code", "says"), [
    ("mainrun-memory --help | head -1", 0, ""), ("mainrun-memory --help >/dev/full", 1, "standard output: No space left on device"),
    ("mainrun-memory --config nowhere.yaml 2>/dev/full", 2, ""), ("mainrun-memory --config nowhere.yaml <&- >&- 2>&-", 2, ""),
    ("mainrun-eval " + "x" * 256, 2, "File name too long"), ("mainrun-memory --config " + "x" * 256, 2, "File name too long")])
def test_other_commands_end_as_they_should(line, code, says, tmp_path):
    name, _, rest = line.partition(" ")
    done = shell(f"set -o pipefail; {script(name)} {rest}", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if says else 0), done.stderr
    assert says in done.stderr


def test_a_stream_that_closes_takes_nothing_with_it(capfd):
    class Gone(io.StringIO):
        def write(self, text):
            raise ValueError("I/O operation on closed file")

    err = console.Stream(Gone(), fatal=False)
    print("x", file=err, flush=True)
    assert err.error.errno == errno.EBADF
    with pytest.raises(OSError, match="Bad file descriptor"):
        print("x", file=console.Stream(Gone(), fatal=True))


def test_control_characters_do_not_steer_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    seen = Terminal()
    print("a title\x1b[2J\x07\r with\tcommands \u202e", file=console.Stream(seen, fatal=True))
    assert seen.getvalue() == r"a title\x1b[2J\x07\r with" + "\t" + r"commands \u202e" + "\n"


def test_an_interrupt_while_the_package_is_imported_takes_one_line():
    code = ("import sys, os, signal, time; sys.argv[0] = '/bin/mainrun-train'; import mainrun_nb\n"
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    done = python(code)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "mainrun-train: interrupted\n")


def test_a_broken_pipe_of_something_else_is_not_hidden(monkeypatch):
    for stdout in (console.Stream(io.StringIO(), fatal=True), io.StringIO(), None):  # the last two: called from Python
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError), console.for_people("mainrun-x"):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_broken_pipe_of_the_output_ends_a_command_without_a_word(monkeypatch, capfd):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", console.Stream(Gone(), fatal=True))
    with console.for_people("mainrun-x"):
        print("x")
        raise AssertionError("not reached")
    assert capfd.readouterr().err == ""


# --- keys ---


def test_no_key_is_printed_not_even_in_a_traceback():
    code = ("import sys, warnings, logging; from mainrun_nb.cli import guard_streams; guard_streams(); from tqdm import tqdm\n"
            "print(sys.argv[1]); logging.warning(sys.argv[1]); warnings.warn(sys.argv[1]); list(tqdm([1], desc=sys.argv[1]))\n"
            "raise ValueError(sys.argv[1])")
    done = python(code, f"hidden {SECRET} word", MY_SECRET=SECRET)
    assert done.returncode == 1 and SECRET not in done.stdout + done.stderr
    assert done.stdout == "hidden *** word\n" and "ValueError: hidden *** word" in done.stderr


def test_no_key_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    tracker = Tracker(tmp_path, tiny())
    tracker.log("dataset_info", source=f"https://me:{SECRET}@host", nested=[{"key": SECRET}])
    tracker.close()
    atomic_write(tmp_path / "result.json", json.dumps({"error": SECRET}))
    for name in ("metrics.jsonl", "result.json"):
        text = (tmp_path / name).read_text()
        assert SECRET not in text and "***" in text
    with pytest.raises(InputError, match="holds a key or password") as e:
        load_config(overrides=[f"tracking.entity={SECRET}"])
    assert SECRET not in str(e.value)
    (tmp_path / "s.yaml").write_text("parameters: {data.source: {values: ['${oc.env:MY_TOKEN}']}}")
    with pytest.raises(InputError, match="may read the variables HN_TITLES and MAINRUN_"):
        read_yaml(tmp_path / "s.yaml")


def test_only_two_kinds_of_variables_are_read(monkeypatch):
    for name, value in {"HN_TITLES": "titles.txt", "MAINRUN_LR": "0.5", "MY_API_KEY": SECRET, "HOME": "/root"}.items():
        monkeypatch.setenv(name, value)
    cfg = load_config(overrides=["data.source=${oc.env:HN_TITLES,hackernews}", "hyperparams.lr=${oc.env:MAINRUN_LR}"])
    assert (cfg.data.source, cfg.hyperparams.lr) == ("titles.txt", 0.5)
    for text in ("${oc.env:MY_API_KEY}", "${oc.env:HOME}", "${oc.env:HN_TITLES,${oc.env:HOME}}", "${oc.decode:x}", "${" * 60 + "}" * 60):
        with pytest.raises(InputError) as e:
            load_config(overrides=[f"data.source={text}"])
        assert SECRET not in str(e.value) and "/root" not in str(e.value) and "\n" not in str(e.value)


def test_a_message_that_is_cut_does_not_show_half_a_key(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "k" * 60 + "9" * 60)
    for bad in [f"hyperparams.lr={'k' * 60 + '9' * 60}", f"nonsense {'k' * 60 + '9' * 60}", f"{'k' * 60 + '9' * 60}=1"]:
        with pytest.raises(InputError) as e:
            load_config(overrides=[bad])
        assert "kkkkkkkk" not in str(e.value)


@pytest.mark.parametrize("value", ["short", "1234567", "12345678", ""])
def test_short_values_are_not_looked_for(value, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", value)
    assert scrubbed(f"a {value} b") == f"a {value} b"


def test_a_notebook_that_papermill_runs_holds_no_key(tmp_path):
    papermill = pytest.importorskip("papermill")
    kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    source = {"cells": [], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    lines = ["import os; from mainrun_nb.cli import guard_notebook; guard_notebook()", "print(os.environ['MY_SECRET'])",
             "os.environ['MY_SECRET']", "raise ValueError(os.environ['MY_SECRET'])"]
    source["cells"] = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": line}
                       for i, line in enumerate(lines)]
    (tmp_path / "in.ipynb").write_text(json.dumps(source))
    with mock.patch.dict(os.environ, {"MY_SECRET": SECRET, "PYTHONPATH": str(ROOT)}), pytest.raises(papermill.PapermillExecutionError) as e:
        papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), progress_bar=False)
    text = (tmp_path / "out.ipynb").read_text()
    assert SECRET not in text + str(e.value) and text.count("***") >= 3


# --- file systems ---


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_forced_to_the_disk_is_mentioned_once(number, tmp_path, monkeypatch):
    real = os.fsync
    monkeypatch.setattr(files, "SAID", set())

    def only_files(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2):
            checkpoint.save_checkpoint(tmp_path, step, {}, {}, {})
    assert len(caught) == 1 and "does not force" in str(caught[0].message)
    assert checkpoint.load_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failing_disk_is_an_error_and_the_file_stays(number, tmp_path, monkeypatch):
    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(RunError, match=os.strerror(number)):
        atomic_write(tmp_path / "x", "after")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(("number", "says"), [(errno.ENOLCK, None), (errno.ENOSYS, None), (errno.EOPNOTSUPP, None),
                                              (errno.EAGAIN, "another process"), (errno.EIO, "cannot be locked .Input/output error")])
def test_a_lock_that_is_not_to_be_had(number, says, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAID", set())
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    if says:
        with pytest.raises(InputError, match=says), checkpoint.run_lock(tmp_path):
            pass
    else:
        with pytest.warns(UserWarning, match="has no locks"), checkpoint.run_lock(tmp_path):
            pass


def test_a_checkpoint_that_cannot_be_renamed_is_removed_all_the_same(tmp_path, monkeypatch):
    path = checkpoint.save_checkpoint(tmp_path, 1, {}, {}, {})
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    checkpoint.remove_checkpoint(path)
    assert not path.exists()


def test_the_copy_of_the_log_replaces_nothing_that_is_not_this_runs(tmp_path):
    mine, run = tmp_path / "notes.jsonl", tmp_path / "run"
    run.mkdir()
    mine.write_text('{"event": "of another run"}\n')
    cfg = tiny(f"hyperparams.log_file={mine}")
    for act in (lambda: check_tracking(cfg), lambda: check_tracking(cfg, run), lambda: Tracker(run, cfg)):
        with pytest.raises(InputError, match="holds something else than the log of this run"):
            act()
    assert mine.read_text() == '{"event": "of another run"}\n'
    mine.unlink()
    first = Tracker(run, cfg)
    first.log("hyperparameters_configured")
    first.log("training_step", step=1)
    first.log("training_step", step=2)
    first.close()
    check_tracking(cfg, run)
    again = Tracker(run, cfg, resume_step=1)
    again.log("training_step", step=2)
    again.close()
    assert mine.read_text() == (run / "metrics.jsonl").read_text() and len(read_events(mine)) == 3


# --- traps ---


def test_files_that_unpack_without_end_are_refused_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_FILE", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 2**21))
    column = pa.array(["x" * 1000] * 5000).dictionary_encode()
    pq.write_table(pa.table({"title": column}), tmp_path / "bomb.parquet")
    (tmp_path / "large.txt").write_bytes(b"a title\n" * 2**18)
    for name in ("bomb.txt.gz", "bomb.parquet", "large.txt"):
        with pytest.raises(InputError, match=f"{name}: holds more than 1 MB"):
            sources.read_titles(tmp_path / name)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a\nb", ".", "..", "", "a/b", "nul", "x" * 256, "a\x00b", "~"])
def test_a_name_is_no_path(name):
    with pytest.raises(InputError, match="--promote: must be a name") as e:
        check_file_name(name, "--promote")
    assert "\n" not in str(e.value)
