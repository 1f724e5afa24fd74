"Tables that grow by a row for every run, which is how a study that was stopped goes on."

import csv
import fcntl
import io
import os
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, str]]:
    "The rows so far; none without a file."
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def columns(path: Path) -> list[str]:
    "The names in the first line."
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def add_rows(path: Path, *rows: dict[str, Any]) -> None:
    "More rows, by one writer at a time; the first names the columns. Raises `SystemExit` where the file has other ones."
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        if not file.seek(0, os.SEEK_END):
            writer.writeheader()
        elif columns(path) != list(rows[0]):  # also in another order: values are written in that of the row
            raise SystemExit(f"{path}: has other columns; name another file")
        writer.writerows(rows)
        file.write(text.getvalue())
