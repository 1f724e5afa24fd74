"""What the tests on a pretended GPU share: they are collected only there, and no number that a kernel would have computed counts."""
import os

import pytest
from pretended import HERE

if not HERE:
    collect_ignore_glob = ["test_*.py"]  # an ordinary `pytest`: see README.md

ALL = bool(os.environ.get("MAINRUN_CUDA_ALL"))


def pytest_configure(config: pytest.Config) -> None:
    """cuDNN is not pretended; where it would be chosen, PyTorch's own attention kernels are."""
    if HERE:
        import torch

        torch.backends.cuda.enable_cudnn_sdp(False)


@pytest.fixture(scope="session")
def titles(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of titles: those of the grammar, but not as the synthetic source, whose floor no pretended loss respects."""
    from mainrun_nb.synthetic import sample_titles

    path = tmp_path_factory.mktemp("data") / "titles.txt"
    path.write_text("\n".join(dict.fromkeys(sample_titles(800, seed=0))) + "\n")
    return str(path)


@pytest.fixture
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels compute nothing, so losses and tokens are whatever lay in memory: give them values that a run goes on with.

    And what takes most of so small a run, its picture and the speed of the machine, is left out.
    """
    from mainrun_nb import runtime, trainer
    from mainrun_nb.tokenizer import Tokenizer

    read, measure = trainer.read_steps, trainer.validation_metrics
    fine = {"ok": True, "train/loss": 1.0, "grad_norm": 1.0}
    monkeypatch.setattr(trainer, "read_steps", lambda taken: [{**row, **fine} for row in read(taken)])
    monkeypatch.setattr(trainer, "validation_metrics", lambda *args, **more: {**measure(*args, **more), "val/loss": 1.0})
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "title")
    monkeypatch.setattr(trainer, "save_curves", lambda run_dir: (run_dir / "curves.png").write_bytes(b"a picture"))
    monkeypatch.setattr(runtime, "matrix_rate", lambda device, dtype: 1e12)
