"""Predicted memory of a training step on CUDA against the caching allocator's peak on the pretended GPU.

    python tests/cuda --memory [CASE ...]        writes benchmarks/results/memory_cuda.json
"""
import json
import math
import sys
import time
from pathlib import Path

import torch
from steps import steps

from mainrun_nb.config import load_config
from mainrun_nb.memory import estimate_memory

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks/results/memory_cuda.json"
AMP = "hyperparams.amp_bool=true"
OTHERS = [["hyperparams.optimizer=adafactor"], ["hyperparams.optimizer=rmsprop", "hyperparams.momentum=0.9"], [AMP],
          ["hyperparams.optimizer=muon", AMP, "hyperparams.ema=0.99"],
          ["hyperparams.optimizer=adamw", AMP, "hyperparams.batch_size=256", "hyperparams.context_length=256"]]


def cases() -> dict[str, tuple[Path, list[str]]]:
    """Every shipped file, and what else is asked of the baseline."""
    shipped = sorted((ROOT / "sweeps").glob("base/*.yaml")) + sorted((ROOT / "sweeps").glob("sota/*.yaml"))
    found = {f"{p.parent.name}/{p.stem}": (p, []) for p in shipped}
    base = ROOT / "sweeps/base/baseline.yaml"
    more = {" ".join(["base/baseline", *(o.removeprefix("hyperparams.") for o in over)]): (base, over) for over in OTHERS}
    return found | more


def compare(name: str) -> dict[str, float]:
    """One case: bytes predicted and held at most, their ratio, and the processor seconds that the prediction took."""
    path, over = cases()[name]
    cfg = load_config(path, ["data.source=synthetic", "hyperparams.device=cuda", *over])
    began = time.process_time()
    estimate = estimate_memory(cfg, "cuda", until=math.inf)
    seconds = time.process_time() - began
    peak = steps(cfg)[1]
    return {"predicted": estimate.peak_bytes, "measured": peak, "error": estimate.peak_bytes / peak - 1, "simulated": estimate.simulated,
            "predict_cpu_s": round(seconds, 1)}


def main() -> None:
    """The table, kept beside what other benchmarks found."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # not pretended
    kept = json.loads(OUT.read_text()) if OUT.exists() else {}
    rows = kept.get("rows", {})
    for name in sys.argv[1:] or cases():
        rows[name] = compare(name)
        row = rows[name]
        sizes = f"{row['predicted'] / 1e6:9.1f} {row['measured'] / 1e6:9.1f} MB {row['error']:+7.1%}"
        print(f"{name:75s} {sizes} {row['predict_cpu_s']:6.1f} s", flush=True)
        machine = {"device": f"pretended {torch.cuda.get_device_name()}", "torch": torch.__version__}
        summary = {"configurations": len(rows), "largest_error": max(abs(r["error"]) for r in rows.values())}
        OUT.write_text(json.dumps({"machine": machine, "summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
