"""A warm process that does each case in a fork of itself: everything is imported and has been used once.

`Worker().run(job)` is what tests use; below it is what happens in the process, which `Worker` starts with the library of faults.c.
"""
import ctypes
import errno
import gc
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from configparser import ConfigParser
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WARM_UP = 300  # seconds, before the first job and for what is around each
CODE = Path(os.environ.get("MAINRUN_FAULTS_CODE", ROOT))  # the checkout that is tried; another one than this on request


def entry_points() -> dict[str, str]:
    """The console commands as settings.ini has them: name -> module:function."""
    settings = ConfigParser()
    settings.read(CODE / "settings.ini")
    lines = settings["DEFAULT"]["console_scripts"].strip().splitlines()
    return {name.strip(): target.strip() for name, target in (line.split("=") for line in lines)}


@dataclass
class Fault:
    """The act, counted from 1, that goes wrong below `folder`: with an errno by name, or by a kill. 0: none, but the acts are noted."""

    folder: str
    at: int = 0
    error: str = "kill"
    lasting: bool = False


@dataclass
class Job:
    """One command line, and the world that it meets."""

    argv: list[str]
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    streams: tuple[str, str, str] = ("null", "file", "file")  # stdin, stdout, stderr: null, file, closed, full, pipe (nobody reads), ascii
    fault: Fault | None = None
    ranks: int = 1
    kill: tuple[int, float] | None = None  # which rank (-1: all of them) is killed, after so many seconds
    limit: int = 60  # seconds
    patch: str = ""  # Python code that is run before the command


@dataclass
class Done:
    """How it ended: exit codes (negative: a signal), what it said, its acts, and the seconds it took."""

    codes: list[int]
    out: str
    err: str
    acts: list[str]
    seconds: float

    @property
    def code(self) -> int:
        """Of the first process."""
        return self.codes[0]


def compiled() -> Path | None:
    """The library of faults.c, compiled once; None where there is no C compiler or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        return None
    source = HERE / "faults.c"
    library = Path(tempfile.gettempdir()) / f"mainrun-faults-{os.getuid()}-{source.stat().st_mtime_ns}-{sysconfig.get_platform()}.so"
    if not library.exists():
        scratch = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", scratch, source], check=True)
        scratch.rename(library)
    return library


class Worker:
    """The warm process, seen from outside."""

    def __init__(self) -> None:
        library = compiled()
        env = {**os.environ, "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1",
               "WANDB_MODE": "offline", **({"LD_PRELOAD": str(library)} if library else {})}
        env = {k: v for k, v in env.items() if not k.startswith(("PYTEST", "COLUMNS"))}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        start_new_session=True)  # Ctrl-C is not meant for it

    def run(self, job: Job) -> Done:
        """Do a job, and wait for it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], job.limit + WARM_UP)[0]:
            self.process.kill()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker has ended with exit code {self.process.wait()}")
        return Done(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(20)


# --- in the worker ---


def warm_up() -> None:
    """Import and use everything once, so that a fork finds it in memory; the clock of the machine is not measured again each time."""
    import papermill
    import torch
    import torch._dynamo
    from actions import SMALLEST, executed_here
    from matplotlib.figure import Figure
    from tqdm import tqdm

    import mainrun_nb.checkpoint
    import mainrun_nb.cli
    import mainrun_nb.hub
    import mainrun_nb.report
    import mainrun_nb.sweep  # noqa: F401
    from mainrun_nb import compare, config, runtime, tracking, trainer
    from mainrun_nb.config import load_config

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is one lock for all forks: killed while it holds it, one would leave the others waiting
    tracking.register_backend("silent", lambda *args: MagicMock())
    papermill.execute_notebook = executed_here  # no kernel for each case
    schema = pickle.dumps(config._schema())  # half of what it takes to load a configuration
    config._schema = lambda: pickle.loads(schema)
    runtime.matrix_rate = lambda *args, **kwargs: 1e9  # a third of a second that says nothing here
    compare.time = SimpleNamespace(strftime=lambda *args: "now")  # a page says when it was written
    Figure.draw = lambda *args: None  # a picture is written as any other, but there is nothing on it

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        if not os.fork():  # the library that trains it starts threads, which no fork would have
            signal.alarm(120)
            trainer.prepare_data(load_config(overrides=SMALLEST)).tokenizer.save(tokenizer)
            os._exit(0)
        if status := os.wait()[1]:
            raise RuntimeError(f"the tokenizer's training ended with {os.waitstatus_to_exitcode(status)} (-14: after two minutes)")
        honest, trainer.train_tokenizer = trainer.train_tokenizer, lambda *args: trainer.load_tokenizer(tokenizer)
        trainer.train(load_config(overrides=SMALLEST), Path(folder) / "run", progress=False)
        trainer.train_tokenizer = honest
        trainer.evaluate_run(Path(folder) / "run")
        mainrun_nb.report.write_html(Path(folder) / "run")
        if find_spec("transformers"):
            mainrun_nb.hub.export_gpt2(*mainrun_nb.checkpoint.load_run(Path(folder) / "run")[1:], Path(folder) / "exported")
    gc.collect()
    gc.freeze()  # a fork's collections do not touch, and so copy, what is here


def connect(fd: int, how: str, path: str) -> None:
    """Make a standard stream what the job says."""
    if how == "closed":
        os.close(fd)
        return
    if how == "pipe":
        reading, writing = os.pipe()
        os.close(writing if fd == 0 else reading)
        end = reading if fd == 0 else writing
    else:
        name = {"null": os.devnull, "full": "/dev/full"}.get(how, path)
        end = os.open(name, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    if end != fd:
        os.dup2(end, fd)
        os.close(end)


def renew_streams(ascii_only: bool) -> None:
    """sys.stdin, stdout and stderr as Python makes them at its start: None where a file descriptor is closed."""
    encoding = "ascii" if ascii_only else "utf-8"
    for fd, name, errors in ((0, "stdin", "strict"), (1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        try:
            os.fstat(fd)
            stream = open(fd, "r" if fd == 0 else "w", encoding=encoding, errors=errors, closefd=False, buffering=1 if fd == 2 else -1)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise
            stream = None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def leave(error: BaseException | None) -> int:
    """The exit code that Python gives, and what it prints at its end."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str) and sys.stderr:
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        if sys.stderr:
            traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as e:
            if stream is sys.stdout and sys.stderr:
                print(f"Exception ignored in: {stream!r}\n{type(e).__name__}: {e}", file=sys.stderr)
            code = 120 if stream is sys.stdout else code
    return code


def perform(job: dict, rank: int, space: str) -> None:
    """In the fork: the job, to its exit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(job["limit"])
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["ranks"] > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])})
    streams = job["streams"]
    for fd, how in enumerate(streams):
        connect(fd, how, f"{space}/{fd}")
    renew_streams("ascii" in streams)
    if "ascii" in streams:
        os.environ["PYTHONIOENCODING"] = "ascii"
    error: BaseException | None = None
    try:
        if job["patch"]:
            exec(compile(job["patch"], "patch", "exec"), {})
        if fault := job["fault"]:
            number = 0 if fault["error"] == "kill" else getattr(errno, fault["error"])
            arguments = fault["folder"].encode(), f"{space}/acts".encode(), fault["at"], number, int(fault["lasting"])
            ctypes.CDLL(None).faults_arm(*arguments)
        sys.argv = list(job["argv"])
        command(sys.argv[0])()
    except BaseException as e:  # noqa: B036  whatever it is, the process ends with it
        error = e
    os._exit(leave(error))


def command(name: str):
    """The function behind a console command, or behind a name of actions.py."""
    if name in entry_points():
        module, function = entry_points()[name].split(":")
        return getattr(importlib.import_module(module), function)
    return getattr(importlib.import_module("actions"), name)


def do(job: dict) -> dict:
    """Fork for each rank, kill what is to be killed, and gather."""
    with tempfile.TemporaryDirectory() as space:
        began, pids = time.perf_counter(), []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if not pid:
                try:
                    perform(job, rank, space)
                finally:
                    os._exit(99)
            pids.append(pid)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            if job["kill"] and time.perf_counter() - began > job["kill"][1]:
                for rank, pid in enumerate(pids):
                    if job["kill"][0] in (-1, rank) and rank not in codes:
                        os.kill(pid, signal.SIGKILL)
                job["kill"] = None
            for rank, pid in enumerate(pids):
                if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.001)
        return {"codes": [codes[r] for r in range(len(pids))], "seconds": time.perf_counter() - began, **said(space)}


def said(space: str) -> dict:
    """What the job's streams and log hold."""
    texts = {}
    for name, key in (("1", "out"), ("2", "err"), ("acts", "acts")):
        path = Path(space) / name
        texts[key] = path.read_text(errors="replace") if path.exists() else ""
    return {**texts, "acts": texts["acts"].splitlines()}


def serve() -> None:
    """Jobs come in by lines, and their ends go out; the standard streams belong to the jobs."""
    coming, going = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    connect(0, "null", "")
    os.dup2(2, 1)
    warm_up()
    for line in coming:
        going.write(json.dumps(do(json.loads(line))) + "\n")
        going.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    serve()
