"""What the cases do: the smallest run, the smallest sweep, and every console command with arguments for them."""
import io
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import yaml
from tqdm import tqdm

SMALLEST = ["data.source=synthetic", "tokenizer.kind=bpe", "tracking.backends=[silent]", "attn_configs.causal.n_head=2",
            *(f"hyperparams.{s}" for s in ("num_titles=300", "vocab_size=300", "epochs=1", "context_length=16", "batch_size=4",
                                           "max_steps=6", "save_every=2", "keep_checkpoints=3", "evals_per_epoch=1", "device=cpu",
                                           "optimizer=adamw", "lr=0.003")),
            *(f"model_configs.gpt.{s}" for s in ("d_model=16", "hidden_layer=16", "n_layer=1"))]
OTHER = ["hyperparams.seed=5", "hyperparams.num_titles=320"]  # another run: other weights, titles and tokenizer, all of the same shape
RATES, OTHER_RATES = (0.003, 0.01), (0.004, 0.02)  # of the two trials of the sweep, and of another one
SEARCH = {"method": "grid", "metric": {"name": "val/loss", "goal": "minimize"}}


def write_inputs(folder: Path) -> None:
    """The files that the commands are given."""
    tree: dict = {}
    for key, value in (item.split("=") for item in SMALLEST):
        node = tree
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = yaml.safe_load(value)
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    for name, rates in (("search.yaml", RATES), ("other.yaml", OTHER_RATES)):
        (folder / name).write_text(yaml.safe_dump({**SEARCH, "parameters": {"hyperparams.lr": {"values": list(rates)}}}))


# Each console command, on a folder `run` or `sweep` beside the inputs. A command that is not here fails test_harness.py.
COMMANDS = {
    "mainrun-train": ["--config", "small.yaml", "--out", "run", "--resume"],
    "mainrun-eval": ["run"],
    "mainrun-generate": ["run", "--n", "3"],
    "mainrun-memory": ["--config", "small.yaml"],
    "mainrun-sweep": ["search.yaml", "--config", "small.yaml", "--out", "sweep", "--fast", "--resume", "--promote", "best"],
    "mainrun-report": ["run"],
    "mainrun-eda": ["--config", "small.yaml", "--out", "eda"],
    "mainrun-gpu": [],
    "mainrun-check": ["run"],
    "mainrun-export": ["run", "exported"],
    "mainrun-configs": [],
}
SWEEP = COMMANDS["mainrun-sweep"]


def prepared_trials(folder: str) -> None:
    """Let trials be copies of runs that are there already, `folder/RATE`: the scheduler's own files are what a sweep's cases are about."""
    from mainrun_nb import trials

    def trial_command(where: Path, base: str, overrides: list[str], *more: object) -> list[str]:
        rate = next(float(o.split("=")[1]) for o in overrides if o.startswith("hyperparams.lr="))
        code = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
        return [sys.executable, "-I", "-S", "-c", code, f"{folder}/{rate}", str(where / "run")]

    assert trials.watch_trial.__globals__["trial_command"] is trials.trial_command, "trials are started otherwise: let them be copies anew"
    trials.trial_command = trial_command


def executed_here(source: str, target: str, parameters: dict, **more: object) -> None:
    """A stand-in for papermill's execute_notebook: the notebook's code in this process, its copy written, errors as papermill's."""
    import IPython.display
    from papermill import PapermillExecutionError

    IPython.display.display = lambda *things, **more: None
    notebook, names = json.loads(Path(source).read_text()), {}
    for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        code = "".join(line for line in cell["source"] if not line.startswith("%"))
        try:
            with redirect_stdout(io.StringIO()):
                exec(code, names)
        except Exception as e:
            raise PapermillExecutionError(number, number, code, type(e).__name__, str(e), traceback.format_exc()) from None
        names.update(parameters if "parameters" in cell["metadata"].get("tags", []) else {})
    notebook["metadata"]["papermill"] = {"parameters": parameters}  # by which a second report knows the notebook for its own
    Path(target).write_text(json.dumps(notebook))


def export() -> None:
    """The export, where there is no command for it."""
    from mainrun_nb.checkpoint import load_run
    from mainrun_nb.cli import for_people
    from mainrun_nb.hub import export_gpt2

    with for_people("mainrun-export"):
        print(export_gpt2(*load_run("run")[1:], "exported"))


def half(run: Path) -> None:
    """Make a finished run one that was killed after its second last checkpoint."""
    for name in ("result.json", "samples.txt", "curves.png"):
        (run / name).unlink()
    shutil.rmtree(sorted((run / "checkpoints").glob("step-*"))[-1])


def many_configs() -> None:
    """configs.many, as a command."""
    import configs

    configs.many(*sys.argv[1:])


def killed_while_it_draws() -> None:
    """A command that is killed while it holds the lock of the progress bars."""
    with tqdm.get_lock():
        os.kill(os.getpid(), signal.SIGKILL)


def nothing() -> None:
    """A command that does nothing: whether a fault could be planted."""
