"""Sphinx's settings for the book (make site). What is done to a chapter before Sphinx reads it is in book.py."""
import os
import shutil
import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "docs")]

from book import Book, Names, describe  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

urls = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
book = Book(root / "nbs", urls.get("Repository", ""))
katex = Path(os.environ.get("KATEX", root / ".venv/node_modules/katex")) / "dist"

project = html_title = "mainrun_nb"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinxcontrib.katex", *(["sphinx.ext.linkcode"] if book.repository else [])]
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"  # with the outputs that the notebooks carry
nb_merge_streams = True
myst_enable_extensions = ["attrs_block", "attrs_inline", "dollarmath"]
katex_prerender = True  # formulas are HTML: no script, no request
katex_css_path = "katex.min.css"

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
pygments_dark_style = "github-dark-high-contrast"


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    return book.address(info["module"], info["fullname"])


def copy_katex(app: Sphinx, failure: Exception | None) -> None:
    """KaTeX's style sheet and its fonts into the site, so that no page asks elsewhere."""
    for file in [katex / "katex.min.css", *sorted(katex.glob("fonts/*.woff2"))]:
        place = app.outdir / "_static" / file.relative_to(katex)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", copy_katex)
    app.connect("source-read", book.read)
    app.connect("autodoc-process-docstring", describe)
    app.add_post_transform(Names)
