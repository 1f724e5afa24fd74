"""Where sparse attention pays, and where it does not: texts whose last lines need the first, a thousand tokens before (chapter 01b).

    python benchmarks/far.py                        each attention for ten CPU minutes of training -> benchmarks/results/far.csv
    python benchmarks/far.py --minutes 30 --only dense local
    python benchmarks/far.py --width 16 --minutes 0.05 --documents 40 --csv /tmp/far.csv      only to see that it works

A GPT with rotary positions and no dropout reads whole documents of up to 2,048 tokens, one per step, by dense, fixed, strided, local and
SparseK attention, for equal CPU minutes of one thread. The first steps of a run are timed, and as many follow as fit, with warmup and a
decay over the last three tenths. Four times on the way, on documents never trained on: the loss above the exact floor, in nats a document;
and the share of references whose company gets more than half of the probability. A local window of 128 cannot see the first lines, though
layers hand on what theirs saw.

Every run is a process of its own; its memory is the peak of its first steps above what was there before its model. Runs that have their
rows are not made again.
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _rows import add_rows, read_rows

from mainrun_nb.config import Config, load_config
from mainrun_nb.data import EOS, IGNORED, drawn_order, token_stream
from mainrun_nb.documents import Documents
from mainrun_nb.models import count_parameters
from mainrun_nb.runtime import freed_memory_kept, peak_memory
from mainrun_nb.tokenizer import Tokenizer, train_tokenizer
from mainrun_nb.trainer import make_state, take_step

CPU, LENGTH, VOCABULARY, LOOKS = torch.device("cpu"), 2048, 1000, 4
SPARSE = ["model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.local_attn_ctx=128", "attn_configs.sparse.sparseblocksize=128",
          "attn_configs.sparse.vertsize=8", "attn_configs.sparse.num_verts=2", "attn_configs.sparse.n_head=4"]
KINDS = {"dense": ["attn_configs.causal.n_head=4"]}
KINDS |= {kind: [*SPARSE, f"attn_configs.sparse.attn_type={kind}"] for kind in ("fixed", "strided", "local")}
KINDS |= {"sparsek": ["model_configs.gpt.attention_layer=sparsek", "attn_configs.sparsek.n_head=4", "attn_configs.sparsek.k=64",
                      "attn_configs.sparsek.window=128"]}
BASE = ["data.source=synthetic", f"hyperparams.context_length={LENGTH}", "hyperparams.batch_size=1",
        "hyperparams.title_mask=false", f"hyperparams.vocab_size={VOCABULARY}", "tokenizer.kind=bpe",
        "hyperparams.optimizer=muon", "hyperparams.lr=0.01", "hyperparams.adamw_lr=0.005", "hyperparams.betas=[0.9,0.95]",
        "hyperparams.scheduler=wsd", "hyperparams.warmup=0.05", "hyperparams.decay=0.3", "model_configs.gpt.dropout=0",
        "model_configs.gpt.position=rope", "model_configs.gpt.residual_scaling=true"]
KEY = ("attention", "minutes", "width", "layers", "documents", "seed")


def configured(kind: str, width: int, layers: int, seed: int) -> Config:
    "The configuration of a run."
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")] + [f"model_configs.gpt.n_layer={layers}"]
    return load_config(overrides=[*BASE, *KINDS[kind], *shape, f"hyperparams.seed={seed}"])


def padded(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (1, LENGTH) each
    "A document as input and targets."
    x, y = torch.full((1, LENGTH), EOS), torch.full((1, LENGTH), IGNORED)
    x[0, 1 : len(ids)], y[0, : len(ids)] = ids[:-1], ids
    return x, y


class Rows:
    "The documents to train on, one after the other, in a new order for each pass."

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        self.ids, self.seed = [token_stream([text], tokenizer).to(torch.int32) for text in texts], seed
        if (longest := max(map(len, self.ids))) > LENGTH:
            raise SystemExit(f"far.py: a document has {longest} tokens, {LENGTH} at most can be; a smaller --between makes them shorter")

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, at = divmod(k, len(self.ids))
        return padded(self.ids[drawn_order(len(self.ids), self.seed, epoch)[at]])


class Exam:
    "Documents never trained on, with the places of their references."

    def __init__(self, form: Documents, n: int, tokenizer: Tokenizer) -> None:
        documents = form.sample(n, seed=2)
        self.floor, self.rows = -sum(map(form.log_prob, documents)) / n, []
        for document in documents:
            ids = token_stream([document], tokenizer)
            spans = [(len(tokenizer.encode(document[: a - 1])), len(tokenizer.encode(document[:b]))) for a, b in form.references(document)]
            assert all(ids[:b].tolist() == tokenizer.encode(document)[:b] for _, b in spans)
            self.rows.append((*padded(ids), spans))

    @torch.no_grad()
    def mark(self, model: torch.nn.Module) -> dict[str, float]:
        "Nats a document above the floor, and the share of references found."
        model.eval()
        total, found = 0.0, []
        for x, y, spans in self.rows:
            logits = model(x)[0][0].float()
            nats = torch.nn.functional.cross_entropy(logits, y[0], ignore_index=IGNORED, reduction="none")
            total += float(nats.sum())
            found += [float(nats[a:b].sum()) < math.log(2) for a, b in spans]
        model.train()
        return {"above_floor": round(total / len(self.rows) - self.floor, 2), "found": round(sum(found) / len(found), 4)}


def timed(state: Any, rows: Rows, hp: Any, steps: int, max_steps: int) -> float:
    "CPU seconds of so many steps."
    began = time.process_time()
    for _ in range(steps):
        take_step(state, state.model, rows, slice(None), hp, max_steps)
    return time.process_time() - began


def run(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    "Train with one attention; a row for each look."
    form, cfg = Documents(facts=args.facts, between=args.between), configured(kind, args.width, args.layers, args.seed)
    tokenizer = train_tokenizer(form.sample(200, seed=3), (), "bpe", VOCABULARY)
    texts, exam, hp = Rows(form.sample(args.documents, seed=1), tokenizer, args.seed), Exam(form, args.exam, tokenizer), cfg.hyperparams
    base, state = peak_memory(CPU), make_state(cfg, tokenizer.vocab_size, CPU)
    timed(state, texts, hp, 2, 10**6)  # the first pay for allocation
    step = timed(state, texts, hp, 5, 10**6) / 5
    max_steps = max(LOOKS, int(60 * args.minutes / step))
    memory, state, seconds, rows = peak_memory(CPU) - base, make_state(cfg, tokenizer.vocab_size, CPU), 0.0, []
    for look in range(1, LOOKS + 1):
        seconds += timed(state, texts, hp, max_steps * look // LOOKS - state.step, max_steps)
        rows.append({"attention": kind, "minutes": args.minutes, "width": args.width, "layers": args.layers, "documents": args.documents,
                     "seed": args.seed, "trained_minutes": round(seconds / 60, 2), "steps": state.step, **exam.mark(state.model),
                     "floor": round(exam.floor, 2), "facts": args.facts, "between": args.between, "memory_bytes": memory,
                     "parameters": count_parameters(state.model, embeddings=False),
                     "tokens_per_document": round(sum(map(len, texts.ids)) / len(texts.ids)), "torch": torch.__version__,
                     "command": shlex.join(["python", "benchmarks/far.py", *sys.argv[1:]])})
        print({k: rows[-1][k] for k in ("attention", "trained_minutes", "steps", "above_floor", "found")}, flush=True)
    return rows


def done(path: Path) -> set[tuple[str, ...]]:
    "Which runs have their rows."
    return {tuple(row[k] for k in KEY) for row in read_rows(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each attention")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "far.csv")
    whole = {"width": 64, "layers": 3, "documents": 3000, "exam": 40, "facts": 16, "between": 90, "seed": 1337}
    for name, default in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.only:
        if tuple(str(v) for v in (kind, args.minutes, args.width, args.layers, args.documents, args.seed)) in done(args.csv):
            continue
        if len(args.only) > 1:  # a process of its own, for its memory
            more = [part for name in ("minutes", "csv", *whole) for part in (f"--{name}", str(getattr(args, name)))]
            subprocess.run([sys.executable, __file__, "--only", kind, *more], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            continue
        with freed_memory_kept():
            rows = run(kind, args)
        add_rows(args.csv, *rows)


if __name__ == "__main__":
    main()
