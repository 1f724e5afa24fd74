"""A wheel built from this repository installs, imports and answers outside the checkout."""
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

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
    package = [p for p in (ROOT / "mainrun_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
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
    assert {"mainrun_nb/py.typed", *(f"mainrun_nb/static/page.{kind}" for kind in ("html", "css", "js"))} <= set(names)
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
    [("quickstart", []), ("test", ["dev"]), ("lab", ["dev"]), ("chapter C=07", ["dev"]), ("bench", ["dev", "all"])],
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


def test_make_says_when_there_is_no_python(bare):
    done = subprocess.run(["make", "quickstart", "PYTHON="], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 2 and "No Python 3.11 or newer found" in done.stderr and not (bare / ".venv").exists()
