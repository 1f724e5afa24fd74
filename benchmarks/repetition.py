"""What a repeated title is worth, beside a fresh one: the runs behind chapter 33b.

    HN_TITLES=titles.txt.gz python benchmarks/repetition.py           every run that benchmarks/results/repetition.csv lacks
    HN_TITLES=titles.txt.gz python benchmarks/repetition.py --dry     only show them, with their commands and expected minutes
    HN_TITLES=titles.txt.gz python benchmarks/repetition.py --only 'small-1of16-*'

The first recipe of the small track (sweeps/sota/small_first.yaml), in batches of 8 rows rather than 16, reads at two sizes (1.83 and 0.46
million parameters without embeddings) 1/16, 1/8, 1/4 and 1/2 of its 90,000 training titles 1, 2, 4 and 7 times, each run with a whole
schedule of its own. Split, validation titles and tokenizer are the same for all. Besides: one pass over all titles, 16 passes over 1/16;
two more seeds at both ends of 1/8, to know the noise; and weight decay of 0.1, 1 and 3 in all matrices and tables at seven passes of 1/8
(Kim et al. 2025, arXiv:2509.14786), where the recipe has none in its matrices.

The batch: one pass over 1/16 is 34 steps of 16 rows, and its loss says more about the steps than about the titles. The smaller size reached
1.731, 1.669 and 1.634 nats per character there in batches of 16, 8 and 4 rows, for 21, 29 and 26 CPU seconds beside other work.

Every run uses one thread. Started twice, the study is made by two processes side by side, each taking the cheapest run that is neither done
nor under way; a run that was stopped is made again. A row's command makes the same run, to the last bit, with everything that it leaves.
"""

import argparse
import math
import os
import shlex
import time
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from _rows import add_rows, read_rows

from mainrun_nb.checkpoint import run_lock
from mainrun_nb.config import Config, InputError, load_config
from mainrun_nb.data import EOS, Batches
from mainrun_nb.device import computing
from mainrun_nb.models import count_parameters
from mainrun_nb.optim import half_precision
from mainrun_nb.runtime import freed_memory_kept, git_commit
from mainrun_nb.trainer import RunData, evaluate_state, make_plan, make_state, prepare_data, take_step

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "results" / "repetition.csv"
CONFIG = "sweeps/sota/small_first.yaml"
BATCH = "hyperparams.batch_size=8"
SIZES = {"large": [], "small": ["model_configs.gpt.d_model=64", "model_configs.gpt.hidden_layer=96"]}
MINUTES = {"large": 5.5, "small": 2.8}  # of one core for a pass over all training titles, beside another run
SHARES, PASSES, DECAYS = (16, 8, 4, 2), (1, 2, 4, 7), ("0.1", "1.0", "3.0")
COLUMNS = ["name", "size", "share", "passes", "decay", "seed", "n", "d", "tokens_per_epoch", "loss", "nats_per_token",
           "train_nats_per_token", "steps", "cpu_seconds", "torch", "commit", "command"]


def run_of(size: str, share: int, passes: int, seed: int = 1337, decay: str = "") -> dict[str, Any]:
    "A run of the study: what identifies it, and its command."
    name = f"{size}-1of{share}-x{passes}" + (f"-decay-{decay}" if decay else "") + (f"-seed-{seed}" if seed != 1337 else "")
    more = [f"hyperparams.weight_decay={decay}", f"hyperparams.adamw_weight_decay={decay}"] if decay else []
    more += [f"hyperparams.seed={seed}"] if seed != 1337 else []
    overrides = [f"data.train_share={1 / share}", f"hyperparams.epochs={passes}", BATCH, *SIZES[size], *more]
    command = shlex.join(["mainrun-train", "--config", CONFIG, "--out", f"sweeps/runs/repetition-{name}", *overrides])
    return {"name": name, "size": size, "share": share, "passes": passes, "decay": decay, "seed": seed, "command": command,
            "overrides": overrides, "minutes": MINUTES[size] * passes / share}


def study() -> list[dict[str, Any]]:
    "All runs, the cheapest first."
    runs = [run_of(size, share, passes) for size in SIZES for share in SHARES for passes in PASSES]
    runs += [run_of(size, *more) for size in SIZES for more in ((1, 1), (16, 16))]
    runs += [run_of(size, 8, passes, seed) for size in SIZES for passes in (1, 7) for seed in (1, 2)]
    runs += [run_of(size, 8, 7, decay=decay) for size in SIZES for decay in DECAYS]
    return sorted(runs, key=lambda run: run["minutes"])


def first_titles(data: RunData, share: float) -> torch.Tensor:  # (tokens,)
    "The stream of the first titles, as `prepare_data` makes it for this `data.train_share`."
    ends = (data.train_ids == EOS).nonzero()[:, 0]
    return data.train_ids[: int(ends[math.ceil(share * len(ends)) - 1]) + 1]


def measure(cfg: Config, data: RunData) -> dict[str, Any]:
    "Train as `train` does, without its folder; the losses at the end. `data` is that of all training titles."
    began, cpu = time.process_time(), torch.device("cpu")
    hp = replace(cfg.hyperparams, amp_dtype=half_precision(cfg.hyperparams, cpu))
    cfg = replace(cfg, hyperparams=hp)
    data = replace(data, train_ids=first_titles(data, cfg.data.train_share))
    plan, batches = make_plan(hp, len(data.train_ids)), Batches(data.train_ids, hp)
    state, losses = make_state(cfg, data.tokenizer.vocab_size, cpu, pairs=data.tokenizer.pairs, pieces=data.tokenizer.pieces), []
    with freed_memory_kept(), computing(hp, cpu):
        while state.step < plan.max_steps:
            losses.append(float(take_step(state, state.model, batches, slice(None), hp, plan.max_steps).result.loss))
        metrics = evaluate_state(state, data, cfg, challenge=False)
    last = losses[-batches.per_epoch :]
    return {"n": count_parameters(state.model, embeddings=False), "d": state.step * batches.tokens, "tokens_per_epoch": len(data.train_ids),
            "loss": metrics["val/loss"], "nats_per_token": round(metrics["val/nats_per_token"], 5),
            "train_nats_per_token": round(sum(last) / len(last), 5), "steps": state.step,
            "cpu_seconds": round(time.process_time() - began, 1), "torch": torch.__version__}


def done() -> set[str]:
    "Names of the runs that have their row."
    return {row["name"] for row in read_rows(ROWS)}


def make(run: dict[str, Any], data: RunData) -> None:
    "Make a run, unless it is done or another process is at it."
    folder = ROOT / "sweeps" / "runs" / f"repetition-{run['name']}"
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(InputError), run_lock(folder):  # held until the run has its row
        if run["name"] in done():
            return
        found = measure(load_config(ROOT / CONFIG, run["overrides"]), data)
        commit = git_commit() or ""
        row = {**run, **found, "loss": round(found["loss"], 5), "commit": commit[:10] + "+" * commit.endswith("+")}
        add_rows(ROWS, {k: row.get(k, "") for k in COLUMNS})
        print(f"{run['name']}: {found['loss']:.4f} nats per character in {found['cpu_seconds'] / 60:.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="runs whose name matches this pattern")
    parser.add_argument("--dry", action="store_true", help="show the runs and make none")
    args = parser.parse_args()
    left = [run for run in study() if fnmatch(run["name"], args.only) and run["name"] not in done()]
    if args.dry:
        for run in left:
            print(f"{run['minutes']:5.1f} minutes  {run['command']}")
        print(f"{len(left)} runs, {sum(run['minutes'] for run in left):.0f} minutes of one core")
        return
    if not os.environ.get("HN_TITLES"):
        parser.exit(0, "repetition.py: nothing was measured; HN_TITLES must name a file of titles\n")
    torch.set_num_threads(1)
    data = prepare_data(load_config(ROOT / CONFIG))
    for run in left:
        make(run, data)


if __name__ == "__main__":
    main()
