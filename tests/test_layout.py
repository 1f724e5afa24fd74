"""The rules that keep the house livable: what may import what, notebooks and package in step, clean notebooks, one version."""
import ast
import configparser
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mainrun_nb"
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "sweeps").glob("*.ipynb"))
HEAVY = {"wandb", "datasets", "optuna", "ray", "trackio", "transformers", "matplotlib", "plotly"}
MORE_FIGURES = {"04_eda": 8, "35_results": 8}  # all others: 4


def cells(path: Path, kind: str | None = None) -> list[dict]:
    """The notebook's cells, with their source as one string."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if kind in (None, c["cell_type"])]


def module_name(path: Path) -> str | None:
    """The module that a notebook compiles into."""
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", "\n".join(c["source"] for c in cells(path, "code")), re.M)
    return found[1] if found else None


MODULES = {name: int(p.name[:2]) for p in CHAPTERS if (name := module_name(p))}


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def own_imports(node: ast.AST) -> set[str]:
    """The package's modules that any import below `node` names."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            found |= {a.name.split(".")[1] for a in n.names if a.name.startswith("mainrun_nb.")}
        elif isinstance(n, ast.ImportFrom):
            path = (["mainrun_nb"] if n.level else []) + (n.module.split(".") if n.module else [])
            if path[:1] == ["mainrun_nb"]:
                found |= {path[1]} if len(path) > 1 else {a.name for a in n.names if a.name in MODULES}
    return found


def top_imports(node: ast.AST) -> set[str]:
    """The packages imported while a module is imported: everywhere but inside functions."""
    found: set[str] = set()
    for n in ast.iter_child_nodes(node):
        if isinstance(n, ast.Import):
            found |= {a.name.split(".")[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom) and not n.level and n.module:
            found.add(n.module.split(".")[0])
        elif not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found |= top_imports(n)
    return found


# --- rule 1: modules import only lower-numbered ones ---


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_lower_numbered_modules(name):
    wrong = {m for m in own_imports(tree(name)) if MODULES.get(m, 99) >= MODULES[name]}
    assert not wrong, f"{name} ({MODULES[name]:02}) imports {sorted(wrong)}"


@pytest.mark.parametrize("name", MODULES)
def test_no_star_imports_and_no_patching_of_our_own_classes(name):
    own = {c.name for m in MODULES for c in tree(m).body if isinstance(c, ast.ClassDef)}
    for n in ast.walk(tree(name)):
        if isinstance(n, ast.ImportFrom):
            assert all(a.name != "*" for a in n.names), f"line {n.lineno}: from {n.module} import *"
        if isinstance(n, ast.FunctionDef) and any("patch" in ast.unparse(d) for d in n.decorator_list):
            target = ast.unparse(n.args.args[0].annotation or ast.Constant("")) if n.args.args else ""
            assert not own & set(re.findall(r"\w+", target)), f"{n.name} patches {target}"


# --- rule 2: one notebook, one module, in step ---


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    modules = {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")}
    assert modules == set(MODULES)
    assert len(MODULES) == sum(module_name(p) is not None for p in CHAPTERS), "two notebooks export to one module"


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "mainrun_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for module in MODULES:
        (tmp_path / "mainrun_nb" / f"{module}.py").unlink()
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    names = sorted(p.name for p in PACKAGE.glob("*.py"))
    assert sorted(p.name for p in (tmp_path / "mainrun_nb").glob("*.py")) == names
    _, differ, missing = filecmp.cmpfiles(PACKAGE, tmp_path / "mainrun_nb", names, shallow=False)
    assert not differ + missing, "run nbdev-export and commit its result"


# --- rule 3: a light import ---


def test_importing_the_package_is_instant_and_brings_no_torch():
    code = "import sys; before = len(sys.modules); import mainrun_nb; print('torch' in sys.modules, len(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert out[0] == "False" and int(out[1]) < 20


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(name):
    assert not top_imports(tree(name)) & HEAVY


def test_importing_every_module_brings_no_heavy_package():
    code = "import sys, importlib\n" + "".join(f"importlib.import_module('mainrun_nb.{m}')\n" for m in MODULES)
    code += f"print(*sorted({sorted(HEAVY)!r} & sys.modules.keys()))".replace("[", "{").replace("]", "}")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert not out


# --- rule 4: clean notebooks ---


def output_texts(cell: dict) -> list[str]:
    """Every piece of text that a cell's outputs show."""
    found = []
    for out in cell.get("outputs", []):
        found.append("".join(out.get("text", "")))
        found += ["".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/")]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    assert path.stat().st_size <= 200_000
    found = cells(path)
    assert len({c["id"] for c in found}) == len(found), "cell ids missing or not unique"
    for cell in found:
        where = cell["source"][:60]
        assert set(cell["metadata"]) <= {"tags"}, where
        if cell["cell_type"] != "code":
            continue
        assert cell["execution_count"] is None, where
        for out in cell["outputs"]:
            assert out.get("name") != "stderr" and out["output_type"] != "error", where
            assert out.get("execution_count") is None, where
        for text in output_texts(cell):
            leak = re.search(r"(?<![\w./])/(home|root|work|tmp|usr|Users|opt|mnt|private|var)/[\w.-]+|[A-Z]:\\\\", text)
            assert not leak, f"{where}: a path in an output: {leak and leak[0]}"
            assert not re.search(r"\d+(\.\d+)?\s?(it/s|s/it)\b|█", text), f"{where}: a progress bar or timing in an output"
            assert not re.search(r"\b(hf|gh[pousr]|wandb_v1)_\w{16,}", text), f"{where}: looks like a key"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_few_figures(path):
    kinds = [o.get("data", {}).keys() for c in cells(path, "code") for o in c["outputs"]]
    figures = sum(bool(k & {"image/png", "image/svg+xml"}) for k in kinds)
    assert figures <= MORE_FIGURES.get(path.stem, 4)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_reads_as_a_chapter(path):
    lines = cells(path)[0]["source"].splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("> ") for line in lines), "begins with a heading and a summary"
    prose, code = len(cells(path, "markdown")), len(cells(path, "code"))
    assert code <= 1.6 * prose, f"{code} code cells to {prose} of prose"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exported_cells_are_small(path):
    for cell in cells(path, "code"):
        lines = cell["source"].splitlines()
        if re.match(r"#\|\s*export", cell["source"]) and "@dataclass" not in cell["source"]:
            assert len(lines) <= 45, f"{len(lines)} lines: {lines[1][:60]}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_real_titles_only_in_slow_cells(path):
    for cell in cells(path, "code"):
        if 'environ["HN_TITLES"]' in cell["source"]:
            assert re.match(r"#\|\s*slow", cell["source"]), cell["source"][:60]


# --- rule 5: one version ---


def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_versions_agree():
    found = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M)
    assert found and found[1] == settings()["version"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited and cited[1] == found[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={settings()['min_python']}" and project["name"] == settings()["lib_name"]


def test_readme_is_what_index_says():
    out = subprocess.run([sys.executable, ROOT / ".github/scripts/readme.py"], check=True, capture_output=True, text=True).stdout
    assert (ROOT / "README.md").read_text(encoding="utf-8") == out, "run: make readme"


def test_readme_lists_every_chapter_and_its_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        title, *rest = cells(path)[0]["source"].splitlines()
        summary = next(line[2:] for line in rest if line.startswith("> "))
        assert f"| [{title[2:]}](nbs/{path.name}) | {summary} |" in text, f"{path.name} has changed; run: make readme"
    for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text):
        assert (ROOT / link.split("#")[0]).exists(), f"README links to {link}"
