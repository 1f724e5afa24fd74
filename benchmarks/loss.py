"""The loss at the end of a GPT, side by side: time and peak memory of its forward and backward pass.

    python benchmarks/loss.py                          -> benchmarks/results/loss.json
    python benchmarks/loss.py --threads 1 --rows 2048  in CPU seconds, which a busy neighbour hardly changes
    python benchmarks/loss.py --device cuda

Contenders: the plain loss, which builds all its logits; ours, in chunks of 256, 512 and 1024 rows, and of those that the budget is
held against: 512, or an eighth of the rows where that is less; PyTorch's `F.linear_cross_entropy`, as it is and with its own
chunking; and a checkpoint around each chunk of 256 rows. They take turns, round after round; a figure is the median of the rounds, a
ratio is the median of the rounds' ratios to the plain loss. Memory is what the allocator holds beyond the inputs, at its peak: counted
by the profiler on a CPU, by the allocator itself on CUDA. Every contender's gradient is compared with that of the plain loss in
float32, because a fast wrong answer is no answer.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mainrun_nb.loss import linear_cross_entropy

RESULTS = Path(__file__).parent / "results"
BUDGET = {"memory": 0.25, "float32": 1.0, "bf16": 1.0}  # at most, as ratios to the plain loss
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def checkpointed(h: Tensor, w: Tensor, y: Tensor, chunk: int = 256) -> Tensor:
    "The plain loss of each chunk, computed again in the backward pass."

    def part(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")

    parts = zip(h.split(chunk), y.split(chunk), strict=True)
    return torch.stack([checkpoint(part, a, w, b, use_reentrant=False) for a, b in parts]).sum() / len(y)


def budgeted(rows: int) -> int:
    "The rows of a chunk that the budget is held against."
    return max(1, min(512, rows // 8))


def contenders(rows: int) -> dict[str, Loss]:
    "Name to loss of (hidden states, weight, targets)."
    found: dict[str, Loss] = {"plain": lambda h, w, y: linear_cross_entropy((h,), w, y, 0)}
    for chunk in sorted({256, 512, 1024, budgeted(rows)}):
        found[f"ours, {chunk} rows"] = lambda h, w, y, chunk=chunk: linear_cross_entropy((h,), w, y, chunk)
    if hasattr(F, "linear_cross_entropy"):  # newer than torch 2.11
        found["torch"] = lambda h, w, y: F.linear_cross_entropy(h, w, y)
        for chunk in (None, 512):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk) if chunk else torch.nn.LinearCrossEntropyOptions()
            name = f"torch, {f'{chunk} rows' if chunk else 'its own chunks'}"
            found[name] = lambda h, w, y, options=options: F.linear_cross_entropy(h, w, y, options=options)
    found["checkpoint, 256 rows"] = checkpointed
    return found


def make_step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], amp: bool) -> Callable[[], Tensor]:
    "Forward and backward pass as a function; the gradient of the weight stays in the weight."
    h, w, y = inputs

    def step() -> Tensor:
        h.grad = w.grad = None
        with torch.autocast(h.device.type, dtype=torch.bfloat16, enabled=amp):
            out = loss(h, w, y)
        out.backward()
        return out.detach()

    return step


def peak_bytes(step: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> int:
    "The most memory held at once in a step, beyond its inputs."
    for x in inputs:
        x.grad = None
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds(step: Callable[[], Tensor], clock: Callable[[], float], cuda: bool) -> float:
    "Duration of one step."
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(rows: int, precision: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    "Every contender at one number of rows, in one precision."
    torch.manual_seed(0)
    h = torch.randn(rows, args.width, device=args.device, requires_grad=True)
    w = (torch.randn(args.vocab, args.width, device=args.device) * 0.05).requires_grad_()
    inputs = (h, w, torch.randint(args.vocab, (rows,), device=args.device))
    steps = {name: make_step(loss, inputs, precision == "bf16") for name, loss in contenders(rows).items()}
    make_step(contenders(rows)["ours, 256 rows"], inputs, False)()
    exact = w.grad.clone()  # type: ignore[union-attr]
    clock = time.process_time if args.threads == 1 and args.device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    memory, wrong = {}, {}
    for name, step in steps.items():  # the round that warms up
        memory[name] = peak_bytes(step, inputs)
        wrong[name] = ((w.grad - exact).norm() / exact.norm()).item()  # type: ignore[operator]
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, clock, args.device == "cuda"))
    return {name: dict(median_s=round(median(t), 4), time_ratio=round(median(a / b for a, b in zip(t, times["plain"], strict=True)), 3),
                       mib=round(memory[name] / 2**20, 1), memory_ratio=round(memory[name] / memory["plain"], 3),
                       gradient_error=float(f"{wrong[name]:.1e}"))
            for name, t in times.items()}


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    "Each budget with what was measured."
    out = {}
    for case, table in found.items():
        rows, precision = int(case.split()[0]), case.split()[-1]
        chunk = budgeted(rows)
        row = table[f"ours, {chunk} rows"]
        for what, limit in [("memory", BUDGET["memory"]), ("time", BUDGET[precision])]:
            value = row[f"{what}_ratio"]
            out[f"{case}: {what} of ours, {chunk} rows, <= {limit} of plain"] = [value, value <= limit]
    return out


def cpu() -> str:
    "The processor's name."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    "Measure, print, write the JSON; 1 if a budget is missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for rows in args.rows:
        for precision in ("float32", "bf16"):
            case = f"{rows} rows, {precision}"
            found[case] = measure(rows, precision, args)
            print(f"\n{case}: width {args.width}, {args.vocab} words")
            for name, row in found[case].items():
                print(f"  {name:24} {row['median_s']:8.3f} s {row['time_ratio']:7.2f}x {row['mib']:9.1f} MiB {row['memory_ratio']:7.3f}x"
                      f"   gradient off by {row['gradient_error']:.0e}")
    verdict = verdicts(found)
    print("\n" + "\n".join(f"{'met   ' if ok else 'MISSED'} {what}: {value}" for what, (value, ok) in verdict.items()))
    machine = dict(device=torch.cuda.get_device_name() if args.device == "cuda" else cpu(), cores=os.cpu_count(), threads=args.threads,
                   clock="CPU seconds" if args.threads == 1 and args.device == "cpu" else "seconds", load=os.getloadavg(),
                   python=platform.python_version(), torch=importlib.metadata.version("torch"))
    RESULTS.mkdir(exist_ok=True)
    result = dict(verdict=verdict, width=args.width, vocab=args.vocab, rounds=args.rounds, loss=found, machine=machine)
    name = "loss.json" if args.device == "cpu" else "loss_cuda.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(ok for _, ok in verdict.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
