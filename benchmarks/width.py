"""Does the learning rate that is best for a narrow GPT hold for a wide one? The runs behind chapter 33c.

    HN_TITLES=titles.txt.gz python benchmarks/width.py                both parts: what is not in their tables
    HN_TITLES=titles.txt.gz python benchmarks/width.py coordinates    -> benchmarks/results/coordinates.csv
    HN_TITLES=titles.txt.gz python benchmarks/width.py rates          -> benchmarks/results/width.csv
    HN_TITLES=titles.txt.gz python benchmarks/width.py --dry          only show what would be next
    HN_TITLES=titles.txt.gz python benchmarks/width.py --run adamw-mup-80-7-1337        this row of the second table again
    HN_TITLES=titles.txt.gz python benchmarks/width.py --run adamw-mup-64-1337          this row of the first

GPTs of two layers, with heads of 16 numbers and a vocabulary of 2,000, read the first titles of a draw of 20,000 in batches of 512 tokens,
by AdamW or Muon, in standard parametrisation or in maximal update parametrisation.

`coordinates`: how much the outputs of each part change in four steps, at five widths and three seeds; muP is relative to width 32.

`rates`: 200 steps in bfloat16, with warmup and decay, at widths of 32, 80 and 192. `mup` is relative to width 192, where it changes
nothing: the narrow models stand in for that one. `mupnarrow` is relative to width 32, for one curve. A run's name says its optimizer,
parametrisation, width, rate (7 is 2^-7) and seed, of which there is one; a coordinate check's has no rate. Rates go on by factors of two
until two on each side of the best are worse. The rate of Muon is that of the matrices; tables and vectors have half of it, as in the recipe
of the small track.

One thread and one process. Rows are written as they are measured: a study that was stopped goes on where it was. A row's command measures
it again.
"""

import argparse
import math
import os
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _rows import add_rows, read_rows

from mainrun_nb.config import Config, load_config
from mainrun_nb.data import Batches
from mainrun_nb.models import count_parameters
from mainrun_nb.runtime import freed_memory_kept, git_commit
from mainrun_nb.trainer import RunData, TrainState, evaluate_state, make_state, prepare_data, take_step
from mainrun_nb.width import coordinate_check, mup

RESULTS = Path(__file__).parent / "results"
WIDTHS, SEED, STEPS, FIRST = (32, 80, 192), 1337, 200, 7  # rates from 2^-7
BASES = {"standard": None, "mup": WIDTHS[-1], "mupnarrow": WIDTHS[0]}
CHECKED, CHECK_SEEDS, CHECK_RATE = (32, 64, 128, 256, 512), (1337, 1, 2), 7
BASE = ["data.source=${oc.env:HN_TITLES}", "hyperparams.num_titles=20000", "hyperparams.epochs=1", "hyperparams.vocab_size=2000",
        "tokenizer.kind=bpe", "hyperparams.context_length=64", "hyperparams.batch_size=8", "hyperparams.betas=[0.9,0.95]",
        "hyperparams.weight_decay=0", "hyperparams.adamw_weight_decay=0", "hyperparams.scheduler=wsd", "hyperparams.warmup=0.05",
        "hyperparams.decay=0.3", "hyperparams.amp_bool=true", "model_configs.gpt.n_layer=2", "model_configs.gpt.dropout=0",
        "model_configs.gpt.position=rope", "model_configs.gpt.residual_scaling=true"]


def configured(optimizer: str, width: int, rate: int, seed: int, *more: str) -> Config:
    "The configuration of a run."
    lr = 2.0**-rate
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")] + [f"attn_configs.causal.n_head={width // 16}"]
    rates = [f"hyperparams.optimizer={optimizer}", f"hyperparams.lr={lr}", f"hyperparams.adamw_lr={lr / 2}"]
    return load_config(overrides=[*BASE, *shape, *rates, f"hyperparams.seed={seed}", *more])


def fresh(cfg: Config, base: int | None, vocab_size: int) -> TrainState:
    "A state at step 0, in maximal update parametrisation where there is a base."
    state = make_state(cfg, vocab_size, torch.device("cpu"))
    if base:
        mup(state.model, state.optimizer, base)
    return state


def check(optimizer: str, parametrisation: str, width: int, seed: int, data: RunData) -> dict[str, Any]:
    "A row of the first table: what a few steps change, by part."
    cfg = configured(optimizer, width, CHECK_RATE, seed, "hyperparams.scheduler=none", "hyperparams.warmup=0", "hyperparams.amp_bool=false")
    state = fresh(cfg, WIDTHS[0] if parametrisation == "mup" else None, data.tokenizer.vocab_size)
    found = coordinate_check(state, Batches(data.train_ids, cfg.hyperparams), cfg.hyperparams)
    return {"optimizer": optimizer, "parametrisation": parametrisation, "width": width, "seed": seed,
            **{part: float(f"{change:.5g}") for part, change in found.items()},
            "command": command_of(named(optimizer, parametrisation, width, seed))}


def named(*parts: str | int) -> str:
    "A run's name."
    return "-".join(map(str, parts))


def command_of(name: str) -> str:
    "The command that measures a row again."
    return f"python benchmarks/width.py --run {name}"


def measure(name: str, data: RunData) -> dict[str, Any]:
    "Make the run of this name: its row."
    optimizer, parametrisation, width, *rate, seed = (part if part.isalpha() else int(part) for part in name.split("-"))
    if not rate:
        return check(optimizer, parametrisation, width, seed, data)
    began, cfg = time.process_time(), configured(optimizer, width, *rate, seed)
    state, hp = fresh(cfg, BASES[parametrisation], data.tokenizer.vocab_size), cfg.hyperparams
    batches = Batches(data.train_ids, hp)
    with freed_memory_kept():
        while state.step < STEPS:
            take_step(state, state.model, batches, slice(None), hp, STEPS)
        metrics = evaluate_state(state, data, cfg, challenge=False)
    commit = git_commit() or ""
    return {"name": name, "optimizer": optimizer, "parametrisation": parametrisation, "width": width, "lr": hp.lr, "seed": seed,
            "n": count_parameters(state.model, embeddings=False), "d": STEPS * batches.size, "loss": round(metrics["val/loss"], 5),
            "nats_per_token": round(metrics["val/nats_per_token"], 5), "steps": STEPS,
            "cpu_seconds": round(time.process_time() - began, 1), "torch": torch.__version__,
            "commit": commit[:10] + "+" * commit.endswith("+"), "command": command_of(name)}


def wanted(tried: dict[int, float]) -> list[int]:
    "Which rates around the best so far are not tried, the nearest first."
    best = min(tried, key=lambda k: tried[k] if math.isfinite(tried[k]) else math.inf, default=FIRST)
    return sorted(set(range(best - 2, best + 3)) - set(tried), key=lambda k: (abs(k - best), k))


def curves() -> Iterator[tuple[str, str, int]]:
    "Optimizer, parametrisation and width of each curve; at the greatest width the parametrisations are one."
    for optimizer in ("adamw", "muon"):
        yield from ((optimizer, "standard", width) for width in WIDTHS)
        yield from ((optimizer, "mup", width) for width in WIDTHS[:-1])
    yield "adamw", "mupnarrow", WIDTHS[1]


def left(rows: list[dict[str, str]]) -> list[str]:
    "Names of the runs still to be made, as far as the losses of these rows tell, the next one first."
    losses, names = {row["name"]: float(row["loss"]) for row in rows}, []
    for curve in curves():
        tried = {k: losses[name] for k in range(30) if (name := named(*curve, k, SEED)) in losses}
        names += [named(*curve, k, SEED) for k in wanted(tried)]
    return names


def checks() -> Iterator[tuple[str, str, int, int]]:
    "Optimizer, parametrisation, width and seed of each row of the first table."
    yield from product(("adamw", "muon"), ("standard", "mup"), CHECKED, CHECK_SEEDS)


def is_name(name: str) -> bool:
    "Whether a row of either table could have this name."
    curve = "|".join(named(*curve) for curve in curves())
    return name in {named(*key) for key in checks()} or bool(re.fullmatch(rf"({curve})-\d+-\d+", name))


def make_coordinates(path: Path) -> None:
    "The rows that the first table lacks."
    done = [(row["optimizer"], row["parametrisation"], row["width"], row["seed"]) for row in read_rows(path)]
    todo = [key for key in checks() if tuple(map(str, key)) not in done]
    data = prepare_data(configured("adamw", WIDTHS[0], FIRST, SEED)) if todo else None
    for key in todo:
        add_rows(path, row := check(*key, data))
        print(row, flush=True)


def make_rates(path: Path) -> None:
    "The rows that the second table lacks."
    data = prepare_data(configured("adamw", WIDTHS[0], FIRST, SEED)) if left(read_rows(path)) else None
    while names := left(read_rows(path)):
        add_rows(path, row := measure(names[0], data))
        print(f"{names[0]}: {row['loss']:.4f} in {row['cpu_seconds']:.0f} CPU seconds", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("coordinates", "rates"), help="default: both")
    parser.add_argument("--run", metavar="NAME", help="measure this row of either table again, and write nothing")
    parser.add_argument("--dry", action="store_true", help="show which runs of the rates would be next, and make none")
    args = parser.parse_args()
    if args.dry:
        print("\n".join(left(read_rows(RESULTS / "width.csv"))))
        return
    if "HN_TITLES" not in os.environ:
        parser.exit(0, "width.py: nothing was measured; HN_TITLES must name a file of titles\n")
    torch.set_num_threads(1)
    if args.run:
        if not is_name(args.run):
            parser.error(f"--run {args.run}: not a row's name")
        print(measure(args.run, prepare_data(configured("adamw", WIDTHS[0], FIRST, SEED))))
        return
    for part, make in (("coordinates", make_coordinates), ("rates", make_rates)):
        if args.part in (None, part):
            make(RESULTS / f"{'width' if part == 'rates' else part}.csv")


if __name__ == "__main__":
    main()
