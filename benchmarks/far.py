"""Where sparse attention pays, and where it does not: texts whose last lines need the first, a thousand tokens before (chapter 01b).

    python benchmarks/far.py                        each attention for 7.5 CPU minutes of training -> benchmarks/results/far.csv
    python benchmarks/far.py --only sparsek --seed 1
    python benchmarks/far.py --minutes 30 --only dense local
    python benchmarks/far.py --width 16 --minutes 0.05 --documents 40 --csv /tmp/far.csv      only to see that it works

A GPT of two layers with rotary positions, token shift and no dropout is trained for equal CPU minutes of one thread with dense, fixed,
strided, local and SparseK attention. Its documents grow: two fifths of the minutes go to documents of 8 facts and 50 tokens, where it
learns to look a name up, and three twentieths each to four more kinds, up to 128 facts and 1,280 tokens. Between the facts and their
references stand lines of a small grammar, so that the memory is what there is to learn. A row is a document. The first steps of a stage are
timed beforehand, and as many follow as fit, with warmup and a decay over the last three tenths of all steps. After each stage, on documents
of its kind never trained on: the loss above the exact floor, in nats a document; and the share of references whose company gets more than
half of the probability (found). A window of 128 tokens sees all of a document of the first stage and no first lines in the last, though
layers hand on what theirs saw.

Why so: in ten minutes of long documents alone, with the titles of chapter 01 between, dense attention found none of its references, nor
where such documents followed on short ones; and a stage of a minute was too short for the first references to be found.

Runs that have their rows are not made again. (What attentions need in memory: benchmarks/attention.py.)
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
from mainrun_nb.models import count_parameters
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.synthetic import Grammar
from mainrun_nb.tokenizer import Tokenizer, train_tokenizer
from mainrun_nb.trainer import make_state, take_step

CPU, VOCABULARY = torch.device("cpu"), 1500
STAGES = ((8, 0, 0.4), (16, 4, 0.15), (32, 32, 0.15), (64, 64, 0.15), (128, 128, 0.15))  # facts, lines between, share of the minutes
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
        "model_configs.gpt.position=rope", "model_configs.gpt.residual_scaling=true", "model_configs.gpt.token_shift=true"]
WHOLE = {"width": 64, "layers": 2, "documents": 600, "exam": 40, "seed": 1337}  # options and what they are unless said
KEY = ("attention", "minutes", "width", "layers", "documents", "seed")


def configured(kind: str, width: int, layers: int, seed: int) -> Config:
    "The configuration of a run."
    shape = [f"model_configs.gpt.{k}={width}" for k in ("d_model", "hidden_layer")] + [f"model_configs.gpt.n_layer={layers}"]
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
        epoch, at = divmod(k * self.rows, len(self.ids) - self.rows)
        which = drawn_order(len(self.ids), self.seed, epoch)[at : at + self.rows]
        return tuple(torch.stack(both) for both in zip(*(padded(self.ids[i], self.length) for i in which), strict=True))


class Exam:
    "Documents never trained on, with the places of their references."

    def __init__(self, form: Documents, n: int, tokenizer: Tokenizer) -> None:
        documents = form.sample(n, seed=2)
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


def timed(state: Any, rows: Rows, hp: Any, steps: int, max_steps: int) -> float:
    "CPU seconds of so many steps."
    began = time.process_time()
    for _ in range(steps):
        take_step(state, state.model, rows, slice(None), hp, max_steps)
    return time.process_time() - began


def steps_for(seconds: float, cfg: Config, vocab_size: int, rows: Rows) -> int:
    "How many steps fit, by the time of five; the first two pay for allocation."
    state = make_state(cfg, vocab_size, CPU)
    timed(state, rows, cfg.hyperparams, 2, 10**6)
    return max(1, int(seconds / timed(state, rows, cfg.hyperparams, 5, 10**6) * 5))


def run(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    "Train with one attention; a row for each stage."
    cfg, names = configured(kind, args.width, args.layers, args.seed), Documents().names
    names = dict.fromkeys(names, 1 / len(names))
    forms = [Documents(facts, between, BETWEEN, names) for facts, between, _ in STAGES]
    tokenizer = train_tokenizer(forms[-1].sample(200, seed=3), (), "bpe", VOCABULARY)
    stages = [Rows(form.sample(args.documents * STAGES[-1][0] // form.facts, seed=1), tokenizer, args.seed) for form in forms]
    exams = [Exam(form, args.exam, tokenizer) for form in forms]
    steps = [steps_for(60 * args.minutes * share, cfg, tokenizer.vocab_size, stage)
             for stage, (_, _, share) in zip(stages, STAGES, strict=True)]
    given = [part for name in ("minutes", *WHOLE) for part in (f"--{name}", str(getattr(args, name)))]
    command = shlex.join(["python", "benchmarks/far.py", "--only", kind, *given])
    state, seconds, rows = make_state(cfg, tokenizer.vocab_size, CPU), 0.0, []
    for form, stage, exam, n in zip(forms, stages, exams, steps, strict=True):
        seconds += timed(state, stage, cfg.hyperparams, n, sum(steps))
        rows.append({"attention": kind, "minutes": args.minutes, "width": args.width, "layers": args.layers, "documents": args.documents,
                     "seed": args.seed, "facts": form.facts, "trained_minutes": round(seconds / 60, 2), "steps": state.step,
                     **exam.mark(state.model), "floor": round(exam.floor, 2), "tokens": stage.length,
                     "parameters": count_parameters(state.model, embeddings=False), "torch": torch.__version__,
                     "command": command})
        print({k: rows[-1][k] for k in ("attention", "facts", "trained_minutes", "steps", "above_floor", "found")}, flush=True)
    return rows


def done(path: Path) -> set[tuple[str, ...]]:
    "Which runs have their rows."
    return {tuple(row[k] for k in KEY) for row in read_rows(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="of training, for each attention")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "far.csv")
    for name, default in WHOLE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in args.only:
        if (kind, *(str(getattr(args, name)) for name in KEY[1:])) in done(args.csv):
            continue
        with freed_memory_kept():
            rows = run(kind, args)
        add_rows(args.csv, *rows)


if __name__ == "__main__":
    main()
