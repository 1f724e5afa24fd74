"""Training steps of two checkouts in turn: how much faster one commit of this project trains than another, and whether it learns the same.

    git worktree add --detach /tmp/before 7c75a36
    HN_TITLES=titles.txt.gz python benchmarks/commits.py /tmp/before        -> benchmarks/results/commits.json

Each checkout trains this one's sweeps/sota/small_first.yaml in a process of its own, from the same seed on the same tokens; the two take
turns, a step each, round after round. A ratio is the median of the rounds' ratios. The clock is CPU seconds where there is one thread (a
busy neighbour hardly changes them), seconds otherwise. The losses are compared twice: without dropout, where every step's should agree,
and with it, where the two draw other bits and only the mean over the steps can. `--set KEY=VALUE` changes the recipe in both.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "sweeps/sota/small_first.yaml"
PLAIN = "model_configs.gpt.dropout=0"


def serve(tokens: str, threads: int, settings: list[str]) -> None:
    "Train a step for each line that comes, and answer with its seconds and its loss; the package is that of the working folder."
    import torch

    from mainrun_nb import trainer
    from mainrun_nb.config import load_config

    torch.set_num_threads(threads)
    ids, cfg = torch.load(tokens), load_config(ROOT / CONFIG, ["data.source=synthetic", *settings])
    hp, clock = cfg.hyperparams, time.process_time if threads == 1 else time.perf_counter
    state = trainer.make_state(cfg, hp.vocab_size, torch.device("cpu"))
    batches = getattr(trainer, "Batches", lambda ids, hp: ids)(ids, hp)  # older commits take the stream itself
    with trainer.freed_memory_kept():
        for _ in sys.stdin:
            began = clock()
            taken = trainer.take_step(state, state.model, batches, slice(None), hp, 1000)
            row = trainer.read_steps([taken])[0]
            print(json.dumps([clock() - began, row["train/loss"]]), flush=True)


class Trainee:
    "A process that trains in one checkout."

    def __init__(self, where: Path, tokens: str, threads: int, settings: list[str]) -> None:
        env = {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", tokens, "--threads", str(threads), "--set", *settings]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=where, env=env, stdin=pipe, stdout=pipe, text=True)

    def step(self) -> tuple[float, float]:  # seconds, loss
        "One step of training."
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, loss = json.loads(self.process.stdout.readline())
        return seconds, loss

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def tokens_file(where: Path) -> None:
    "Training tokens, of synthetic titles where HN_TITLES names none, by a BPE tokenizer, which is trained faster than the recipe's own."
    import torch

    from mainrun_nb.config import load_config
    from mainrun_nb.data import load_titles, split_titles, token_stream
    from mainrun_nb.tokenizer import train_tokenizer

    cfg = load_config(ROOT / CONFIG, ["hyperparams.num_titles=20000", f"data.source={os.environ.get('HN_TITLES') or 'synthetic'}"])
    train, _ = split_titles(load_titles(cfg), cfg)
    torch.save(token_stream(train, train_tokenizer(train, [], "bpe", cfg.hyperparams.vocab_size)), where)


def compare(before: Path, tokens: str, threads: int, rounds: int, settings: list[str]) -> dict:
    "Both checkouts, a step each in turn; the first three rounds are not timed."
    pair = [Trainee(where, tokens, threads, settings) for where in (before, ROOT)]
    rows = [[t.step() for t in pair] for _ in range(rounds + 3)]
    for t in pair:
        t.close()
    timed, (old, new) = rows[3:], ([row[i][1] for row in rows] for i in (0, 1))
    seconds = [median(row[i][0] for row in timed) for i in (0, 1)]
    return {"ratio": round(median(a[0] / b[0] for a, b in timed), 3), "before_ms": round(1e3 * seconds[0], 1),
            "now_ms": round(1e3 * seconds[1], 1), "rounds": rounds, "last_losses": [round(x[-1], 4) for x in (old, new)],
            "largest_loss_difference": max(abs(a - b) for a, b in zip(old, new, strict=True)),
            "mean_loss_difference": mean(new) - mean(old)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout; default: this one, so that the ratio should be 1")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "commits.json")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.threads, args.set)
    before = (args.before or ROOT).resolve()
    with tempfile.TemporaryDirectory() as folder:
        tokens_file(tokens := Path(folder) / "tokens.pt")
        found = {name: compare(before, str(tokens), args.threads, args.rounds, [*more, *args.set])
                 for name, more in {"as configured": [], "without dropout": [PLAIN]}.items()}
    for name, row in found.items():
        print(f"{name:16s} {row['before_ms']:8.1f} ms -> {row['now_ms']:8.1f} ms, {row['ratio']:.3f}x; losses differ by "
              f"{row['largest_loss_difference']:.1e} at most, {row['mean_loss_difference']:+.1e} on average")
    commit = ["git", "rev-parse", "--short", "HEAD"]
    names = [subprocess.run(commit, cwd=d, capture_output=True, text=True).stdout.strip() for d in (before, ROOT)]
    import torch

    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": args.threads, "load": os.getloadavg(),
               "clock": "CPU seconds" if args.threads == 1 else "seconds", "torch": torch.__version__, "python": platform.python_version()}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"commits": names, "config": CONFIG, "set": args.set, **found, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
