"""Kind 2: every file of a run's and of a sweep's folder, damaged in six ways, before every command.

Allowed are the result of the undamaged folder, another one with a warning that names the file, and one line that names it with exit
code 1 or 2.
"""
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ground import Case, Done, Ground
from judge import Wrong, check_refusal, check_words, lines_of, same_run, timeless
from workers import entry_points
from writes import board


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\x01"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "flipped": flipped,
    "replaced": lambda data: b"something else\n",
}
WAYS = (*DAMAGES, "of another run", "removed")
UNBOUND = {"curves.png", "samples.txt", ".lock", "leaderboard.csv", "trial.log", "report.html", "report.ipynb"}  # no number comes from them
UNREAD = {".lock", "leaderboard.csv", "trial.log"}  # of these mainrun-check says nothing: empty, made of the trials, or what a trial said

# What is done to which folder: name -> (prepared folder, its name there, another one of its kind, command, arguments)
TRIES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "resume a finished run": ("run", "run", "other", "mainrun-train", ()),
    "resume half a run": ("half", "run", "other", "mainrun-train", ()),
    "evaluate": ("run", "run", "other", "mainrun-eval", ()),
    "generate": ("run", "run", "other", "mainrun-generate", ()),
    "report a run": ("run", "run", "other", "mainrun-report", ()),
    "export": ("run", "run", "other", "mainrun-export" if "mainrun-export" in entry_points() else "export", ()),
    "resume a finished sweep": ("sweep", "sweep", "other-sweep", "mainrun-sweep", ()),
    "resume half a sweep": ("half-sweep", "sweep", "other-sweep", "mainrun-sweep", ()),
    "report a sweep": ("sweep", "sweep", "other-sweep", "mainrun-report", ("sweep",)),
}
if "mainrun-check" in entry_points():
    TRIES["check a run"] = ("run", "run", "other", "mainrun-check", ())
    TRIES["check a sweep"] = ("sweep", "sweep", "other-sweep", "mainrun-check", ("sweep",))


def damage(file: Path, way: str, other: Path) -> None:
    """Damage a file; `other` is what has its name in another folder of the kind."""
    if way == "removed":
        file.unlink()
    elif way == "of another run":
        file.write_bytes(other.read_bytes() if other.exists() else b"")
    else:
        file.write_bytes(DAMAGES[way](file.read_bytes()))


def files_of(folder: Path) -> list[str]:
    """The files of a folder; of a sweep's trials the first alone, and of its run what a sweep reads."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("report."))
    return [f for f in files if not f.startswith("trial-0001") and not ("/run/" in f and ("checkpoints" in f or "tokenizer" in f))]


def content(where: Path, done: Done, name: str) -> object:
    """What a command has made, comparable: its output, and the page or the folder that it has written."""
    if name.startswith(("resume half a run", "check")):
        return None
    if name.startswith("resume"):
        return board(where / "sweep") if "sweep" in name else timeless(json.loads(done.out))
    page = [p.read_bytes() for p in where.rglob("report.html")]
    return done.out, page, {p.name: p.read_bytes() for p in where.glob("exported/*") if p.is_file()}


def undamaged(ground: Ground, name: str) -> object:
    """What the command makes of the folder as it is; computed once."""
    known = ground.__dict__.setdefault("undamaged", {})
    if name not in known:
        source, folder, _, command, arguments = TRIES[name]
        with ground.copy(**{folder: source}) as where:
            done = ground.run(where, command, *arguments)
            if done.code:
                raise Wrong(f"{name}: fails undamaged: {done.err[-300:]}")
            known[name] = content(where, done, name)
    return known[name]


def named(file: str) -> tuple[str, ...]:
    """What a line may call a file: its name, or that of the folder that is read as one."""
    path = Path(file)
    return (path.name, path.parent.name) if path.parent.name and not path.parent.name.startswith("trial-") else (path.name,)


def check(name: str, file: str, way: str, ground: Ground) -> None:
    """Damage the file, give the command."""
    source, folder, other, command, arguments = TRIES[name]
    wanted = undamaged(ground, name)
    with ground.copy(**{folder: source}) as where:
        damage(where / folder / file, way, ground.folder / other / file)
        done = ground.run(where, command, *arguments)
        check_words(done)
        if name.startswith("check"):
            told = any(n in done.out + done.err for n in named(file))
            if not told or (not done.code and Path(file).name not in UNBOUND):
                raise Wrong(f"exit code {done.code}, and the file is {'named' if told else 'not named'}")
            return
        if done.code:
            check_refusal(done, *named(file))
            return
        warned = any(n in line for line in lines_of(done)[1] for n in named(file)) or any(
            Path(file).name in page.read_text() for page in where.rglob("report.html"))
        if name == "resume half a run":
            same_run(where / folder, ground.folder / "run", gaps=file == "metrics.jsonl" and warned)
        elif content(where, done, name) != wanted and not warned:
            raise Wrong("another result, without a word")


def is_damage(ground: Ground, name: str, file: str, way: str) -> bool:
    """Whether the file would be another one, and one that the command looks at."""
    mine, other = (ground.folder / folder / file for folder in (TRIES[name][0], TRIES[name][2]))
    if name.startswith("check") and Path(file).name in UNREAD:
        return False
    return way != "of another run" or not other.exists() or mine.read_bytes() != other.read_bytes()


def cases(ground: Ground, tries: tuple[str, ...] = tuple(TRIES)) -> list[Case]:
    """Every file x every damage x every one of these commands."""
    if any("sweep" in name for name in tries):
        ground.make_sweeps()
    return [Case(f"a file {way}", f"{name}: {file} {way}", partial(check, name, file, way))
            for name in tries for file in files_of(ground.folder / TRIES[name][0]) for way in WAYS if is_damage(ground, name, file, way)]
