"""Kind 1: at every act that writes, a full disk, an error of the device, a lock or a sync that cannot be had, and a kill.

The acts are found by watching each scene once, undisturbed; then the scene is played again for each act and each fault, and once more
without a fault. In the end everything must be as if nothing had happened, or a line says what is in the way and nothing is lost.
"""
import csv
import fcntl
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ground import Case, Fault, Ground
from judge import Wrong, check_refusal, check_words, same_run, timeless

FAULTS = ("ENOSPC", "EIO", "ENOLCK", "EINVAL", "kill")


def digests(folder: Path) -> dict[str, str]:
    """The files below a folder, and their contents' digests."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def same_files(found: Path, wanted: Path) -> None:
    """The same files with the same content."""
    mine, theirs = digests(found), digests(wanted)
    differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differ:
        raise Wrong(f"differs: {', '.join(differ)[:200]}")


def board(folder: Path) -> list[dict]:
    """The leaderboard of a sweep, but for the times."""
    with open(folder / "leaderboard.csv", newline="") as f:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(f)]


def same_sweep(found: Path, wanted: Path) -> None:
    """The same leaderboard and trials, but for their times."""
    if board(found) != board(wanted):
        raise Wrong("another leaderboard")
    for path in sorted(wanted.glob("trial-*/trial.json")):
        mine = found / path.relative_to(wanted)
        if timeless(json.loads(mine.read_text())) != timeless(json.loads(path.read_text())):
            raise Wrong(f"another {mine.parent.name}/trial.json")
    if left := [*found.glob(".*.tmp"), *found.glob("*/*.tmp")]:
        raise Wrong(f"left behind: {left[0].name}")


@dataclass
class Scene:
    """A command on prepared folders, and how its outcome is compared with that of the undisturbed one."""

    command: str
    result: str  # the folder that it makes or changes
    same: Callable[[Path, Path], None]
    start: dict[str, str] = field(default_factory=dict)  # folders that are there: name -> the prepared one
    arguments: tuple[str, ...] = ()
    done_before: tuple[str, ...] = ()  # a second time, this may be in the way: exit code 2, named


SCENES = {
    "a run": Scene("mainrun-train", "run", same_run),
    "a resumed run": Scene("mainrun-train", "run", same_run, {"run": "half"}),
    "a sweep": Scene("mainrun-sweep", "sweep", same_sweep, done_before=("best.yaml",)),
    "a resumed sweep": Scene("mainrun-sweep", "sweep", same_sweep, {"sweep": "half-sweep"}, done_before=("best.yaml",)),
    "a run's report": Scene("mainrun-report", "run", same_files, {"run": "run"}),
    "a sweep's report": Scene("mainrun-report", "sweep", same_files, {"sweep": "sweep"}, ("sweep",)),
    "an export": Scene("export", "exported", same_files, {"run": "run"}, done_before=("exported",)),
    "an analysis": Scene("mainrun-eda", "eda", same_files),
}


def place_of(act: str) -> str:
    """The act without what differs from one time to the next."""
    return re.sub(r"\d+", "N", re.sub(r"\.\d+\.tmp", ".tmp", act))


def whole(ground: Ground, name: str) -> Path:
    """What a scene ends with if nothing happens; for a run, resumed or not, that is the run that was never touched."""
    return ground.folder / "run" if SCENES[name].same is same_run else ground.folder / "whole" / name


def seen_in(path: str, seen: set[str]) -> bool:
    """Whether a file was written, or came with its folder; a trial's run is another process's."""
    return "/run/" in path or any(str(p) in seen for p in (Path(path), *Path(path).parents))


def acts_of(ground: Ground, name: str) -> list[str]:
    """The acts of a scene that nothing happens to; its outcome is kept, to be compared with."""
    scene, kept = SCENES[name], whole(ground, name)
    with ground.copy(**scene.start) as where:
        done = ground.run(where, scene.command, *scene.arguments, fault=Fault(str(where)))
        if done.code:
            raise Wrong(f"{name}: fails undisturbed: {done.err[-300:]}")
        seen = {act.split(" ", 1)[1] for act in done.acts}
        unseen = [f for f in digests(where / scene.result) if not scene.start and not seen_in(f"{scene.result}/{f}", seen)]
        if unseen:
            raise Wrong(f"{name}: {unseen[0]} was written, and faults.c has not seen it")
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            (where / scene.result).rename(kept)
    return done.acts


def first_and_last(acts: list[str]) -> list[int]:
    """For each place, the numbers of the first act there and of the last."""
    places: dict[str, list[int]] = {}
    for number, act in enumerate(acts, 1):
        places.setdefault(place_of(act), []).append(number)
    return sorted({n for numbers in places.values() for n in (numbers[0], numbers[-1])})


def check(name: str, at: int, error: str, ground: Ground) -> None:
    """One act goes wrong; then the command is given again."""
    scene = SCENES[name]
    with ground.copy(**scene.start) as where:
        fault = Fault(str(where), at, error, lasting=error == "ENOSPC")
        done = ground.run(where, scene.command, *scene.arguments, fault=fault)
        check_words(done)
        if error != "kill" and done.code:
            check_refusal(done, scene.result, "sota", allowed=(1, 2))
        elif error == "kill" and done.code not in (-9, 0):
            raise Wrong(f"exit code {done.code}")
        again = ground.run(where, scene.command, *scene.arguments)
        check_words(again)
        if again.code:
            check_refusal(again, *(scene.done_before or ("nothing may be in the way",)), allowed=(2,))
        scene.same(where / scene.result, whole(ground, name))


def check_in_use(name: str, ground: Ground) -> None:
    """A folder that another process holds is refused, and nothing in it changes."""
    scene = SCENES[name]
    with ground.copy(**scene.start) as where, open(where / scene.result / ".lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = digests(where)
        done = ground.run(where, scene.command, *scene.arguments)
        check_words(done)
        check_refusal(done, "another process is at work", allowed=(2,))
        if digests(where) != before:
            raise Wrong("something was written into it")


def cases(ground: Ground, scenes: tuple[str, ...] = tuple(SCENES)) -> list[Case]:
    """Every act of these scenes x every fault."""
    found = [Case("a folder in use", f"{name}, in use", partial(check_in_use, name)) for name in scenes if name.startswith("a resumed")]
    for name in scenes:
        acts = acts_of(ground, name)
        found += [Case(f"{error} at every write", f"{name}, {error} at act {at}: {acts[at - 1]}", partial(check, name, at, error))
                  for at in first_and_last(acts) for error in FAULTS]
    return found
