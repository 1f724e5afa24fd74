"""Everything, on all cores: python tests/faults [--share N] [KIND ...]. Writes benchmarks/results/faults.json and RESULTS.md here.

With `--share N` every N-th case only; with KINDs only these (writes, damage, configs, stdio, kills). Neither writes anything, unless
`--keep` says so: the table says how many cases there are and how many of them were tried, and the rows of other kinds stay. Cases come
in an order that is drawn with a fixed seed, so that Ctrl-C leaves a fair part of them; what was tried by then is kept as with `--keep`.
Exit code 0 if every case was survived. MAINRUN_FAULTS_CODE names another checkout to try.
"""
import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from ground import Case, Ground, Worker
from workers import ROOT, compiled

KINDS = ("writes", "damage", "configs", "stdio", "kills")


class Queue:
    """What is still to be tried, shared by the workers, each of which prepares and lists the cases itself; and what came of the others."""

    def __init__(self, kinds: list[str], share: int) -> None:
        self.kinds, self.share, self.lock, self.stop, self.began = kinds, share, Lock(), Event(), time.perf_counter()
        self.known: Counter = Counter()  # cases of each kind of the table
        self.order: list[int] | None = None
        self.cut = False  # stopped from outside
        self.done: list[tuple[str, str, str]] = []  # kind, name, and why it was not survived (empty if it was)

    def units(self, ground: Ground) -> list[list[Case]]:
        """All cases one by one, but for the configurations, which are loaded together."""
        found = {kind: importlib.import_module(kind).cases(ground) for kind in self.kinds}
        units = [[case] for kind in self.kinds if kind != "configs" for case in found[kind]]
        units = [found["configs"], *units] if "configs" in found else units
        with self.lock:
            if self.order is None:
                self.known.update(case.kind for unit in units for case in unit)
                drawn = random.Random(1).sample(range(len(units)), len(units))[:: self.share]
                self.order = drawn[::-1] + [0] * ("configs" in found and 0 not in drawn)
        return units

    def take(self) -> int | None:
        """The number of the next unit."""
        with self.lock:
            return self.order.pop() if self.order and not self.stop.is_set() else None

    def end(self) -> None:
        """No more; the cases that are being tried are done to their end."""
        self.cut = True
        self.stop.set()

    def add(self, case: Case, why: str) -> None:
        """A case was tried."""
        with self.lock:
            self.done.append((case.kind, case.name, why))
            if why:
                print(f"{case.kind}: {case.name}: {why}", file=sys.stderr, flush=True)
            if not len(self.done) % 100:
                print(f"{len(self.done):,} tried in {(time.perf_counter() - self.began) / 60:.0f} minutes, {len(self.order or ()):,} to go",
                      file=sys.stderr, flush=True)

    def work(self) -> None:
        """One worker's part; if it breaks, the others end too."""
        try:
            ground = Ground(Worker())
            units = self.units(ground)
            while (number := self.take()) is not None:
                for case in units[number]:
                    self.add(case, case.fails(ground))
            ground.close()
        except BaseException:
            self.stop.set()
            raise


def table(rows: dict[str, dict[str, int]]) -> Iterator[str]:
    """The counts as a Markdown table."""
    yield "| what goes wrong | cases | tried | survived |"
    yield "|---|---:|---:|---:|"
    for kind, row in rows.items():
        yield f"| {kind} | {row['cases']:,} | {row['tried']:,} | {row['survived']:,} |"
    yield "| **all** | " + " | ".join(f"**{sum(row[k] for row in rows.values()):,}**" for k in ("cases", "tried", "survived")) + " |"


def keep(rows: dict[str, dict[str, int]], failed: list[dict[str, str]], whole: bool) -> None:
    """Write the counts; where not all kinds were tried, those of the others stay as they are."""
    path = ROOT / "benchmarks" / "results" / "faults.json"
    if not whole and path.exists():
        old = json.loads(path.read_text())
        failed = [f for f in old["failed"] if f["kind"] not in rows] + failed
        rows = dict(sorted({**old["kinds"], **rows}.items()))
    path.write_text(json.dumps({"kinds": rows, "failed": failed}, indent=1) + "\n")
    part = any(row["tried"] < row["cases"] for row in rows.values())
    head = "# What was tried, and what was survived\n\nWritten by `make faults`" + (", of a part of the cases.\n\n" if part else ".\n\n")
    (Path(__file__).parent / "RESULTS.md").write_text(head + "\n".join(table(rows)) + "\n")


def main() -> int:
    """Try, count, write."""
    parser = argparse.ArgumentParser(prog="tests/faults", description="Every fault that the harness knows, with a table at the end")
    parser.add_argument("kinds", nargs="*", default=[], help=", ".join(KINDS))
    parser.add_argument("--share", type=int, default=1, help="every N-th case only")
    parser.add_argument("--keep", action="store_true", help="write the table of a part too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    compiled()  # once, not by every worker
    queue = Queue(args.kinds or list(KINDS), args.share)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *caught: queue.end())
    with ThreadPoolExecutor(args.jobs) as pool:  # the work is done in the workers' processes
        _ = list(pool.map(lambda number: queue.work(), range(args.jobs)))
    rows = {kind: {"cases": count, "tried": 0, "survived": 0} for kind, count in sorted(queue.known.items())}
    for kind, _, wrong in queue.done:
        rows[kind]["tried"] += 1
        rows[kind]["survived"] += not wrong
    print("\n".join(table(rows)))
    print(f"in {(time.perf_counter() - queue.began) / 60:.0f} minutes", file=sys.stderr)
    if args.keep or queue.cut or (not args.kinds and args.share == 1):
        keep(rows, [{"kind": kind, "case": name, "why": why} for kind, name, why in sorted(queue.done) if why], whole=not args.kinds)
    return int(any(wrong for _, _, wrong in queue.done))


if __name__ == "__main__":
    sys.exit(main())
