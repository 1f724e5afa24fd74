"""Where the nats of a run with letters and case apart go, and which titles gain against a run without: benchmarks/results/cased.json.

    HN_TITLES=titles.txt.gz python benchmarks/cased.py RUN CASED_RUN

Both runs are of the same titles. Every token of the validation stream is scored once, as in `val/loss`; a token's loss is that of its
piece and that of its case, and a title's the sum over its tokens, its `<eos>` included.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mainrun_nb.checkpoint import atomic_write, load_run
from mainrun_nb.data import joined_chars, title_slices
from mainrun_nb.evaluate import scoring, windows
from mainrun_nb.runtime import versions
from mainrun_nb.trainer import prepare_data

RESULTS = Path(__file__).parent / "results" / "cased.json"
KINDS = {"no capital after the first word": 0, "a third or fewer": 1 / 3, "up to four fifths": 0.8, "Title Case": 1}
CLASSES = ["no letter", "lower", "Title", "UPPER", "other"]


def kind_of(title: str) -> str:
    "How a title is written, by the share of its words after the first that begin with a capital."
    capitals = [word[0].isupper() for word in re.findall(r"[^\W\d_]+", title)[1:]]
    share = sum(capitals) / max(1, len(capitals))
    return next(name for name, limit in KINDS.items() if share <= limit)


def token_nats(model: Any, ids: Tensor, context_length: int) -> tuple[Tensor, Tensor]:
    "Loss of each token in nats, (tokens,) in float64, and how much of it is the case's."
    whole, case = [], []
    with scoring(model) as device:
        for x, y in windows(ids, context_length, 16):
            hidden, targets = model.features(x.to(device)).flatten(0, 1), y.to(device).flatten()
            whole.append(model.token_nats(hidden, targets).double().cpu())
            if (head := model.case_head) is None:
                case.append(torch.zeros_like(whole[-1]))
            else:
                case.append(head.nats(hidden, model.piece_vectors(head.pieces(targets)), targets).double().cpu())
    return torch.cat(whole), torch.cat(case)


def scored(run_dir: str) -> dict[str, Any]:
    "A run's validation titles, their tokens, and the loss of each."
    cfg, model, tokenizer = load_run(run_dir)
    data = prepare_data(cfg, tokenizer)
    whole, case = token_nats(model, data.val_ids, cfg.hyperparams.context_length)
    starts, sizes = title_slices(data.val_ids.numpy())
    assert len(starts) == len(data.val_titles)
    return {"titles": data.val_titles, "ids": data.val_ids, "starts": starts, "sizes": sizes, "nats": whole.numpy(), "case": case.numpy(),
            "by_title": np.add.reduceat(whole.numpy(), starts), "tokenizer": tokenizer, "context_length": cfg.hyperparams.context_length}


def by_class(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    "Tokens of each class of case, as a share, and what their case costs: nats per token, and per character of the whole text."
    classes = np.minimum(run["tokenizer"].pairs.case, len(CLASSES) - 1)[run["ids"].numpy()]
    chars = joined_chars(run["titles"])
    return {name: {"share": float((classes == i).mean()), "nats per token": float(run["case"][classes == i].mean()),
                   "nats per character": float(run["case"][classes == i].sum() / chars)} for i, name in enumerate(CLASSES)}


def by_kind(plain: dict[str, Any], cased: dict[str, Any]) -> dict[str, dict[str, float]]:
    "Titles by the way they are written: their share, nats per character in both runs, and the share that gains."
    assert plain["titles"] == cased["titles"]
    kinds, chars = np.array([kind_of(t) for t in cased["titles"]]), np.array([len(t) + 5 for t in cased["titles"]])
    rows = {"all": np.ones(len(kinds), bool), **{kind: kinds == kind for kind in KINDS},
            "with a word all in capitals": np.array([bool(re.search(r"\b[A-Z]{2,}\b", t)) for t in cased["titles"]]),
            "with a capital inside a word": np.array([bool(re.search(r"[a-z][A-Z]", t)) for t in cased["titles"]])}
    a, b = plain["by_title"], cased["by_title"]
    return {name: {"share": float(on.mean()), "without": float(a[on].sum() / chars[on].sum()),
                   "cased": float(b[on].sum() / chars[on].sum()), "gain": float((b < a)[on].mean())}
            for name, on in rows.items() if on.any()}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run")
    ap.add_argument("cased_run")
    args = ap.parse_args()
    plain, cased = scored(args.run), scored(args.cased_run)
    chars = joined_chars(cased["titles"])
    result = {"runs": {"without": args.run, "cased": args.cased_run},
              "loss": {"without": plain["by_title"].sum() / chars, "cased": cased["by_title"].sum() / chars,
                       "case alone": cased["case"].sum() / chars},
              "classes": by_class(cased), "titles": by_kind(plain, cased), "versions": versions()}
    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
