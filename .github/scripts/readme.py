"""README.md from nbs/index.ipynb: its prose and the outputs of its cells, without their code.

Usage: readme.py [OUT]   (without OUT: to stdout)
"""
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[2]


def readme(notebook: Path) -> str:
    """The notebook as GitHub Markdown, its links turned from nbs/ to the repository's root."""
    exporter = MarkdownExporter(exclude_input=True)
    text, resources = exporter.from_filename(str(notebook))
    if resources["outputs"]:
        raise SystemExit(f"{notebook.name}: link a committed picture; an embedded one cannot stand in README.md")
    text = text.replace("](../", "](").replace("](images/", "](nbs/images/")
    text = re.sub(r"\]\((\d\d\w?_\w+\.ipynb)", r"](nbs/\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    text = readme(root / "nbs" / "index.ipynb")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        print(text, end="")
