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
    for path in [ROOT / n for n in names] + [*(ROOT / "mainrun_nb").glob("*.py"), ROOT / "mainrun_nb" / "py.typed"]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
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
    assert "mainrun_nb/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)
    modules = {f"mainrun_nb/{p.name}" for p in (ROOT / "mainrun_nb").glob("*.py")}
    assert modules <= set(names)


def test_the_wheels_metadata_is_that_of_settings_ini(wheel, settings):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    meta = HeaderParser().parsestr(archive.read(name).decode())
    assert (meta["Name"], meta["Version"]) == (settings["lib_name"], settings["version"])
    assert meta["License-Expression"] == settings["license"] and meta["Requires-Python"] == f">={settings['min_python']}"
    assert {"ray", "trackio", "plotly", "bench", "dev", "all"} <= set(meta.get_all("Provides-Extra"))
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


def test_what_runs_here_is_what_constraints_say():
    """A difference is no fault of the package, but its tests then say nothing about what CI installs."""
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.split("+")[0] for d in importlib.metadata.distributions()}
    differ = {n: (found[n], v) for n, v in constraints().items() if found.get(n, v) != v}
    if differ:
        pytest.skip(f"other versions here than in constraints.txt: {differ}")
