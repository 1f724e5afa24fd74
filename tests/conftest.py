"""What every test shares: few threads, a clean environment, real titles where there are any, and slow tests only on request."""
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Before torch is imported: functional tests gain nothing from more threads, and lose much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):  # what `make test` was told is not for the makes that tests start
    os.environ.pop(name, None)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked slow, unless MAINRUN_SLOW=1 is set or the -m expression speaks of slow."""
    if os.environ.get("MAINRUN_SLOW", "0") not in ("", "0") or "slow" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="slow: set MAINRUN_SLOW=1 or say -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked real where there are no real titles."""
    if "real" in item.keywords:
        _real_titles()


def _real_titles() -> Path:
    path = os.environ.get("HN_TITLES", "")
    if not path:
        pytest.skip("needs real titles: set HN_TITLES to a file of titles, one a line (.txt or .txt.gz)")
    found = Path(path) if Path(path).is_absolute() else ROOT / path
    if not found.is_file():
        pytest.fail(f"HN_TITLES names no file: {path}")
    return found


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def hn_titles() -> Path:
    """The file of real titles that HN_TITLES names; skips the test where it is unset."""
    return _real_titles()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A function that gives a script of benchmarks/ as a module."""
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")  # for what the scripts share
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module
    return load
