"""A run's result.json as Markdown for the summary of a job: summary.py TITLE RESULT.json (standard library only)."""
import json
import sys
from pathlib import Path

FIRST = [
    "val/loss", "val/floor", "val/challenge_loss", "val/coverage", "val/nats_per_token", "val/bits_per_byte",
    "reference/unigram", "reference/bigram", "reference/kneser_ney", "lossless", "beats_counting", "train/loss",
    "parameters", "steps", "tokens_per_second", "peak_memory", "seed", "commit",
]  # fmt: skip


def cell(value: object) -> str:
    """A value as the text of a table's cell."""
    text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def summary(title: str, path: Path) -> str:
    """The table: what matters first, then every other single value."""
    lines = [f"## {title}", ""]
    try:
        result = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if isinstance(v, str | int | float)}
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        what = "left no result.json" if isinstance(e, FileNotFoundError) else "left a result.json that cannot be read"
        return "\n".join([*lines, f"The run {what}: the executed notebook in this run's artifacts shows where it stopped.", ""])
    order = [k for k in FIRST if k in result] + sorted(result.keys() - set(FIRST))
    return "\n".join([*lines, "| what | value |", "|---|---|", *(f"| {cell(k)} | {cell(result[k])} |" for k in order), ""])


if __name__ == "__main__":
    print(summary(sys.argv[1], Path(sys.argv[2])))
