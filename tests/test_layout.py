"""The rules that keep the house livable (DESIGN, section 1), one after the other; a failure names the file and the cell or line."""
import ast
import configparser
import filecmp
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mainrun_nb"
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb")) + sorted((ROOT / "sweeps").glob("*.ipynb"))
by_stem = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)

# Rule 1: private interfaces of other packages, by module (its notebook included) and interface, with the reason why no public one will do.
PRIVATE = {
    ("loss", "torch._subclasses"): "in the notebook: FakeTensorMode, see memory",
    ("loss", "torch.distributed._tools"): "in the notebook: MemTracker, see memory",
    ("memory", "torch._subclasses"): "FakeTensorMode: tensors without memory, the only way to run a step that does not fit",
    ("memory", "torch.distributed._tools"): "MemTracker: what each tensor of a step is for; it is published under this path only",
    ("memory", "torch.utils._python_dispatch"): "TorchDispatchMode: documented as a tutorial, published under this path only",
    **{("optim", f"torch._foreach_{name}"): "many tensors in one kernel, what torch's own optimizers are made of; it has no public name"
       for name in ("add_", "lerp", "lerp_", "mul_", "sub")},
    ("sparse_attention", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"): "the flash kernel that also gives the log-sum-exp",
    ("sparse_attention", "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward"): "its gradient",
}
# Underscored names that are public all the same: of named tuples, and one of the standard library's documented functions.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}

# Rule 3: imported inside the function that needs them.
HEAVY = {"wandb", "datasets", "optuna", "ray", "trackio", "transformers", "matplotlib"}

# Rule 4.
MORE_FIGURES = {"04_eda": 8, "35_results": 8}  # all others: 4
SOURCE_BYTES, FILE_BYTES = 80_000, 400_000

# Rule 5: the public interface (DESIGN section 4, with the results that it names, and the registries of section 5), which `__all__` may
# list whether or not this repository uses it.
INTERFACE = {
    "config": {"Config", "load_config", "register_name",  # and what a registered section's own fields are declared with:
               "positive", "at_least", "between", "fraction", "optional_positive", "pair", "one_of", "named"},
    "data": {"load_titles", "split_titles"},
    "tokenizer": {"train_tokenizer", "load_tokenizer"},
    "attention": {"register_attention", "build_attention"},
    "models": {"build_model", "register_model"},
    "optim": {"register_optimizer", "register_scheduler"},
    "memory": {"estimate_memory", "MemoryEstimate"},
    "evaluate": {"evaluate", "EvalResult"},
    "tracking": {"register_backend"},
    "checkpoint": {"load_run"},
    "generate": {"generate"},
    "trainer": {"train", "RunResult"},
    "sweep": {"run_sweep", "Leaderboard"},
    "report": {"make_report"},
    "hub": {"export_run", "load_exported"},
}
FUNCTION, CELL, CLASS, MODULE = 25, 30, 140, 600  # lines


# --- reading notebooks and modules ---


def cells(path: Path, kind: str | None = None) -> list[dict]:
    """The notebook's cells, with their source as one string."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if kind in (None, c["cell_type"])]


def directives(cell: dict) -> dict[str, str]:
    """The `#| name: value` lines that a cell begins with."""
    found = {}
    for line in cell["source"].splitlines():
        if line.strip() and not line.startswith("#|"):
            break
        if match := re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", line):
            found[match[1]] = match[2].strip()
    return found


def exported(cell: dict) -> bool:
    return any(name.startswith("export") for name in directives(cell))


def where(path: Path, cell: dict) -> str:
    """The place of a fault: notebook, cell, and the cell's first line of code."""
    lines = [line for line in cell["source"].splitlines() if line.strip() and not line.startswith("#|")]
    return f"{path.name}, cell {cell['id']} ({lines[0][:60] if lines else 'empty'})"


def module_name(path: Path) -> str | None:
    """The module that a notebook compiles into."""
    return next((d["default_exp"] for d in map(directives, cells(path, "code")) if "default_exp" in d), None)


def number(path: Path) -> str:
    """The number of a chapter, by which chapters are ordered: 29 comes before 29a, and that before 30."""
    return path.name.split("_")[0]


MODULES = {name: number(p) for p in CHAPTERS if (name := module_name(p))}
by_module = pytest.mark.parametrize("name", MODULES, ids=lambda m: f"{MODULES[m]}_{m}")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


@cache
def cell_trees(path: Path) -> list[tuple[str, ast.Module]]:
    """Every code cell's syntax tree and place; lines for the shell or IPython are left out."""
    found = []
    for cell in cells(path, "code"):
        code = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in cell["source"].splitlines())
        found.append((where(path, cell), ast.parse(code)))
    return found


class Source(NamedTuple):
    """A piece of code: the module that it belongs to or is named like, its place, its tree."""

    module: str
    place: str
    tree: ast.Module


@cache
def sources() -> list[Source]:
    """The package's modules, then the cells of all notebooks that do not get into one."""
    found = [Source(m, f"{m}.py", tree(m)) for m in MODULES]
    for path in NOTEBOOKS:
        for cell, (place, parsed) in zip(cells(path, "code"), cell_trees(path), strict=True):
            if not exported(cell):
                found.append(Source(module_name(path) or path.stem, place, parsed))
    return found


def imports(node: ast.AST) -> Iterator[tuple[int, str, str | None, str]]:
    """(line, dotted module, imported name or None, name it is bound to) of every import; relative ones spelt out."""
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from ((n.lineno, a.name, None, a.asname or a.name.split(".")[0]) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            module = ".".join(filter(None, ["mainrun_nb" if n.level else "", n.module or ""]))
            yield from ((n.lineno, module, a.name, a.asname or a.name) for a in n.names)


def own_imports(node: ast.AST) -> set[str]:
    """The package's modules that any code below `node` imports, or reaches through the package."""
    found: set[str] = set()
    for _, module, name, _ in imports(node):
        package, _, rest = module.partition(".")
        if package == "mainrun_nb":
            found |= {rest.split(".")[0]} if rest else {name} if name in MODULES else set()
    for n in ast.walk(node):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "mainrun_nb":
            found |= {n.attr} & set(MODULES)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and (match := re.fullmatch(r"mainrun_nb\.(\w+)", n.value)):
            found |= {match[1]} & set(MODULES)  # import_module("mainrun_nb.name")
    return found


def top_imports(node: ast.AST) -> set[str]:
    """The packages imported while a module is imported: everywhere but inside functions."""
    found: set[str] = set()
    for n in ast.iter_child_nodes(node):
        if isinstance(n, ast.Import | ast.ImportFrom):
            found |= {module.split(".")[0] for _, module, _, _ in imports(n)}
        elif not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found |= top_imports(n)
    return found


# --- rule 1: only lower-numbered modules, no cycles, no import *, no @patch on our own classes, nothing private ---


@by_module
def test_a_module_imports_only_lower_numbered_modules(name):
    wrong = {m for m in own_imports(tree(name)) if MODULES.get(m, "99") >= MODULES[name]}
    assert not wrong, f"{name} ({MODULES[name]}) imports {sorted(wrong)}"


def test_there_are_no_cycles():
    """Follows from the rule above as long as no two chapters share a number."""
    numbers = [number(p) for p in CHAPTERS]
    assert len(set(numbers)) == len(numbers), f"two chapters with one number: {numbers}"
    assert not own_imports(ast.parse((PACKAGE / "__init__.py").read_text())), "__init__.py imports a module"


def test_no_star_imports():
    found = [f"{s.place}:{line}: from {module} import *" for s in sources() for line, module, name, _ in imports(s.tree) if name == "*"]
    assert not found, found


def patched(node: ast.FunctionDef) -> str:
    """What a function's decorators of fastcore's kind patch, as text."""
    found = []
    for d in node.decorator_list:
        called = d.func if isinstance(d, ast.Call) else d
        if re.search(r"\bpatch(_to|_property)?$", ast.unparse(called)):
            found += [ast.unparse(d), ast.unparse(node.args.args[0].annotation or ast.Constant("")) if node.args.args else ""]
    return " ".join(found)


def test_no_patching_of_our_own_classes():
    own = {n.name for m in MODULES for n in tree(m).body if isinstance(n, ast.ClassDef)}
    for s in sources():
        for n in ast.walk(s.tree):
            if isinstance(n, ast.FunctionDef):
                assert not own & set(re.findall(r"\w+", patched(n))), f"{s.place}:{n.lineno}: {n.name} patches {patched(n)}"


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore; `__init__` and IPython's `_repr_html_` are no private names."""
    outside = name.startswith("__") or (name.startswith("_repr_") and name.endswith("_"))
    return name.startswith("_") and not outside and name not in DOCUMENTED


def private_names(node: ast.AST) -> set[str]:
    """The private functions, classes, variables, arguments and attributes that some code defines."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(n.name)
        elif isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store):
            found.add(n.id if isinstance(n, ast.Name) else n.attr)
    return {name for name in found if is_private(name)}


OWN_PRIVATE = {m: private_names(tree(m)) for m in MODULES}


def dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """`a.b.c` with `a` replaced by the module that it is bound to; None where it is no such chain."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    inner = dotted(node.value, bound) if isinstance(node, ast.Attribute) else None
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else None


def up_to_private(path: str) -> str | None:
    """A dotted path up to and with its first private part; None where it has none."""
    parts = path.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if is_private(part)), None)


def private_uses(s: Source, bound: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line, interface) of every private name that some code imports or takes from anything but itself."""
    for line, module, name, _ in imports(s.tree):
        if found := up_to_private(".".join(filter(None, [module, name]))):
            yield line, found
    for n in ast.walk(s.tree):
        if isinstance(n, ast.Attribute) and is_private(n.attr):
            if not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")):
                yield n.lineno, up_to_private(dotted(n, bound) or n.attr) or n.attr
        elif isinstance(n, ast.Call) and ast.unparse(n.func) in ("getattr", "setattr", "hasattr", "delattr", "attrgetter") and n.args:
            name = n.args[min(1, len(n.args) - 1)]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield n.lineno, ".".join(filter(None, [dotted(n.args[0], bound), name.value]))


@cache
def private() -> list[tuple[Source, int, str]]:
    """Every use of a private name that its own module does not define."""
    bound: dict[str, dict[str, str]] = {}
    for s in sources():  # a notebook's cells share their names, and see those of the module that they compile into
        known = bound.setdefault(s.module, {})
        known |= {to: ".".join(filter(None, [module, name])) if name or "." not in module or to != module.split(".")[0] else to
                  for _, module, name, to in imports(s.tree)}  # fmt: skip
    here: dict[str, set[str]] = {}
    for s in sources():
        here.setdefault(s.module, set()).update(private_names(s.tree))
    return [(s, line, name) for s in sources() for line, name in private_uses(s, bound[s.module]) if name not in here[s.module]]


def owner(name: str) -> str | None:
    """The module of ours that a private name belongs to."""
    if name.startswith("mainrun_nb."):
        return name.split(".")[1]
    return next((m for m, names in OWN_PRIVATE.items() if name in names and name not in {n for _, n in PRIVATE}), None)


def test_no_private_name_of_another_module_of_ours():
    wrong = [f"{s.place}:{line}: {name} is private to {owner(name)}" for s, line, name in private() if owner(name)]
    assert not wrong, "\n".join(["", *wrong])


def test_private_interfaces_of_other_packages_only_where_the_list_says():
    wrong = [f"{s.place}:{line}: {name}" for s, line, name in private() if not owner(name) and (s.module, name) not in PRIVATE]
    assert not wrong, "\n".join(["private interfaces that PRIVATE does not name:", *wrong])


def test_the_list_of_private_interfaces_names_no_more_than_is_used():
    unused = PRIVATE.keys() - {(s.module, name) for s, _, name in private()}
    assert not unused and all(PRIVATE.values()), f"no longer used: {sorted(unused)}"


# --- rule 2: one notebook, one module, in step ---


def test_every_module_has_its_notebook_and_every_notebook_its_module():
    modules = {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")}
    assert modules == set(MODULES), f"stale or missing: {sorted(modules ^ set(MODULES))}"
    assert len(MODULES) == sum(module_name(p) is not None for p in CHAPTERS), "two notebooks export to one module"


@by_stem
def test_a_notebook_exports_to_its_own_module_only(path):
    for cell in cells(path, "code"):
        other = [d for name, d in directives(cell).items() if name.startswith("export") and d]
        assert not other, f"{where(path, cell)} exports to {other}"
        assert not exported(cell) or module_name(path), f"{where(path, cell)} exports, but the notebook has no default_exp"


def test_package_is_what_the_notebooks_export(tmp_path):
    for name in ("nbs", "mainrun_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for module in MODULES:
        (tmp_path / "mainrun_nb" / f"{module}.py").unlink(missing_ok=True)
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    names = sorted(p.name for p in PACKAGE.glob("*.py"))
    assert sorted(p.name for p in (tmp_path / "mainrun_nb").glob("*.py")) == names, "run nbdev-export and commit its result"
    _, differ, missing = filecmp.cmpfiles(PACKAGE, tmp_path / "mainrun_nb", names, shallow=False)
    assert not differ + missing, f"run nbdev-export and commit its result: {differ + missing}"


# --- rule 3: a light import, and one line where an optional package is missing ---


def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def optional() -> set[str]:
    """The packages of the extras, those for development and for the site aside."""
    kept = [k for k in settings() if k.endswith("_requirements") and k not in ("dev_requirements", "site_requirements")]
    text = "\n".join(settings()[k] for k in kept)
    return set(re.findall(r"^\s*([\w.-]+)", text, re.M))


def test_importing_the_package_is_instant_and_brings_no_torch():
    code = "import sys; before = len(sys.modules); import mainrun_nb; print('torch' in sys.modules, len(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert out[0] == "False" and int(out[1]) < 20


@by_module
def test_heavy_packages_are_imported_where_they_are_used(name):
    assert not top_imports(tree(name)) & (HEAVY | optional())


def test_importing_every_module_brings_no_heavy_package():
    code = "import sys, importlib\n" + "".join(f"importlib.import_module('mainrun_nb.{m}')\n" for m in MODULES)
    code += f"print(*sorted(set({sorted(HEAVY | optional())!r}) & sys.modules.keys()))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert not out


def our(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"mainrun_nb.{module}"), name)


def with_trackio(folder: Path) -> None:
    our("tracking", "check_tracking")(our("config", "load_config")(None, ["tracking.backends=[trackio]"]))


def with_transformers(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    our("models", "import_gpt2")(folder)


NEEDS: dict[str, Callable[[Path], object]] = {
    "ray": lambda folder: our("trials", "RayEngine")(1),
    "trackio": with_trackio,
    "transformers": with_transformers,
}


def test_every_optional_package_is_tried_missing():
    assert set(NEEDS) == optional()


@pytest.mark.parametrize("package", NEEDS)
def test_a_missing_package_gives_one_line_that_says_what_to_install(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(our("config", "InputError")) as caught:
        NEEDS[package](tmp_path)
    said = str(caught.value)
    assert "\n" not in said and package in said and "pip install" in said


# --- rule 4: clean notebooks ---

# Directories of one machine, progress bars and timings, keys.
PATHS = r"(?<![\w./])/(home|root|work|tmp|usr|Users|opt|mnt|private|var|srv)/[\w.-]+|[A-Z]:\\\\"
TIMINGS = r"\d\s?(it/s|s/it)\b|█|\d%\|| per loop\b|^(CPU times|Wall time):"
KEYS = r"\b(hf|gh[pousr]|github_pat|wandb_v1)_\w{16,}|\bsk-\w{16,}|\bAKIA[0-9A-Z]{16}\b"
CLOCKS = r"\btime\.(time|perf_counter|process_time|monotonic)|\b(perf_counter|process_time|monotonic)\(|%%?time|\btimeit\b"
FIGURES = {"image/png", "image/svg+xml", "image/jpeg"}


def output_texts(cell: dict) -> list[str]:
    """Every piece of text that a cell's outputs show."""
    found = []
    for out in cell.get("outputs", []):
        found.append("".join(out.get("text", "")))
        found += ["".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/") or k == "image/svg+xml"]
    return found


@by_stem
def test_notebook_is_clean(path):
    found = cells(path)
    assert len({c["id"] for c in found}) == len(found), "cell ids missing or not unique"
    for cell in found:
        place = where(path, cell)
        assert set(cell["metadata"]) <= {"tags"}, place
        assert not re.search(KEYS, cell["source"]), f"{place}: looks like a key"
        if cell["cell_type"] != "code":
            continue
        assert cell["execution_count"] is None, place
        for out in cell["outputs"]:
            assert out.get("name") != "stderr" and out["output_type"] != "error", f"{place}: an error or stderr in an output"
            assert out.get("execution_count") is None, place
        for text in output_texts(cell):
            assert not (leak := re.search(PATHS, text)), f"{place}: a path in an output: {leak and leak[0]}"
            assert not re.search(TIMINGS, text, re.M), f"{place}: a progress bar or timing in an output"
            assert not re.search(KEYS, text), f"{place}: looks like a key in an output"
        measures = not exported(cell) and re.search(CLOCKS, cell["source"])
        assert not (measures and any(output_texts(cell))), f"{place}: shows what a clock said"


@by_stem
def test_notebook_is_small(path):
    source = sum(len(c["source"].encode()) for c in cells(path))
    assert source <= SOURCE_BYTES, f"{path.name}: {source} bytes in its cells; {SOURCE_BYTES} are allowed"
    assert path.stat().st_size <= FILE_BYTES, f"{path.name}: {path.stat().st_size} bytes; {FILE_BYTES} are allowed"


def figures(cell: dict) -> int:
    return sum(bool(o.get("data", {}).keys() & FIGURES) for o in cell["outputs"])


@by_stem
def test_notebook_has_few_figures(path):
    count = sum(map(figures, cells(path, "code")))
    assert count <= MORE_FIGURES.get(path.stem, 4), f"{path.name} shows {count} figures"


@by_stem
def test_every_figure_has_alt_text(path):
    """Of a cell's output, by its directive `#| fig-alt: what the figure shows`; of a picture in prose, between the brackets."""
    wrong = [where(path, c) for c in cells(path, "code") if figures(c) and len(directives(c).get("fig-alt", "")) < 15]
    wrong += [where(path, c) for c in cells(path, "markdown") if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=)", c["source"])]
    assert not wrong, "\n".join(["figures without #| fig-alt:", *wrong])


@by_stem
def test_real_titles_only_in_slow_cells_and_cuda_in_cells_of_its_own(path):
    """However the variable is spelt: put together from pieces, in another case, or inside a configuration."""
    wrong = []
    for cell in cells(path, "code"):
        if exported(cell):
            continue
        plain = re.sub(r"[\s\"'+{}\\]", "", cell["source"])
        if re.search(r"hn_?titles", plain, re.I) and "slow" not in directives(cell):
            wrong.append(f"{where(path, cell)} names HN_TITLES and is not #| slow")
        if re.search(r"\.cuda\(|\.to\([^)]*cuda|torch\.device\(f?cuda|\bdevice=f?cuda", plain) and "cuda" not in directives(cell):
            wrong.append(f"{where(path, cell)} uses a CUDA device and is not #| cuda")
    assert not wrong, "\n".join(["", *wrong])


@by_chapter
def test_chapter_begins_with_a_heading_and_a_summary(path):
    lines = cells(path)[0]["source"].splitlines()
    assert lines[0].startswith("# ") and any(line.startswith("> ") for line in lines)


# --- rule 5: small functions, cells and modules; `__all__` holds what others use ---


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


@by_module
def test_functions_are_short(name):
    functions = [n for n in ast.walk(tree(name)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    wrong = [f"{name}.py:{n.lineno}: {n.name} has {lines_of(n)} lines" for n in functions if lines_of(n) > FUNCTION]
    assert not wrong, "\n".join(["", *wrong])


def is_settings(node: ast.stmt) -> bool:
    """Whether a statement is a dataclass without methods."""
    return (isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            and not any(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) for n in node.body))  # fmt: skip


def allowed_lines(body: list[ast.stmt]) -> float:
    """How long an exported cell may be: settings as long as they are, one class 140 lines, anything else 30."""
    if all(is_settings(n) for n in body):
        return float("inf")
    return CLASS if len(body) == 1 and isinstance(body[0], ast.ClassDef) else CELL


@by_chapter
def test_exported_cells_are_short(path):
    wrong = []
    for cell in filter(exported, cells(path, "code")):
        count = sum(not line.startswith("#|") for line in cell["source"].strip().splitlines())
        if count > (most := allowed_lines(ast.parse(cell["source"]).body)):
            wrong.append(f"{where(path, cell)} has {count} lines; {most} are allowed")
    assert not wrong, "\n".join(["", *wrong])


@by_module
def test_modules_are_short(name):
    count = len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert count <= MODULE, f"{name}.py has {count} lines; {MODULE} are allowed"


def listed(name: str) -> list[str]:
    """A module's `__all__`."""
    values = [n.value for n in tree(name).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return ast.literal_eval(values[0]) if values else []


def own_uses(parsed: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of everything of ours that some code imports, takes from an imported module, or names as a dotted text."""
    bound: dict[str, str] = {}
    for _, module, name, to in imports(parsed):
        package, _, rest = module.partition(".")
        if package == "mainrun_nb" and rest and name:
            yield rest, name
        elif package == "mainrun_nb":
            bound[to] = rest or name or ""
    for n in ast.walk(parsed):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in bound:
            yield bound[n.value.id], n.attr
        elif isinstance(n, ast.Attribute) and ast.unparse(n.value).startswith("mainrun_nb."):
            yield ast.unparse(n.value).removeprefix("mainrun_nb."), n.attr
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            yield from re.findall(r"\bmainrun_nb\.(\w+)\.(\w+)", n.value)
            for module, names in re.findall(r"\bfrom mainrun_nb\.(\w+) import ([\w, ]+)", n.value):
                yield from ((module, name) for name in re.findall(r"\w+", names))


@cache
def used() -> set[tuple[str, str]]:
    """(module, name) of everything of ours that is used outside its module and its notebook."""
    found: set[tuple[str, str]] = set()
    for m in MODULES:
        found |= {use for use in own_uses(tree(m)) if use[0] != m}
    for path in NOTEBOOKS:  # a notebook's cells share their names
        whole = ast.Module([n for _, parsed in cell_trees(path) for n in parsed.body], [])
        found |= {use for use in own_uses(whole) if use[0] != module_name(path)}
    scripts = [p for folder in ("tests", "benchmarks", ".github/scripts", "sweeps") for p in sorted((ROOT / folder).rglob("*.py"))]
    texts = [p.read_text(encoding="utf-8") for p in [*scripts, PACKAGE / "__main__.py"]]
    texts += re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    for text in texts:
        found |= set(own_uses(ast.parse(text)))
    found |= set(re.findall(r"= mainrun_nb\.(\w+):(\w+)", settings()["console_scripts"]))
    moved = importlib.import_module("mainrun_nb").MOVED
    return found | {(new, name) for names in moved.values() for name, new in names.items()}


def types_of(name: str, known: set[str]) -> set[str]:
    """The names in the annotations and bases of the functions and classes `known`: what they take, return and extend."""
    found: set[str] = set()
    for n in (n for n in tree(name).body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name in known):
        parts = [x for x in ast.walk(n) if isinstance(x, ast.arg | ast.AnnAssign | ast.FunctionDef)]
        said = [x.returns if isinstance(x, ast.FunctionDef) else x.annotation for x in parts] + getattr(n, "bases", [])
        found |= {y.id for x in said if x for y in ast.walk(x) if isinstance(y, ast.Name)}
    return found


@by_module
def test_all_names_what_others_use(name):
    fine = {n for m, n in used() if m == name} | INTERFACE.get(name, set())
    while more := types_of(name, fine) - fine:
        fine |= more
    wrong = set(listed(name)) - fine
    assert not wrong, f"{name}.__all__ lists what nothing outside uses (#| exporti, an underscore, or delete): {sorted(wrong)}"


@pytest.mark.parametrize("name", [m for m in INTERFACE if m in MODULES])
def test_the_public_interface_is_there(name):
    missing = [n for n in sorted(INTERFACE[name]) if not hasattr(importlib.import_module(f"mainrun_nb.{name}"), n)]
    assert not missing, f"{name} has no {missing}"


# --- rule 6: one version (that the built wheel has it too: tests/test_packaging.py) ---


def test_versions_agree():
    found = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    newest = re.search(r"^## (\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert found and cited and newest, "a version is missing"
    assert {found[1], cited[1], newest[1]} == {settings()["version"]}, "settings.ini, __init__.py, CITATION.cff, CHANGELOG.md"


def test_pyproject_repeats_settings_ini_rightly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={settings()['min_python']}" and project["name"] == settings()["lib_name"]


# --- README, generated from nbs/index.ipynb ---


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
