"""Memory math: the prediction against the real allocator, units, and what happens when a run does not fit."""
import importlib.util
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from mainrun_nb import memory
from mainrun_nb.cli import memory_cli
from mainrun_nb.config import InputError, load_config
from mainrun_nb.gpt import CASE_WIDTH
from mainrun_nb.memory import check_budget, estimate_memory, explain, inference_memory, measured_peak, memory_budget, simulate_step
from mainrun_nb.models import build_model
from mainrun_nb.sweep import examine

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("bench_memory", ROOT / "benchmarks/memory.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

ONE, TWO = ([*bench.SHAPE, f"model_configs.gpt.n_layer={n}"] for n in (1, 2))  # blocks
CASES = ["causal, adafactor", "causal, muon", "bottleneck, bf16", "fixed, plain", "strided, title mask", "local, checkpointing",
         "sparsek, accumulate", "sparsek, checkpointing", "unet, r_drop"]


@pytest.mark.parametrize("name", CASES)
def test_prediction(name):
    """Within 1 % of the allocator's peak; a small vocabulary keeps this quick. Rows long enough for SparseK to select."""
    cfg = load_config(overrides=[*bench.grid()[name][0], "model_configs.gpt.n_layer=2", "hyperparams.context_length=96"])
    assert simulate_step(cfg, 4000)[0]["total"] == pytest.approx(measured_peak(cfg, 4000), rel=0.01)


def test_tied_weights_and_buffers_once():
    tied, untied = (simulate_step(load_config(overrides=[*TWO, f"model_configs.gpt.tied={t}"]), 3000)[0] for t in ("true", "false"))
    assert untied["parameters"] - tied["parameters"] == 4 * 3000 * 128


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", 0), ("adagrad", 4), ("rmsprop", 4), ("adam", 8), ("adamw", 8)])
def test_optimizer_state(optimizer, state):
    """The formula's bytes per parameter are the simulation's, apart from the optimizers' step counters."""
    cfg = load_config(overrides=[*TWO, f"hyperparams.optimizer={optimizer}"])
    parts = simulate_step(cfg, 3000)[0]
    assert parts["optimizer"] == pytest.approx(state / 4 * parts["parameters"], abs=1000)
    assert explain(cfg, 3000)["optimizer"] == state / 4 * parts["parameters"]


def test_units():
    """GB are 10^9 bytes, everywhere."""
    cfg = load_config(overrides=[*TWO, "hyperparams.memory_budget_gb=1.5"])
    assert memory_budget(cfg) == 1_500_000_000
    line = next(row for row in estimate_memory(cfg, vocab_size=3000).table().splitlines() if row.startswith("total"))
    assert float(line.split()[1]) == pytest.approx(estimate_memory(cfg, vocab_size=3000).peak_bytes / 1e6, abs=0.01)


def with_budget(cfg, budget):
    """The same run in `budget` bytes."""
    return replace(cfg, hyperparams=replace(cfg.hyperparams, memory_budget_gb=budget / 1e9))


@pytest.mark.parametrize(("share", "grad_accum"), [(0.85, 1), (0.65, 2)])
def test_refusal_says_what_fits_and_it_does(share, grad_accum):
    hp = ["hyperparams.optimizer=adamw", "hyperparams.context_length=64", f"hyperparams.grad_accum={grad_accum}"]
    cfg = load_config(overrides=[*ONE, *hp])
    tight = with_budget(cfg, estimate_memory(cfg, vocab_size=3000).peak_bytes * share)
    says = r"needs .* GB, the budget is .* GB; hyperparams.batch_size=\d+ would fit, or hyperparams.grad_accum=\d+"
    with pytest.raises(InputError, match=says) as e:
        check_budget(tight, 3000)
    for advice in ("batch_size", "grad_accum"):
        n = int(str(e.value).split(f"{advice}=")[1].split()[0])
        assert check_budget(replace(tight, hyperparams=replace(tight.hyperparams, **{advice: n})), 3000)["method"] == "simulated"


@pytest.mark.parametrize("extra", [
    ["model_configs.gpt.dropout=0.1"], ["model_configs.gpt.dropout=0.1", "hyperparams.r_drop=2", "hyperparams.grad_accum=2"],
    ["hyperparams.title_mask=true"], ["hyperparams.amp_bool=true", "hyperparams.context_length=512"]])
def test_no_run_that_barely_fits_is_waved_through(extra):
    """Where an attention table is kept, it dwarfs what the formulas know of; the short cut must see that it might be."""
    long = ["hyperparams.batch_size=2", "hyperparams.context_length=2048", "model_configs.gpt.dropout=0"]
    cfg = load_config(overrides=[*ONE, *long, *extra])
    peak = estimate_memory(cfg, vocab_size=500).peak_bytes
    assert check_budget(with_budget(cfg, peak), 500)["method"] == "simulated"


def test_each_process_is_given_its_share():
    """Of the rows, and on a CPU of the memory; the advice speaks of the whole batch again."""
    cfg = load_config(overrides=[*ONE, "hyperparams.optimizer=adamw", "hyperparams.context_length=64"])
    half = estimate_memory(replace(cfg, hyperparams=replace(cfg.hyperparams, batch_size=4)), vocab_size=3000).peak_bytes
    assert check_budget(with_budget(cfg, 2 * half), 3000, processes=2)["predicted_bytes"] == half
    with pytest.raises(InputError, match=r"hyperparams.batch_size=4 would fit"):
        check_budget(with_budget(cfg, 2 * half - 2), 3000, processes=2)


@pytest.mark.parametrize("attention", ["causal", "sparse", "sparsek"])
def test_inference(attention):
    cfg = load_config(overrides=[*TWO, f"model_configs.gpt.attention_layer={attention}"])
    one, four = (inference_memory(cfg, 3000, texts) for texts in (1, 4))
    assert one["precomputed"] == four["precomputed"] == 0
    assert one["parameters"] == four["parameters"] and four["cache"] == pytest.approx(4 * one["cache"], rel=0.01)


@pytest.mark.parametrize("ngrams", [0, 50])
def test_what_a_text_computes_once_is_counted(ngrams):
    """64 numbers of each piece for the head of the case; and with n-grams the parts of the embedding, which are parameters without."""
    more = ["tokenizer.kind=cased", "model_configs.gpt.embedding_cutoff=100", f"model_configs.gpt.embedding_ngrams={ngrams}"]
    cfg = load_config(overrides=[*ONE, *more])
    gpt = cfg.model_configs.gpt
    pieces = build_model(cfg, 3000).embed.tokens.num_embeddings
    parts = 100 * gpt.d_model + (pieces - 100) * gpt.embedding_rank if ngrams else 0
    assert inference_memory(cfg, 3000)["precomputed"] == 4 * (pieces * CASE_WIDTH + parts)


DEEP = ["model_configs.gpt.n_layer=1000", "model_configs.gpt.d_model=8", "model_configs.gpt.hidden_layer=8", "attn_configs.causal.n_head=2",
        "hyperparams.batch_size=1048576", "hyperparams.optimizer=adamw", "hyperparams.vocab_size=1000", "hyperparams.device=cpu"]


def test_a_prediction_that_takes_too_long_is_by_formula(monkeypatch, tmp_path, capsys):
    """From the command line, and where a sweep looks at a point; the advice has one time for all that it tries."""
    counts, real = [], memory._parameters
    monkeypatch.setattr(memory, "_parameters", lambda *args: counts.append(1) or real(*args))
    monkeypatch.setattr(memory, "PATIENCE", 0.0)
    shallow = [*DEEP, "model_configs.gpt.n_layer=3"]
    status, reason = examine(None, [*shallow, "hyperparams.memory_budget_gb=40"])
    assert status == "skipped" and "GB (by formula only, a guide: to simulate the step takes too long), the budget is 40 GB; " in reason
    assert reason.endswith("with the same batch (by formula only)")
    assert len(counts) == 3, "for the formulas, for what stands in for the simulation, and once for all that the advice tries"
    with pytest.warns(UserWarning, match="memory: a step needs .* GB of 2e.03 GB, by formula only"):
        assert examine(None, [*shallow, "hyperparams.memory_budget_gb=2000"]) == ("running", "")
    (tmp_path / "c.yaml").write_text("{}")
    with pytest.raises(SystemExit):
        memory_cli(*shallow, config=str(tmp_path / "c.yaml"), budget=40.0)
    assert "by formula only" in capsys.readouterr().out


def test_the_time_is_looked_at_all_along(monkeypatch):
    """Whichever operation the time ends before, the simulation ends as it should, and the next one is what it was."""
    cfg = load_config(overrides=[*ONE, "hyperparams.optimizer=adamw", "hyperparams.context_length=16", "model_configs.gpt.dropout=0.1"])
    whole, clock = simulate_step(cfg, 500)[0], []
    monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: clock.append(1) or len(clock)))
    assert simulate_step(cfg, 500, until=10**9)[0] == whole and len(clock) > 1000
    for until in range(10, len(clock), len(clock) // 5):
        clock.clear()
        with pytest.raises(memory.TooLong):
            simulate_step(cfg, 500, until=until)
        assert until < len(clock) < until + 100  # asking for devices, which cannot be interrupted, in between
    assert simulate_step(cfg, 500)[0] == whole


@pytest.mark.slow
def test_the_deepest_model_is_predicted_in_time():
    """With the real clock: it is given up, or done."""
    began = time.monotonic()
    with pytest.raises(memory.TooLong):
        simulate_step(load_config(overrides=DEEP), 1000, until=began + 2)


def test_ctrl_c_is_not_raised_where_pytorch_asks_a_fake_tensor_for_its_device(monkeypatch):
    """An exception from there ends the process with `terminate called`, sooner or later: once in some twenty times."""
    inside, asked, honest = [], [], FakeTensor.__torch_dispatch__.__func__

    def dispatch(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            asked.append(1)
            try:
                if len(asked) == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    sum(range(100))
            except KeyboardInterrupt:
                inside.append(1)
        return honest(cls, func, types, args, kwargs or {})

    monkeypatch.setattr(FakeTensor, "__torch_dispatch__", classmethod(dispatch))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate_step(load_config(overrides=ONE), 100)
        assert asked and not inside
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        asked.clear()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert simulate_step(load_config(overrides=ONE), 100)[0]["total"] and asked  # an ignored signal stays ignored
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("own, files, limits", [
    ("0::/", {"memory.max": "900"}, [900]),  # in a container, which sees its own group as the root
    ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "700", "memory.max": "900"}, [700, 900]),
    ("0::/host/only", {"memory.max": "900"}, [900]),  # a path of the host's
    ("9:cpu,cpuacct:/job\n4:memory:/job\n0::/", {  # version 1, which writes "no limit" as a number
        "memory/job/memory.limit_in_bytes": "500", "memory/memory.limit_in_bytes": str(2**63 - 4096), "cpu/job/memory.limit_in_bytes": "1",
    }, [500, 2**63 - 4096]),
    ("0::/a:b", {"a:b/memory.max": "600"}, [600]),
    ("4:hugetlb,memory:/docker/x", {"memory/memory.limit_in_bytes": "800"}, [800]),
    ("", {"memory.max": "900"}, [900]), ("no group at all", {}, []), (None, {"memory.max": "words"}, []),
])
def test_the_limit_of_a_job_or_container_is_the_machines_memory(tmp_path, monkeypatch, own, files, limits):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own + "\n")
    assert sorted(set(memory.memory_limits(root, tmp_path / "own"))) == limits
    monkeypatch.setattr(memory, "memory_limits", lambda: limits)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory.machine_memory() == min([total, *limits])
