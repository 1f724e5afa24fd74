"""Three small studies behind chapter 33, on one core: loss against model size and data, steps against batch size, branches of runs.

    HN_TITLES=titles.txt.gz python benchmarks/scaling.py            all, one after the other
    HN_TITLES=titles.txt.gz python benchmarks/scaling.py runs       -> benchmarks/results/scaling.csv
    HN_TITLES=titles.txt.gz python benchmarks/scaling.py batches    -> benchmarks/results/batches.csv
    HN_TITLES=titles.txt.gz python benchmarks/scaling.py branches   -> benchmarks/results/branches.csv
    HN_TITLES=titles.txt.gz python benchmarks/scaling.py branches --run width=24 seed=1337 step=64 rows=8    this row again

`runs`: four GPTs of 14 thousand to 448 thousand non-embedding parameters, each trained on 1/8, 1/4 and 1/2 of one pass over the
36,000 training titles of a draw of 40,000 (no token is seen twice), the two smaller ones also on all of it, each with a whole schedule
of its own; three seeds in one place, to know the noise. The optimizer is Muon at one pair of learning rates for every run, not tuned
for each.

`batches`: the smallest GPT, trained by AdamW on a draw of 60,000 titles with batches of 8 to 128 rows of 64 tokens until it predicts
16,384 validation tokens with 5.6 nats each, or has read four million, at four learning rates, constant after ten steps. From the same
steps, each in four micro-batches, comes the gradient noise scale over the second half of the run.

`branches`: two GPTs of 14 and 150 thousand non-embedding parameters, trained by AdamW at a constant rate on one pass over the 90,000
training titles of a draw of 100,000, in batches of 16 rows of 64 tokens. After 64, 256 and 1,024 steps copies of the model read the next
1,024, 2,048 and 4,096 rows in batches of 8 to 256 rows, the learning rate growing with the square root of the batch size, and are scored
on 16,384 validation tokens. The noise scale is that of the second half of the steps before.

Rows are written as they are measured: a study that was stopped goes on where it was. A row's command measures it again.
"""

import argparse
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _rows import add_rows, read_rows

from mainrun_nb.config import Config, load_config
from mainrun_nb.data import Batches
from mainrun_nb.evaluate import total_nats, windows
from mainrun_nb.models import count_parameters
from mainrun_nb.scaling import branch, noise_scale
from mainrun_nb.trainer import RunData, TrainState, evaluate_state, make_plan, make_state, prepare_data, take_step

RESULTS = Path(__file__).parent / "results"
SIZES = [(24, 2, 2), (48, 2, 4), (64, 3, 4), (96, 4, 6)]  # width, layers, heads
SHARES = [1 / 8, 1 / 4, 1 / 2]  # of one pass over the training stream

BASE = ["data.source=${oc.env:HN_TITLES}", "hyperparams.num_titles=40000", "hyperparams.epochs=1", "hyperparams.vocab_size=2000",
        "tokenizer.kind=bpe", "hyperparams.context_length=128", "hyperparams.batch_size=8", "hyperparams.optimizer=muon",
        "hyperparams.lr=0.02", "hyperparams.adamw_lr=0.005", "hyperparams.betas=[0.9,0.95]", "hyperparams.weight_decay=0.1",
        "hyperparams.scheduler=cosine", "hyperparams.warmup=0.05", "model_configs.gpt.dropout=0",
        "model_configs.gpt.position=rope", "model_configs.gpt.residual_scaling=true"]

CONSTANT = ["hyperparams.optimizer=adamw", "hyperparams.scheduler=none", "hyperparams.context_length=64"]
BRANCHED = [(SIZES[0], 0.0094), (SIZES[2], 0.0035)]  # a rate good for 16 rows (batches.csv), and as much less as the model is wider
POINTS = [(64, 1024), (256, 2048), (1024, 4096)]  # step, and rows that its branches read

Key = dict[str, Any]  # the columns that identify a row of a study
Study = Iterator[tuple[Key, Callable[[], dict[str, Any]]]]  # and for each a function that measures it


def configured(width: int, layers: int, heads: int, *more: str) -> Config:
    "The configuration of a GPT of this shape."
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")]
    shape += [f"model_configs.gpt.n_layer={layers}", f"attn_configs.causal.n_head={heads}"]
    return load_config(overrides=[*BASE, *shape, *more])


def train_once(cfg: Config, data: RunData, share: float) -> dict:
    "One run over a share of one pass, and what came of it."
    hp, cpu = cfg.hyperparams, time.process_time()
    plan = make_plan(hp, int(share * len(data.train_ids)))
    state, batches = make_state(cfg, data.tokenizer.vocab_size, torch.device("cpu")), Batches(data.train_ids, hp)
    while state.step < plan.max_steps:
        take_step(state, state.model, batches, slice(None), hp, plan.max_steps)
    metrics, gpt = evaluate_state(state, data, cfg, challenge=False), cfg.model_configs.gpt
    return {"n": count_parameters(state.model, embeddings=False), "d": state.step * hp.batch_size * hp.context_length,
            "loss": round(metrics["val/loss"], 5), "nats_per_token": round(metrics["val/nats_per_token"], 5), "width": gpt.d_model,
            "layers": gpt.n_layer, "steps": state.step, "seed": hp.seed, "cpu_seconds": round(time.process_time() - cpu, 1)}


def measure_runs() -> Study:
    "What identifies each run of the first study, and a function that makes it."
    data = prepare_data(configured(*SIZES[0]))
    plan = [(shape, share, 1337) for share in SHARES for shape in SIZES] + [(SIZES[1], 1 / 4, seed) for seed in (1, 2)]
    plan += [(shape, 1, 1337) for shape in SIZES[:2]]
    for shape, share, seed in plan:
        cfg = configured(*shape, f"hyperparams.seed={seed}")
        steps = make_plan(cfg.hyperparams, int(share * len(data.train_ids))).max_steps
        key = {"width": shape[0], "layers": shape[1], "seed": seed, "steps": steps}
        yield key, partial(train_once, cfg, data, share)


def steps_to(cfg: Config, data: RunData, target: float, cap: int) -> dict:
    "Steps (interpolated) until the loss on the first 16,384 validation tokens is `target`, and the noise scale on the way."
    hp, check, batches = cfg.hyperparams, data.val_ids[:16_384], Batches(data.train_ids, cfg.hyperparams)
    state, norms, due, before = make_state(cfg, data.tokenizer.vocab_size, torch.device("cpu")), [], 1, (0, math.inf)
    while state.step < cap:
        result = take_step(state, state.model, batches, slice(None), hp, cap).result
        norms.append([float(norm or 0) ** 2 for norm in (result.micro_norm, result.grad_norm)])
        if state.step < min(due, cap):
            continue
        loss = total_nats(state.model, windows(check, hp.context_length, 64)) / len(check)
        if loss <= target:
            steps = before[0] + (state.step - before[0]) * (before[1] - target) / (before[1] - loss)
            late = np.array(norms[len(norms) // 2 :])
            noise = noise_scale(late[:, 0], late[:, 1], hp.batch_size / hp.grad_accum, hp.batch_size, block=5)
            found = {"steps": steps, "noise": noise.b_simple, "noise_low": noise.low, "noise_high": noise.high}
            return {k: round(v, 1) for k, v in found.items()}
        before, due = (state.step, loss), math.ceil(state.step * 1.06)
    return {"steps": "", "noise": "", "noise_low": "", "noise_high": ""}


def measure_batches() -> Study:
    "What identifies each run of the second study, and a function that makes it."
    kind = [*CONSTANT, "hyperparams.num_titles=60000", "hyperparams.grad_accum=4"]
    data = prepare_data(configured(*SIZES[0], *kind))

    def measure(rows: int, lr: float) -> dict:
        cap, cpu = 4_000_000 // (rows * 64), time.process_time()
        cfg = configured(*SIZES[0], *kind, f"hyperparams.batch_size={rows}", f"hyperparams.lr={lr}", f"hyperparams.warmup={10 / cap}")
        found = steps_to(cfg, data, 5.6, cap)
        return {"rows": rows, "tokens_per_row": 64, "lr": lr, "target": 5.6, **found, "cpu_seconds": round(time.process_time() - cpu, 1)}

    for rows in (8, 16, 32, 64, 128):
        for lr in (0.0067, 0.0094, 0.0133, 0.0188):
            yield {"rows": rows, "lr": lr}, partial(measure, rows, lr)


class Trunk:
    "A run that goes on from one point to the next, and what it has seen."

    def __init__(self, cfg: Config, data: RunData) -> None:
        self.hp, self.data = cfg.hyperparams, data
        self.check = list(windows(data.val_ids[:16_384], self.hp.context_length, 64))
        self.batches, self.norms = Batches(data.train_ids, self.hp), []
        self.state: TrainState = make_state(cfg, data.tokenizer.vocab_size, torch.device("cpu"))

    def score(self, model: torch.nn.Module) -> float:
        "Nats per token on the first validation tokens."
        return total_nats(model, self.check) / 16_384

    def go_on(self, step: int) -> dict[str, Any]:
        "Train up to a step; the loss there, and the noise scale of the second half of the steps."
        while self.state.step < step:
            result = take_step(self.state, self.state.model, self.batches, slice(None), self.hp, POINTS[-1][0]).result
            self.norms.append([float(norm or 0) ** 2 for norm in (result.micro_norm, result.grad_norm)])
        late = np.array(self.norms[step // 2 : step])
        noise = noise_scale(late[:, 0], late[:, 1], self.hp.batch_size / self.hp.grad_accum, self.hp.batch_size, block=5)
        found = {"start": self.score(self.state.model), "noise": noise.b_simple, "noise_low": noise.low, "noise_high": noise.high}
        return {k: round(v, 4) for k, v in found.items()}

    def branch(self, step: int, rows: int, more: int) -> dict[str, Any]:
        "A row of the study."
        cpu = time.process_time()
        found, rest = self.go_on(step), self.data.train_ids[step * self.batches.size :]
        loss = self.score(branch(self.state, rest, self.hp, rows, more))
        return {"width": self.state.model.cfg.d_model, "seed": self.hp.seed, "step": step, "rows": rows,
                "n": count_parameters(self.state.model, embeddings=False), "tokens": step * self.batches.size,
                "tokens_per_row": self.hp.context_length, "more": more, **found, "loss": round(loss, 4),
                "cpu_seconds": round(time.process_time() - cpu, 1)}


def measure_branches() -> Study:
    "What identifies each branch of the third study, and a function that makes it."
    data = None
    for seed in (1337, 1):
        for shape, lr in BRANCHED:
            cfg = configured(*shape, *CONSTANT, "hyperparams.num_titles=100000", "hyperparams.batch_size=16", "hyperparams.grad_accum=2",
                             f"hyperparams.lr={lr}", f"hyperparams.warmup={10 / POINTS[-1][0]}", f"hyperparams.seed={seed}")
            data = data or prepare_data(cfg)
            trunk = Trunk(cfg, data)
            for step, more in POINTS:
                for rows in (8, 16, 32, 64, 128, 256):
                    if rows <= more / 8:
                        yield {"width": shape[0], "seed": seed, "step": step, "rows": rows}, partial(trunk.branch, step, rows, more)


STUDIES = {"runs": (measure_runs, "scaling.csv"), "batches": (measure_batches, "batches.csv"),
           "branches": (measure_branches, "branches.csv")}


def is_row(row: dict[str, str], key: Key) -> bool:
    "Whether a row of a table is the one of this key."
    return all(row[k] == str(v) for k, v in key.items())


def command_of(name: str, key: Key) -> str:
    "The command that measures one row of a study again."
    return shlex.join(["python", "benchmarks/scaling.py", name, "--run", *(f"{k}={v}" for k, v in key.items())])


def make(name: str) -> None:
    "Measure the rows that a study's table lacks, and write each as it ends."
    study, file = STUDIES[name]
    for key, measure in study():
        if not any(is_row(row, key) for row in read_rows(RESULTS / file)):
            add_rows(RESULTS / file, row := measure() | {"command": command_of(name, key)})
            print(row, flush=True)


def measure_again(name: str, asked: list[str]) -> None:
    "Measure one row of a study, and write nothing."
    for key, measure in STUDIES[name][0]():
        if asked == [f"{k}={v}" for k, v in key.items()]:
            print(measure())
            return
    raise SystemExit(f"{name} {' '.join(asked)}: no row of this study")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES, help="default: all")
    parser.add_argument("--run", nargs="+", metavar="COLUMN=VALUE", help="measure this row of the study again, and write nothing")
    args = parser.parse_args()
    if args.run and not args.study:
        parser.error("--run needs a study")
    if "HN_TITLES" not in os.environ:
        parser.exit(0, "scaling.py: nothing was measured; HN_TITLES must name a file of titles\n")
    torch.set_num_threads(1)
    if args.run:
        measure_again(args.study, args.run)
        return
    for name in [args.study] if args.study else STUDIES:
        make(name)


if __name__ == "__main__":
    main()
