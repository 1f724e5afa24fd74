"""What the cases start from, made once: a finished run, one that was cut short, another run, a sweep."""
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actions import COMMANDS, OTHER, OTHER_RATES, RATES, SWEEP, half, write_inputs
from judge import Wrong
from workers import Done, Fault, Job, Worker, entry_points

MEMORY = Path("/dev/shm")  # a sync costs nothing there


class Ground:
    """A folder with everything prepared, and a worker for the cases."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.patch = worker, ""  # code for every job: a fault planted in the product (planted.py)
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir=MEMORY if MEMORY.is_dir() else None))
        write_inputs(self.folder)
        self.do("mainrun-train")
        self.do("mainrun-train", "--config", "small.yaml", "--out", "other", *OTHER)
        shutil.copytree(self.folder / "run", self.folder / "half")
        half(self.folder / "half")

    def make_sweeps(self) -> None:
        """The trials and the sweeps, where they are not there yet."""
        if (self.folder / "trials").exists():
            return
        for rate in RATES + OTHER_RATES:
            more = OTHER if rate in OTHER_RATES else ()
            self.do("mainrun-train", "--config", "small.yaml", "--out", f"trials/{rate}", f"hyperparams.lr={rate}", *more)
        self.do("mainrun-sweep")
        shutil.copytree(self.folder / "sweep", self.folder / "half-sweep")
        shutil.rmtree(self.folder / "half-sweep" / "trial-0001")
        self.do("mainrun-sweep", "other.yaml", *(word.replace("sweep", "other-sweep") for word in SWEEP[1:-2]), *OTHER)

    def do(self, name: str, *arguments: str) -> Done:
        """Run a command that must succeed."""
        done = self.run(self.folder, name, *arguments)
        assert done.code == 0, (name, done)
        return done

    def run(self, where: Path, name: str, *arguments: str, **world: object) -> Done:
        """Run a console command, with the arguments of actions.py if none are given, in a folder."""
        if name == "mainrun-sweep":
            self.make_sweeps()
        trials = f"import actions; actions.prepared_trials({str(self.folder / 'trials')!r})\n" if name == "mainrun-sweep" else ""
        job = Job([name, *(arguments or COMMANDS.get(name, []))], str(where), patch=trials + self.patch)
        for key, value in world.items():
            setattr(job, key, value)
        return self.worker.run(job)

    @contextmanager
    def copy(self, *names: str, **renamed: str) -> Iterator[Path]:
        """A folder with the inputs and copies of what is named; `run="half"`: the half run under the name run.

        It has the same name in every case, as pages and results may name it.
        """
        where = self.folder / "case"
        where.mkdir()
        try:
            for name in ("small.yaml", "search.yaml"):
                shutil.copy(self.folder / name, where)
            if any("sweep" in old for old in (*names, *renamed.values())):
                self.make_sweeps()
            for new, old in {**{name: name for name in names}, **renamed}.items():
                shutil.copytree(self.folder / old, where / new)
            yield where
        finally:
            shutil.rmtree(where, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder, end the worker."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.worker.close()


@dataclass
class Case:
    """One thing that goes wrong, and the check that raises `Wrong` where the package does not stand it."""

    kind: str  # of the table's rows
    name: str
    check: Callable[[Ground], None]

    def fails(self, ground: Ground) -> str:
        """Why it was not survived; empty if it was."""
        try:
            self.check(ground)
        except Wrong as e:
            return str(e) or "wrong"
        except (OSError, ValueError, KeyError) as e:  # what should be compared is not there, or cannot be read
            return f"{type(e).__name__}: {e}"
        return ""


def sample(cases: list[Case], count: int) -> list[Case]:
    """So many of the cases, evenly spread, the same ones each time."""
    return cases if count >= len(cases) else [cases[i * len(cases) // count] for i in range(count)]


__all__ = ["Case", "Done", "Fault", "Ground", "Job", "Worker", "entry_points", "sample"]
