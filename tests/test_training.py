"""The training loop under everything that happens to one: kills, signals, full disks, bad numbers, several processes."""
import errno
import functools
import importlib
import json
import multiprocessing
import os
import pickle
import pkgutil
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mainrun_nb
import mainrun_nb.trainer as trainer
from mainrun_nb import cli, device
from mainrun_nb.attention import ATTENTIONS, Attention, allowed
from mainrun_nb.check import check_run
from mainrun_nb.checkpoint import list_checkpoints, load_checkpoint, load_run, read_checkpoint, sealed
from mainrun_nb.compare import find_runs
from mainrun_nb.config import CausalAttnConfig, Hyperparams, InputError, RunError, load_config, save_config
from mainrun_nb.gpt import GPT
from mainrun_nb.hub import export_run
from mainrun_nb.optim import StepResult
from mainrun_nb.runtime import Interrupted, Processes
from mainrun_nb.tokenizer import BPETokenizer
from mainrun_nb.tracking import read_events

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data.source=synthetic", "tokenizer.kind=bpe", "attn_configs.causal.n_head=2",
    *(f"hyperparams.{s}" for s in ["num_titles=1000", "vocab_size=400", "epochs=9", "context_length=32", "batch_size=16", "max_steps=40",
                                   "device=cpu", "optimizer=adamw", "lr=0.003", "evals_per_epoch=3", "save_every=2", "scheduler=wsd"]),
    *(f"model_configs.gpt.{s}" for s in ["d_model=32", "hidden_layer=32", "n_layer=2"])]
TIMES = {"timestamp", "seconds", "tokens_per_second", "memory_bytes", "train_seconds", "peak_memory_bytes", "step_seconds",
         "flops_per_second", "matrix_flops_per_second", "matrix_fraction", "commit", "identity", "seal", "files"}
# Processes that can be killed: forked from a server that has imported everything and computed nothing, so that each is there at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.figure", "nbdev.test", "mainrun_nb.trainer", "mainrun_nb.cli"])


def tiny(*more):
    return load_config(overrides=[*TINY, *more])


def quick(cfg, run_dir, **kwargs):
    return trainer.train(cfg, run_dir, progress=False, **kwargs)


def timeless(events):
    """The events of a log as everything but the clock sees them."""
    kept = [e for e in events if e["event"] in ("training_step", "validation_step", "run_finished")]
    return [{k: v for k, v in e.items() if k not in TIMES} for e in kept]


def assert_same_run(a, b):
    """Bit for bit: last weights and state, titles, metrics, log."""
    one, two = load_checkpoint(a), load_checkpoint(b)
    assert one.step == two.step and one.metrics == two.metrics
    assert all(torch.equal(one.weights[k], two.weights[k]) for k in one.weights)
    assert one.state["step"] == two.state["step"] and torch.equal(one.state["rng"][0]["cpu"], two.state["rng"][0]["cpu"])
    assert all(torch.equal(one.state["ema"][k], two.state["ema"][k]) for k in one.state["ema"] or {})
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    assert timeless(read_events(a)) == timeless(read_events(b))
    first, second = (json.loads((d / "result.json").read_text()) for d in (a, b))
    assert {k: v for k, v in first.items() if k not in TIMES} == {k: v for k, v in second.items() if k not in TIMES}


@pytest.mark.parametrize(("wrong", "says"), [
    ("hyperparams.optimizer=adamv", "Did you mean"), ("hyperparams.scheduler=cosin", "Did you mean"),
    ("hyperparams.model_architecture=gtp", "Did you mean"), ("model_configs.gpt.attention_layer=casual", "Did you mean"),
    ("attn_configs.causal.n_head=3", "3 heads do not divide")])
def test_what_cannot_be_is_refused_before_a_title_is_read(tmp_path, monkeypatch, wrong, says):
    monkeypatch.setattr(trainer, "read_split", lambda cfg: pytest.fail("titles were read"))
    with pytest.raises(InputError, match=says):
        quick(tiny(wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_tokenizer_sees_validation_titles_whose_floor_is_known(tmp_path):
    data = trainer.prepare_data(tiny("tokenizer.kind=challenge"))
    assert data.tokenizer.meta["trained_on"] == "train"
    (tmp_path / "titles.txt").write_text("\n".join(f"a title about {i}" for i in range(300)))
    data = trainer.prepare_data(tiny("tokenizer.kind=challenge", f"data.source={tmp_path / 'titles.txt'}", "hyperparams.num_titles=200"))
    assert data.tokenizer.meta["trained_on"] == "train+validation"


def test_a_copy_of_the_log_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="log_file"):
        quick(tiny(f"hyperparams.log_file={tmp_path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    quick(tiny(), run_dir)
    return run_dir


# --- in another process ---


def in_child(overrides, run_dir, on_event=None, env=()):
    """The body of a child: one thread, `train`, and an exit code as the command would give."""
    from mainrun_nb.cli import for_people

    os.environ.update(env)
    sys.stderr = open(f"{run_dir}.err", "a", buffering=1)
    torch.set_num_threads(1)
    with for_people("mainrun-train"):
        quick(tiny(*overrides), run_dir, resume=True, on_event=on_event)


def start(overrides, run_dir, on_event=None, env=()):
    child = PROCESSES.Process(target=in_child, args=(overrides, run_dir, on_event, dict(env)))
    child.start()
    return child


def said(run_dir):
    """The lines that the command's wrapper said in the children that trained in a folder."""
    return [line for line in Path(f"{run_dir}.err").read_text().splitlines() if line.startswith("mainrun-")]


def ended(child, seconds=120):
    child.join(seconds)
    assert child.exitcode is not None, "the process hangs"
    return child.exitcode


def kill_at(event, kind, step):
    if event["event"] == kind and event["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.0005)


def steps_logged(run_dir):
    log = run_dir / "metrics.jsonl"
    return log.read_text().count('"training_step"') if log.exists() else 0


# --- kills ---


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path):
    options = ["hyperparams.ema=0.9", "hyperparams.grad_accum=2", "hyperparams.optimizer=muon", "hyperparams.save_every=1",
               "hyperparams.shuffle=true"]
    quick(tiny(*options), tmp_path / "whole")
    run_dir, chance, debris = tmp_path / "cut", random.Random(0), 0
    for attempt in range(5):
        child = start(options, run_dir)
        if attempt % 2:  # in the middle of a save
            seen = steps_logged(run_dir)
            wait_for(lambda seen=seen, child=child: steps_logged(run_dir) > min(seen, 38) or not child.is_alive())
            wait_for(lambda child=child: list(run_dir.glob("checkpoints/.step-*.tmp")) or not child.is_alive())
        else:  # at any moment at all, the start included
            wait_for(lambda child=child: (run_dir / "metrics.jsonl").exists() or not child.is_alive())
            time.sleep(chance.uniform(0, 0.3))
        child.kill()
        ended(child)
        debris += len(list(run_dir.glob("checkpoints/.step-*.tmp")))
    assert debris, "no kill fell into a save"
    assert ended(start(options, run_dir)) == 0
    assert_same_run(tmp_path / "whole", run_dir)
    assert not list(run_dir.glob("**/.*.tmp"))


@pytest.mark.parametrize("kind, step", [("validation_step", 13), ("run_finished", 40)])
def test_killed_between_the_acts(finished, tmp_path, kind, step):
    assert ended(start([], tmp_path, functools.partial(kill_at, kind=kind, step=step))) == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    quick(tiny(), tmp_path, resume=True)
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_its_code(finished, tmp_path, signum):
    child = start(["hyperparams.save_every=1000"], tmp_path)
    wait_for(lambda: steps_logged(tmp_path) >= 5)
    os.kill(child.pid, signum)
    assert ended(child) == 128 + signum
    stopped = load_checkpoint(tmp_path).step
    assert 5 <= stopped < 40 and stopped == steps_logged(tmp_path)
    quick(tiny("hyperparams.save_every=1000"), tmp_path, resume=True)
    assert json.loads((tmp_path / "result.json").read_text())["val/loss"] == json.loads((finished / "result.json").read_text())["val/loss"]


def sleep_at(event, step):
    if event.get("step") == step:
        time.sleep(60)


def test_a_second_process_is_refused_and_a_second_signal_means_now(tmp_path):
    child = start([], tmp_path, functools.partial(sleep_at, step=7))
    wait_for(lambda: steps_logged(tmp_path) == 7)
    with pytest.raises(InputError, match="another process is at work"):
        quick(tiny(), tmp_path, resume=True)
    for _ in range(2):
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.2)
    assert ended(child, 20) == 143
    assert load_checkpoint(tmp_path).step == 6


def test_a_damaged_checkpoint_costs_steps_and_not_the_run(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "result.json").unlink()
    victim = list_checkpoints(run_dir)[-1] / "state.pt"
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="damaged"):
        quick(tiny(), run_dir, resume=True)
    assert_same_run(finished, run_dir)


def test_a_checkpoint_has_the_metrics_of_its_own_step_or_none(tmp_path):
    """Saved every second step, evaluated every fifth; the best is the best of those evaluated."""
    quick(tiny("hyperparams.max_steps=16", "hyperparams.keep_checkpoints=40"), tmp_path)
    measured = {e["step"]: e["val/loss"] for e in read_events(tmp_path) if e["event"] == "validation_step"}
    kept = {c.step: c.metrics.get("val/loss") for c in map(read_checkpoint, list_checkpoints(tmp_path))}
    assert kept == {step: measured.get(step) for step in {1, 5, 15, *range(2, 17, 2)}} and set(measured) == {1, 5, 10, 15, 16}
    assert load_checkpoint(tmp_path, "best").step == min(measured, key=measured.__getitem__)


# --- disks ---


def limit_files(event, step, size):
    """From `step` on, no file of this process may grow beyond `size` bytes, or beyond the log's present size if that is 0."""
    if event["event"] == "training_step" and event["step"] == step:
        log = next(Path(f"/proc/self/fd/{fd}").resolve() for fd in os.listdir("/proc/self/fd")
                   if os.path.realpath(f"/proc/self/fd/{fd}").endswith("metrics.jsonl"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or log.stat().st_size + 40, resource.RLIM_INFINITY))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds its open files in /proc")
@pytest.mark.parametrize("size, named", [(60_000, "step-00000012"), (0, "metrics.jsonl")])
def test_a_full_disk_stops_the_run_and_a_resume_ends_the_same(finished, tmp_path, size, named):
    run_dir = tmp_path / "run"
    assert ended(start([], run_dir, functools.partial(limit_files, step=11, size=size))) == 1
    assert len(said(run_dir)) == 1 and named in said(run_dir)[0] and "File too large" in said(run_dir)[0]
    assert load_checkpoint(run_dir).step == 10
    quick(tiny(), run_dir, resume=True)
    assert_same_run(finished, run_dir)


def test_a_copy_of_the_log_on_a_full_device(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(RunError, match="/dev/full: the log cannot be written"):
        quick(tiny("hyperparams.log_file=/dev/full"), tmp_path)


# --- what may change on resume, and what not ---


def test_a_resume_with_other_settings_or_other_titles_is_refused(tmp_path):
    titles = tmp_path / "titles.txt"
    titles.write_text("".join(f"A title about the number {i}\n" for i in range(1000)))
    settings = [f"data.source={titles}", "hyperparams.max_steps=4"]
    quick(tiny(*settings), tmp_path / "run", on_event=None)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(InputError, match=r"hyperparams.lr \(0.003 there, 0.1 here\), hyperparams.max_steps \(4 there, 5 here\)"):
        quick(tiny(settings[0], "hyperparams.max_steps=5", "hyperparams.lr=0.1"), tmp_path / "run", resume=True)
    titles.write_text(titles.read_text().replace("number 7", "digit 7"))
    with pytest.raises(InputError, match="titles are not those"):
        quick(tiny(*settings), tmp_path / "run", resume=True)
    titles.write_text(titles.read_text().replace("digit 7", "number 7"))
    quick(tiny(*settings, "hyperparams.save_every=3", f"hyperparams.log_file={tmp_path}/copy.jsonl"), tmp_path / "run", resume=True)
    assert read_events(tmp_path / "copy.jsonl") == read_events(tmp_path / "run")


# --- bad numbers ---


def spoilt(monkeypatch, bad):
    """Let the steps in `bad` find a loss that is not a number, and make no update."""
    honest = trainer.train_step

    def step(model, optimizer, x, y, hp, scaler, ema):
        step.count += 1
        if step.count in bad:
            nan = torch.tensor(float("nan"))
            return StepResult(nan, nan, torch.tensor(False))
        return honest(model, optimizer, x, y, hp, scaler, ema)

    step.count = 0
    monkeypatch.setattr(trainer, "train_step", step)


def test_a_bad_step_is_skipped_counted_and_never_saved(tmp_path, monkeypatch):
    spoilt(monkeypatch, {5, 6, 20})
    result = quick(tiny("hyperparams.max_bad_steps=3", "hyperparams.keep_checkpoints=40"), tmp_path)
    assert result.metrics["skipped_steps"] == 3 and result.metrics["steps"] == 40
    assert {p.name for p in list_checkpoints(tmp_path)} == {f"step-{s:08d}" for s in {1, 13, 39, *range(2, 41, 2)} - {6, 20}}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    skipped = [e["step"] for e in read_events(tmp_path) if e["event"] == "training_step" and e["train/loss"] is None]
    assert skipped == [5, 6, 20]


def test_too_many_bad_steps_end_the_run_and_spare_the_last_good_checkpoint(tmp_path, monkeypatch):
    spoilt(monkeypatch, range(13, 100))
    with pytest.raises(RunError, match="the 5 steps up to step 17 had a loss"):
        quick(tiny("hyperparams.max_bad_steps=5"), tmp_path)
    assert load_checkpoint(tmp_path).step == 12


def test_a_validation_loss_that_is_not_a_number_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "validation_metrics", lambda *args: {"val/loss": float("nan")})
    with pytest.raises(RunError, match="validation loss after step 1 is not a finite number"):
        quick(tiny(), tmp_path)


# --- options ---


def losses(run_dir):
    return torch.tensor([e["train/loss"] for e in read_events(run_dir) if e["event"] == "training_step"])


def short(run_dir, *options):
    quick(tiny("hyperparams.max_steps=6", "model_configs.gpt.dropout=0.0", *options), run_dir)
    return losses(run_dir)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return short(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("option", ["checkpoint_activations=true", "grad_accum=4", "loss_chunk=0", "ema=0.5"])
def test_options_that_do_not_change_the_losses(plain, tmp_path, option):
    torch.testing.assert_close(short(tmp_path, f"hyperparams.{option}"), plain, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_compiled_training_loses_the_same_and_its_warm_up_is_not_timed(plain, tmp_path):
    torch.testing.assert_close(short(tmp_path, "hyperparams.compile=true"), plain, atol=1e-4, rtol=0)
    events = [e["seconds"] for e in read_events(tmp_path) if e["event"] == "training_step"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert events[0] > 5 * max(events[1:]) and result["train_seconds"] == pytest.approx(sum(events[1:]))
    assert load_run(tmp_path)[1](torch.zeros(1, 4, dtype=torch.long))[0].shape == (1, 4, 400)


WHOLE = ["rows=titles", "title_mask=true"]
PASSES = "num_titles=100"  # of four or five steps each


@pytest.mark.parametrize("options", [["grad_accum=4"], ["grad_accum=16", "r_drop=2"]])
def test_padded_rows_may_be_taken_in_any_number_of_parts(tmp_path, options):
    whole = short(tmp_path / "a", *(f"hyperparams.{o}" for o in [*WHOLE, *options[1:]]))
    torch.testing.assert_close(short(tmp_path / "b", *(f"hyperparams.{o}" for o in [*WHOLE, *options])), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [["r_drop=2"], ["amp_bool=true", "ema=0.8", "title_mask=true"], ["optimizer=adafactor", "grad_clip=0"],
                                     ["shuffle=true", PASSES], [*WHOLE, "shuffle=true", "grad_accum=2", PASSES]])
def test_options_that_do_and_still_resume_to_the_bit(tmp_path, options):
    cfg = tiny("hyperparams.max_steps=12", *(f"hyperparams.{o}" for o in options))
    quick(cfg, tmp_path / "a")
    with pytest.raises(KeyError):
        quick(cfg, tmp_path / "b", on_event=lambda e: {}[0] if e.get("step") == 7 else None)
    quick(cfg, tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_average_is_what_is_evaluated_and_loaded(tmp_path):
    result = quick(tiny("hyperparams.ema=0.9", "hyperparams.max_steps=12"), tmp_path)
    cfg, model, tokenizer = load_run(tmp_path)
    found = load_checkpoint(tmp_path)
    assert all(torch.equal(p, found.state["ema"][name]) for name, p in model.named_parameters())
    assert not all(torch.equal(p, found.weights[name]) for name, p in model.named_parameters())
    data = trainer.prepare_data(cfg, tokenizer)
    assert trainer.validation_metrics(model, data.val_ids, data.val_titles, cfg)["val/loss"] == result.loss


def test_reading_the_device_ten_steps_at_a_time_changes_no_number(finished, tmp_path, monkeypatch):
    plan = trainer.make_plan
    monkeypatch.setattr(trainer, "make_plan", lambda hp, n, device, per_epoch: plan(hp, n, "cuda", per_epoch))
    quick(tiny("hyperparams.save_every=15"), tmp_path)
    one, ten = ([e for e in timeless(read_events(d)) if e["event"] == "training_step"] for d in (finished, tmp_path))
    assert one == ten
    assert json.loads((tmp_path / "result.json").read_text())["val/loss"] == json.loads((finished / "result.json").read_text())["val/loss"]


# --- batches ---


def test_a_pass_is_as_many_steps_in_any_order_and_its_losses_are_its_own(tmp_path):
    runs = {order: short(tmp_path / order, f"hyperparams.{PASSES}", f"hyperparams.shuffle={order}", "hyperparams.max_steps=12",
                         "hyperparams.lr=1.0e-9") for order in ("true", "false")}  # the weights hardly move: a loss is its batch's
    n = trainer.prepare_data(tiny(f"hyperparams.{PASSES}")).info["tokens_per_epoch"] // (16 * 32)
    assert n in (4, 5)
    kept, drawn = runs["false"], runs["true"]
    torch.testing.assert_close(kept[:n], kept[n : 2 * n], atol=1e-4, rtol=0)
    assert (drawn[:n] - drawn[n : 2 * n]).abs().max() > 1e-3 and (drawn[:n] - kept[:n]).abs().max() > 1e-3
    torch.testing.assert_close(drawn[:n].mean(), kept[:n].mean(), atol=5e-3, rtol=0)


def test_rows_of_whole_titles_count_real_tokens_and_say_what_they_cut(tmp_path):
    options = [f"hyperparams.{o}" for o in [*WHOLE, PASSES, "context_length=16", "batch_size=8"]]
    with pytest.warns(UserWarning, match=r"rows=titles: \d+ of 90 training titles are cut, longer than the 16 tokens"):
        result = quick(tiny(*options, "hyperparams.max_steps=6"), tmp_path)
    data = result.metrics["data"]
    assert 0 < data["titles_cut"] < 90 and 0 < data["rows_padding"] < 0.2
    real = 8 * 16 * (1 - data["rows_padding"])  # tokens of a step
    assert result.metrics["tokens_per_second"] * result.metrics["step_seconds"] == pytest.approx(real)
    step = next(e for e in read_events(tmp_path) if e["event"] == "training_step")
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(real)


def test_rows_of_whole_titles_need_the_title_mask():
    with pytest.raises(InputError, match="hyperparams.rows=titles: needs hyperparams.title_mask=true"):
        tiny("hyperparams.rows=titles")


# --- what a run leaves behind ---


def test_the_log_can_be_read_while_the_run_goes_on(tmp_path):
    seen = []
    quick(tiny("hyperparams.max_steps=5"), tmp_path, on_event=lambda e: seen.append(read_events(tmp_path)[-1] == e))
    assert len(seen) > 10 and all(seen)


def test_the_result_is_complete(finished):
    result = json.loads((finished / "result.json").read_text())
    wanted = {"val/loss", "val/challenge_loss", "val/coverage", "val/nats_per_token", "val/bits_per_byte", "val/floor",
              "steps", "skipped_steps", "tokens_per_second", "step_seconds", "flops_per_second", "matrix_flops_per_second",
              "matrix_fraction", "mfu", "peak_memory_bytes", "parameters", "seed", "data", "device", "versions", "commit"}
    assert wanted <= result.keys()
    assert {"source", "revision", "n_titles", "sha256", "tokens_per_epoch", "lost_titles", "reference/kneser_ney"} <= result["data"].keys()
    assert result["lossless"] is True and result["data"]["lost_titles"] == 0
    assert result["beats_counting"] is (result["val/loss"] < result["data"]["reference/kneser_ney"])
    assert 0 < result["matrix_fraction"] < 2 and result["tokens_per_second"] == pytest.approx(16 * 32 / result["step_seconds"])
    kinds = [e["event"] for e in read_events(finished)]
    opening = ["hyperparameters_configured", "device_info", "dataset_info", "model_configured", "memory_estimate", "model_info"]
    assert kinds[:6] == opening and kinds[-1] == "run_finished"
    step = next(e for e in read_events(finished) if e["event"] == "training_step")
    assert {"train/loss", "train/nats_per_char", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "step", "max_steps"} <= step.keys()


def test_a_result_says_what_it_is_not(finished, tmp_path):
    metrics = json.loads((finished / "result.json").read_text())
    metrics["val/loss"], metrics["beats_counting"] = 1.0, False
    said = trainer.RunResult(finished, metrics).summary()
    assert "the model has learned less than a table of counts" in said and "not comparable" not in said
    metrics["beats_counting"], metrics["data"]["lost_titles"] = True, 3
    said = trainer.RunResult(finished, metrics).summary()
    assert "1.0000 nats per character (not comparable: 3 of 100 validation titles do not come back" in said
    assert "table of counts" not in said
    for key in ("beats_counting", "lossless"):
        del metrics[key]
    for key in ("lost_titles", "reference/kneser_ney"):  # the result of an earlier version
        del metrics["data"][key]
    assert "bigram reference" in trainer.RunResult(finished, metrics).summary()


def test_a_tokenizer_that_loses_letters_is_marked_in_result_and_evaluation(tmp_path, monkeypatch):
    honest = BPETokenizer._encode_titles
    monkeypatch.setattr(BPETokenizer, "_encode_titles", lambda self, titles: honest(self, [title.lower() for title in titles]))
    result = quick(tiny("hyperparams.max_steps=2"), tmp_path)
    assert result.metrics["lossless"] is False and result.metrics["data"]["lost_titles"] > 90
    assert "(not comparable: " in result.summary().splitlines()[0]
    scored = trainer.evaluate_run(tmp_path)
    assert (scored["lossless"], scored["lost_titles"]) == (False, result.metrics["data"]["lost_titles"])
    assert scored["reference/kneser_ney"] == result.metrics["data"]["reference/kneser_ney"]


def test_sparsek_says_how_often_its_buffer_was_large_enough(tmp_path):
    sparsek = [f"attn_configs.sparsek.{s}" for s in ("k=2", "candidates=3", "window=2", "chunk=4")]
    quick(tiny("hyperparams.max_steps=2", "model_configs.gpt.attention_layer=sparsek", *sparsek), tmp_path)
    logged = [e["sparsek/certificate"] for e in read_events(tmp_path) if e["event"] == "validation_step"]
    assert logged and all(0 <= share < 1 for share in logged)  # three candidates for two places: too few for some


def test_the_smoke_test_of_the_whole_path(tmp_path, capsys):
    from mainrun_nb.cli import train_cli

    train_cli(config=str(ROOT / "sweeps/base/quickstart.yaml"), out=str(tmp_path / "run"), test=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3


def test_the_cuda_allocator_is_told_before_cuda_starts(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "nvml_answers", lambda: False)
    assert trainer.pick_device("auto").type == "cpu" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ  # they would end the process
    monkeypatch.setattr(device, "nvml_answers", lambda: True)
    assert trainer.pick_device("cpu").type == "cpu" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    trainer.pick_device("auto")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    trainer.pick_device("auto")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    with pytest.raises(InputError, match="no CUDA device"):
        trainer.pick_device("cuda")


def test_running_out_of_memory_is_said_in_one_line(tmp_path, monkeypatch):
    def hungry(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nand a trace")

    monkeypatch.setattr(trainer, "train_step", hungry)
    with pytest.raises(RunError, match="out of memory .* GB predicted, .* GB used .*grad_accum") as e:
        quick(tiny(), tmp_path)
    assert "\n" not in str(e.value)


PAGES = """
import resource, torch
from mainrun_nb import runtime

torch.set_num_threads(1)

def pages(megabytes):
    "Page faults of each of twenty tensors that come and go."
    found = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes * 250_000)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found

for _ in range(2):  # two runs of one process
    with runtime.freed_memory_kept():
        within = pages(20) + pages(50)
    print(sum(within), *(sum(pages(megabytes)[4:]) for megabytes in (2, 20, 30)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the page faults of glibc's allocator")
def test_after_a_run_freed_memory_is_still_found_again():
    """A tensor of 20 MB has 4,883 pages; from the fifth on they are those of the one before, within a run and after it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PAGES], env=env, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        within, *after = map(int, line.split())
        assert within < 100_000 and max(after) < 4883, done.stdout


def test_a_run_builds_its_model_once_to_check_it_and_once_to_train_it(tmp_path, monkeypatch):
    built = []
    honest = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, *args, **kwargs: built.append(1) or honest(self, *args, **kwargs))
    assert quick(tiny("hyperparams.max_steps=2"), tmp_path).metrics["data"]["vocab_size"] == 400
    assert len(built) == 2


class Own(Attention):
    """An attention as a user may write it: nothing but `attend`."""

    def attend(self, q, k, v, info, cache, x):
        seen = allowed(info.positions, info.positions, info.titles, info.titles).to(v.dtype)
        return seen / seen.sum(-1, keepdim=True) @ v


def test_an_attention_without_a_cache_trains_and_says_that_it_cannot_write(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(ATTENTIONS, "causal", (Own, CausalAttnConfig))
    with pytest.warns(UserWarning, match="samples.txt: could not be made .*Own keeps no cache, so it cannot write"):
        result = quick(tiny("hyperparams.max_steps=4"), tmp_path)
    assert result.loss > 0 and not (tmp_path / "samples.txt").exists()
    with pytest.raises(SystemExit) as ended:
        cli.generate_cli(str(tmp_path))
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "attention_layer: Own keeps no cache" in said[-1] and "Traceback" not in "".join(said)


# --- many processes ---


def job(overrides, run_dir, count, on_event=None):
    """A job of `count` processes, started as torchrun does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [start(overrides, run_dir, on_event, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]


NO_DROPOUT = ["model_configs.gpt.dropout=0.0", "hyperparams.grad_accum=2", "hyperparams.max_steps=24"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The losses of a run in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    quick(tiny(*NO_DROPOUT), run_dir)
    return losses(run_dir)


# What the first process fails with, and what the others hear of it.
FAILURES = [(InputError("bad"), "InputError: bad"), (Interrupted("stopped", signal.SIGTERM), "Interrupted: stopped"),
            (OSError(errno.ENOSPC, "No space left on device", "state.pt"),
             "RunError: the first process failed: [Errno 28] No space left on device: 'state.pt'")]


def raised(error):
    raise error


def shares(rank, folder):
    """What one of two processes hears of the failures of the first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    heard = []
    for error, _ in FAILURES:
        try:
            Processes(rank, 2).share(functools.partial(raised, error))
        except Exception as e:
            heard.append(f"{type(e).__name__}: {e}")
    Path(folder, f"heard{rank}").write_text(json.dumps([*heard, Processes(rank, 2).share(lambda: "work")]))
    dist.destroy_process_group()


def test_a_failure_of_the_first_process_reaches_the_other(tmp_path):
    torch.multiprocessing.spawn(shares, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"heard{rank}").read_text()) for rank in (0, 1))
    assert second == [*(heard for _, heard in FAILURES), "work"]
    assert first == [*(f"{type(e).__name__}: {e}" for e, _ in FAILURES), "work"]


def test_every_exception_of_the_package_survives_the_way_to_another_process():
    found = set()
    for name in (m.name for m in pkgutil.iter_modules(mainrun_nb.__path__) if m.name != "__main__"):
        classes = (c for c in vars(importlib.import_module(f"mainrun_nb.{name}")).values() if isinstance(c, type))
        found |= {c for c in classes if issubclass(c, Exception) and c.__module__.startswith("mainrun_nb")}
    assert {InputError, RunError, Interrupted} < found
    for cls in found:
        error = cls("stopped", 15) if cls is Interrupted else cls("words")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (cls, str(error), vars(error))


def test_two_processes_lose_what_one_loses_and_the_first_writes(one_process, tmp_path):
    run_dir = tmp_path / "two"
    assert [ended(p) for p in job(NO_DROPOUT, run_dir, 2)] == [0, 0]
    torch.testing.assert_close(losses(run_dir)[:20], one_process[:20], atol=1e-5, rtol=0)
    assert [e["step"] for e in read_events(run_dir) if e["event"] == "training_step"] == list(range(1, 25))
    assert json.loads((run_dir / "result.json").read_text())["device"]["processes"] == 2


def test_two_processes_lose_what_one_loses_on_padded_rows_in_drawn_order(tmp_path):
    options = [*NO_DROPOUT, *(f"hyperparams.{o}" for o in [*WHOLE, "shuffle=true", PASSES, "max_steps=10"])]
    quick(tiny(*options, "hyperparams.grad_accum=1"), tmp_path / "one")
    assert [ended(p) for p in job(options, tmp_path / "two", 2)] == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_more_or_fewer_processes_can_go_on_with_a_sharded_optimizer(one_process, tmp_path, first, then):
    options = [*NO_DROPOUT, "hyperparams.zero_optimizer=true"]
    stop = functools.partial(kill_at, kind="training_step", step=11)
    assert [ended(p) for p in job(options, tmp_path / "run", first, stop)][0] == -signal.SIGKILL
    assert [ended(p) for p in job(options, tmp_path / "run", then)] == [0] * then
    torch.testing.assert_close(losses(tmp_path / "run")[:20], one_process[:20], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_with_other_processes_dropout_stays_defined_and_it_is_said(tmp_path, first, then):
    stop = functools.partial(kill_at, kind="training_step", step=11)
    assert [ended(p) for p in job([], tmp_path / "a", first, stop)][0] == -signal.SIGKILL
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        assert [ended(p) for p in job([], tmp_path / name, then)] == [0] * then
        assert any(f"processes {then} instead of {first}" in line for line in said(tmp_path / name))
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_other_optimizers_sharded(tmp_path, optimizer):
    options = [*NO_DROPOUT, f"hyperparams.optimizer={optimizer}", "hyperparams.zero_optimizer=true", "hyperparams.max_steps=8"]
    quick(tiny(*options), tmp_path / "one")
    assert [ended(p) for p in job(options, tmp_path / "two", 2)] == [0, 0]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=5e-5, rtol=0)


def dawdle(event):
    time.sleep(0.02)


def test_a_dead_process_ends_the_job_with_one_clear_line(tmp_path):
    run_dir = tmp_path / "run"
    first, second = job([], run_dir, 2, dawdle)
    wait_for(lambda: steps_logged(run_dir) >= 5)
    second.kill()
    assert ended(first, 60) == 1 and ended(second) == -signal.SIGKILL
    assert len(said(run_dir)) == 1 and "rank 1 of this job is gone" in said(run_dir)[0] and "--resume" in said(run_dir)[0]
    assert load_checkpoint(run_dir).step >= 2


def stopped_job(tmp_path, heartbeat, rank):
    """A job of two, of which one is stopped in the middle (SIGSTOP, as by a debugger); both processes, the stopped one first."""
    processes = job([f"hyperparams.heartbeat={heartbeat}", "hyperparams.max_steps=4000"], tmp_path / "run", 2)
    wait_for(lambda: steps_logged(tmp_path / "run") >= 5)
    os.kill(processes[rank].pid, signal.SIGSTOP)
    return processes[rank], processes[1 - rank]


@pytest.mark.parametrize("rank", [1, 0])  # rank 0 holds the store here, which then does not answer either
def test_a_stopped_process_is_found_and_named(tmp_path, rank):
    frozen, other = stopped_job(tmp_path, 3, rank)
    assert ended(other, 30) == 1
    assert f"rank {rank} has given no sign of life for 3 s" in Path(f"{tmp_path}/run.err").read_text()
    frozen.kill()
    assert ended(frozen) == -signal.SIGKILL and load_checkpoint(tmp_path / "run").step >= 1


def test_a_signal_ends_a_process_that_waits_for_a_stopped_one(tmp_path):
    frozen, other = stopped_job(tmp_path, 30, 1)
    time.sleep(0.5)
    os.kill(other.pid, signal.SIGTERM)
    assert ended(other, 25) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM while rank 1 does not answer" in Path(f"{tmp_path}/run.err").read_text()
    frozen.kill()
    ended(frozen)


def slow_validation(event):
    if event["event"] == "validation_step" and event["step"] == 1:
        time.sleep(5)


def test_a_long_evaluation_is_no_fault(tmp_path):
    """The first process alone is busy, twice as long as the limit, while the other waits for it."""
    processes = job(["hyperparams.heartbeat=3", "hyperparams.max_steps=3"], tmp_path / "run", 2, slow_validation)
    assert [ended(p) for p in processes] == [0, 0]


@pytest.mark.parametrize("wrong, word", [("hyperparams.batch_size=15", "multiple of 2"), ("data.source=no/such.txt", "no/such.txt")])
def test_what_is_wrong_is_said_once_and_ends_all_processes(tmp_path, wrong, word):
    run_dir = tmp_path / "run"
    assert [ended(p) for p in job([wrong], run_dir, 2)] == [2, 2]
    assert len(said(run_dir)) == 1 and word in said(run_dir)[0] and not run_dir.exists()


def test_a_signal_stops_all_processes_after_the_same_step_and_they_resume_to_the_bit(tmp_path):
    options = ["hyperparams.max_steps=30", "hyperparams.save_every=1000", "hyperparams.ema=0.9"]
    assert [ended(p) for p in job(options, tmp_path / "whole", 2)] == [0, 0]
    processes = job(options, tmp_path / "cut", 2)
    wait_for(lambda: steps_logged(tmp_path / "cut") >= 5)
    os.kill(processes[1].pid, signal.SIGTERM)  # only one of them hears of it
    assert ended(processes[0]) == 143 and ended(processes[1]) in (1, 143)
    assert load_checkpoint(tmp_path / "cut").step == steps_logged(tmp_path / "cut") < 30
    assert [ended(p) for p in job(options, tmp_path / "cut", 2)] == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_shares_of_a_batch_are_disjoint_and_complete():
    rows = [trainer.my_rows(Hyperparams(batch_size=24, grad_accum=2), trainer.Processes(r, 3)) for r in range(3)]
    assert [i for s in rows for i in range(24)[s]] == list(range(24))


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    config = tmp_path / "tiny.yaml"
    save_config(tiny(*NO_DROPOUT), config)
    folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [folder / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", "mainrun-train"]
    done = subprocess.run([*command, "--config", config, "--out", tmp_path / "run"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)["device"]["processes"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "run").step == 24


@pytest.mark.parametrize("lost", ["a link to nowhere", "unreadable"])
def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(lost, tmp_path, monkeypatch):
    """The run is refused, and all that it has is left as it was."""
    run = tmp_path / "run"
    quick(tiny("hyperparams.max_steps=4"), run)
    (run / "result.json").unlink()
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / ("nowhere" if "link" in lost else "elsewhere"))
    if lost == "unreadable":  # root reads everything
        there = Path.iterdir

        def listed(path):
            if path.name == "checkpoints":
                raise PermissionError(13, "Permission denied")
            return there(path)

        monkeypatch.setattr(Path, "iterdir", listed)
    with pytest.raises(InputError, match=r"checkpoints: cannot be read \("):
        quick(tiny("hyperparams.max_steps=4"), run, resume=True)
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    monkeypatch.undo()
    (run / "checkpoints").unlink()
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert quick(tiny("hyperparams.max_steps=4"), run, resume=True).metrics["steps"] == 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "result.json", "checkpoints/log", "../run/metrics.jsonl"])
def test_a_second_log_is_none_of_the_files_that_the_run_writes(name, tmp_path):
    """However it is spelled; nothing is written."""
    (tmp_path / "run").mkdir()
    for spelled in (tmp_path / "run" / name, os.path.relpath(tmp_path / "run" / name)):
        with pytest.raises(InputError, match="a file that the run itself writes"):
            quick(tiny("hyperparams.max_steps=2", f"hyperparams.log_file={spelled}"), tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())
    quick(tiny("hyperparams.max_steps=2", f"hyperparams.log_file={tmp_path}/run/copy.jsonl"), tmp_path / "run")
    assert (tmp_path / "run" / "copy.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_a_result_edited_by_hand_is_believed_nowhere(tmp_path):
    """Without its seal too, and sealed anew."""
    run = tmp_path / "run"
    loss = quick(tiny("hyperparams.max_steps=4"), run).loss
    real = json.loads((run / "result.json").read_bytes())
    edited = {k: v for k, v in real.items() if k != "seal"} | {"val/loss": 0.1}
    for content in (edited, {k: v for k, v in edited.items() if k != "files"}, sealed(edited)):
        (run / "result.json").write_text(json.dumps(content))
        assert {f.file: f.state for f in check_run(run)}["result.json"] == "damaged"
        with pytest.raises(InputError, match="result.json: cannot be read"):
            export_run(run, tmp_path / "export")
        (found,) = find_runs([run])
        assert found.loss != 0.1 and any("result.json" in fault for fault in found.faults)
    with pytest.warns(UserWarning, match="damaged"):
        assert quick(tiny("hyperparams.max_steps=4"), run, resume=True).loss == loss
    assert json.loads((run / "result.json").read_bytes())["val/loss"] == loss
