"""What a training step may launch, and that it waits for nothing; an evaluation waits once, not at each batch. See README.md."""
from pathlib import Path

import pytest
import torch
from conftest import ALL
from memory import cases, compare
from pretended import library, watching
from steps import steps
from test_runs import MODELS, SMALL

from mainrun_nb.config import load_config
from mainrun_nb.device import pick_device
from mainrun_nb.evaluate import attention_distance, evaluate
from mainrun_nb.models import build_model

SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"
# Launches of an eager step, with a margin of 3 %.
LAUNCHES = {"base/baseline": 447, "base/baseline hyperparams.amp_bool=true": 598, "sota/small_first": 629, "sota/small": 1099,
            "sota/full": 1398, "base/sparsek": 5165}
COMPILED = {"base/baseline": 393, "sota/small_first": 484, "sota/small": 769, "sota/full": 894}  # likewise


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_step(name):
    file, *over = name.split()
    seen, _ = steps(load_config(SWEEPS / f"{file}.yaml", ["data.source=synthetic", "hyperparams.device=cuda", *over]))
    print(f"{name}: {seen.launches / 2:.0f} launches a step")
    assert not seen.waits, "the host waits for the device inside a step"
    assert 0 < seen.launches / 2 <= LAUNCHES[name]


@pytest.fixture
def counted_kernels(monkeypatch):
    """Triton's kernels are counted where they are started, and not compiled: most of the time of `torch.compile`, and nothing would run."""
    import torch._inductor.config

    class Counted:
        def __init__(self, compiler, name, *args, **more):
            self.name = name.encode()

        def run(self, *args, **more):
            library.pretended_launch(self.name)

    with torch._inductor.config.patch(compile_threads=1, force_disable_caches=True):
        from torch._inductor.async_compile import AsyncCompile

        torch._dynamo.reset()
        monkeypatch.setattr(AsyncCompile, "triton", lambda *args, **more: Counted(*args, **more))
        yield
        torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_launches_of_a_compiled_step(name, counted_kernels):
    over = ["data.source=synthetic", "hyperparams.device=cuda", "hyperparams.compile=true"]
    seen, _ = steps(load_config(SWEEPS / f"{name}.yaml", over))
    print(f"{name}, compiled: {seen.launches / 2:.0f} launches a step")
    assert any(kernel.startswith("triton_") for kernel in seen.kernels), "nothing was compiled"
    assert not seen.waits, "the host waits for the device inside a step"
    assert 0 < seen.launches / 2 <= COMPILED[name]


@pytest.mark.parametrize("name", ["causal", "unet", "fixed", "merged", "sparsek"])
def test_an_evaluation_waits_once(name):
    """At its end, for the whole stream's loss and for the challenge's, however many batches there are."""
    cfg = load_config(None, [*SMALL, *MODELS[name], "hyperparams.title_mask=true"])
    model = build_model(cfg, 600).to(pick_device("cuda"))
    found = {}
    for batches in (2, 8):
        ids = torch.ones(batches * 4 * 64 + 5, dtype=torch.long)
        for _ in range(2):  # the first time loads what is loaded lazily
            with watching() as seen:
                evaluate(model, ids, ["title"], 64, 4)
        found[batches] = sum(seen.waits.values())
    assert found[2] == found[8] <= 8  # copies and waits: the stream, the opening <eos>, and the two losses


def test_attention_distance_waits_at_its_end():
    model = build_model(load_config(None, SMALL), 600).to(pick_device("cuda"))
    found = {}
    for batches in (2, 8):
        for _ in range(2):
            with watching() as seen:
                attention_distance(model, torch.ones(batches * 4 * 64, dtype=torch.long), batch_size=4)
        found[batches] = sum(seen.waits.values())
    assert found[2] == found[8]


QUICK = ("base/quickstart", "base/baseline", "sota/small_control", "base/sparse")


@pytest.mark.parametrize("name", [name for name in cases() if ALL or name in QUICK])
def test_predicted_memory(name):
    """Within 7 % of the allocator's peak."""
    assert abs(compare(name)["error"]) < 0.07
