"""Every notebook runs from the first cell to the last: on synthetic titles always, its slow cells on request."""
import contextlib
import io
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
# One fresh process per notebook, forked from a server that has imported torch but computed nothing: isolated and quick.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "nbdev.test"])


def run_notebook(path: str, skip: list[str]) -> tuple[bool, str]:
    """Run one notebook but for the cells with a flag in `skip`; whether it passed, and what it said."""
    import nbdev.test as nbtest

    os.chdir(ROOT)
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
        passed, said = pool.submit(run_notebook, str(path), skip).result(timeout=1200)
    assert passed, said


def has_flag(path: Path, flag: str) -> bool:
    return bool(re.search(rf'"#\|\s*{flag}\b', path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    check(path, ["slow", "cuda"])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if has_flag(p, "slow")], ids=lambda p: p.stem)
def test_slow_cells_run(path):
    check(path, ["cuda"])


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if has_flag(p, "cuda")], ids=lambda p: p.stem)
def test_cuda_cells_run(path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(path, ["slow"])
