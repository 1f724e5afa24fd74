"""What a training step may launch, and that it waits for nothing; an evaluation waits once, not at each batch. See README.md."""
from pathlib import Path

import pytest
import torch
from conftest import ALL
from memory import cases, compare
from pretended import watching
from steps import steps

from mainrun_nb.config import load_config
from mainrun_nb.device import pick_device
from mainrun_nb.evaluate import evaluate
from mainrun_nb.models import build_model

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
LAUNCHES = {"base/baseline": 440, "sota/small": 1365, "sota/full": 4285, "base/sparsek": 10_000}  # eager, with a margin of 3 %


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_step(name):
    seen, _ = steps(load_config(SWEEPS / f"{name}.yaml", ["data.source=synthetic", "hyperparams.device=cuda"]))
    print(f"{name}: {seen.launches / 2:.0f} launches a step")
    assert not seen.waits, "the host waits for the device inside a step"
    assert 0 < seen.launches / 2 <= LAUNCHES[name]


def test_an_evaluation_waits_once():
    cfg = load_config(None, ["model_configs.gpt.n_layer=1", "hyperparams.vocab_size=600"])
    model = build_model(cfg, 600).to(pick_device("cuda"))
    found = {}
    for batches in (2, 8):
        ids = torch.ones(batches * 4 * 128, dtype=torch.long)
        evaluate(model, ids, ["title"], 128, 4, challenge=False)
        with watching() as seen:
            evaluate(model, ids, ["title"], 128, 4, challenge=False)
        found[batches] = sum(seen.waits.values())
    assert found[2] == found[8] <= 6  # the titles' copy, the opening <eos>, and the one number at the end, each with its wait


QUICK = ("base/quickstart", "base/baseline", "sota/small_control", "base/sparse")


@pytest.mark.parametrize("name", [name for name in cases() if ALL or name in QUICK])
def test_predicted_memory(name):
    """Within 7 % of the allocator's peak."""
    assert abs(compare(name)["error"]) < 0.07
