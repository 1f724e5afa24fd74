"""The pretended GPU from Python: what was launched, copied and waited for, and by which line of the package."""
import collections
import contextlib
import ctypes
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "mainrun_nb"
library = ctypes.CDLL(None)  # the stand-in is preloaded
HERE = hasattr(library, "pretended_launches")
if HERE:
    library.pretended_launches.restype = ctypes.c_long
    library.pretended_counts.restype = ctypes.c_char_p


@dataclass
class Seen:
    """What happened within `watching`."""

    launches: int = 0
    calls: dict[str, int] = field(default_factory=dict)  # of the runtime, by name
    kernels: dict[str, int] = field(default_factory=dict)  # mangled name -> launches
    waits: collections.Counter = field(default_factory=collections.Counter)  # (what, "file:line text") -> times; host copies too


def _counts(of_kernels: int) -> dict[str, int]:
    lines = library.pretended_counts(of_kernels).decode().splitlines()
    return {name: int(count) for count, name in (line.split("\t", 1) for line in lines)}


def _where() -> str:
    """The innermost line of the package that is being executed."""
    own = [f for f in traceback.extract_stack() if f.filename.startswith(f"{PACKAGE}{os.sep}")]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line[:90]}" if own else "elsewhere"


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Count from nothing; what is yielded is filled at the end."""
    seen = Seen()

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t)
    def told(what: bytes, size: int) -> None:
        seen.waits[what.decode(), _where()] += 1

    library.pretended_reset()
    library.pretended_on_wait(told)
    try:
        yield seen
    finally:
        library.pretended_on_wait(None)
        seen.launches, seen.calls, seen.kernels = library.pretended_launches(), _counts(0), _counts(1)
