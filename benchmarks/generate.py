"""Writing 256 tokens: with the cache, without it, and Hugging Face `generate` on the exported model. Interleaved, medians; JSON out.

    python benchmarks/generate.py        writes benchmarks/results/generate.json
"""
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mainrun_nb.config import load_config
from mainrun_nb.generate import stream_ids
from mainrun_nb.hub import export_gpt2
from mainrun_nb.models import build_model
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import train_tokenizer

OUT = Path(__file__).with_name("results") / "generate.json"
TOKENS, REPEATS = 256, 5
SHAPES = {"small": (4, 192), "baseline": (6, 512)}


class Endless:
    """Stands for the model, with an `<eos>` that never comes, so that all texts have the same length."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.eos_id = model, -1

    def __getattr__(self, name: str):
        return getattr(self.model, name)


def with_cache(model, n: int) -> torch.Tensor:
    """Greedy tokens through `stream_ids`: (n, TOKENS)."""
    return torch.stack(list(stream_ids(Endless(model), [1], n, max_tokens=TOKENS, temperature=0)), 1)


@torch.no_grad()
def without_cache(model, n: int) -> torch.Tensor:
    """Greedy tokens, the whole text through the model for each: (n, TOKENS)."""
    idx = torch.ones(n, 1, dtype=torch.long)
    for _ in range(TOKENS):
        logits = model.logits(model.features(idx)[:, -1])
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    return idx[:, 1:]


def hugging_face(model, n: int) -> torch.Tensor:
    """Greedy tokens through transformers' `generate`: (n, TOKENS)."""
    start = torch.ones(n, 1, dtype=torch.long)
    mask = torch.ones_like(start)
    out = model.generate(start, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[:, 1:]


def measure(shape: tuple[int, int], n: int) -> dict:
    """Median seconds of each way for `n` texts at once, and the ratios to ours."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    layers, width = shape
    sizes = {"n_layer": layers, "d_model": width, "hidden_layer": width}
    cfg = load_config(overrides=[*(f"model_configs.gpt.{k}={v}" for k, v in sizes.items()),
                                 "hyperparams.context_length=320", "tokenizer.kind=bpe"])
    tokenizer = train_tokenizer(sample_titles(20_000, 0), kind="bpe", vocab_size=16_000)
    torch.manual_seed(0)
    model = build_model(cfg, tokenizer.vocab_size).eval()
    with tempfile.TemporaryDirectory() as folder:
        export_gpt2(model, tokenizer, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ways = {"with_cache": (with_cache, model), "without_cache": (without_cache, model), "hugging_face": (hugging_face, theirs)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for _ in range(REPEATS):
        for name, (way, subject) in ways.items():
            began = time.perf_counter()
            outputs[name] = way(subject, n)
            times[name].append(time.perf_counter() - began)
    same = {name: (outputs[name] == outputs["with_cache"]).float().mean().item() for name in ways}
    seconds = {name: statistics.median(t) for name, t in times.items()}
    return {"texts": n, "tokens": TOKENS, "vocab_size": tokenizer.vocab_size, "seconds": seconds, "same_tokens": same,
            "speedup_over": {name: seconds[name] / seconds["with_cache"] for name in ways if name != "with_cache"}}


def main() -> None:
    """Measure both shapes, the small one also with eight texts at once, and write the JSON."""
    rows = {}
    for name, n in [("small", 1), ("small", 8), ("baseline", 1)]:
        rows[f"{name}, {n} at once"] = row = measure(SHAPES[name], n)
        print(f"{name:9s} {n} at once: {TOKENS / row['seconds']['with_cache'] * n:7.0f} tokens/s; times faster than: "
              + ", ".join(f"{k} {v:.2f}" for k, v in row["speedup_over"].items()), flush=True)
    import transformers

    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "torch": torch.__version__,
               "transformers": transformers.__version__, "python": platform.python_version()}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
