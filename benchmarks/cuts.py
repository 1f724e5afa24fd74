"""What titles cut by the edge of a window cost two runs, one trained on whole titles and one on a stream: benchmarks/results/cuts.json.

    HN_TITLES=titles.txt.gz python benchmarks/cuts.py WHOLE_RUN STREAM_RUN

Both runs are of the same titles and the same vocabulary. Every token of the validation stream is scored once, as in `val/loss`, in windows
of `context_length` tokens. Of a title that reaches into the next window, the tokens there are scored without its beginning.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from cased import token_nats

from mainrun_nb.checkpoint import atomic_write, load_run
from mainrun_nb.data import joined_chars
from mainrun_nb.runtime import versions
from mainrun_nb.trainer import prepare_data

RESULTS = Path(__file__).parent / "results" / "cuts.json"


def scored(run_dir: str) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    "Loss of each validation token, which tokens are of which group, and the characters of all."
    cfg, model, tokenizer = load_run(run_dir)
    data = prepare_data(cfg, tokenizer)
    nats, _ = token_nats(model, data.val_ids, cfg.hyperparams.context_length)
    return nats.numpy(), groups(data.val_ids.numpy(), tokenizer.eos_id, cfg.hyperparams.context_length), joined_chars(data.val_titles)


def groups(ids: np.ndarray, eos: int, context_length: int) -> dict[str, np.ndarray]:
    "Masks of the tokens: of titles in one window; of the others, those in the first window and those in the next."
    ends = np.flatnonzero(ids == eos)
    starts = np.concatenate([[0], ends[:-1] + 1])
    cut, window, title = starts // context_length != ends // context_length, np.arange(len(ids)) // context_length, np.arange(len(ends))
    of = np.repeat(title, ends - starts + 1)  # title of each token
    after = cut[of] & (window != starts[of] // context_length)
    return {"titles in one window": ~cut[of], "before the cut": cut[of] & ~after, "after the cut": after}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("whole_run")
    ap.add_argument("stream_run")
    args = ap.parse_args()
    (whole, masks, chars), (stream, same, _) = scored(args.whole_run), scored(args.stream_run)
    assert all((masks[name] == same[name]).all() for name in masks)
    rows = {name: {"share": float(on.mean()), "whole": float(whole[on].mean()), "stream": float(stream[on].mean()),
                   "whole above stream": float((whole[on].sum() - stream[on].sum()) / chars)} for name, on in masks.items()}
    result = {"runs": {"whole": args.whole_run, "stream": args.stream_run},
              "loss": {"whole": float(whole.sum() / chars), "stream": float(stream.sum() / chars)}, "tokens": rows, "versions": versions()}
    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
