"""A training step can be captured as a CUDA graph: nothing in it waits, and what changes from step to step lies in memory that stays."""
import pytest
import torch
from pretended import watching
from test_runs import MODELS, OPTIMIZERS, OPTIONS, PRECISIONS, SMALL

from mainrun_nb.config import load_config
from mainrun_nb.data import Batches
from mainrun_nb.device import computing, pick_device
from mainrun_nb.optim import set_lr, train_step
from mainrun_nb.trainer import make_state, take_step

AUTO, MUON = PRECISIONS["auto"], ["hyperparams.optimizer=muon"]
CASES = {**{f"causal, {name}": [f"hyperparams.optimizer={name}", *AUTO] for name in OPTIMIZERS},
         **{f"{name}, muon": [*shape, *MUON, *AUTO] for name, shape in MODELS.items() if name != "causal"},
         **{f"causal, muon, {name}": [*MUON, *PRECISIONS[name]] for name in ("fp32", "fp16")},
         **{f"causal, muon, {name}": [*MUON, *AUTO, *more] for name, more in OPTIONS.items() if "tokenizer" not in more[0]}}


@pytest.mark.parametrize("name", CASES)
def test_a_step_can_be_captured(name):
    cfg = load_config(None, [*SMALL, *CASES[name]])
    hp, device = cfg.hyperparams, pick_device("cuda")
    ids = torch.randint(hp.vocab_size, (16 * hp.batch_size * hp.context_length + 1,))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with computing(hp, device), torch.cuda.stream(stream):
        state, batches = make_state(cfg, hp.vocab_size, device), Batches(ids, hp, device)
        for _ in range(3):  # what is made once is made here
            take_step(state, state.model, batches, slice(None), hp, 10)
        x, y = (part.clone() for part in batches[3])  # buffers that the graph reads
        with torch.cuda.graph(graph, stream=stream):
            train_step(state.model, state.optimizer, x, y, hp, state.scaler, state.ema)
        rates = [group["lr"].data_ptr() for group in state.optimizer.param_groups]
        with watching() as seen:
            set_lr(state.optimizer, 0.5)
            for buffer, part in zip((x, y), batches[4], strict=True):
                buffer.copy_(part)
            graph.replay()
    assert not seen.waits
    assert rates == [group["lr"].data_ptr() for group in state.optimizer.param_groups]
    random = 2  # the seed and the offset of the generator that dropout draws from
    assert seen.kernels["a graph"] == 1 and seen.launches <= 1 + len(rates) + 2 + random
