"""Training steps of a configuration on the pretended GPU: what they launch, wait for, and hold at most."""
import gc

import torch
from pretended import Seen, watching

from mainrun_nb import trainer
from mainrun_nb.config import Config
from mainrun_nb.data import Batches
from mainrun_nb.device import computing, pick_device


def steps(cfg: Config, n: int = 2) -> tuple[Seen, int]:
    """What `n` steps did, after some that do not count, and the allocator's peak in bytes."""
    hp, device = cfg.hyperparams, pick_device("cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()  # else only the first configuration of a process would pay for them
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(hp.vocab_size, (8 * hp.batch_size * hp.context_length + 1,))
    with computing(hp, device):
        state, batches = trainer.make_state(cfg, hp.vocab_size, device), Batches(ids, hp, device)
        state.model.train()
        held = torch.cuda.memory_allocated()
        for _ in range(2):
            trainer.take_step(state, state.model, batches, slice(None), hp, 1000)
        with watching() as seen:
            for _ in range(n):
                trainer.take_step(state, state.model, batches, slice(None), hp, 1000)
    assert held, "nothing lies on the device"
    return seen, torch.cuda.max_memory_allocated()
