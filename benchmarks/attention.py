"""Time and memory of every attention against dense causal attention, side by side in one run.

    python benchmarks/attention.py                       all variants, T = 256 .. 16384 -> benchmarks/results/attention.json, .png
    python benchmarks/attention.py --lengths 256 8192 --only local fixed_c1
    python benchmarks/attention.py --threads 1 --clock cpu    on a machine that others are using: CPU seconds of one thread

Every variant computes the same job: B 1, H 4, D 32, float32, block = stride = window = 128 (DESIGN's budgets are in this shape).
For each length the variants take turns, round after round, so that a busy moment of the machine falls on all of them; a figure is
the median over the rounds, a ratio is the median of the rounds' ratios to dense causal SDPA. Memory is the allocator's peak during
one forward + backward, the inputs not counted: from the profiler's allocation events on CPU, from CUDA's own counter there.
All run as they do in training, where the C library keeps freed memory. A new variant is one function with `@variant("name")`.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mainrun_nb.attention import attend_plain
from mainrun_nb.config import SparseAttnConfig
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.sparse_attention import attend_sparse, sparse_bias
from mainrun_nb.sparsek import Selection
from mainrun_nb.sparsek_stream import sparsek_fast

RESULTS = Path(__file__).parent / "results"


@dataclass
class Shape:
    "The job: one forward + backward of causal attention over (B, H, T, D)."

    T: int
    B: int = 1
    H: int = 4
    D: int = 32
    block: int = 128  # block, stride or window
    device: str = "cpu"

    def qkv(self) -> list[Tensor]:
        "Fresh leaves q, k, v that want gradients."
        return [torch.randn(self.B, self.H, self.T, self.D, device=self.device, requires_grad=True) for _ in range(3)]


@dataclass
class Case:
    "One variant at one length: `fn(*inputs)` returns (B, H, T, D); the inputs that want gradients get them."

    fn: Callable[..., Tensor]
    inputs: list[Tensor]


VARIANTS: dict[str, Callable[[Shape], Case | None]] = {}


def variant(name: str):
    "Register a builder Shape -> Case; None where the variant cannot run at this length."

    def add(build):
        VARIANTS[name] = build
        return build

    return add


@variant("dense")
def dense(shape: Shape) -> Case:
    return Case(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), shape.qkv())


@variant("materialised")
def materialised(shape: Shape) -> Case | None:
    if shape.T > 4096:  # the T x T table and its gradients would need 17 GB at 16384
        return None
    mask = torch.ones(shape.T, shape.T, dtype=torch.bool, device=shape.device).tril()
    return Case(lambda q, k, v: attend_plain(q, k, v, mask), shape.qkv())


def sparse(name: str, **settings) -> None:
    "Add a pattern of the Sparse Transformer as a variant."

    @variant(name)
    def build(shape: Shape) -> Case:
        cfg = SparseAttnConfig(n_head=shape.H, local_attn_ctx=shape.block, sparseblocksize=shape.block, **settings)
        bias = sparse_bias(cfg, shape.T, shape.device)  # built once per layer, as the layer does
        return Case(lambda q, k, v: attend_sparse(q, k, v, cfg, bias=bias), shape.qkv())


sparse("local", attn_type="local")
sparse("strided", attn_type="strided")
sparse("strided_merged", attn_type="strided", merged=True)
sparse("fixed_c1", attn_type="fixed", vertsize=1, num_verts=1)
sparse("fixed_c1_merged", attn_type="fixed", vertsize=1, num_verts=1, merged=True)
sparse("fixed_c8", attn_type="fixed", vertsize=8, num_verts=2)
sparse("fixed_c8_merged", attn_type="fixed", vertsize=8, num_verts=4, merged=True)


@variant("sparsek")
def sparsek(shape: Shape) -> Case:
    "k 64 of 256 candidates beside the window; the scores are an input that wants a gradient too."
    rule = Selection(k=64, candidates=256, window=shape.block)
    scores = torch.randn(shape.B, shape.H, shape.T, device=shape.device, requires_grad=True)
    return Case(lambda q, k, v, u: sparsek_fast(q, k, v, u, rule)[0], [*shape.qkv(), scores])


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
read_clock = CLOCKS["wall"]


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return read_clock()


def once(case: Case, grad: Tensor, device: str) -> tuple[float, float]:
    "Seconds of the forward pass, and of forward + backward."
    start = clock(device)
    y = case.fn(*case.inputs)
    middle = clock(device)
    torch.autograd.grad(y, [x for x in case.inputs if x.requires_grad], grad)
    return middle - start, clock(device) - start


def peak_bytes(case: Case, grad: Tensor, device: str) -> int:
    "Peak of the memory allocated during one forward + backward, above what was there before."
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(case, grad, device)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        once(case, grad, device)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(level.max())


def measure(T: int, names: list[str], rounds: int, seconds: float, device: str, shape: dict) -> dict[str, dict]:
    "All variants at one length, taking turns; stops after `rounds`, or once `seconds` are spent and 3 rounds are done."
    cases = {n: c for n in names if (c := VARIANTS[n](Shape(T=T, device=device, **shape))) is not None}
    grad = torch.randn_like(next(iter(cases.values())).inputs[0])
    out: dict[str, dict] = {n: {"peak_bytes": peak_bytes(c, grad, device)} for n, c in cases.items()}  # also the warm-up
    times: dict[str, list[tuple[float, float]]] = {n: [] for n in cases}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for n, case in cases.items():
            times[n].append(once(case, grad, device))
    for n, pairs in times.items():
        forward, both = zip(*pairs, strict=True)
        out[n] |= {"forward_ms": 1e3 * median(forward), "both_ms": 1e3 * median(both), "rounds": len(both)}
        if "dense" in times:
            dense_forward, dense_both = zip(*times["dense"], strict=True)
            out[n]["forward_speedup"] = median(d / t for d, t in zip(dense_forward, forward, strict=True))
            out[n]["both_speedup"] = median(d / t for d, t in zip(dense_both, both, strict=True))
            out[n]["memory_ratio"] = out[n]["peak_bytes"] / out["dense"]["peak_bytes"]
    return out


def exponent(lengths: list[int], values: list[float], start: int = 2048) -> float | None:
    "Slope of log(value) against log(T) from `start` on."
    points = [(np.log(t), np.log(v)) for t, v in zip(lengths, values, strict=True) if t >= start]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else None


def machine(device: str) -> dict:
    "What the figures were taken on."
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def picture(result: dict, path: Path) -> None:
    "Two log-log panels: time of forward + backward, and peak memory."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
    colours = ["#000000", "#999999", "#0072b2", "#e69f00", "#d55e00", "#56b4e9", "#009e73", "#cc79a7"]  # Okabe and Ito
    panels = [("both_ms", 1, "forward + backward (ms)", "time"), ("peak_bytes", 2**-20, "peak memory (MiB)", "memory")]
    for ax, (key, scale, label, what) in zip(axes, panels, strict=True):
        for i, (name, rows) in enumerate(result["variants"].items()):
            lengths, slope = sorted(map(int, rows)), result["exponents"][name][what]
            text = name if slope is None else f"{name}: $T^{{{slope:.2f}}}$"
            style = {"color": colours[i % len(colours)], "marker": "osD^v<>pP*Xh"[i % 12], "ls": "-" if i < len(colours) else "--"}
            ax.loglog(lengths, [rows[str(t)][key] * scale for t in lengths], ms=5, lw=1.5, label=text, **style)
        ax.set(xlabel="length T (tokens)", ylabel=label, xticks=result["lengths"])
        ax.set_xticklabels([str(t) for t in result["lengths"]])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    s, m = result["shape"], result["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, {result['clock']} time"
    fig.suptitle(f"B {s['B']}, H {s['H']}, D {s['D']}, float32, block {s['block']}; {where}; exponents from T = 2048 on", fontsize=11)
    fig.savefig(path, dpi=90)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    ap.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="variants (dense is always there)")
    ap.add_argument("--rounds", type=int, default=31, help="at most this many rounds per length")
    ap.add_argument("--seconds", type=float, default=20, help="per length; at least 3 rounds are made")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--threads", type=int, default=torch.get_num_threads())
    ap.add_argument("--clock", choices=list(CLOCKS), default="wall")
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--heads", type=int, default=4)
    ap.add_argument("--block", type=int, default=128)
    ap.add_argument("--out", type=Path, default=RESULTS / "attention.json", help="the picture goes beside it")
    args = ap.parse_args()
    global read_clock
    read_clock = CLOCKS[args.clock]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    names = list(dict.fromkeys(["dense", *args.only]))
    shape = {"B": args.batch, "H": args.heads, "block": args.block}
    variants: dict[str, dict] = {n: {} for n in names}
    for T in args.lengths:
        with freed_memory_kept():
            rows = measure(T, names, args.rounds, args.seconds, args.device, shape)
        print(f"T = {T}")
        for n, row in rows.items():
            variants[n][str(T)] = row
            print(f"  {n:18s} forward {row['forward_ms']:9.2f} ms   both {row['both_ms']:9.2f} ms   {row['both_speedup']:6.2f}x dense   "
                  f"peak {row['peak_bytes'] / 2**20:8.1f} MiB   {row['memory_ratio']:5.2f}x dense", flush=True)
    keys = {"forward": "forward_ms", "time": "both_ms", "memory": "peak_bytes"}
    exponents = {n: {what: exponent(list(map(int, rows)), [r[key] for r in rows.values()]) for what, key in keys.items()}
                 for n, rows in variants.items()}
    fixed_shape = {k: v for k, v in asdict(Shape(T=0, **shape)).items() if k not in ("T", "device")}
    result = {"machine": machine(args.device), "device": args.device, "clock": args.clock, "shape": fixed_shape, "lengths": args.lengths,
              "variants": variants, "exponents": exponents}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    picture(result, args.out.with_name(args.out.name.removesuffix(".json") + ".png"))  # with_suffix would cut a name like run-0.5
    print(json.dumps({n: e["time"] for n, e in exponents.items()}))


if __name__ == "__main__":
    main()
