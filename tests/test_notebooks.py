"""Every notebook runs from the first cell to the last: on synthetic titles always, its slow cells on request.

A cell that needs an optional package begins with the package's name as a directive (`#| ray`), and is left out where that is missing.
"""
import contextlib
import faulthandler
import io
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
OPTIONAL = ["ray", "trackio", "transformers"]
MISSING = [name for name in OPTIONAL if find_spec(name) is None]
# One fresh process per notebook, forked from a server that has imported torch but computed nothing: isolated and quick.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "nbdev.test"])


def run_notebook(path: str, skip: list[str]) -> tuple[bool, str]:
    """Run one notebook but for the cells with a flag in `skip`; whether it passed, and what it said."""
    import nbdev.test as nbtest

    os.chdir(ROOT)
    if "slow" in skip:  # a cell that needs real titles and is not marked slow has none
        os.environ.pop("HN_TITLES", None)
    sys.modules.update(dict.fromkeys(set(skip) & set(OPTIONAL)))  # as if they were not installed
    faulthandler.dump_traceback_later(900, exit=True, file=sys.__stderr__)  # a cell that waits for ever; the pool would wait with it
    said = sys.__stderr__ = io.StringIO()  # the traceback of a failing cell goes to sys.__stderr__
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            passed = nbtest.test_nb(Path(path), skip_flags=skip, do_print=False)[0]
        except Exception:
            passed = False
            traceback.print_exc()
    return passed, said.getvalue()


def check(path: Path, skip: list[str]) -> None:
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        passed, said = pool.submit(run_notebook, str(path), skip).result()
    assert passed, said


def has_flag(path: Path, *flags: str) -> bool:
    return bool(re.search(rf'"#\|\s*({"|".join(flags)})\b', path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    check(path, ["slow", "cuda", *MISSING])


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if has_flag(p, *OPTIONAL)], ids=lambda p: p.stem)
def test_notebook_runs_without_optional_packages(path):
    check(path, ["slow", "cuda", *OPTIONAL])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if has_flag(p, "slow")], ids=lambda p: p.stem)
def test_slow_cells_run(path):
    check(path, ["cuda", *MISSING])


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if has_flag(p, "cuda")], ids=lambda p: p.stem)
def test_cuda_cells_run(path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(path, ["slow", *MISSING])
