"""Everything, on all cores: python tests/faults [--share N] [KIND ...]. Writes benchmarks/results/faults.json and RESULTS.md here.

With `--share N` every N-th case only; with KINDs only these (writes, damage, configs, stdio, kills). Neither writes anything, unless
`--keep` says so: the table says how many cases there are and how many of them were tried, and the rows of other kinds stay.
Exit code 0 if every case was survived. MAINRUN_FAULTS_CODE names another checkout to try.
"""
import argparse
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ground import Ground, Worker
from workers import ROOT

KINDS = ("writes", "damage", "configs", "stdio", "kills")


def part(kinds: list[str], share: int, number: int, of: int) -> tuple[list[tuple[str, str, str]], Counter]:
    """One worker's part of the cases: kind, name, and why it was not survived (empty if it was); and how many there are of each kind."""
    ground, done, known = Ground(Worker()), [], Counter()
    try:
        for kind in kinds:
            cases = importlib.import_module(kind).cases(ground)
            known.update(case.kind for case in cases)
            if kind != "configs":
                cases = cases[::share][number::of]
            elif number:  # they are loaded together
                continue
            for case in cases:
                done.append((case.kind, case.name, case.fails(ground)))
                if done[-1][2]:
                    print(f"{case.kind}: {case.name}: {done[-1][2]}", file=sys.stderr, flush=True)
            print(f"{kind}: {len(cases)} tried", file=sys.stderr, flush=True)
    finally:
        ground.close()
    return done, known


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
    kinds, began = args.kinds or list(KINDS), time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:  # the work is done in the workers' processes
        parts = list(pool.map(lambda number: part(kinds, args.share, number, args.jobs), range(args.jobs)))
    done = sorted(case for cases, _ in parts for case in cases)
    rows = {kind: {"cases": count, "tried": 0, "survived": 0} for kind, count in sorted(parts[0][1].items())}
    for kind, _, wrong in done:
        rows[kind]["tried"] += 1
        rows[kind]["survived"] += not wrong
    print("\n".join(table(rows)))
    print(f"in {(time.perf_counter() - began) / 60:.0f} minutes", file=sys.stderr)
    if args.keep or (not args.kinds and args.share == 1):
        keep(rows, [{"kind": kind, "case": name, "why": why} for kind, name, why in done if why], whole=not args.kinds)
    return int(any(wrong for _, _, wrong in done))


if __name__ == "__main__":
    sys.exit(main())
