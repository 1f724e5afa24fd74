"""The figures of a chapter's prose are its code's: each stands, rounded as the prose has it, in a code cell nearby.

There an assert holds it to what the code measures, or it is the setting of what is run. So a slip in the prose is found here, and a
figure that has become untrue by the assert. What pictures show (`#| fig-alt`) is prose too, comments are not code. Whole numbers below ten
(two heads, 8 bits), formulas and number words are left to the reader.
"""
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mainrun_nb.config import Hyperparams

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NEARBY = 6  # cells before and after
NUMBER = re.compile(r"(?<![\w.,])(?<![A-Za-z]-)\d+(?:,\d{3})*(?:\.\d+)?(?![\d_]|,\d)")
ALT = re.compile(r"^#\|\s*fig-alt:(.*)$", re.MULTILINE)
COMMENT = re.compile(r"(?:^|  )# .*$", re.MULTILINE)
SCALES = {"%": 100, "million": 1e-6, "billion": 1e-9, "KB": 1e-3, "MB": 1e-6, "GB": 1e-9, "thousand": 1e-3}
LIST = r"\d\d[a-c]?(?:(?:,| to| and) \d\d[a-c]?)*(?!\d)"  # of chapters
NOT_PROSE = [r"```.*?```", r"`[^`]*`", r"\$\$.*?\$\$", r"\$[^$]*\$", r"\[\d\d[a-c]?\]\([^)]*\)", r"(?<=\])\([^)]*\)", r"https?://\S+",
             rf"[Cc]hapters? {LIST}", rf"\({LIST}\)", r"section \d+(?:\.\d+)*", r"(?<![.,\d])(?:19[5-9]|20[0-3])\d\b"]

PROTOCOL = {"100,000", "90,000", "10,000"}  # the titles of the challenge: all that are drawn, and its two halves

# What no cell can hold: figures that others have published, and names that are numbers.
QUOTED: dict[str, dict[str, str]] = {
    "04_eda": {"80": "Hacker News: the longest title that it takes"},
    "05_overlap": {"13": "GPT-3's paper: its longest runs of words"},
    "13_sparsek_stream": {"2,048": "DeepSeek-V3.2's report (arXiv:2512.02556): key-value pairs that its indexer selects for each query"},
    "20_runtime": {"128": "glibc's manual, Malloc Tunable Parameters: the threshold before it is adjusted, in KiB"},
    "24_tracking": {"8.32": "the assessment's report: where the training loss of its first run ends",
                    "1.78": "the same: the validation loss of that run"},
    "33_scaling": {"40": "Hoffmann et al. 2022 (arXiv:2203.15556): billions of parameters for Gopher's budget",
                   "0.05": "Kaplan et al. 2020 (arXiv:2001.08361): the exponent of the loss in compute"},
    "33b_repetition": {"400": "Muennighoff et al. 2023 (arXiv:2305.16264): models trained"},
    "36_assessment": {"27,707": "the assessment's data analysis: words", "348": "the same: tokens of validation alone"},
    "index": {"2.0": "the licence's version"},
}


class Figure(NamedTuple):
    """A number of the prose, the word after it, and the cell it stands in."""

    text: str
    unit: str
    cell: int
    line: str


def figures(cells: list[dict]) -> Iterator[Figure]:
    """The numbers of the prose but for whole ones below ten."""
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        prose = source if cell["cell_type"] == "markdown" else " ".join(ALT.findall(source))
        for other in NOT_PROSE:
            prose = re.sub(other, lambda m: "\n" * m.group().count("\n") + "·", prose, flags=re.DOTALL)
        for m in NUMBER.finditer(prose):
            if "." in m.group() or len(m.group()) > 1:
                unit = re.match(r"\s*([A-Za-z%]*)", prose[m.end():]).group(1)
                yield Figure(m.group(), unit, i, " ".join(prose[max(0, m.start() - 40): m.end() + 30].split()))


def constants(cell: dict) -> set[float]:
    """The numbers in a code cell."""
    source = COMMENT.sub("", ALT.sub("", "".join(cell["source"]))) if cell["cell_type"] == "code" else ""
    return {float(text) for text in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]?\d+)?", source.replace("_", ""))}


def stands(text: str, unit: str, known: set[float]) -> bool:
    """Whether a figure is one of these numbers, rounded to its digits and in its unit."""
    half = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    value, scale = float(text.replace(",", "")), SCALES.get(unit)
    return any(abs(k - value) < 1e-9 or "." in text and abs(k - value) < half or scale and abs(k * scale - value) < half for k in known)


def nearby(cells: list[dict], at: int) -> set[float]:
    return set().union(*map(constants, cells[max(0, at - NEARBY): at + NEARBY + 1]))


def read(path: Path) -> tuple[list[dict], list[Figure], set[str]]:
    """The cells of a notebook, the figures of its prose that its code must have, and the others."""
    cells, others = json.loads(path.read_text(encoding="utf-8"))["cells"], PROTOCOL | QUOTED.get(path.stem, {}).keys()
    found = list(figures(cells))
    return cells, [f for f in found if f.text not in others], {f.text for f in found} & others


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_of_the_prose_stand_in_code_nearby(path):
    cells, own, others = read(path)
    lost = [f"cell {f.cell}: {f.text} in '{f.line}'" for f in own if not stands(f.text, f.unit, nearby(cells, f.cell))]
    assert not lost, "\n".join([f"{path.name}: figures that no code cell nearby has:", *lost])
    assert QUOTED.get(path.stem, {}).keys() <= others, "QUOTED lists figures that are not there"


def test_the_protocol_has_as_many_titles():
    hp = Hyperparams()
    held_out = round(hp.num_titles * hp.val_frac)
    assert {f"{n:,}" for n in (hp.num_titles, hp.num_titles - held_out, held_out)} == PROTOCOL


def test_a_mutated_figure_is_found():
    """One digit of every figure changed at random: about nine of ten no longer stand; the others are by chance another number nearby."""
    rng, caught, total = random.Random(0), 0, 0
    for path in NOTEBOOKS:
        cells, own, _ = read(path)
        for f in own:
            at = rng.choice([i for i, c in enumerate(f.text) if c.isdigit()])
            other = rng.choice([d for d in "123456789" if d != f.text[at]])
            total += 1
            caught += not stands(f.text[:at] + other + f.text[at + 1:], f.unit, nearby(cells, f.cell))
    assert caught > 0.85 * total, f"{caught} of {total}"
