"""Predicted against measured peak memory of whole training steps, over a grid of configurations. CPU allocator; JSON out.

    python benchmarks/memory.py [--quick]        writes benchmarks/results/memory.json
"""
import argparse
import itertools
import json
import platform
import time
from pathlib import Path

import torch

from mainrun_nb.config import load_config
from mainrun_nb.memory import measured_peak, simulate_step
from mainrun_nb.optim import OPTIMIZERS

OUT = Path(__file__).with_name("results") / "memory.json"
SHAPE = ["model_configs.gpt.d_model=128", "model_configs.gpt.hidden_layer=128", "model_configs.gpt.n_layer=3", "hyperparams.batch_size=8"]
UNET = ["hyperparams.model_architecture=unet_gpt", "model_configs.unet_gpt.hidden_layer_list=[128,64,128]",
        "model_configs.unet_gpt.d_model=128", "hyperparams.batch_size=8", "model_configs.unet_gpt.skip_connections=true"]
ATTENTIONS = {
    "causal": [], "bottleneck": ["attn_configs.causal.intermediate_dim=64"],
    "fixed": ["model_configs.gpt.attention_layer=sparse"],
    "strided": ["model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.attn_type=strided"],
    "local": ["model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.attn_type=local"],
    "sparsek": ["model_configs.gpt.attention_layer=sparsek"],
}
TRICKS = {
    "plain": [], "bf16": ["hyperparams.amp_bool=true"], "accumulate": ["hyperparams.grad_accum=4"],
    "checkpointing": ["hyperparams.checkpoint_activations=true"], "r_drop": ["hyperparams.r_drop=2"],
    "whole logits": ["hyperparams.loss_chunk=0"],
    "title mask": ["hyperparams.title_mask=true"], "ema": ["hyperparams.ema=0.99"],
}


def grid() -> dict[str, tuple[list[str], int]]:
    """Name -> overrides and vocabulary, for every configuration measured."""
    cases = {}
    for optimizer in OPTIMIZERS:
        cases[f"causal, {optimizer}"] = ([*SHAPE, f"hyperparams.optimizer={optimizer}"], 16_000)
    for (attention, chosen), (trick, extra) in itertools.product(ATTENTIONS.items(), TRICKS.items()):
        cases[f"{attention}, {trick}"] = ([*SHAPE, *chosen, *extra, "hyperparams.optimizer=adamw"], 16_000)
    for trick, extra in TRICKS.items():
        cases[f"unet, {trick}"] = ([*UNET, *extra, "hyperparams.optimizer=adamw"], 16_000)
    for context, batch in [(32, 4), (96, 2), (200, 3), (512, 1)]:
        cases[f"small vocabulary, {batch} x {context}"] = (
            [*SHAPE, "hyperparams.optimizer=adamw", f"hyperparams.context_length={context}", f"hyperparams.batch_size={batch}"], 600)
    for path in sorted(Path(__file__).parents[1].glob("sweeps/base/*.yaml")):
        cases[f"sweeps/base/{path.name}"] = ([str(path)], 0)
    return cases


def measure(overrides: list[str], vocab_size: int) -> dict:
    """One configuration: predicted and measured bytes, their ratio, and the seconds each took."""
    cfg = load_config(overrides[0]) if not vocab_size else load_config(overrides=overrides)
    vocab_size = vocab_size or cfg.hyperparams.vocab_size
    started = time.perf_counter()
    predicted = simulate_step(cfg, vocab_size)[0]["total"]
    middle = time.perf_counter()
    measured = measured_peak(cfg, vocab_size)
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1,
            "simulate_s": round(middle - started, 2), "step_s": round(time.perf_counter() - middle, 2)}


def main() -> None:
    """Measure the grid (or every eighth case of it) and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every eighth configuration")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    cases = list(grid().items())[:: 8 if args.quick else 1]
    rows = {}
    for name, (overrides, vocab_size) in cases:
        rows[name] = measure(overrides, vocab_size)
        row = rows[name]
        print(f"{name:36s} {row['predicted'] / 1e6:10.2f} {row['measured'] / 1e6:10.2f} MB {row['error']:+8.2%}", flush=True)
    errors = sorted(abs(r["error"]) for r in rows.values())
    summary = {"configurations": len(rows), "largest_error": errors[-1], "median_error": errors[len(errors) // 2],
               "within_2_percent": sum(e <= 0.02 for e in errors), "slowest_simulation_s": max(r["simulate_s"] for r in rows.values())}
    machine = {"platform": platform.platform(), "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version()}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "summary": summary, "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
