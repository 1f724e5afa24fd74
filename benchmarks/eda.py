"""Time and memory of the data analysis against the number of titles, on generated titles.

    python benchmarks/eda.py                             10,000 to 4,000,000 titles -> benchmarks/results/eda.json
    python benchmarks/eda.py --sizes 1000 100000

Each size runs in a process of its own, so that its peak memory (the process's, all stages and the titles included) is its own.
Stages: `sample` draws the titles, `tokenizer` trains 16k BPE on the first 100,000 of them (both are needed but are no part of the
analysis), `titles` and `tokens` are the two halves of what `mainrun-eda` does, `pictures` writes the PNG files. One thread does
nearly all the work: `cpu` seconds are what a quiet machine takes, `wall` seconds what this one took.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ANALYSIS = ("titles", "tokens", "pictures")  # the stages that are the analysis itself


def measure(n: int) -> dict:
    "Seconds of each stage and the peak memory, for `n` titles, in this process."
    from mainrun_nb.eda import explore_titles, explore_tokens, join_parts, markdown, save_pictures
    from mainrun_nb.overlap import explore_overlap
    from mainrun_nb.synthetic import sample_titles
    from mainrun_nb.tokenizer import train_tokenizer

    wall: dict[str, float] = {}
    cpu: dict[str, float] = {}
    start = time.perf_counter(), time.process_time()

    def done(stage: str) -> None:
        "Note the time since the last stage."
        nonlocal start
        now = time.perf_counter(), time.process_time()
        wall[stage], cpu[stage], start = round(now[0] - start[0], 2), round(now[1] - start[1], 2), now

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    titles = sample_titles(n, seed=1337)
    done("sample")
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut = int(0.9 * n)
    train, val = titles[:cut], titles[cut:]
    tokenizer = train_tokenizer(train[:100_000], kind="bpe", vocab_size=16_000)
    done("tokenizer")
    parts = [explore_titles(train, val), explore_overlap(train, val)]
    done("titles")
    rows, pictures = join_parts([*parts, explore_tokens(train, val, tokenizer)])
    done("tokens")
    with tempfile.TemporaryDirectory() as tmp:
        save_pictures(Path(tmp), pictures)
    done("pictures")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = rows["titles measured against each training title"]["validation"]
    return dict(titles=n, cpu_seconds=cpu, wall_seconds=wall, analysis_cpu_seconds=round(sum(cpu[k] for k in ANALYSIS), 2),
                analysis_wall_seconds=round(sum(wall[k] for k in ANALYSIS), 2),
                memory_mib=dict(imports=idle // 1024, with_titles=loaded // 1024, peak=peak // 1024),
                overlap_measured_on=measured, rows=len(rows), table_bytes=len(markdown(rows)))


def main() -> None:
    "Run every size in turn and write the results."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 4_000_000], help="numbers of titles")
    parser.add_argument("--out", type=Path, default=RESULTS / "eda.json", help="the JSON file to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # measure this size here and print it
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    runs = []
    for n in args.sizes:
        done = subprocess.run([sys.executable, __file__, "--one", str(n)], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
        print(json.dumps(runs[-1]), flush=True)
    machine = dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(), python=platform.python_version())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = dict(benchmark="eda", source="synthetic", machine=machine, runs=runs)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
