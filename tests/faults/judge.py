"""What may have happened: the right result, or one line and nothing lost. Everything else is a `Wrong`."""
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from workers import Done

TIMES = {"timestamp", "seconds", "tokens_per_second", "memory_bytes", "train_seconds", "peak_memory_bytes", "step_seconds", "commit",
         "flops_per_second", "matrix_flops_per_second", "matrix_fraction", "mfu", "run", "identity", "seal", "files", "device", "versions",
         "crc32", "sweep"}
HANGS = "it hangs"


class Wrong(AssertionError):
    """What must not happen, in one line."""


def lines_of(done: Done) -> tuple[list[str], list[str]]:
    """The errors and the warnings that a command has said."""
    said = [line for line in re.split(r"[\r\n]+", done.err) if line.startswith("mainrun-")]
    return [line for line in said if ": warning: " not in line], [line for line in said if ": warning: " in line]


def check_words(done: Done) -> None:
    """No traceback, whatever happens; and an end by a signal of its own is none."""
    for mark in ("Traceback (most recent call last)", "Exception ignored", "Fatal Python error", "Segmentation"):
        if mark in done.err:
            last = [line for line in done.err.strip().splitlines() if line.strip()][-1]
            raise Wrong(f"{mark.split(' (')[0]}: {last[:200]}")
    if -14 in done.codes:
        raise Wrong(HANGS)


def check_refusal(done: Done, *names: str, allowed: tuple[int, ...] = (1, 2)) -> None:
    """A command that did not do its work says why in exactly one line, which holds one of `names`, if there are any."""
    errors, _ = lines_of(done)
    if done.code not in allowed:
        raise Wrong(f"exit code {done.code}")
    if len(errors) != 1:
        raise Wrong(f"exit code {done.code} and {len(errors)} lines: {' | '.join(errors)[:200]}")
    if names and not any(name in errors[0] for name in names):
        raise Wrong(f"the line names none of {', '.join(names)}: {errors[0][:250]}")


def timeless(value: Any) -> Any:
    """The same without what the clock and the machine decide."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def events_of(run: Path) -> list[dict]:
    """The steps and evaluations in a run's log, timeless."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [timeless(e) for e in events if e.get("event") in ("training_step", "validation_step", "run_finished")]


def same_run(run: Path, whole: Path, gaps: bool = False) -> None:
    """Bit for bit: result, weights, random state's consequences, titles and log; where the log was damaged, it may have `gaps`."""
    first, second = (json.loads((d / "result.json").read_text()) for d in (run, whole))
    if timeless(first) != timeless(second):
        differ = [k for k in second if timeless(first.get(k)) != timeless(second[k]) and k not in TIMES]
        raise Wrong(f"another result: {', '.join(differ)[:200] or 'more keys'}")
    name = sorted((whole / "checkpoints").glob("step-*"))[-1].name
    mine, theirs = (load_file(d / "checkpoints" / name / "model.safetensors") for d in (run, whole))
    if mine.keys() != theirs.keys() or not all((mine[k] == theirs[k]).all() for k in mine):
        raise Wrong("other weights")
    if (run / "samples.txt").read_text() != (whole / "samples.txt").read_text():
        raise Wrong("other samples")
    found, wanted = events_of(run), events_of(whole)
    if [e for e in wanted if e not in found] and not gaps or [e for e in found if e not in wanted] or len(found) > len(wanted):
        raise Wrong(f"another log: {len(found)} events for {len(wanted)}")
    for kind in ("*.tmp", ".*.tmp"):
        if left := list(run.rglob(kind)):
            raise Wrong(f"left behind: {left[0].name}")
