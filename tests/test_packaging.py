"""A wheel built from this repository installs, imports and answers outside the checkout."""
import configparser
import csv
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the files that git knows, built without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    package = [p for name in ("mainrun_nb", "sweeps") for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    package = [p for p in package if not p.is_relative_to(ROOT / "sweeps/runs")]
    for path in [*(ROOT / n for n in names), *package]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    subprocess.run([*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, source], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh folder with the wheel in it, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    return target


def outside(installed: Path, code: str) -> str:
    """What a Python process prints that sees the installed wheel, from a folder outside the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=installed.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def scripts(settings) -> dict[str, str]:
    return dict(re.split(r"\s*=\s*", line.strip()) for line in settings["console_scripts"].splitlines() if line.strip())


def test_the_wheel_carries_the_package_and_nothing_else(wheel, settings):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"mainrun_nb", f"mainrun_nb-{settings['version']}.dist-info"}
    static = {f"mainrun_nb/static/{name}" for name in ("card.md", "page.html", "page.css", "page.js")}
    assert {"mainrun_nb/py.typed", *static} <= set(names)
    carried = {str(p.relative_to(ROOT)) for kind in ("base", "search", "assessed", "sota") for p in (ROOT / "sweeps" / kind).glob("*.yaml")}
    carried |= {"sweeps/trial.ipynb", "sweeps/report.ipynb"}
    assert {n.removeprefix("mainrun_nb/") for n in names if n.startswith("mainrun_nb/sweeps/")} == carried
    assert any(n.endswith("licenses/LICENSE") for n in names)
    modules = {f"mainrun_nb/{p.name}" for p in (ROOT / "mainrun_nb").glob("*.py")}
    assert modules <= set(names)


def test_the_wheels_metadata_is_that_of_settings_ini(wheel, settings):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    meta = HeaderParser().parsestr(archive.read(name).decode())
    assert (meta["Name"], meta["Version"]) == (settings["lib_name"], settings["version"])
    assert meta["License-Expression"] == settings["license"] and meta["Requires-Python"] == f">={settings['min_python']}"
    assert {"ray", "trackio", "bench", "dev", "all"} <= set(meta.get_all("Provides-Extra"))
    required = [r for r in meta.get_all("Requires-Dist") if "extra" not in r]
    assert len(required) == len([line for line in settings["requirements"].splitlines() if line.strip()])
    assert meta.get_payload().startswith("# mainrun_nb")


def test_it_imports_outside_the_checkout(installed, settings):
    where, version = outside(installed, "import mainrun_nb; print(mainrun_nb.__file__, mainrun_nb.__version__)").rsplit(" ", 1)
    assert Path(where).is_relative_to(installed) and version == settings["version"]


def test_every_console_script_answers_help(installed, settings):
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    for name in scripts(settings):
        done = subprocess.run([installed / "bin" / name, "--help"], cwd=installed.parent, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and f"usage: {name} " in done.stdout, done.stderr


def test_what_there_is_and_no_checkout_needed(installed, settings):
    """`python -m mainrun_nb` names every command; the shipped files are those of the wheel."""
    said = outside(installed, "import runpy, sys; sys.argv = ['x']; runpy.run_module('mainrun_nb', run_name='__main__', alter_sys=True)")
    assert set(re.findall(r"^  (mainrun-\w+)", said, re.M)) == set(scripts(settings)) and "exit codes:" in said
    said = outside(installed, "from mainrun_nb.config import shipped, load_config; load_config('quickstart'); print(*shipped().values())")
    assert all(Path(path).is_relative_to(installed / "mainrun_nb" / "sweeps") for path in said.split())


# --- a stranger: nothing but the wheel, a CSV of their own and an empty folder ---


class Stranger(NamedTuple):
    home: Path
    installed: Path

    def says(self, line: str, stdin: str | None = None, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        """What a line in this folder's shell prints."""
        known = {k: v for k, v in os.environ.items() if k not in ("HN_TITLES", "VIRTUAL_ENV")}
        known |= {"PYTHONPATH": str(self.installed), "PYTHONSAFEPATH": "1", "PATH": f"{self.installed / 'bin'}:{os.environ['PATH']}", **env}
        done = subprocess.run(["bash", "-c", line], cwd=self.home, env=known, input=stdin, capture_output=True, text=True, timeout=600)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-3000:]
        return done


OWN = "data.source=titles.csv data.column=headline"
SHORT = "hyperparams.num_titles=1200 hyperparams.vocab_size=500 hyperparams.max_steps=6 hyperparams.evals_per_epoch=1"


@pytest.fixture(scope="module")
def stranger(installed, tmp_path_factory) -> Stranger:
    """A folder with a CSV in it."""
    from mainrun_nb.synthetic import sample_titles

    home = tmp_path_factory.mktemp("stranger")
    with open(home / "titles.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["when", "headline"], *(["2026", t] for t in dict.fromkeys(sample_titles(2500, seed=3)))])
    return Stranger(home, installed)


@pytest.fixture(scope="module")
def trained(stranger) -> Stranger:
    done = stranger.says(f"mainrun-train --config quickstart --out runs/first {OWN} {SHORT}")
    assert json.loads(done.stdout.splitlines()[-1])["data"]["n_titles"] == 1200 and done.stdout.count("\n") == 1
    for step in ("mainrun-generate runs/first --chat", "mainrun-report runs/first", "mainrun-export runs/first runs/first-export"):
        assert step in done.stderr
    return stranger


@pytest.mark.slow
def test_a_stranger_trains_and_evaluates(trained):
    result = json.loads((trained.home / "runs/first/result.json").read_text())
    assert json.loads(trained.says("mainrun-eval runs/first").stdout)["val/loss"] == result["val/loss"]
    assert result["commit"] is None
    trained.says("mainrun-check runs/first")


@pytest.mark.slow
def test_a_stranger_sweeps_with_notebooks_and_compares(trained):
    (trained.home / "search.yaml").write_text("method: grid\nmetric: {name: val/loss, goal: minimize}\n"
                                              "parameters: {hyperparams.lr: {values: [1.0e-3, 3.0e-3]}}\n")
    done = trained.says(f"mainrun-sweep search.yaml --config quickstart --out runs/sweep {OWN} {SHORT}")
    assert "next:" in done.stderr and "mainrun-report runs/sweep" in done.stderr
    assert len(list(trained.home.glob("runs/sweep/trial-*/out.ipynb"))) == 2
    page = Path(trained.says("mainrun-report runs/first runs/sweep --out page.html").stdout.strip())
    assert page.name == "page.html" and "<html" in page.read_text(encoding="utf-8")[:200] and page.with_suffix(".ipynb").exists()
    assert "hyperparams.lr" in trained.says("mainrun-report runs/sweep/trial-0000/run runs/sweep/trial-0001/run --diff").stdout


@pytest.mark.slow
def test_a_stranger_generates_and_exports(trained):
    assert len(trained.says('mainrun-generate runs/first --prompt "Show HN:" --n 3').stdout.splitlines()) == 3
    lines = trained.says("mainrun-generate runs/first --chat", stdin="Show HN:\nAsk HN:\n").stdout.splitlines()
    assert [line[:3] for line in lines] == ["Sho", "Ask"]
    assert trained.says("mainrun-export runs/first shared").stdout == "shared\n"
    one, other = (trained.says(f"mainrun-generate {place} --seed 5").stdout for place in ("runs/first", "shared"))
    assert one == other and len(one.splitlines()) == 5
    assert "`titles.csv`" in (trained.home / "shared/README.md").read_text()


@pytest.mark.slow
def test_a_stranger_copies_what_there_is_and_edits_it(stranger):
    listed = [line.split()[0] for line in stranger.says("mainrun-configs").stdout.splitlines()]
    assert {"base/quickstart", "sota/small", "trial.ipynb", "report.ipynb"} <= set(listed)
    assert stranger.says("mainrun-configs quickstart").stdout == (ROOT / "sweeps/base/quickstart.yaml").read_text()
    stranger.says("mkdir edited; cd edited; mainrun-configs quickstart --copy sweeps")
    (stranger.home / "edited/sweeps/base/quickstart.yaml").write_text("hyperparams: {bath_size: 3}")
    assert "bath_size" in stranger.says("cd edited; mainrun-memory --config quickstart", code=2).stderr
    assert "nothing was copied" in stranger.says("cd edited; mainrun-configs quickstart --copy sweeps", code=2).stderr
    for line, words in {"mainrun-configs quickstrat": "Did you mean 'quickstart'?",
                        "mainrun-train --config small --out x": "say base/small or sota/small",
                        "mainrun-train --config sweeps/base/quickstart.yaml --out x": "Did you mean 'base/quickstart'?",
                        "mainrun-sweep quickstart --config quickstart --out x": "quickstart: no such file"}.items():
        said = stranger.says(line, code=2).stderr
        assert words in said and said.count("\n") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize(("line", "word"), [
    ("mainrun-train --config quicks", "quickstart"), ("mainrun-train --config sota/sm", "sota/small"), ("mainrun-train --re", "--resume"),
    ("mainrun-sweep search/", "search/"), ("mainrun-generate x --which l", "last"),
    ("mainrun-train hyperparams.sched", "hyperparams.scheduler="),
    ("mainrun-train --config quickstart hyperparams.optimizer=ada", "adamw"), ("mainrun-eval run", "runs/")])
def test_the_tab_key_offers(line, word, stranger):
    (stranger.home / "runs").mkdir(exist_ok=True)
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": "offered",
             "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_COMP_WORDBREAKS": "\"'><=;|&(:"}
    stranger.says(line.split()[0], **asked)
    offered = (stranger.home / "offered").read_text().splitlines()
    assert any(word in offer for offer in offered), offered


# --- constraints.txt ---


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def test_constraints_pin_every_requirement_exactly_and_within_its_range(settings):
    from packaging.requirements import Requirement

    pins = constraints()
    for key in (k for k in settings if k.endswith("requirements")):
        for req in (Requirement(line) for line in settings[key].splitlines() if line.strip()):
            name = re.sub(r"[-_.]+", "-", req.name).lower()
            assert name in pins and req.specifier.contains(pins[name], prereleases=True), f"{req} and {pins.get(name)}"
    assert all(re.fullmatch(r"[\w.]+", v) for v in pins.values()), "a local or open version"


def required(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """What an installed distribution requires here, and what that requires; what is not installed is an extra left out."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [(name, extras)]
    while todo:
        name, extras = todo.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for req in map(Requirement, lines):
            key = re.sub(r"[-_.]+", "-", req.name).lower()
            if key not in found and any(req.marker is None or req.marker.evaluate({"extra": e}) for e in extras | {""}):
                found.add(key)
                todo.append((req.name, frozenset(req.extras)))
    return found


def test_constraints_pin_whatever_the_requirements_bring_along(settings):
    """Else two installations from the same constraints can differ. CUDA's libraries come with their build of torch, pinned by it."""
    from packaging.requirements import Requirement

    lines = [line for k in settings if k.endswith("requirements") for line in settings[k].splitlines() if line.strip()]
    needed = set().union(*(required(r.name, frozenset(r.extras)) | {r.name.lower()} for r in map(Requirement, lines)))
    loose = {n for n in needed if not re.match(r"(nvidia|cuda)-|triton$|pip$", n)} - constraints().keys()
    installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in importlib.metadata.distributions()}
    assert not loose & installed, f"constraints.txt does not pin {sorted(loose & installed)}"


def test_every_pin_can_be_installed_with_the_first_python_that_is_promised():
    """Debian 12 has 3.11.2, and a version that asks for 3.11.5 ends its installation in a conflict that names another package."""
    from packaging.specifiers import SpecifierSet

    dists = [(re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(), d) for d in importlib.metadata.distributions()]
    asks = {name: d.metadata["Requires-Python"] or "" for name, d in dists if constraints().get(name) == d.version}
    assert len(asks) > 50 and not {name: asked for name, asked in asks.items() if not SpecifierSet(asked).contains("3.11.0")}


def test_constraints_pin_what_the_cuda_build_of_torch_leaves_open():
    """It names exact versions of CUDA's libraries but for these three, which the image of the GPU runner would take as they come."""
    assert {"cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink"} <= constraints().keys()


# --- make, on a machine that has nothing yet ---


@pytest.fixture
def bare(tmp_path) -> Path:
    """A checkout without .venv, and a folder of pretended interpreters that comes first on the path."""
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    return tmp_path


def with_tools(bare: Path) -> dict[str, str]:
    """An environment for make on a checkout whose .venv is complete."""
    (bare / ".venv/bin").mkdir(parents=True, exist_ok=True)
    for name in ("bin/python", ".runtime", ".dev"):
        (bare / ".venv" / name).touch()
    return dict(os.environ)


def make(bare: Path, *args: str, pythons: dict[str, int] | None = None) -> subprocess.CompletedProcess:
    """make with interpreters that exit with the given codes when they are asked for their version."""
    for name, code in (pythons or {}).items():
        (bare / "bin" / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (bare / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{bare / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(["make", "--just-print", *args], cwd=bare, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "extras"),
    [("quickstart", []), ("test", ["dev"]), ("lab", ["dev"]), ("chapter C=07", ["dev"]), ("site", ["site"]), ("bench", ["dev", "all"])],
)
def test_make_installs_what_its_target_needs(bare, target, extras):
    said = make(bare, *target.split()).stdout
    assert "-m venv .venv" in said and "install --quiet --disable-pip-version-check -c constraints.txt -e .\n" in said
    assert re.findall(r"-c constraints\.txt -e '\.\[(\w+)\]'", said) == extras


def test_make_chapter_tests_one_chapter(bare):
    assert '-k "07_ or ' in make(bare, "chapter", "C=07").stdout
    done = subprocess.run(["make", "chapter"], cwd=bare, capture_output=True, text=True, env=with_tools(bare))
    assert done.returncode == 2 and "make chapter C=07" in done.stderr


def test_make_does_not_install_twice_and_installs_again_after_a_change(bare):
    with_tools(bare)
    assert "install" not in make(bare, "quickstart").stdout
    os.utime(bare / "constraints.txt", (2e9, 2e9))
    assert "install" in make(bare, "quickstart").stdout


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": 0, "python3.13": 0}, "python3"),
        ({"python3": 1, "python3.13": 127, "python3.12": 0, "python3.11": 0}, "python3.12"),
    ],
)
def test_make_takes_the_first_python_that_works(bare, pythons, chosen):
    assert f"\n{chosen} -m venv .venv" in "\n" + make(bare, "quickstart", pythons=pythons).stdout


def test_make_site_says_what_is_missing_and_forgets_what_it_built(bare):
    env = with_tools(bare)
    (bare / "bin/bash").symlink_to("/bin/bash")
    done = subprocess.run(["/usr/bin/make", "site"], cwd=bare, capture_output=True, text=True, env={**env, "PATH": str(bare / "bin")})
    assert done.returncode == 2 and "No npm found" in done.stderr and not (bare / ".venv/.site").exists()


@pytest.mark.parametrize("python, found", [("", "found."), ("./old", "found: ./old is older"), ("./none", "found: ./none is older or")])
@pytest.mark.parametrize("target", ["quickstart", "test-cuda"])
def test_make_says_when_there_is_no_python(bare, python, found, target):
    (bare / "old").write_text("#!/bin/sh\nexit 1\n")
    (bare / "old").chmod(0o755)
    done = subprocess.run(["make", target, f"PYTHON={python}"], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 2 and f"No Python 3.11 or newer {found}" in done.stderr and not list(bare.glob(".venv*"))
