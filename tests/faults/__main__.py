"""Everything, on all cores: python tests/faults [--share N] [KIND ...]. Writes benchmarks/results/faults.json and RESULTS.md here.

With `--share N` every N-th case only; with KINDs only these (writes, damage, configs, stdio, kills). Neither writes anything.
Exit code 0 if every case was survived. MAINRUN_FAULTS_CODE names another checkout to try.
"""
import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ground import Ground, Worker
from workers import ROOT

KINDS = ("writes", "damage", "configs", "stdio", "kills")


def part(kinds: list[str], share: int, number: int, of: int) -> list[tuple[str, str, str]]:
    """One worker's part of the cases: kind, name, and why it was not survived (empty if it was)."""
    ground, done = Ground(Worker()), []
    try:
        for kind in kinds:
            cases = importlib.import_module(kind).cases(ground)
            if kind != "configs":
                cases = cases[::share][number::of]
            elif number:  # they are loaded together
                continue
            for case in cases:
                done.append((case.kind, case.name, case.fails(ground)))
                if done[-1][2]:
                    print(f"{case.kind}: {case.name}: {done[-1][2]}", file=sys.stderr, flush=True)
    finally:
        ground.close()
    return done


def table(rows: dict[str, dict[str, int]]) -> Iterator[str]:
    """The counts as a Markdown table."""
    yield "| what goes wrong | tried | survived |"
    yield "|---|---:|---:|"
    for kind, row in rows.items():
        yield f"| {kind} | {row['tried']:,} | {row['survived']:,} |"
    yield "| **all** | " + " | ".join(f"**{sum(row[k] for row in rows.values()):,}**" for k in ("tried", "survived")) + " |"


def main() -> int:
    """Try, count, write."""
    parser = argparse.ArgumentParser(prog="tests/faults", description="Every fault that the harness knows, with a table at the end")
    parser.add_argument("kinds", nargs="*", default=[], help=", ".join(KINDS))
    parser.add_argument("--share", type=int, default=1, help="every N-th case only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    kinds, began = args.kinds or list(KINDS), time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:  # the work is done in the workers' processes
        parts = list(pool.map(lambda number: part(kinds, args.share, number, args.jobs), range(args.jobs)))
    done = sorted(case for one in parts for case in one)
    rows = {kind: {"tried": 0, "survived": 0} for kind in dict.fromkeys(kind for kind, _, _ in done)}
    for kind, _, wrong in done:
        rows[kind]["tried"] += 1
        rows[kind]["survived"] += not wrong
    print("\n".join(table(rows)))
    print(f"in {(time.perf_counter() - began) / 60:.0f} minutes", file=sys.stderr)
    if not args.kinds and args.share == 1:
        failed = [{"kind": kind, "case": name, "why": why} for kind, name, why in done if why]
        (ROOT / "benchmarks" / "results" / "faults.json").write_text(json.dumps({"kinds": rows, "failed": failed}, indent=1) + "\n")
        head = "# What was tried, and what was survived\n\nWritten by `make faults`.\n\n"
        (Path(__file__).parent / "RESULTS.md").write_text(head + "\n".join(table(rows)) + "\n")
    return int(any(wrong for _, _, wrong in done))


if __name__ == "__main__":
    sys.exit(main())
