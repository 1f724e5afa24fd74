"""Whole trainings over model, attention, optimizer and precision: no tensor on the wrong device, no host wait inside a step."""
import itertools
import json

import pytest
import torch
from conftest import ALL
from pretended import watching

from mainrun_nb import trainer
from mainrun_nb.config import load_config
from mainrun_nb.device import pick_device

SMALL = ["hyperparams.num_titles=600", "hyperparams.vocab_size=600", "hyperparams.context_length=64", "hyperparams.batch_size=8",
         "hyperparams.max_steps=4", "hyperparams.evals_per_epoch=1", "hyperparams.device=cuda", "tokenizer.kind=bpe",
         *(f"model_configs.{m}.{s}" for m in ("gpt", "unet_gpt") for s in ("d_model=64", "n_layer=2")), "model_configs.gpt.hidden_layer=64",
         "model_configs.unet_gpt.hidden_layer_list=[64,32]", *(f"attn_configs.{a}.n_head=4" for a in ("causal", "sparse", "sparsek")),
         "attn_configs.sparsek.k=8", "attn_configs.sparsek.window=8", "attn_configs.sparsek.chunk=16",
         "attn_configs.sparse.local_attn_ctx=16", "attn_configs.sparse.sparseblocksize=16", "attn_configs.sparse.num_verts=2"]
SPARSE = "model_configs.gpt.attention_layer=sparse"
MODELS = {
    "causal": [], "bottleneck": ["attn_configs.causal.intermediate_dim=32"], "unet": ["hyperparams.model_architecture=unet_gpt"],
    "fixed": [SPARSE], "strided": [SPARSE, "attn_configs.sparse.attn_type=strided"],
    "merged": [SPARSE, "attn_configs.sparse.attn_type=strided", "attn_configs.sparse.merged=true"],
    "local": [SPARSE, "attn_configs.sparse.attn_type=local"], "sparsek": ["model_configs.gpt.attention_layer=sparsek"],
}
OPTIMIZERS = ["sgd", "adam", "adamw", "adagrad", "rmsprop", "adafactor", "muon"]
PRECISIONS = {"fp32": [], "auto": ["hyperparams.amp_bool=true"], "fp16": ["hyperparams.amp_bool=true", "hyperparams.amp_dtype=fp16"]}
OPTIONS = {
    "title mask": ["hyperparams.title_mask=true"], "whole titles": ["hyperparams.title_mask=true", "hyperparams.rows=titles"],
    "rope, gate": ["model_configs.gpt.position=rope", "model_configs.gpt.output_gate=true", "model_configs.gpt.layer_scale=0.1"],
    "restarting": ["hyperparams.title_mask=true", "model_configs.gpt.restart_positions=true"], "shuffled": ["hyperparams.shuffle=true"],
    "r_drop": ["hyperparams.r_drop=2"], "ema": ["hyperparams.ema=0.99"], "accumulated": ["hyperparams.grad_accum=2"],
    "checkpointing": ["hyperparams.checkpoint_activations=true"], "whole logits": ["hyperparams.loss_chunk=0"],
    "small chunks": ["hyperparams.loss_chunk=64"], "no clipping": ["hyperparams.grad_clip=0"], "no tf32": ["hyperparams.tf32=false"],
    "deterministic": ["hyperparams.deterministic=true"], "momentum": ["hyperparams.optimizer=sgd", "hyperparams.momentum=0.9"],
    "shortcuts": ["hyperparams.title_mask=true", "model_configs.gpt.token_shift=true", "model_configs.gpt.embedding_skips=true"],
    "rare ids": ["model_configs.gpt.embedding_cutoff=200", "model_configs.gpt.embedding_rank=16"],
    "cased": ["tokenizer.kind=cased"], "unigram": ["tokenizer.kind=unigram"], "challenge": ["tokenizer.kind=challenge"],
    "rmsnorm, swiglu": ["model_configs.gpt.norm=rmsnorm", "model_configs.gpt.activation_function=swiglu", "model_configs.gpt.bias=false"],
    "post-norm, untied": ["model_configs.gpt.norm_type=post", "model_configs.gpt.tied=false"],
}


def grid() -> dict[str, list[str]]:
    """Name -> overrides: everything with everything, or each value of each with the usual ones of the others."""
    cases = {}
    for (model, shape), optimizer, (precision, amp) in itertools.product(MODELS.items(), OPTIMIZERS, PRECISIONS.items()):
        usual = (model == "causal") + (optimizer == "adamw") + (precision == "auto")
        if usual >= (0 if ALL and torch.cuda.get_device_capability() == (9, 0) else 2):
            cases[f"{model}, {optimizer}, {precision}"] = [*shape, f"hyperparams.optimizer={optimizer}", *amp]
    muon = ["hyperparams.optimizer=muon", *PRECISIONS["auto"]]
    return cases | {name: [*muon, *extra] for name, extra in OPTIONS.items()}


@pytest.fixture
def unwaited(monkeypatch):
    """The host's waits and copies inside the steps of a run, but the first, which loads what is loaded lazily."""
    found, step = [], trainer.take_step

    def watched(state, *args):
        with watching() as seen:
            taken = step(state, *args)
        if taken.step > 1:
            found.extend(seen.waits)
        return taken

    monkeypatch.setattr(trainer, "take_step", watched)
    return found


@pytest.mark.parametrize("name", grid())
def test_a_run_finishes_and_never_waits_in_a_step(name, titles, tmp_path, no_numbers, unwaited):
    cfg = load_config(None, [*SMALL, f"data.source={titles}", *grid()[name]])
    result = trainer.train(cfg, tmp_path, progress=False).metrics
    assert result["steps"] == 4 and result["device"]["device"] == "cuda" and json.loads((tmp_path / "result.json").read_text())
    assert not unwaited


def test_a_run_goes_on_from_its_checkpoint(titles, tmp_path, no_numbers):
    cfg = load_config(None, [*SMALL, f"data.source={titles}", "hyperparams.save_every=2", "hyperparams.ema=0.9", *PRECISIONS["fp16"]])
    stop = lambda event: 1 / 0 if event["event"] == "training_step" and event["step"] == 4 else None  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        trainer.train(cfg, tmp_path, progress=False, on_event=stop)
    assert trainer.train(cfg, tmp_path, resume=True, progress=False).metrics["steps"] == 4


@pytest.mark.skipif(not ALL, reason="minutes of compiling: --all")
def test_a_compiled_run(titles, tmp_path, no_numbers):
    cfg = load_config(None, [*SMALL, f"data.source={titles}", "hyperparams.compile=true", *PRECISIONS["auto"]])
    assert trainer.train(cfg, tmp_path, progress=False).metrics["steps"] == 4


def test_the_card_is_the_pretended_one():
    assert pick_device("auto") == torch.device("cuda", 0) and pick_device("cuda").type == "cuda"
