"""What a sweep costs beside the training itself: overhead of a papermill trial, and trials per hour with one and two workers.

    python benchmarks/sweep.py        writes benchmarks/results/sweep.json; --only PART measures one part of it again

Overhead: the wall time of one trial as the sweep runs it (a process, papermill, a kernel, the imports, the run), less that of the same
run by `mainrun-train` in a process of its own, and less that of the same run called from a Python that has everything imported already.
The budget is 3 s above the former. All three in turn, several times; medians, of the overheads those of the differences within a turn.

Scheduler: processor seconds that the sweep itself takes for a trial, in a random sweep of two thousand whose runs are pretended: they end
at once, with a log and a result such as a real run writes. The mean of a hundred trials at the start and of a hundred at the end; the
budget is 0.2 s for each. All that a trial costs is in it, its examination too, but not its process.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BASE = """
hyperparams: {num_titles: 5000, vocab_size: 1000, epochs: 9, context_length: 64, batch_size: 16, optimizer: adamw, lr: 0.003,
              max_steps: STEPS, evals_per_epoch: 2, device: cpu}
model_configs: {gpt: {d_model: 64, hidden_layer: 64, n_layer: 2, dropout: 0.0}}
attn_configs: {causal: {n_head: 4}}
data: {source: synthetic}
tokenizer: {kind: bpe}
"""
FAST = "from sys import argv as a; from mainrun_nb.cli import train_cli; train_cli(config=a[1], out=a[2])"


def timed(work) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overhead(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds of a trial as a notebook, as a process, and from Python."""
    from mainrun_nb.config import load_config
    from mainrun_nb.sweep import watch_trial
    from mainrun_nb.trainer import train

    base, env = str(folder / "base.yaml"), {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    times: dict[str, list[float]] = {"notebook": [], "process": [], "python": []}
    train(load_config(base), folder / "warm", progress=False)
    for i in range(repeats):
        for name in ("notebook", "process"):
            where = folder / f"{name}{i}"
            where.mkdir()
            times[name].append(timed(lambda w=where, n=name: watch_trial(str(w), base, [], n == "process", env)))
            assert (where / "run" / "result.json").exists(), (where / "trial.log").read_text()[-2000:]
        times["python"].append(timed(lambda n=i: train(load_config(base), folder / f"python{n}", progress=False)))
    medians = {name: statistics.median(t) for name, t in times.items()}
    over = {f"overhead_over_{name}": statistics.median(n - t for n, t in zip(times["notebook"], times[name], strict=True))
            for name in ("process", "python")}
    return {**medians, **over, "turns": times}


class Instant:
    """An engine whose trials have ended when they are started."""

    here = True

    def __init__(self, jobs, address=None, gpus=()):
        self.times: list[float] = []  # of the process, at the start of each trial

    def submit(self, folder, base, overrides, fast):
        self.times.append(time.process_time())
        run, done = Path(folder) / "run", Future()
        run.mkdir(exist_ok=True)
        losses = [3.0 / (1 + i) for i in range(5)]
        (run / "metrics.jsonl").write_text("".join(
            json.dumps({"event": "validation_step", "step": i, "val/loss": loss}) + "\n" for i, loss in enumerate(losses)))
        (run / "result.json").write_text(json.dumps({"val/loss": losses[-1], "val/coverage": 1.0, "data": {}}))
        done.set_result({"status": "complete", "error": "", "seconds": 0.0})
        return done

    def close(self):
        ENDED.append(self)


ENDED: list[Instant] = []


def scheduler(folder: Path, trials: int, method: str) -> dict[str, float]:
    """Processor seconds a trial, of the first hundred after the start and of the last hundred."""
    from mainrun_nb import sweep

    search = folder / f"{method}.yaml"
    search.write_text(f"method: {method}\nparameters: {{hyperparams.lr: {{distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}}}}")
    sweep.ENGINES["instant"] = Instant
    board = sweep.run_sweep(search, folder / "base.yaml", folder / method, trials=trials, jobs=8, engine="instant",
                            fast=True, progress=False)  # eight at a time: one wait of the loop for eight trials
    assert board.counts == {"complete": trials}
    at, few = ENDED.pop().times, min(100, trials // 2 - 1)
    mean = (at[-1] - at[0]) / (trials - 1)
    return {"trials": trials, "start": (at[few] - at[0]) / few, "end": (at[-1] - at[-1 - few]) / few, "all": mean}


def pace(folder: Path, jobs: int, trials: int, fast: bool) -> float:
    """Trials per hour of a sweep in a process of its own."""
    search = folder / "search.yaml"
    search.write_text("method: random\nparameters: {hyperparams.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}}")
    code = ("import sys; from mainrun_nb.sweep import run_sweep; s, b, o, n, j, f = sys.argv[1:]; "
            "board = run_sweep(s, b, o, trials=int(n), jobs=int(j), fast=f == 'True', progress=False); "
            "assert board.counts == {'complete': int(n)}")
    paths = [str(search), str(folder / "base.yaml"), str(folder / f"sweep{jobs}{fast}")]
    command = [sys.executable, "-c", code, *paths, str(trials), str(jobs), str(fast)]
    return 3600 * trials / timed(lambda: subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition, two trials")
    parser.add_argument("--only", choices=["seconds", "scheduler", "trials_per_hour"], help="one part; the others of the file are kept")
    parser.add_argument("--trials", type=int, default=2000, help="pretended ones, whose scheduling is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "sweep.json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps, plan = (50, [("fast", True, 2)]) if args.quick else (200, [("notebook", False, 4), ("fast", True, 4)])
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        (folder / "base.yaml").write_text(BASE.replace("STEPS", str(steps)))
        parts = {"seconds": lambda: overhead(folder, 1 if args.quick else 5),
                 "scheduler": lambda: scheduler(folder, 20 if args.quick else args.trials, "random"),
                 "trials_per_hour": lambda: {f"{name}, {j} workers": pace(folder, j, n, fast) for name, fast, n in plan for j in (1, 2)}}
        measured = {name: part() for name, part in parts.items() if args.only in (None, name)}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
               "load": round(os.getloadavg()[1], 1)}  # where it is above the cores, wall times are those of a busy machine
    kept = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    text = json.dumps({**kept, "machine": machine, "steps": steps, **measured}, indent=1)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
