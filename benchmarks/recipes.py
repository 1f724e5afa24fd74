"""Studies on real titles, run after run, into the ledger sweeps/results.csv, which chapter 35 reads.

    HN_TITLES=titles.txt.gz python benchmarks/recipes.py control             what the ledger lacks of one study
    HN_TITLES=titles.txt.gz python benchmarks/recipes.py control --dry       only show the commands
    HN_TITLES=titles.txt.gz python benchmarks/recipes.py screen --only small wsd --seeds 1337 1 2 --jobs 2
    HN_TITLES=titles.txt.gz python benchmarks/recipes.py full --only control final --untouched     score on titles never drawn

Every run is the command that its row names, in a process of its own; with --jobs several at a time, the cores shared out among them. A run
that fails gets a row too, with its error. Killed, the same command goes on where it was: finished runs are skipped, those under way are
resumed from their checkpoints. (Older rows of sota/small_first.yaml name commits at which that file was still sota/small.yaml.)
"""

import argparse
import csv
import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _rows import read_rows

from mainrun_nb.checkpoint import atomic_write
from mainrun_nb.config import load_config
from mainrun_nb.data import load_titles

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "sweeps" / "results.csv"
SMALL, FIRST, RECIPE = "sweeps/base/small.yaml", "sweeps/sota/small_first.yaml", "sweeps/sota/small.yaml"
COLUMNS = ["study", "name", "seed", "status", "val/loss", "val/challenge_loss", "val/coverage", "val/nats_per_token", "reference/unigram",
           "reference/bigram", "reference/kneser_ney", "lossless", "train_seconds", "tokens_per_second", "peak_memory_bytes",
           "parameters", "parameters_non_embedding", "steps", "batch_size", "context_length", "n_titles", "tokens_per_epoch", "sha256",
           "commit", "torch", "threads", "cpu_count", "error", "command"]

Study = dict[str, tuple[str, list[str]]]  # name -> configuration, overrides


def changed(config: str, budget: list[str], changes: dict[str, list[str]]) -> Study:
    "A configuration within a budget, changed in one way at a time."
    return {name: (config, [*budget, *change]) for name, change in changes.items()}


def attention() -> Study:
    "The first recipe of the small track with each attention for one pass; with and without title mask."
    layer = "model_configs.gpt.attention_layer"
    sparse = [f"{layer}=sparse", "attn_configs.sparse.n_head=6", "attn_configs.sparse.local_attn_ctx=16",
              "attn_configs.sparse.sparseblocksize=16", "attn_configs.sparse.vertsize=4", "attn_configs.sparse.num_verts=3"]
    kinds = {
        "causal": [], "bottleneck": ["attn_configs.causal.intermediate_dim=96", "model_configs.gpt.mlp_ratio=5"],  # as many parameters
        "fixed": [*sparse, "attn_configs.sparse.attn_type=fixed"], "strided": [*sparse, "attn_configs.sparse.attn_type=strided"],
        "local": [*sparse, "attn_configs.sparse.attn_type=local"],
        "sparsek": [f"{layer}=sparsek", "attn_configs.sparsek.n_head=6", "attn_configs.sparsek.k=8", "attn_configs.sparsek.window=16"],
    }
    kinds |= {f"{name}-no-mask": [*change, "hyperparams.title_mask=false"] for name, change in kinds.items()}
    return changed(FIRST, ["hyperparams.epochs=1"], kinds)


PROXY = ["hyperparams.epochs=2", "hyperparams.evals_per_epoch=1"]  # 2.3 million tokens; eight to eleven minutes on one core


def control() -> Study:
    "What the recipe is measured against: AdamW, warmup and cosine, learned positions, no title mask; its best learning rate."
    plain = ["model_configs.gpt.position=learned", "hyperparams.optimizer=adamw", "hyperparams.weight_decay=0.1",
             "hyperparams.title_mask=false"]
    rates = ("2.0e-3", "4.0e-3", "1.0e-3", "8.0e-3", "3.0e-3")
    return changed(SMALL, [*PROXY, *plain], {f"lr-{lr}": [f"hyperparams.lr={lr}"] for lr in rates})


def screen() -> Study:
    "small.yaml, and one change at a time."
    return changed(SMALL, PROXY, {
        "small": [], "vocab-8k": ["hyperparams.vocab_size=8000"], "unigram": ["tokenizer.kind=unigram"],
        "wsd": ["hyperparams.scheduler=wsd"], "lr-2.0e-2": ["hyperparams.lr=2.0e-2"], "adamw-lr-5.0e-3": ["hyperparams.adamw_lr=5.0e-3"],
    })


def screen2() -> Study:
    "The three largest gains of `screen` together, and again one change at a time."
    three = ["tokenizer.kind=unigram", "hyperparams.scheduler=wsd", "hyperparams.adamw_lr=5.0e-3"]
    return changed(SMALL, [*PROXY, *three], {
        "three": [], "adamw-lr-1.0e-2": ["hyperparams.adamw_lr=1.0e-2"], "lr-2.0e-2": ["hyperparams.lr=2.0e-2"],
        "decay-0.3": ["hyperparams.decay=0.3"],
    })


def assessed() -> Study:
    "What the assessment measured, on sizes that fit here: its batch sizes with the challenge's optimizer, and its headline recipe."
    gpt, base = "model_configs.gpt", "sweeps/base/baseline.yaml"
    narrow = ["hyperparams.evals_per_epoch=1", "hyperparams.amp_bool=true", f"{gpt}.d_model=128", f"{gpt}.hidden_layer=128"]
    two = ["hyperparams.epochs=2", *narrow, f"{gpt}.n_layer=2"]
    headline = ["hyperparams.epochs=3", *narrow, f"{gpt}.n_layer=8", f"{gpt}.init_method=xavier", "hyperparams.optimizer=adamw",
                "hyperparams.lr=0.02", "hyperparams.weight_decay=0.5", "hyperparams.batch_size=256", "hyperparams.context_length=256",
                "hyperparams.grad_accum=16"]  # the last for memory; the numbers are the same
    return {f"batch-{b}": (base, [*two, f"hyperparams.batch_size={b}"]) for b in (32, 64, 128, 256)} | {"headline": (base, headline)}


CASED = ["tokenizer.kind=cased"]  # letters and their case apart
TITLES = ["hyperparams.rows=titles"]  # rows of whole titles, as the third recipe still had them
WHOLE = [*TITLES, "hyperparams.shuffle=true"]  # in a new order for each epoch
NO_NGRAMS = ["model_configs.gpt.embedding_ngrams=0"]


def dropout(p: str) -> list[str]:
    "Dropout everywhere."
    return [f"model_configs.gpt.dropout={p}"]


def decay(matrices: str, embeddings: str) -> list[str]:
    "Weight decay of what Muon trains, and of what AdamW trains beside it."
    return [f"hyperparams.weight_decay={matrices}", f"hyperparams.adamw_weight_decay={embeddings}"]


def screen3() -> Study:
    "Letters and case apart, and a longer decay, on two epochs."
    return changed(FIRST, [*CASED, "hyperparams.epochs=2"], {"cased": [], "decay-0.6": ["hyperparams.decay=0.6"]})


def half() -> Study:
    "The same on four epochs of half the titles, at the end of which a model overfits as it does after seven of all."
    return changed(FIRST, [*CASED, "hyperparams.num_titles=50000", "hyperparams.epochs=4"], {
        "cased": [], "weight-decay-0.1": ["hyperparams.weight_decay=0.1"], "whole-titles": WHOLE,
        "dropout-0.05": dropout("0.05"), "dropout-0.15": dropout("0.15")})


def full() -> Study:
    "All seven passes: the control, also at other rates; four recipes, one after the other, and what each loses without one of its parts."
    control = "sweeps/sota/small_control.yaml"
    first = {"": [], "-cased": CASED, "-dropout-0.2": dropout("0.2"),
             "-without-muon": ["hyperparams.optimizer=adamw", "hyperparams.lr=4.0e-3", "hyperparams.weight_decay=0.1"],
             "-without-unigram": ["tokenizer.kind=bpe"],
             "-without-adamw-lr": ["hyperparams.adamw_lr=2.0e-3"],
             "-without-mask": ["hyperparams.title_mask=false"],
             "-without-rope": ["model_configs.gpt.position=learned"],
             "-without-wsd": ["hyperparams.scheduler=cosine"]}
    rates = {"": "0.15", "-dropout-0.05": "0.05", "-dropout-0.1": "0.1"}
    second = {f"second{name}": [*NO_NGRAMS, *decay("0", "0.01"), *dropout(p)] for name, p in rates.items()}
    third = {"third": [], "third-weight-decay-0.3": decay("0.3", "0.3"), "third-without-ngrams": NO_NGRAMS,
             "third-without-cased": ["tokenizer.kind=unigram"],
             "third-without-shortcuts": ["model_configs.gpt.token_shift=false", "model_configs.gpt.embedding_skips=false"]}
    final = {"final": [], "decay-0.5": ["hyperparams.decay=0.5"],
             "context-256": ["hyperparams.context_length=256", "hyperparams.batch_size=8"],
             "without-shuffle": ["hyperparams.shuffle=false"], "without-weight-decay": decay("0", "0.01")}
    return {"control": (control, ["hyperparams.lr=2.0e-3"]), "control-lr-4.0e-3": (control, ["hyperparams.lr=4.0e-3"]),
            **{f"first{name}": (FIRST, change) for name, change in first.items()},
            **changed(RECIPE, TITLES, second | third), **changed(RECIPE, [], final)}


def alone() -> Study:
    "One of the seven passes of control and recipes, each with the whole machine to itself: what the track's minutes are measured by."
    files = {name: (f"sweeps/sota/{name}.yaml", ["hyperparams.epochs=1"]) for name in ("small", "small_first", "small_control")}
    return {**files, "third": (RECIPE, [*TITLES, "hyperparams.epochs=1"]),
            "second": (RECIPE, [*TITLES, "hyperparams.epochs=1", *NO_NGRAMS, *decay("0", "0.01"), *dropout("0.15")])}


def scaled() -> Study:
    "The recipes of the full track at 10 million parameters: for one pass and for three, and for three with what the second round found."
    width = ["model_configs.gpt.d_model=208", "model_configs.gpt.hidden_layer=208"]
    passes = {"": ["hyperparams.epochs=1"], "-three": ["hyperparams.epochs=3", "hyperparams.evals_per_epoch=1"]}
    runs = {f"{name}{more}": (f"sweeps/sota/{name}.yaml", [*budget, *width])
            for name in ("full", "public_best") for more, budget in passes.items()}
    deeper = ["model_configs.gpt.n_layer=16"]  # in as many parameters
    return {**runs, "full_found-three": ("sweeps/sota/full_found.yaml", [*TITLES, *passes["-three"], *width, *deeper])}


STUDIES = {"full": full, "alone": alone, "scaled": scaled, "attention": attention, "control": control, "screen": screen, "screen2": screen2,
           "screen3": screen3, "half": half, "assessed": assessed}
Key = tuple[str, str, str]  # study, name, seed


def key_of(row: dict[str, Any]) -> Key:
    "What makes a row of the ledger unique."
    return row["study"], row["name"], str(row["seed"])


def read_ledger() -> dict[Key, dict[str, str]]:
    "The rows so far."
    return {key_of(row): row for row in read_rows(LEDGER)}


def add_row(row: dict[str, Any]) -> None:
    "Write the ledger with one more row, or with that row replaced; one writer at a time."
    folder = os.open(LEDGER.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows((read_ledger() | {key_of(row): row}).values())
        atomic_write(LEDGER, text.getvalue())
    finally:
        os.close(folder)


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    "The ledger's columns from a result.json."
    data, device, commit = result["data"], result["device"], result["commit"] or ""
    losses = {k: round(result[k], 5) for k in ("val/loss", "val/challenge_loss", "val/coverage", "val/nats_per_token")}
    counted = {k: round(data[k], 5) for k in ("reference/unigram", "reference/bigram", "reference/kneser_ney")}
    rates = {k: round(result[k]) for k in ("train_seconds", "tokens_per_second")}
    return {**result, **data, **device, **losses, **counted, **rates, "status": "finished", "sha256": data["sha256"][:12],
            "torch": result["versions"]["torch"], "commit": commit[:10] + "+" * commit.endswith("+")}


def folder_of(key: Key) -> str:
    "The folder of one run."
    return "sweeps/runs/" + "-".join(key)


def command_of(key: Key, config: str, overrides: list[str]) -> list[str]:
    "The command of one run."
    seed = [] if key[2] == "1337" else [f"hyperparams.seed={key[2]}"]  # the default
    return ["mainrun-train", "--config", config, "--out", folder_of(key), *overrides, *seed]


def start(command: list[str], check: bool = False, **how: Any) -> subprocess.CompletedProcess[str]:
    "Run a console command of this environment to its end; what it prints is kept."
    program = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run([program, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=check, **how)


def failure(code: int, log: Path) -> str:
    "Why a run failed; raises `SystemExit` where it was only interrupted, or is still running elsewhere."
    error = ([line for line in log.read_text().splitlines() if line.strip()] or ["no message"])[-1]
    if code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM) or "another process" in error:
        raise SystemExit(f"{log.stem}: {error}")
    return f"killed by {signal.Signals(-code).name}" if code < 0 else error


def run(key: Key, config: str, overrides: list[str], threads: int) -> None:
    "Train, or go on training, and enter the result."
    (study, name, seed), command = key, command_of(key, config, overrides)
    resume = ["--resume"] if (ROOT / folder_of(key) / "config.yaml").exists() else []
    log = ROOT / f"{folder_of(key)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:  # a file, not a pipe: should this process die, the run does not
        done = start([*command, *resume], stderr=errors, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    row = {"study": study, "name": name, "seed": seed, "command": shlex.join(command)}
    if done.returncode:
        error = failure(done.returncode, log)
        add_row({**row, "status": "failed", "error": error})
        print(f"{study} {name} {seed}: {error}", file=sys.stderr, flush=True)
        return
    result, hp = json.loads(done.stdout.splitlines()[-1]), load_config(ROOT / folder_of(key) / "config.yaml").hyperparams
    add_row({**row_of(result), **row, "batch_size": hp.batch_size, "context_length": hp.context_length})
    print(f"{study} {name} {seed}: {result['val/loss']:.4f} nats per character in {result['train_seconds'] / 60:.1f} minutes", flush=True)


def write_untouched(path: Path) -> None:
    "Write the 10,000 titles that the protocol never drew and would draw next, one a line."
    cfg = load_config(ROOT / SMALL)
    drawn = cfg.hyperparams.num_titles
    cfg.hyperparams.num_titles = drawn + 10_000
    atomic_write(path, "\n".join(load_titles(cfg)[drawn:]) + "\n")


def score_untouched(trained: dict[str, str], titles: Path) -> None:
    "Evaluate a finished run on the titles that were never drawn, and enter the result."
    command = ["mainrun-eval", shlex.split(trained["command"])[4], "--titles", str(titles.relative_to(ROOT))]
    done = start(command, check=True)
    row = {k: round(v, 5) if isinstance(v, float) else v for k, v in json.loads(done.stdout).items() if k in COLUMNS}
    same = {k: trained[k] for k in ("name", "seed", "status", "batch_size", "context_length", "parameters", "steps", "commit", "torch")}
    add_row({**same, **row, "study": "untouched", "n_titles": 10_000, "command": shlex.join(command)})
    print(f"untouched {trained['name']} {trained['seed']}: {row['val/loss']:.4f} nats per character", flush=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("study", nargs="+", choices=list(STUDIES))
    ap.add_argument("--only", nargs="+", help="these runs of the study")
    ap.add_argument("--seeds", nargs="+", default=["1337"])
    ap.add_argument("--jobs", type=int, default=1, help="runs at a time")
    ap.add_argument("--dry", action="store_true", help="show the commands and run nothing")
    ap.add_argument("--again", action="store_true", help="run what failed once more")
    ap.add_argument("--untouched", action="store_true", help="train nothing; score what `full` has finished, once, on titles never drawn")
    args = ap.parse_args()
    if not os.environ.get("HN_TITLES"):
        raise SystemExit("HN_TITLES: name a file of titles; the studies are of real ones")
    asked = {(study, name, seed): what for study in args.study for seed in args.seeds for name, what in STUDIES[study]().items()
             if name in (args.only or [name])}
    ledger = read_ledger()
    if args.untouched:
        write_untouched(titles := ROOT / "sweeps" / "runs" / "untouched.txt")
        for key in asked:
            if key[0] == "full" and ("untouched", *key[1:]) not in ledger and ledger.get(key, {}).get("status") == "finished":
                score_untouched(ledger[key], titles)
        return
    plan = [(key, *what) for key, what in asked.items() if key not in ledger or (args.again and ledger[key]["status"] == "failed")]
    changed = [key for key, what in asked.items() if key in ledger and ledger[key]["command"] != shlex.join(command_of(key, *what))]
    if changed:
        raise SystemExit(f"{' '.join(changed[0])}: the ledger's row is of another command; give the new run another name")
    if args.dry:
        print("\n".join(shlex.join(command_of(*what)) for what in plan))
        return
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for future in [pool.submit(run, *what, threads) for what in plan]:
            future.result()
    finally:  # interrupted, the runs under way end by themselves, and no further one begins
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
