"""The chapters as pages of a site: what Sphinx is told about each notebook before it reads it.

Nothing is run, and nothing is written between: the notebooks of nbs/ go in as they are committed, with the outputs that they carry.
"""
import ast
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from fastcore.docments import docments
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

Cell = dict[str, Any]
PARTS = re.compile(r"\*\*(Part (\d): .+?)\*\*")  # the index names the parts, and marks the chapters of a first reading
MARKED = re.compile(r"\| (\d\d\w?) \| ● \|")
NUMBER = re.compile(r"\d\d[a-z]?")
# Chapters named in prose, and before them what is passed over: code, and what is a link already.
CHAPTERS = re.compile(r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)|(\b[Cc]hapters? \d\d[a-z]?(?:(?:, | and | to )\d\d[a-z]?)*\b)", re.S)


def cells(notebook: str) -> list[Cell]:
    """The cells of a notebook, each with its source in one piece."""
    return [{**c, "source": "".join(c["source"])} for c in json.loads(notebook)["cells"]]


def markdown(text: str) -> Cell:
    """A cell of prose."""
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:8], "cell_type": "markdown", "metadata": {}, "source": text}


def defined(code: str) -> str:
    """The names that a cell defines, as a list for people."""
    names: list[str] = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names += [t.id for t in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(t, ast.Name)]
    return ", ".join(names) or "the code"


def shown(cell: Cell) -> Iterator[Cell]:
    """A cell as a reader sees it, if at all: without directives, pictures described, internals folded, tables as prose."""
    lines = cell["source"].splitlines(keepends=True)
    said = [line[2:].strip() for line in lines if line.startswith("#|")]
    code = "".join(line for line in lines if not line.startswith("#|")).strip("\n")
    if cell["cell_type"] != "code":
        yield cell
    elif "echo: false" in said:
        yield from (markdown("".join(out["data"]["text/markdown"])) for out in cell["outputs"])
    elif code and "hide" not in said:
        alt = next((s.removeprefix("fig-alt:").strip() for s in said if s.startswith("fig-alt:")), "")
        alt = re.sub(r'^"(.*)"$', r"\1", alt)  # as YAML, where it is quoted
        about: Cell = {"image": {"alt": alt}} if alt else {}
        if folded := "exporti" in said:
            about |= {"code_prompt_show": f"Show {defined(code)}", "code_prompt_hide": f"Hide {defined(code)}"}
        yield {**cell, "source": code, "metadata": {"mystnb": about, "tags": ["hide-input"] if folded else []}}


class Book:
    """What the pages share: the chapters, their parts, and where the repository lies, if it is published."""

    def __init__(self, folder: Path, repository: str = "") -> None:
        self.repository, self.ref = repository.rstrip("/"), os.environ.get("GITHUB_SHA", "main")
        self.blob = f"{self.repository}/blob/{self.ref}"
        texts = {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.ipynb"))}
        index = "".join(new["source"] for cell in cells(texts.pop("index")) for new in shown(cell))
        self.titles = {name: cells(text)[0]["source"].partition("\n")[0].removeprefix("# ") for name, text in texts.items()}
        self.names = {name.partition("_")[0]: name for name in self.titles}
        self.parts, self.marked = {digit: part for part, digit in PARTS.findall(index)}, set(MARKED.findall(index))

    def contents(self) -> str:
        """The table of contents for the side of each page: the chapters in their parts, and the names of the library."""
        groups: dict[str, list[str]] = {part: [] for part in self.parts.values()}
        for number, name in self.names.items():
            groups[self.parts[number[0]]].append(f"{number} {self.titles[name]} <{name}>")
        groups["Reference"] = ["All names <genindex>"]
        return "\n".join(f'```{{toctree}}\n:hidden:\n:caption: "{part}"\n\n' + "\n".join(pages) + "\n```" for part, pages in groups.items())

    def about(self, name: str, module: str) -> str:
        """The line under a chapter's summary: its number, its module and, where the repository is known, where to find and to run it."""
        number = name.partition("_")[0]
        parts = [f"Chapter {number}"] + [f"compiles into `mainrun_nb.{module}`"] * bool(module)
        if self.repository:
            parts += [f"[notebook]({self.blob}/nbs/{name}.ipynb)"] + [f"[module]({self.blob}/mainrun_nb/{module}.py)"] * bool(module)
        if self.repository.startswith("https://github.com/") and number in self.marked:
            colab = f"{self.blob}/nbs/{name}.ipynb".replace("https://github.com", "https://colab.research.google.com/github")
            parts += [f"[Open in Colab]({colab}){{.colab}}, and first run `%pip install git+{self.repository}@{self.ref}`"]
        return "{.about}\n" + " · ".join(parts)

    def linked(self, text: str, here: str = "") -> str:
        """Prose whose chapter numbers lead to the chapters, and whose links out of the book to the repository, or nowhere without one."""
        def link(number: re.Match[str]) -> str:
            name = self.names.get(number[0], here)
            return number[0] if name == here else f"[{number[0]}]({name}.ipynb)"

        text = CHAPTERS.sub(lambda found: NUMBER.sub(link, found[1]) if found[1] else found[0], text)
        if self.repository:
            return re.sub(r"\]\(\.\./([^)]+)\)", rf"]({self.blob}/\1)", text)
        return re.sub(r"\[([^][]*)\]\(\.\./[^)]+\)", r"\1", text)

    def read(self, app: Sphinx, name: str, text: list[str]) -> None:
        """Sphinx's event source-read: the text of a notebook, changed in place into that of its page."""
        old = cells(text[0])
        module = next((m[1] for c in old if (m := re.match(r"#\| default_exp (\w+)", c["source"]))), "")
        page = [new for cell in old for new in shown(cell)]
        head, summary, rest = re.split(r"^> (.+)$", page[0]["source"], maxsplit=1, flags=re.M)
        page[0] = markdown(f"{head}> {summary}\n\n" + ("" if name == "index" else self.about(name, module)) + f"\n\n{rest}")
        if name == "index":
            page.append(markdown(self.contents()))
        if module:
            page.append(markdown(f"## Reference\n\n```{{eval-rst}}\n.. automodule:: mainrun_nb.{module}\n   :members:\n```"))
        for cell in page:
            if cell["cell_type"] == "markdown":
                cell["source"] = self.linked(cell["source"], name)
        notebook = json.loads(text[0])
        notebook["metadata"]["myst"] = {"html_meta": {"description": summary}}
        text[0] = json.dumps({**notebook, "cells": page})

    def address(self, module: str, name: str) -> str | None:
        """Where in the repository the source of an object of the library lies."""
        found: Any = sys.modules.get(module)
        try:
            for part in name.split("."):
                found = getattr(found, part)
            if isinstance(found, property):
                found = found.fget
            found = inspect.unwrap(found)
            lines, first = inspect.getsourcelines(found)
            path = Path(inspect.getfile(found)).resolve().relative_to(Path(__file__).resolve().parents[1])
        except (AttributeError, TypeError, OSError, ValueError):  # a value; or what another package defines
            return None
        return f"{self.blob}/{path.as_posix()}#L{first}-L{first + len(lines) - 1}"


def rst(text: str) -> str:
    """A line of a docstring, in Markdown as all of the book, for Sphinx's own markup."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(rf"\ ``{part}``\ " if i % 2 else re.sub(r"([*_|\\])", r"\\\1", part) for i, part in enumerate(parts))


def describe(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """autodoc-process-docstring: a docstring in Sphinx's markup, and behind it the comments of the parameters (docments)."""
    lines[:] = [rst(line) for line in lines] if what != "module" else [rst(f"For others to use: `from {name} import ...`"), ""]
    if what in ("function", "method") or (what == "class" and "__init__" in vars(obj)):
        said = {k: rst(v) for k, v in docments(obj).items() if v and (k, what) != ("return", "class")}
        lines += ["", *(f":returns: {v}" if k == "return" else f":param {k}: {v}" for k, v in said.items()), ""]


class Names(SphinxPostTransform):
    """A name of the library in prose leads to its reference."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        places: dict[str, list[str]] = {}
        objects = self.env.domains.python_domain.objects
        for full in (name for name, place in objects.items() if place.objtype in ("function", "class", "exception")):
            places.setdefault(full.rpartition(".")[2], []).append(full)
        for node in list(self.document.findall(nodes.literal)):
            found = places.get(node.astext().removesuffix("()"), [])
            if len(found) == 1 and isinstance(node.parent, nodes.paragraph):
                place = objects[found[0]]
                node.replace_self(make_refnode(self.app.builder, self.env.docname, place.docname, place.node_id, node.deepcopy(), found[0]))
