"""Kind 4: each standard stream closed, full, with nobody at its other end or of plain ASCII, under every command."""
from functools import partial
from pathlib import Path

from actions import COMMANDS
from ground import Case, Ground
from judge import Wrong, check_words, lines_of, same_run
from workers import entry_points
from writes import same_sweep

NAMES = ("stdin", "stdout", "stderr")
WORLDS = {"no stream at all": ("closed", "closed", "closed"), "stdin closed": ("closed", "file", "file")}
for how in ("closed", "full", "pipe", "ascii"):
    WORLDS[f"stdout {how}"] = ("null", how, "file")
    WORLDS[f"stderr {how}"] = ("null", "file", how)
START = {"mainrun-eval": "run", "mainrun-generate": "run", "mainrun-report": "run", "mainrun-export": "run", "mainrun-check": "run"}


def check(command: str, world: str, ground: Ground) -> None:
    """The work is done whatever the streams are; what cannot be printed is said in at most a line, where a line can be said."""
    streams = WORLDS[world]
    with ground.copy(*([START[command]] if command in START else [])) as where:
        done = ground.run(where, command, streams=streams)
        check_words(done)
        if len(lines_of(done)[0]) > 1:
            raise Wrong(f"more than one line: {done.err[-200:]}")
        unheard = streams[1] in ("full", "closed", "pipe")
        if done.code not in ((0, 1) if unheard else (0,)):
            raise Wrong(f"exit code {done.code}: {done.err.strip()[-200:]}")
        if streams[1] in ("file", "ascii") and not done.out.strip():
            raise Wrong("printed nothing")
        if command == "mainrun-train":
            same_run(where / "run", ground.folder / "run")
        if command == "mainrun-sweep":
            same_sweep(where / "sweep", ground.folder / "sweep")
        if command == "mainrun-eda" and not list(Path(where, "eda").glob("*.png")):
            raise Wrong("wrote no pictures")


def cases(ground: Ground) -> list[Case]:
    """Every command x every world."""
    return [Case("standard streams", f"{command}, {world}", partial(check, command, world))
            for world in WORLDS for command in COMMANDS if command in entry_points()]
