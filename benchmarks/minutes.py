"""How long a training step takes, predicted (chapter 22) and measured, for the shipped configurations.

    python benchmarks/minutes.py                     one thread, in CPU seconds -> benchmarks/results/minutes.json
    python benchmarks/minutes.py --threads 2         in seconds, for a machine with nothing else to do

Each configuration takes four whole steps on random tokens, common ones more often; the first is not counted, the figure is the median of
the others. Batches are cut to `--rows` rows, where one is larger, so that this takes minutes; the budget is a prediction within 25 % of
what was measured.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median

import torch

from mainrun_nb import runtime
from mainrun_nb.config import load_config
from mainrun_nb.memory import machine_pace, step_seconds
from mainrun_nb.optim import train_step
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.trainer import make_state

ROOT = Path(__file__).resolve().parents[1]
VOCAB, BUDGET = 16_000, 0.25


def measured(cfg, clock) -> float:
    "Seconds of a whole step."
    hp, state = cfg.hyperparams, make_state(cfg, VOCAB, torch.device("cpu"))
    x, y = ((VOCAB ** torch.rand(hp.batch_size, hp.context_length)).long().clamp(min=3) for _ in range(2))  # by Zipf's law
    times = []
    for _ in range(4):
        began = clock()
        train_step(state.model, state.optimizer, x, y, hp, None, state.ema)
        times.append(clock() - began)
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names such as sota/small; default: all of sweeps/base and sweeps/sota")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "minutes.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    if args.threads == 1:  # the rates by the same clock
        runtime.time.perf_counter = time.process_time  # type: ignore[assignment]
    names = args.only or [f"{p.parent.name}/{p.stem}" for kind in ("base", "sota") for p in sorted((ROOT / "sweeps" / kind).glob("*.yaml"))]
    rows = {}
    for name in names:
        path, small = ROOT / "sweeps" / f"{name}.yaml", ["data.source=synthetic", "hyperparams.compile=false", "hyperparams.grad_accum=1"]
        whole = load_config(path, small)
        cfg = load_config(path, [*small, f"hyperparams.batch_size={min(args.rows, whole.hyperparams.batch_size)}"])
        machine_pace.cache_clear()  # the machine's own speed drifts: measured anew beside each
        began = time.process_time()
        predicted = step_seconds(cfg, vocab_size=VOCAB, patience=60.0)
        asked = time.process_time() - began
        with freed_memory_kept():
            real = measured(cfg, clock)
        rows[name] = {"rows": cfg.hyperparams.batch_size, "predicted_s": round(predicted or 0, 3), "measured_s": round(real, 3),
                      "ratio": round((predicted or 0) / real, 3), "cpu_seconds_to_predict": round(asked, 1)}
        print(f"{name:20s} {rows[name]}", flush=True)
    dtype = [torch.bfloat16, torch.float32]
    rates = {str(d).removeprefix("torch."): [round(r / 1e9, 1) for r in machine_pace("cpu", d)] for d in dtype}
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads, "load": os.getloadavg(),
               "clock": "CPU seconds" if args.threads == 1 else "seconds", "torch": torch.__version__, "python": platform.python_version()}
    missed = [name for name, row in rows.items() if abs(row["ratio"] - 1) > BUDGET]
    print(f"within {BUDGET:.0%}: {len(rows) - len(missed)} of {len(rows)}" + (f"; not {', '.join(missed)}" if missed else ""))
    found = {"configurations": rows, "giga_operations_and_gigabytes_per_second": rates, "machine": machine}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
