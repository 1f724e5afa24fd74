"""Studies on real titles, run after run, into the ledger sweeps/results.csv, which chapter 21 reads.

    HN_TITLES=titles.txt.gz python benchmarks/recipes.py attention           what the ledger lacks of one study
    HN_TITLES=titles.txt.gz python benchmarks/recipes.py attention --dry     only show the commands

Every run is the command that its row names, in a process of its own. A run that fails gets a row too, with its error. Killed, the same
command goes on where it was: finished runs are skipped, the one under way is resumed from its checkpoint.
"""

import argparse
import csv
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mainrun_nb.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "sweeps" / "results.csv"
COLUMNS = ["study", "name", "status", "val/loss", "val/challenge_loss", "val/coverage", "val/nats_per_token", "reference/bigram",
           "train_seconds", "tokens_per_second", "peak_memory_bytes", "parameters", "parameters_non_embedding", "steps", "batch_size",
           "context_length", "seed", "n_titles", "tokens_per_epoch", "sha256", "commit", "torch", "cpu_count", "error", "command"]

Runs = dict[str, tuple[str, list[str]]]  # name -> configuration, overrides


def attention() -> Runs:
    "small.yaml with each attention for 500 steps of 2,048 tokens, nearly an epoch."
    layer = "model_configs.gpt.attention_layer"
    kinds = {
        "causal": [],
        "fixed": [f"{layer}=sparse", "attn_configs.sparse.attn_type=fixed"],
        "sparsek": [f"{layer}=sparsek", "attn_configs.sparsek.n_head=6", "attn_configs.sparsek.k=8", "attn_configs.sparsek.window=16"],
        "strided": [f"{layer}=sparse", "attn_configs.sparse.attn_type=strided"],
        "local": [f"{layer}=sparse", "attn_configs.sparse.attn_type=local"],
        "bottleneck": ["attn_configs.causal.intermediate_dim=96"],
    }
    sparse = ["attn_configs.sparse.n_head=6", "attn_configs.sparse.local_attn_ctx=16", "attn_configs.sparse.sparseblocksize=16",
              "attn_configs.sparse.vertsize=4", "attn_configs.sparse.num_verts=3"]
    budget = ["hyperparams.max_steps=500", "hyperparams.evals_per_epoch=1"]
    return {name: ("sweeps/base/small.yaml", [*budget, *more, *(sparse if f"{layer}=sparse" in more else [])])
            for name, more in kinds.items()}


PROXY = ["hyperparams.max_steps=1000", "hyperparams.evals_per_epoch=1"]  # 2.05 million tokens, under two epochs; six minutes or so


def control() -> Runs:
    "What small.yaml is measured against: AdamW, warmup and cosine, learned positions, no title mask; its best learning rate."
    plain = ["model_configs.gpt.position=learned",
             *(f"hyperparams.{s}" for s in ("optimizer=adamw", "weight_decay=0.1", "title_mask=false"))]
    return {f"lr-{lr}": ("sweeps/base/small.yaml", [*PROXY, *plain, f"hyperparams.lr={lr}"])
            for lr in ("2.0e-3", "4.0e-3", "1.0e-3", "8.0e-3", "5.0e-4")}


def screen() -> Runs:
    "small.yaml, and one change at a time."
    changes = {
        "small": [], "vocab-8k": ["hyperparams.vocab_size=8000"], "unigram": ["tokenizer.kind=unigram"],
        "wsd": ["hyperparams.scheduler=wsd"], "lr-2.0e-2": ["hyperparams.lr=2.0e-2"], "lr-5.0e-3": ["hyperparams.lr=5.0e-3"],
        "adamw-lr-5.0e-3": ["hyperparams.adamw_lr=5.0e-3"], "no-dropout": ["model_configs.gpt.dropout=0"],
        "no-mask": ["hyperparams.title_mask=false"],
        "learned-positions": ["model_configs.gpt.position=learned"], "batch-8": ["hyperparams.batch_size=8", "hyperparams.max_steps=2000"],
        "swiglu": ["model_configs.gpt.activation_function=swiglu"], "gate": ["model_configs.gpt.output_gate=true"],
    }
    return {name: ("sweeps/base/small.yaml", [*PROXY, *more]) for name, more in changes.items()}


STUDIES = {"attention": attention, "control": control, "screen": screen}


def read_ledger() -> list[dict[str, str]]:
    "The rows so far."
    if not LEDGER.exists():
        return []
    with LEDGER.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(row: dict[str, Any]) -> None:
    "Write the ledger with one more row; a row of the same study and name is replaced."
    rows = [r for r in read_ledger() if (r["study"], r["name"]) != (row["study"], row["name"])] + [row]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(LEDGER, text.getvalue())


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    "The ledger's columns from a result.json."
    data = result["data"]
    losses = {k: round(result[k], 5) for k in ("val/loss", "val/challenge_loss", "val/coverage", "val/nats_per_token")}
    rates = {k: round(result[k]) for k in ("train_seconds", "tokens_per_second")}
    return {**result, **data, **losses, **rates, "status": "finished", "reference/bigram": round(data["reference/bigram"], 5),
            "sha256": data["sha256"][:12], "torch": result["versions"]["torch"], "cpu_count": result["device"]["cpu_count"],
            "commit": (result["commit"] or "")[:10]}


def run(study: str, name: str, config: str, overrides: list[str], dry: bool) -> None:
    "Train, or go on training, and enter the result."
    from mainrun_nb.config import load_config

    out = f"sweeps/runs/{study}-{name}"
    command = ["mainrun-train", "--config", config, "--out", out, *overrides]
    print(f"== {study} {name}\n{shlex.join(command)}", flush=True)
    if dry:
        return
    resume = ["--resume"] if (ROOT / out / "config.yaml").exists() else []
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run([program, *command[1:], *resume], cwd=ROOT, capture_output=True, text=True, check=False)
    hp = load_config(ROOT / config, overrides).hyperparams
    row = {"study": study, "name": name, "command": shlex.join(command), "seed": hp.seed, "batch_size": hp.batch_size,
           "context_length": hp.context_length}
    if done.returncode > 128 or done.returncode < 0:  # interrupted from outside: no result, and no row
        raise SystemExit(done.returncode)
    if done.returncode:
        add_row({**row, "status": "failed", "error": done.stderr.strip().splitlines()[-1]})
        print(done.stderr, file=sys.stderr)
        return
    result = json.loads(done.stdout.splitlines()[-1])
    add_row({**row, **row_of(result)})
    print(f"   {result['val/loss']:.4f} nats per character in {result['train_seconds'] / 60:.1f} minutes", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("study", nargs="+", choices=list(STUDIES))
    ap.add_argument("--dry", action="store_true", help="show the commands and run nothing")
    ap.add_argument("--again", action="store_true", help="run what failed once more")
    args = ap.parse_args()
    if not os.environ.get("HN_TITLES"):
        raise SystemExit("HN_TITLES: name a file of titles; the studies are of real ones")
    for study in args.study:
        for name, (config, overrides) in STUDIES[study]().items():
            known = [r for r in read_ledger() if (r["study"], r["name"]) == (study, name)]
            if not known or (args.again and known[0]["status"] == "failed"):
                run(study, name, config, overrides, args.dry)


if __name__ == "__main__":
    main()
