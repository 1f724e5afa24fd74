"""Tokenizers side by side: training, and encoding against Hugging Face's own encoder, one thread each.

    HN_TITLES=titles.txt.gz python benchmarks/tokenizer.py      -> benchmarks/results/tokenizer.json
    python benchmarks/tokenizer.py --titles 20000 --rounds 3     synthetic titles where HN_TITLES is unset

Every encoder turns the same titles into one numpy array of ids, each title followed by `<eos>`. The contenders of a group take
turns, round after round; a figure is the median of the rounds, a ratio is the median of the rounds' ratios. Hugging Face is called
in each way it offers: the challenge's one long string, title by title, and in batches; the budget is held against its fastest call.
Group `challenge` compares tokenizers with identical ids (checked). All of that runs in a process limited to one thread and is
measured in CPU seconds, which a busy neighbour does not change; a second process then measures the same with all of the machine's
cores, in seconds on the wall, where Hugging Face's batch calls use them.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGET = dict(encode_ratio=4.0, train_seconds=2.0)  # at least, at most


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    "Seconds of each contender in each round, after one round to warm up: of CPU with one thread, on the wall with more."
    clock = time.process_time if os.environ["RAYON_NUM_THREADS"] == "1" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if i:
                times[name].append(clock() - start)
    return times


def hugging_face_calls(original: Any, titles: list[str]) -> dict[str, Callable[[], Any]]:
    "The ways to get the stream of ids out of a Hugging Face tokenizer whose id 1 is `<eos>`."
    import numpy as np

    def stream(encodings: Any) -> Any:
        ids: list[int] = []
        for one in encodings:
            ids += one.ids
            ids.append(1)
        return np.array(ids, dtype=np.int32)

    return {
        "hf encode, one string": lambda: np.array(original.encode("<eos>".join(titles) + "<eos>").ids, dtype=np.int32),
        "hf encode, title by title": lambda: stream(original.encode(title) for title in titles),
        "hf encode_batch": lambda: stream(original.encode_batch(titles)),
        "hf encode_batch_fast": lambda: stream(original.encode_batch_fast(titles)),
    }


def load(n: int) -> tuple[list[str], str]:
    "The titles and the name of their source."
    from mainrun_nb.config import load_config
    from mainrun_nb.data import load_titles

    source = os.environ.get("HN_TITLES", "synthetic")
    titles = load_titles(load_config(overrides=[f"data.source={source}", f"hyperparams.num_titles={n}"]))
    return titles, "synthetic" if source == "synthetic" else "real titles (HN_TITLES)"


def worker(args: argparse.Namespace) -> dict[str, Any]:
    "All measurements at this process's number of threads."
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mainrun_nb import tokenizer as tk

    titles, source = load(args.titles)
    cut = len(titles) * 9 // 10
    train = {
        f"{kind}, {n:,} titles": take_turns({"": lambda kind=kind, some=some: tk.train_tokenizer(some, (), kind, 16_000)}, rounds)[""]
        for kind, some, n, rounds in [("bpe", titles, len(titles), min(args.rounds, 3)), ("challenge", titles, len(titles), 1),
                                      ("unigram", titles[:cut], cut, 1 if args.unigram else 0)]
        if rounds
    }
    original = tk.train_challenge(titles, 16_000)
    ours = tk.ChallengeTokenizer(tk.challenge_tokens(original))
    bpe = tk.train_tokenizer(titles, (), "bpe", 16_000)
    same = np.array_equal(ours.encode_titles(titles), hugging_face_calls(original, titles)["hf encode, one string"]())
    groups = {"challenge": {"ours": lambda: ours.encode_titles(titles), "ours, kind bpe": lambda: bpe.encode_titles(titles)}
              | hugging_face_calls(original, titles)}
    if args.unigram:
        uni = tk.train_tokenizer(titles[:cut], (), "unigram", 16_000)
        rival = Tokenizer(models.Unigram(list(zip(map(tk.disguise, uni.tokens), [-99.0] * 3 + uni.scores, strict=True))))
        rival.pre_tokenizer = pre_tokenizers.ByteLevel()
        calls = hugging_face_calls(rival, titles)
        groups["unigram"] = {"ours": lambda: uni.encode_titles(titles)} | {k: calls[k] for k in ("hf encode_batch", "hf encode_batch_fast")}
    encode = {name: take_turns(contenders, args.rounds) for name, contenders in groups.items()}
    stream = len(ours.encode_titles(titles))
    return dict(source=source, titles=len(titles), megabytes=sum(len(t.encode()) for t in titles) / 1e6, tokens=stream,
                ids_identical=bool(same), train_s=train, encode_s=encode)


def spawn(threads: int, args: argparse.Namespace) -> dict[str, Any]:
    "The worker's answer from a process of its own, with so many threads."
    env = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    command = [sys.executable, __file__, "--worker", "--titles", str(args.titles), "--rounds", str(args.rounds)]
    out = subprocess.run(command + ["--unigram"] * args.unigram, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    "Medians, and the rounds' median ratios to ours."
    encode = {}
    for group, times in found["encode_s"].items():
        encode[group] = {name: dict(median_s=round(median(t), 4), mb_per_s=round(found["megabytes"] / median(t), 2),
                                    ratio=round(median(a / b for a, b in zip(t, times["ours"], strict=True)), 2))
                         for name, t in times.items()}
    return found | dict(megabytes=round(found["megabytes"], 3), encode_s=encode,
                        train_s={name: round(median(t), 3) for name, t in found["train_s"].items()})


def main() -> int:
    "Measure, print, write the JSON; 1 if a budget is missed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--titles", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unigram", action="store_true", help="measure the unigram kind as well (minutes)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return 0
    one = summary(spawn(1, args))
    many = summary(spawn(os.cpu_count() or 1, argparse.Namespace(**vars(args) | dict(unigram=False, rounds=min(args.rounds, 3)))))
    rivals = {name: row["ratio"] for name, row in one["encode_s"]["challenge"].items() if name.startswith("hf")}
    fastest = min(rivals, key=rivals.__getitem__)
    seconds = next(s for name, s in one["train_s"].items() if name.startswith("bpe"))
    verdict = {
        "ids identical to Hugging Face's": one["ids_identical"],
        f"encoding >= {BUDGET['encode_ratio']}x ({fastest}, one thread each)": [rivals[fastest], rivals[fastest] >= BUDGET["encode_ratio"]],
        f"16k BPE trained in <= {BUDGET['train_seconds']} s (one thread, CPU)": [seconds, seconds <= BUDGET["train_seconds"]],
    }
    versions = {p: importlib.metadata.version(p) for p in ("tokenizers", "tiktoken", "rustbpe", "numpy")}
    machine = dict(cpu=cpu(), cores=os.cpu_count(), load=os.getloadavg(), python=platform.python_version(), **versions)
    RESULTS.mkdir(exist_ok=True)
    result = dict(verdict=verdict, one_thread=one, all_cores=many, machine=machine)
    (RESULTS / "tokenizer.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if all(v if isinstance(v, bool) else v[1] for v in verdict.values()) else 1


def cpu() -> str:
    "The processor's name."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
