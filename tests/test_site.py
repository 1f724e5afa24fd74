"""The book as a site: what becomes of a notebook, every link of every page, and five pages in a real browser, by axe too."""
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_lab import wait_for
from test_report import Tab, axe, browser  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("furo", reason="needs the tools of the site: make .venv/.site")
sys.path.append(str(ROOT / "docs"))
import book  # noqa: E402

URL = "https://github.com/me/book"


@pytest.fixture(autouse=True)
def on_main(monkeypatch) -> None:
    monkeypatch.delenv("GITHUB_SHA", raising=False)


def code(text: str, outputs: tuple = ()) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": list(outputs)}


@pytest.mark.parametrize("text", ["#| hide\nimport secret", "#| default_exp data", ""])
def test_what_is_for_the_tools_alone_is_not_shown(text):
    assert list(book.shown(code(text))) == []


def test_a_cell_is_shown_without_its_directives_and_a_picture_is_described():
    (plain,) = book.shown(code("#| export\ndef f(): ..."))
    assert plain["source"] == "def f(): ..." and not plain["metadata"].get("tags")
    for quote in ("", '"'):
        (picture,) = book.shown(code(f"#| slow\n#| fig-alt: {quote}two curves: both fall{quote}\nplot()"))
        assert picture["metadata"]["mystnb"]["image"]["alt"] == "two curves: both fall" and picture["source"] == "plot()"


@pytest.mark.parametrize(
    ("text", "names"),
    [("class A: ...\n\n\ndef f(): ...", "A, f"), ("LIMIT = 3\nkept: int = 4", "LIMIT, kept"), ("import os", "the code")],
)
def test_internals_are_folded_under_their_names(text, names):
    (cell,) = book.shown(code(f"#| exporti\n{text}"))
    assert cell["metadata"]["tags"] == ["hide-input"] and cell["metadata"]["mystnb"]["code_prompt_show"] == f"Show {names}"


def test_a_cell_without_echo_is_what_it_wrote():
    table = {"output_type": "execute_result", "data": {"text/markdown": ["| a |\n", "|---|\n"], "text/plain": ["..."]}}
    (cell,) = book.shown(code("#| echo: false\nMarkdown(...)", (table,)))
    assert (cell["cell_type"], cell["source"]) == ("markdown", "| a |\n|---|\n")


@pytest.mark.parametrize("url", ["", URL, URL + "/"])
def test_links_out_of_the_book_only_where_the_repository_is_known(url):
    text = "See [small](../sweeps/small.yaml), chapters 02, 29a and 03, [this chapter 03](03_data.ipynb), `chapter 03`, chapters 99 and 14."
    small = f"[small]({URL}/blob/main/sweeps/small.yaml)" if url else "small"
    ours = "chapters [02](02_sources.ipynb), [29a](29a_trials.ipynb) and [03](03_data.ipynb)"
    passed = "[this chapter 03](03_data.ipynb), `chapter 03`, chapters 99 and 14."
    assert book.Book(ROOT / "nbs", url).linked(text, "14_loss") == f"See {small}, {ours}, {passed}"


def test_colab_for_the_first_chapters_of_a_book_on_github(monkeypatch):
    for url in ("", URL, "https://git.example.org/me/book"):
        pages = book.Book(ROOT / "nbs", url)
        assert {"03", "10", "27"} < pages.marked < pages.names.keys() and len(pages.marked) == 8 and len(pages.parts) == 4
        lines = {number: pages.about(name, "module") for number, name in pages.names.items()}
        assert {n for n, line in lines.items() if "colab" in line} == (pages.marked if url == URL else set())
        assert all(("](" in line) == bool(url) for line in lines.values())
    monkeypatch.setenv("GITHUB_SHA", "0123abc")
    line = book.Book(ROOT / "nbs", URL).about("03_data", "data")
    assert "(https://colab.research.google.com/github/me/book/blob/0123abc/nbs/03_data.ipynb)" in line
    assert "git+https://github.com/me/book@0123abc`" in line


def test_the_address_of_a_source():
    import mainrun_nb.config  # noqa: F401

    where = book.Book(ROOT / "nbs", URL).address
    path, _, lines = (where("mainrun_nb.config", "load_config") or "").partition("#")
    first, last = (int(n[1:]) for n in lines.split("-"))
    text = (ROOT / "mainrun_nb/config.py").read_text().splitlines()
    assert path == f"{URL}/blob/main/mainrun_nb/config.py" and text[first - 1].startswith("def load_config(") and first < last <= len(text)
    assert [where("mainrun_nb.config", name) for name in ("NAMES", "dataclass", "none")] == [None] * 3


def test_a_docstring_keeps_its_signs_and_gains_its_docments():
    def cut(
        n: int,  # how *many*
    ) -> int:  # what is left
        "Cut `n_1`, * and |c|_."

    lines = [cut.__doc__]
    book.describe(None, "function", "cut", cut, None, lines)
    assert lines == [r"Cut \ ``n_1``\ , \* and \|c\|\_.", "", r":param n: how \*many\*", ":returns: what is left", ""]


# --- the site itself ---


class Page(HTMLParser):
    """What a page asks for, where its links lead, its anchors, and its pictures without a description."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.asked, self.ids, self.silent = set(), set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        has = dict(attrs)
        self.ids.add(has.get("id"))
        if tag == "a" and has.get("href"):
            self.links.add(has["href"])
        elif tag in ("script", "img", "link", "iframe") and (asked := has.get("src") or has.get("href")):
            self.asked.add(asked)
        if tag == "img" and not has.get("alt", "").strip():
            self.silent.append(has)


def check_links(site: Path) -> None:
    """Every page: no link leads nowhere, nothing is fetched from elsewhere, each picture is described."""
    pages = {path.name: Page(path) for path in site.glob("*.html")}
    assert {f"{p.stem}.html" for p in (ROOT / "nbs").glob("*.ipynb")} <= pages.keys()
    for name, page in pages.items():
        assert page.silent == [], name
        for link in sorted(page.links | page.asked):
            url = urlsplit(link)
            if url.scheme in ("http", "https", "mailto") and link not in page.asked:
                continue
            assert not url.scheme and not url.netloc and not url.path.startswith("/"), f"{name}: {link}"
            target = site / unquote(url.path) if url.path else site / name
            assert target.is_file(), f"{name}: {link}"
            assert not url.fragment or target.suffix != ".html" or unquote(url.fragment) in pages[target.name].ids, f"{name}: {link}"


class SiteTab(Tab):
    def ready(self) -> None:
        wait_for(lambda: self.evaluate("document.readyState == 'complete' && location.href != 'about:blank'"), 60)


SERIOUS = """axe.run().then(r => [r.passes.length > 15, r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(
    v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)])])"""
FORMULAS = """[document.querySelectorAll('.math').length, document.querySelectorAll('.math .katex-html').length,
    document.querySelectorAll('.katex-error').length, getComputedStyle(document.querySelector('.math .katex')).fontFamily]"""


def check_page(tab: Tab, name: str, width: int) -> None:
    """In the browser: nothing said on the console, nothing asked of a network, formulas drawn, no serious violation found by axe."""
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the screen"
    if tab.evaluate("!!document.querySelector('.math')"):
        wanted, drawn, wrong, font = tab.evaluate(FORMULAS)
        assert wanted == drawn and not wrong and "KaTeX" in font, name
    if name.startswith("search.html"):
        found = wait_for(lambda: tab.evaluate("[...document.querySelectorAll('#search-results a')].map(a => a.textContent)"), 30)
        assert "mainrun_nb.sources.load_titles" in found
    assert tab.console == [] and [r for r in tab.requests if not r.startswith(("file:", "data:"))] == [], name
    if code := axe():  # which asks for the style sheets itself, and so comes last
        tab.evaluate(code + ";0")
        assert tab.evaluate(SERIOUS) == [True, []], name


@pytest.mark.slow
def test_the_site(request, tmp_path):
    """Built as `make site` does, opened from disk; one test, so that it is built once."""
    line = subprocess.run(["make", "--just-print", "site"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    command = line.replace(".venv/bin/python", sys.executable).replace("build/", f"{tmp_path}/").split()
    if not Path(os.environ.get("KATEX", ROOT / ".venv/node_modules/katex")).is_dir():
        pytest.skip("needs KaTeX: make .venv/.site")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    check_links(site)
    text = "".join(page.read_text(encoding="utf-8") for page in site.glob("*.html"))
    assert not re.search(r'#\|</span>|#\| (export|fig-alt|slow)| object at 0x|"/blob/', text)
    assert 'id="mainrun_nb.config.load_config"' in text and "in the order of the draw" in text
    port = request.getfixturevalue("browser")
    for name in ("index.html", "03_data.html", "10_attention.html", "35_results.html", "search.html?q=load_titles"):
        for width, scheme in ((390, "dark"), (1280, "light")):
            check_page(SiteTab(port, f"{site}/{name}", width, scheme), name, width)
