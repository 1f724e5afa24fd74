"""What titles cut by the edge of a window cost two runs, one trained on whole titles and one on a stream: benchmarks/results/cuts.json.

    HN_TITLES=titles.txt.gz python benchmarks/cuts.py WHOLE_RUN STREAM_RUN

Both runs are of the same titles and the same vocabulary. Every token of the validation stream is scored once, as in `val/loss`, in windows
of `context_length` tokens. Of a title that reaches into the next window, the tokens there are scored without its beginning.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from cased import scored

from mainrun_nb.checkpoint import atomic_write
from mainrun_nb.data import joined_chars
from mainrun_nb.runtime import versions

RESULTS = Path(__file__).parent / "results" / "cuts.json"


def groups(run: dict[str, Any]) -> dict[str, np.ndarray]:
    "Masks of the tokens: of titles in one window; of the others, those in the first window and those in the next."
    window, starts, sizes = np.arange(len(run["ids"])) // run["context_length"], run["starts"], run["sizes"]
    first, last = (np.repeat(window[at], sizes) for at in (starts, starts + sizes - 1))  # of each token's title
    return {"titles in one window": first == last, "before the cut": (first != last) & (window == first), "after the cut": window != first}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("whole_run")
    ap.add_argument("stream_run")
    args = ap.parse_args()
    runs = scored(args.whole_run), scored(args.stream_run)
    assert (runs[0]["ids"] == runs[1]["ids"]).all() and runs[0]["context_length"] == runs[1]["context_length"]
    (whole, stream), chars = (run["nats"] for run in runs), joined_chars(runs[0]["titles"])
    rows = {name: {"share": float(on.mean()), "whole": float(whole[on].mean()), "stream": float(stream[on].mean()),
                   "whole above stream": float((whole[on].sum() - stream[on].sum()) / chars)} for name, on in groups(runs[0]).items()}
    result = {"runs": {"whole": args.whole_run, "stream": args.stream_run},
              "loss": {"whole": float(whole.sum() / chars), "stream": float(stream.sum() / chars)}, "tokens": rows, "versions": versions()}
    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
