"""Checkpoints that are cut off at every moment, damaged in every file, and too large for the disk."""
import builtins
import json
import os
import resource
import shutil
import warnings

import pytest
import torch

from mainrun_nb import checkpoint
from mainrun_nb.checkpoint import atomic_write, list_checkpoints, load_checkpoint, load_run, run_lock, save_checkpoint, sweep_scratch
from mainrun_nb.config import InputError, RunError, load_config, save_config
from mainrun_nb.models import build_model
from mainrun_nb.tokenizer import train_tokenizer


def save(run_dir, step, loss=1.0, keep=2, size=8):
    """A checkpoint whose content tells its step."""
    return save_checkpoint(run_dir, step, {"w": torch.full((size,), float(step))}, {"ptr": step}, {"val/loss": loss}, keep)


def intact(run_dir):
    """The steps of the checkpoints that load, each holding what was saved at its step; no other ones may be there."""
    steps = []
    for path in list_checkpoints(run_dir):
        found = checkpoint.read_checkpoint(path)
        assert found.step == found.state["ptr"] == int(path.name.split("-")[1]) and bool((found.weights["w"] == found.step).all())
        steps.append(found.step)
    return steps


class Cut(BaseException):
    """What a kill would do, as far as an exception can: no `except Exception` or `except OSError` hears of it."""


@pytest.fixture
def cut_at(monkeypatch):
    """Make the n-th act on the file system the last one."""
    acts = [(os, "replace"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree"), (builtins, "open")]
    left = {"n": None}

    def counting(honest):
        def act(*args, **kwargs):
            if left["n"] is not None:
                left["n"] -= 1
                if left["n"] < 0:
                    raise Cut
            return honest(*args, **kwargs)
        return act

    for module, name in acts:
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return lambda n: left.update(n=n)


def test_cut_off_at_any_act_the_old_ones_or_the_new_one_are_there(tmp_path, cut_at):
    for n in range(100):
        run_dir = tmp_path / str(n)
        for step, loss in [(1, 0.5), (2, 0.9), (3, 0.8)]:
            save(run_dir, step, loss)
        cut_at(n)
        try:
            save(run_dir, 4, 0.7)
            done = True
        except Cut:
            done = False
        cut_at(None)
        steps = intact(run_dir)
        assert 1 in steps and 3 in steps and steps[-1] in (3, 4)
        save(run_dir, 5, 0.6)
        assert intact(run_dir) == [1, 4 if 4 in steps else 3, 5]
        assert sorted(p.name for p in (run_dir / "checkpoints").glob(".*")) == []
        if done:
            break
    assert 10 < n < 99, "the cuts did not reach the end of a save"


def test_saved_again_at_a_step_that_is_there(tmp_path, cut_at):
    for n in range(100):
        run_dir = tmp_path / str(n)
        save(run_dir, 1)
        save(run_dir, 2)
        cut_at(n)
        try:
            save(run_dir, 2)
            break
        except Cut:
            cut_at(None)
            assert intact(run_dir) in ([1], [1, 2])
    assert n > 10


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "noise"])
def test_any_damage_to_the_newest_falls_back_with_a_warning(tmp_path, name, damage):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / name
    data = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    else:
        data[len(data) // 2] ^= 255
        victim.write_bytes({"flip": data, "cut": data[:-20], "empty": b"", "noise": os.urandom(len(data))}[damage])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_checkpoint(tmp_path).step == 1
    seen = {"flip": name != "manifest.json", "gone": name != "manifest.json"}.get(damage, True)  # without its manifest it is no checkpoint
    assert len(caught) == 1 or not seen
    assert all("damaged" in str(w.message) and "step-00000002" in str(w.message) for w in caught)


def test_all_damaged_is_an_error_that_names_the_folder(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.pt").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="checkpoints: all 2 checkpoints are damaged"):
            load_checkpoint(tmp_path)


def test_a_limit_on_the_size_of_files_spares_the_previous_checkpoint(tmp_path):
    save(tmp_path, 1, size=100_000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))
    try:
        with pytest.raises(RunError, match="step-00000002: the checkpoint could not be written .File too large.; earlier"):
            save(tmp_path, 2, size=100_000)
        with pytest.raises(RunError, match="result.json: could not be written"):
            atomic_write(tmp_path / "result.json", "x" * 300_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert intact(tmp_path) == [1] and sorted(p.name for p in tmp_path.rglob("*.tmp")) == []


def test_a_full_file_system(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m none {small} 2>/dev/null"):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        save(small, 1, size=100_000)
        with pytest.raises(RunError, match="step-00000003.*No space left on device"):
            save(small, 2, size=100_000)
            save(small, 3, size=100_000)
        assert intact(small) == [1, 2]
    finally:
        os.system(f"umount {small}")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="checkpoints/step-00000001: the checkpoint could not be written"):
        save(tmp_path, 1)
    with pytest.raises(InputError, match="cannot be written to"), run_lock(tmp_path / "nowhere"):
        pass


def test_a_checkpoint_that_was_not_evaluated_is_never_the_best_of_some_that_were(tmp_path):
    for step, metrics in enumerate([{"val/loss": 3.0}, {}, {"val/loss": 2.0}, {}, {}, {}], 1):
        save_checkpoint(tmp_path, step, {"w": torch.full((8,), float(step))}, {"ptr": step}, metrics)
    assert intact(tmp_path) == [3, 5, 6] and load_checkpoint(tmp_path, "best").step == 3
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")
    assert load_checkpoint(tmp_path, "best").step == 6


def test_after_a_fallback_the_damaged_one_does_not_push_out_what_is_saved_next(tmp_path):
    save(tmp_path, 10, 1.0, keep=1)
    (save(tmp_path, 20, 1.2, keep=1) / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        found = load_checkpoint(tmp_path)
    checkpoint.remove_later(found)
    assert save(tmp_path, 15, 1.1, keep=1).exists() and intact(tmp_path) == [10, 15]


def test_the_best_is_kept_and_a_loss_that_is_no_number_is_never_it(tmp_path):
    for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 2.5, 1.5], 1):
        save(tmp_path, step, loss)
    assert intact(tmp_path) == [2, 5, 6]
    assert load_checkpoint(tmp_path, "best").step == 2 and load_checkpoint(tmp_path).step == 6
    with pytest.raises(InputError, match="which: 'newest' is not one of last, best"):
        load_checkpoint(tmp_path, "newest")


def test_sweeping_spares_everything_that_is_not_scratch(tmp_path):
    save(tmp_path, 1)
    atomic_write(tmp_path / "result.json", "{}")
    (tmp_path / ".lock").touch()
    (tmp_path / ".result.json.tmp").write_text("half")
    (tmp_path / "checkpoints" / ".step-00000009.old.tmp").mkdir()
    sweep_scratch(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [".lock", "result.json", "manifest.json", "model.safetensors", "state.pt"])


@pytest.fixture
def run_dir(tmp_path):
    """A folder as a run leaves it, with averaged weights."""
    small = [f"model_configs.gpt.{s}" for s in ["d_model=16", "hidden_layer=16", "n_layer=1"]]
    cfg = load_config(overrides=["hyperparams.context_length=16", *small])
    tokenizer = train_tokenizer(["Show HN: a title", "Ask HN: another one"] * 20, kind="bpe", vocab_size=300)
    model = build_model(cfg, tokenizer.vocab_size)
    save_config(cfg, tmp_path / "config.yaml")
    tokenizer.save(tmp_path / "tokenizer")
    average = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    save_checkpoint(tmp_path, 7, model.state_dict(), {"ema": average}, {"val/loss": 1.0})
    return tmp_path


def test_a_run_loads_with_its_average(run_dir):
    cfg, model, tokenizer = load_run(run_dir)
    assert cfg.hyperparams.context_length == 16 and tokenizer.decode(tokenizer.encode("Show HN")) == "Show HN"
    assert not model.training and all(bool((p == 0).all()) for p in model.parameters())


def test_a_run_whose_parts_do_not_fit_is_refused_in_one_line(run_dir):
    save_config(load_config(run_dir / "config.yaml", ["model_configs.gpt.n_layer=2"]), run_dir / "config.yaml")
    with pytest.raises(InputError, match="step-00000007: does not fit the model of config.yaml") as e:
        load_run(run_dir)
    assert "\n" not in str(e.value)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet"):
        load_run(run_dir)


def test_manifests_are_plain_json(tmp_path):
    manifest = json.loads((save(tmp_path, 3, loss=1.25) / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["metrics"] == {"val/loss": 1.25}
    assert set(manifest["sha256"]) == {"model.safetensors", "state.pt"}
