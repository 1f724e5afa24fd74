"""Every command in README is run by a test, or marked as needing a GPU."""
import csv
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Run by other tests, and why not here.
ELSEWHERE = {
    "make test": "this is it",
    "make lab": "tests/test_lab.py opens it in a browser",
    "make quickstart": "has a test of its own below",
    "pip install mainrun_nb-0.2.0-py3-none-any.whl": "tests/test_packaging.py installs the wheel",
    "mainrun-configs --copy sweeps": "tests/test_packaging.py copies them; in a checkout they are there",
    'pip install "mainrun_nb @ git+https://HOST/OWNER/NAME"': "the same from an address that only its owner knows",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """The lines of README's shell blocks, continued lines joined."""
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def bare(line: str) -> str:
    """A command without the comment behind it."""
    return re.split(r"\s+#\s", line)[0]


DOOR = 'PATH="$PWD/.venv/bin:$PATH"'  # whoever installed a wheel has the commands on the path
# What makes a long command a short one, appended to it.
SHORT = "hyperparams.num_titles=2000 hyperparams.max_steps=4 hyperparams.batch_size=16"
SHORTER = {"mainrun-train": "--test", "mainrun-sweep": f"{SHORT} --fast --trials 4", "papermill": f"-p overrides '{SHORT}'",
           "mainrun-eda": "hyperparams.num_titles=2000"}


def runnable() -> list[str]:
    """What is run here, with a small budget where the command as it stands would take minutes."""
    lines = [bare(line) for line in commands() if "for a GPU" not in line and bare(line) not in ELSEWHERE]
    return [f"{line} {SHORTER.get(line.split()[0], '')}".rstrip() for line in lines]


def test_every_command_is_known():
    for line in commands():
        known = re.match(r"(make \w+|mainrun-[a-z]+|papermill|torchrun|pip install|source \.venv/bin/activate|export \w+=\S+)(\s|$)", line)
        assert known, f"no test knows how to run: {line}"
        script = known[1] if known[1].startswith("mainrun-") else None
        assert script is None or f"    {script} = " in (ROOT / "settings.ini").read_text(), f"{script} is no console script"


def test_the_first_screen_says_two_commands():
    first = README.split("```")[1]
    assert [bare(line) for line in first.splitlines()[1:] if line] == ["make quickstart", "make test"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository whose .venv is a door to this environment, with the console scripts of this very code."""
    target = tmp_path_factory.mktemp("readme") / "mainrun_nb"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
    for name in ("nbs", "mainrun_nb", "sweeps"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, target / name)
    door = target / ".venv" / "bin"
    door.mkdir(parents=True)
    found = re.findall(r"^\s+(mainrun-[a-z]+) = ([\w.]+):(\w+)$", (ROOT / "settings.ini").read_text(), re.M)
    texts = {name: f"#!{sys.executable}\nimport sys\nfrom {module} import {f}\nsys.exit({f}())\n" for name, module, f in found}
    texts |= {name: f'#!/bin/sh\nexec {sys.executable} -m {name} "$@"\n' for name in ("papermill",)}
    texts["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    texts["activate"] = 'PATH="$PWD/.venv/bin:$PATH"\n'
    for name, text in texts.items():
        (door / name).write_text(text)
        (door / name).chmod((door / name).stat().st_mode | stat.S_IXUSR)
    (target / ".venv" / ".runtime").touch()
    (target / ".venv" / ".dev").touch()
    return target


def run(command: list[str], checkout: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    env["HN_TITLES"] = "titles.txt.gz"
    return subprocess.run(command, cwd=checkout, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_commands_run_as_they_stand(checkout):
    from mainrun_nb.synthetic import sample_titles

    titles = list(dict.fromkeys(sample_titles(4000, seed=1)))
    with gzip.open(checkout / "titles.txt.gz", "wt", encoding="utf-8") as f:
        f.write("\n".join(titles))
    with open(checkout / "titles.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["headline"], *([t] for t in titles)])
    done = run(["bash", "-euxc", "\n".join([DOOR, *runnable()])], checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "+ mainrun-train" in done.stderr


@pytest.mark.slow
def test_quickstart_ends_with_loss_floor_titles_and_picture(checkout):
    earlier = checkout / "runs/quickstart/config.yaml"  # as if it had been run before
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    done = run(["make", "quickstart"], checkout)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert re.search(r"validation loss\s+\d\.\d+", said) and re.search(r"floor.*\d\.\d+", said)
    titles = (checkout / "runs/quickstart/samples.txt").read_text(encoding="utf-8").splitlines()
    assert len(titles) == 5 and all(title in said for title in titles)
    assert "runs/quickstart/curves.png" in said and (checkout / "runs/quickstart/curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_the_python_runs_as_it_stands(checkout, code):
    if '"shared"' in code and not (checkout / "shared").exists():  # what the commands above it leave
        made = f"{DOOR}; mainrun-train --config quickstart --out r {SHORT}; mainrun-export r shared"
        assert run(["bash", "-euxc", made], checkout).returncode == 0
    done = run([sys.executable, "-c", code], checkout)
    assert done.returncode == 0, done.stderr[-3000:]
