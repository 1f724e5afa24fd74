"""What titles cut by the edge of a window cost runs that read whole titles or a stream: benchmarks/results/cuts.json.

    HN_TITLES=titles.txt.gz python benchmarks/cuts.py NAME=RUN NAME=RUN ...

The runs are of the same titles, vocabulary and `context_length`. Every token of the validation stream is scored once, as in `val/loss`, in
windows of `context_length` tokens. Of a title that reaches into the next window, the tokens there are scored without its beginning.
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
    ap.add_argument("run", nargs="+", help="NAME=FOLDER of a finished run")
    folders = dict(text.split("=", 1) for text in ap.parse_args().run)
    runs = {name: scored(folder) for name, folder in folders.items()}
    first = next(iter(runs.values()))
    assert all((run["ids"] == first["ids"]).all() and run["context_length"] == first["context_length"] for run in runs.values())
    chars = joined_chars(first["titles"])
    rows = {name: {"share": float(on.mean()), "nats per token": {run: float(of["nats"][on].mean()) for run, of in runs.items()},
                   "nats per character": {run: float(of["nats"][on].sum() / chars) for run, of in runs.items()}}
            for name, on in groups(first).items()}
    result = {"runs": folders, "loss": {name: float(run["nats"].sum() / chars) for name, run in runs.items()}, "tokens": rows,
              "versions": versions()}
    atomic_write(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
