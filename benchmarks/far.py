"""Where sparse attention pays, and where it does not: texts of 2,048 tokens whose last lines need the first (chapter 01b).

    python benchmarks/far.py                        each attention for 8 CPU minutes of training -> benchmarks/results/far.csv
    python benchmarks/far.py --only sparsek --seed 1
    python benchmarks/far.py --minutes 30 --only dense local
    python benchmarks/far.py --width 16 --minutes 0.05 --documents 40 --exam 2 --csv /tmp/far.csv      only to see that it works

A GPT of two layers with rotary positions, token shift and no dropout is trained for equal CPU minutes of one thread with dense, fixed,
strided, local and SparseK attention. Its documents grow: a fifth of the minutes goes to documents of 4 facts, where it learns to look a
name up, a tenth to each of three more kinds, and half to documents of 64 facts and 2,024 tokens. Between the facts and their references
stand lines of a small grammar, so that the memory is what there is to learn. A row is a document. The learning rate goes by the share of
the minutes, with warmup and a decay over the last three tenths. After each stage, and after each quarter of the last, on documents of its
kind never trained on, outside the minutes: the loss above the exact floor, in nats a document; and the share of references whose company
gets more than half of the probability (found). A window of 128 tokens sees all of a document of the first stage and no first lines in the
last, though layers hand on what theirs saw. Memory is the peak of two training steps at 2,048 tokens, as the allocator saw it.

Why so: in ten minutes of long documents alone, with the titles of chapter 01 between, dense attention found none of its references, nor
where such documents followed on short ones. With 4 facts it finds its first references within a minute or two; with 8, within three or not
at all. An attention that has not learned the first stage says nothing by what it misses in the last. And CPU minutes are equal work only
where nothing else runs: beside other work steps of a stage differed by up to 23 %.

Runs that have their rows are not made again. (Attentions by themselves: benchmarks/attention.py.)
"""

import argparse
import math
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from _rows import add_rows, read_rows

from mainrun_nb.config import Config, load_config
from mainrun_nb.data import EOS, IGNORED, drawn_order, token_stream
from mainrun_nb.documents import Documents
from mainrun_nb.memory import measured_peak
from mainrun_nb.models import count_parameters
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.synthetic import Grammar
from mainrun_nb.tokenizer import Tokenizer, train_tokenizer
from mainrun_nb.trainer import TrainState, make_state, take_step

CPU, VOCABULARY = torch.device("cpu"), 1500
STAGES = ((4, 0, 0.2), (16, 4, 0.1), (32, 32, 0.1), (64, 64, 0.1), (64, 410, 0.5))  # facts, lines between, share of the minutes
LENGTH, STEP = 2048, 1024  # tokens of a document at most, and of a step where documents are shorter
MONTHS = dict.fromkeys("March April May June July August".split(), 1 / 6)
BETWEEN = Grammar("2 quiet in {month}\n1 rain in {month}", words={"month": MONTHS})
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
        "model_configs.gpt.n_layer=2", "model_configs.gpt.position=rope", "model_configs.gpt.residual_scaling=true",
        "model_configs.gpt.token_shift=true"]
OPTIONS = {"minutes": 8.0, "width": 64, "documents": 1000, "exam": 40, "seed": 1337}  # and what they are unless said


def configured(kind: str, width: int, seed: int) -> Config:
    "The configuration of a run."
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")]
    return load_config(overrides=[*BASE, *KINDS[kind], *shape, f"hyperparams.seed={seed}"])


def row_length(tokens: int) -> int:
    "Of the shortest row that holds so many tokens, a multiple of 64."
    return -(-tokens // 64) * 64


def padded(ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:  # (length,) each
    "A document as input and targets."
    x, y = torch.full((length,), EOS), torch.full((length,), IGNORED)
    x[1 : len(ids)], y[: len(ids)] = ids[:-1], ids
    return x, y


class Rows:
    "Documents to train on, each a row, in a new order for each pass."

    def __init__(self, texts: list[str], tokenizer: Tokenizer, seed: int) -> None:
        self.ids, self.seed = [token_stream([text], tokenizer).to(torch.int32) for text in texts], seed
        self.length = row_length(max(map(len, self.ids)))
        if self.length > LENGTH:
            raise SystemExit(f"far.py: a document has {self.length} tokens, {LENGTH} at most can be")
        self.rows = max(1, STEP // self.length)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, at = divmod(k * self.rows, len(self.ids) // self.rows * self.rows)
        which = drawn_order(len(self.ids), self.seed, epoch)[at : at + self.rows]
        return tuple(torch.stack(both) for both in zip(*(padded(self.ids[i], self.length) for i in which), strict=True))


class Exam:
    "Documents never trained on, with the places of their references."

    def __init__(self, form: Documents, n: int, tokenizer: Tokenizer, seed: int) -> None:
        documents = form.sample(n, seed)
        self.floor, self.rows = -sum(map(form.log_prob, documents)) / n, []
        for document in documents:
            ids = token_stream([document], tokenizer)
            spans = []
            for a, b in form.references(document):
                first, end = len(tokenizer.encode(document[: a - 1])), len(tokenizer.encode(document[:b]))
                assert tokenizer.decode(ids[first:end].tolist()).strip() == document[a:b]
                spans.append((first, end))
            self.rows.append((*padded(ids, row_length(len(ids))), spans))

    @torch.no_grad()
    def mark(self, model: torch.nn.Module) -> dict[str, float]:
        "Nats a document above the floor, and the share of references found."
        model.eval()
        total, found = 0.0, []
        for x, y, spans in self.rows:
            logits = model(x[None])[0][0].float()
            nats = torch.nn.functional.cross_entropy(logits, y, ignore_index=IGNORED, reduction="none")
            total += float(nats.sum())
            found += [float(nats[a:b].sum()) < math.log(2) for a, b in spans]
        model.train()
        return {"above_floor": round(total / len(self.rows) - self.floor, 2), "found": round(sum(found) / len(found), 4)}


class Minutes:
    "A training run by the CPU clock: how far it is, and steps until a share of its minutes is over."

    def __init__(self, state: TrainState, cfg: Config, minutes: float) -> None:
        self.state, self.hp, self.whole, self.spent = state, cfg.hyperparams, 60 * minutes, 0.0

    def train(self, rows: Rows, share: float) -> None:
        "Steps until this share of the whole is spent; the schedule is as far as the clock."
        while self.spent < share * self.whole:
            began, past = time.process_time(), max(self.spent / self.whole, 1e-4)
            take_step(self.state, self.state.model, rows, slice(None), self.hp, max_steps=round((self.state.step + 1) / past))
            self.spent += time.process_time() - began


def run(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    "Train with one attention; a row for each exam."
    cfg, names = configured(kind, args.width, args.seed), Documents().names
    names = dict.fromkeys(names, 1 / len(names))
    forms = [Documents(facts, between, BETWEEN, names) for facts, between, _ in STAGES]
    tokenizer = train_tokenizer(forms[-1].sample(200, seed=3), (), "bpe", VOCABULARY)
    given = {name: getattr(args, name) for name in OPTIONS}
    command = shlex.join(["python", "benchmarks/far.py", "--only", kind, *(part for k, v in given.items() for part in (f"--{k}", str(v)))])
    memory = measured_peak(cfg, tokenizer.vocab_size)
    clock, share, rows = Minutes(make_state(cfg, tokenizer.vocab_size, CPU), cfg, args.minutes), 0.0, []
    for stage, (form, (*_, part)) in enumerate(zip(forms, STAGES, strict=True)):
        documents = Rows(form.sample(args.documents * forms[-1].facts // form.facts, seed=10 + stage), tokenizer, args.seed)
        exam, quarters = Exam(form, args.exam, tokenizer, seed=100 + stage), 4 if form is forms[-1] else 1
        for _ in range(quarters):
            share += part / quarters
            clock.train(documents, share)
            rows.append({"attention": kind, **given, "stage": stage + 1, "facts": form.facts, "tokens": documents.length,
                         "trained_minutes": round(clock.spent / 60, 3), "steps": clock.state.step, **exam.mark(clock.state.model),
                         "floor": round(exam.floor, 2), "memory_bytes": memory,
                         "parameters": count_parameters(clock.state.model, embeddings=False), "torch": torch.__version__,
                         "command": command})
            print({k: rows[-1][k] for k in ("attention", "tokens", "trained_minutes", "steps", "above_floor", "found")}, flush=True)
    return rows


def done(path: Path) -> set[tuple[str, ...]]:
    "Which runs have their rows."
    return {tuple(row[k] for k in ("attention", *OPTIONS)) for row in read_rows(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "far.csv")
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.only:
        if (kind, *(str(getattr(args, name)) for name in OPTIONS)) in done(args.csv):
            continue
        with freed_memory_kept():
            rows = run(kind, args)
        add_rows(args.csv, *rows)


if __name__ == "__main__":
    main()
