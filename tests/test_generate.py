"""Writing titles against a sampler in plain Python, Hugging Face's limits, and the promise of the stream."""
import math
import os
import random
import select
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mainrun_nb.checkpoint import load_run
from mainrun_nb.config import InputError, tiny
from mainrun_nb.generate import choose, generate, kept, stream_title, write_titles
from mainrun_nb.models import build_model
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import KINDS, Tokenizer, train_tokenizer
from mainrun_nb.trainer import train

ROOT = Path(__file__).resolve().parents[1]


# --- the draw ---


def plain_sampler(logits: list[float], temperature: float, topk: int, topp: float) -> dict[int, float]:
    "The probability of each token that may be drawn, by the definition: p is a share of the full distribution."
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return {ranked[0]: 1.0}
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in ranked]
    kept, before, whole = {}, 0.0, math.fsum(weights)
    for rank, (i, weight) in enumerate(zip(ranked, weights, strict=True)):
        if topk and rank >= topk or topp < 1 and before >= topp:
            break
        kept[i] = weight
        before += weight / whole
    return {i: weight / math.fsum(kept.values()) for i, weight in kept.items()}


def unlikely(counts: Counter, probs: dict[int, float], n: int) -> float:
    "The probability of a chi-square at least as large as this; tokens expected less than 5 times are counted together."
    rare = [i for i in probs if probs[i] * n < 5]
    bins = [(counts[i], probs[i] * n) for i in probs if i not in rare]
    if sum(probs[i] for i in rare) * n >= 5:
        bins.append((sum(counts[i] for i in rare), sum(probs[i] for i in rare) * n))
    if len(bins) < 2:
        return 1.0
    chi2 = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    return torch.special.gammaincc(torch.tensor((len(bins) - 1) / 2).double(), torch.tensor(chi2 / 2).double()).item()


SHAPES = {
    "random": torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2,
    "ties": torch.tensor([0.0, 1, 1, 1, 2, 2, 0, 0, 3, 3, 3, -1]),
    "equal": torch.zeros(10),
    "steep": torch.tensor([20.0, 0, 0, 0, -5, 1]),  # the first has all the mass that float32 can tell from 1
    "one": torch.tensor([0.5]),
    "impossible": torch.tensor([1.0, -math.inf, 2, -math.inf, 0]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0, 0.3, 1, 2.5])
def test_draws_have_the_distribution_of_the_plain_sampler(shape, temperature):
    logits, n = SHAPES[shape], 4_000
    for topk in (0, 1, 2, 5, len(logits), len(logits) + 7):
        for topp in (1.0, 0.999, 0.9, 0.55, 0.3, 1e-9):
            probs = plain_sampler(logits.tolist(), temperature, topk, topp)
            drawn = choose(logits.expand(n, -1), temperature, topk, topp, torch.Generator().manual_seed(1))
            counts, case = Counter(drawn.tolist()), f"topk={topk} topp={topp}"
            assert set(counts) <= {i for i, p in probs.items() if p > 0}, case
            assert {i for i, p in probs.items() if p * n > 30} <= set(counts), case
            assert unlikely(counts, probs, n) > 1e-6, case


def test_what_may_be_drawn_is_exactly_what_the_plain_sampler_keeps():
    "400 distributions, peaked and flat, with and without ties."
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(400):
        logits = torch.randn(rng.choice([2, 7, 50]), generator=generator) * rng.choice([0.1, 1, 5, 15])
        logits = logits.round() if rng.random() < 0.4 else logits
        topk, topp = rng.choice([0, 1, 3, 20, 99]), rng.choice([1.0, rng.random() + 1e-9, 0.9, 0.5])
        ranked, order = logits[None].sort(descending=True, stable=True)
        found = set(order[kept(ranked, topk, topp)].tolist())
        assert found == set(plain_sampler(logits.tolist(), 1.0, topk, topp)), (logits, topk, topp)


def test_topk_alone_keeps_tokens_that_float32_cannot_tell_from_nothing():
    "With p = 1 nothing is cut off by the mass: it reaches 1 in float32 long before the last token."
    ranked = torch.tensor([[40.0, 5, 4, 3, 2, 1]])
    assert kept(ranked, 4, 1.0).sum() == 4 and kept(ranked, 0, 1.0).all() and kept(ranked, 99, 1.0).all()


def test_the_lower_id_wins_a_tie_and_topk_keeps_exactly_k():
    logits = torch.zeros(1, 3_000)
    for k in (1, 7, 2_999):
        drawn = choose(logits.expand(3_000, -1), topk=k, generator=torch.Generator().manual_seed(0))
        assert drawn.max() < k
    assert choose(logits, temperature=0).item() == 0


def test_temperature_0_is_greedy_whatever_the_limits():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for limits in ({}, {"topk": 1}, {"topk": 99}, {"topp": 0.01}, {"topk": 3, "topp": 0.5}):
        for temperature in (0, -0.0, 1e-9):
            assert choose(logits, temperature, **limits).equal(logits.argmax(-1))
        with pytest.raises(InputError, match="topp"):  # and still checked
            choose(logits, 0, topp=0)


def test_each_limit_alone_is_hugging_faces_and_both_keep_at_least_as_many():
    "There, p is a share of what top-k left."
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(200, 60, generator=torch.Generator().manual_seed(0)) * 3
    ranked, order = logits.sort(descending=True, stable=True)

    def ours(topk, topp):
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, kept(ranked, topk, topp))

    more = 0
    for topk, topp in [(1, 0.9), (3, 0.5), (10, 0.7), (60, 0.95), (99, 0.2)]:
        by_k = processors.TopKLogitsWarper(topk)(None, logits)
        assert ours(topk, 1.0).equal(by_k.isfinite())
        assert ours(0, topp).equal(processors.TopPLogitsWarper(topp)(None, logits).isfinite())
        assert ours(topk, topp).equal(ours(topk, 1.0) & ours(0, topp))  # what each keeps alone
        both = processors.TopPLogitsWarper(topp)(None, by_k).isfinite()
        assert (both <= ours(topk, topp)).all()
        more += int((ours(topk, topp) & ~both).sum())
    assert more > 0


# --- the stream ---


class Reciter:
    "A model that continues any prompt with the same tokens."

    eos_id, context_length, device = 1, 400, torch.device("cpu")

    def __init__(self, ids, vocab_size):
        self.ids, self.one_hot = [*ids, 1], torch.eye(vocab_size)

    def make_cache(self, n):
        return iter(self.ids)

    def features(self, idx, cache):
        return self.one_hot[next(cache)].expand(len(idx), 1, -1)

    def logits(self, hidden, cache=None):
        return hidden

    def eval(self):
        return self


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    titles = [f"{title} naïve 😀 日本" if n % 9 == 0 else title for n, title in enumerate(sample_titles(900, 0))]
    return {kind: train_tokenizer(titles, (), kind, 600) for kind in KINDS}


PROMPTS = ["", "Show HN: A fas", "caf", "日", "👩‍", " ", "two  spaces ", "a\nb\x85c\u2028d", "\ufffd", "<eos> x", "\0\x1b[31m", "e\u0301"]


def check_stream(model, tokenizer, prompt, **kwargs):
    "Each text begins with the one before and is longer, the last is the title, and all are one line."
    shown = list(stream_title(model, tokenizer, prompt, **kwargs))
    assert shown[-1:] == write_titles(model, tokenizer, prompt, 1, **kwargs)
    for one, two in zip(shown, shown[1:], strict=False):
        assert two.startswith(one) and len(two) > len(one)
    assert len(shown[-1].splitlines()) <= 1 and shown[-1] == " ".join(shown[-1].split())
    return shown


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_a_growing_prefix_of_the_title(trained, kind):
    "Random ids (bytes that are no UTF-8, specials in the middle, spaces) and cut-up text, after prompts that end anywhere."
    tokenizer, rng = trained[kind], random.Random(0)
    pieces = ["😀", "é", " ", "\n", "日本", "\ufffd", "👨‍👩‍👧", "word", "<eos>", "e\u0301", "\t", "\u3000", "עברית"]
    for round_ in range(150):
        if round_ % 2:
            ids = [rng.choice([rng.randrange(3, 259), rng.randrange(tokenizer.vocab_size)]) for _ in range(rng.randrange(30))]
            ids = [i if i < tokenizer.vocab_size else 3 for i in ids]
        else:
            ids = tokenizer.encode("".join(rng.choices(pieces, k=rng.randrange(1, 8))))
            ids = ids[: rng.randrange(1, len(ids) + 1)]
        most = rng.choice([None, None, 1, 3])
        check_stream(Reciter(ids, tokenizer.vocab_size), tokenizer, rng.choice(PROMPTS), temperature=0, max_tokens=most)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "cased"])
def test_an_emoji_appears_whole(kind, trained):
    tokenizer = train_tokenizer(sample_titles(100, 0), (), kind, 300)  # it has seen no emoji
    shown = check_stream(Reciter(tokenizer.encode("a 😀 b"), tokenizer.vocab_size), tokenizer, "", temperature=0)
    assert [text for text in shown if "\ufffd" in text] == [] and shown[-1] == "a 😀 b"
    cut = tokenizer.encode("a 😀")[:-1]
    shown = check_stream(Reciter(cut, tokenizer.vocab_size), tokenizer, "", temperature=0)
    assert shown[-1] == "a \ufffd" and "\ufffd" not in "".join(shown[:-1])


def test_a_title_that_ends_at_once_is_shown(trained):
    for prompt, text in {"": "", "Show HN: ": "Show HN:"}.items():
        assert check_stream(Reciter([], 600), trained["bpe"], prompt, temperature=0) == [text]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_of_a_real_model_is_what_is_written(trained, kind):
    "Same seed, same title, dropout or not; a model without training writes bytes of all kinds."
    tokenizer = trained[kind]
    model = build_model(tiny("hyperparams.context_length=48", "model_configs.gpt.dropout=0.5"), tokenizer.vocab_size)
    for seed, prompt in enumerate(PROMPTS):
        model.train()
        options = dict(temperature=1.3, topk=200, topp=0.98)
        shown = list(stream_title(model, tokenizer, prompt, generator=torch.Generator().manual_seed(seed), **options))
        assert shown[-1:] == write_titles(model, tokenizer, prompt, 1, seed, **options)


# --- prompts that are no text ---


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train(tiny(f"tokenizer.kind={request.param}", "hyperparams.max_steps=2"), folder / "run", progress=False)
    return folder / "run"


BAD = {"caf\udcc3": "byte 0xc3", "\ud83d": "surrogate", "\ude00 x": "surrogate", None: "None, not text", b"caf\xc3": "not text", 7: "7"}


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_prompt_that_is_no_text_is_one_line(run, bad):
    _, model, tokenizer = load_run(run)
    for call, given in ((generate, (run,)), (write_titles, (model, tokenizer)), (stream_title, (model, tokenizer))):
        with pytest.raises(InputError) as caught:
            list(call(*given, prompt=bad))
        message = str(caught.value)
        assert message.startswith("prompt") and BAD[bad] in message and "\n" not in message
        message.encode()  # can itself be written


def test_the_command_refuses_half_a_character(run):
    code = "import sys; from mainrun_nb.cli import generate_cli; sys.argv[0] = 'mainrun-generate'; generate_cli()"
    env = os.environ | {"LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(run), "--prompt", b"caf\xc3", "--n", "1"], env=env, capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode().splitlines() == [
        "mainrun-generate: prompt holds half a surrogate pair, '\\udcc3' at character 4, which is not valid Unicode "
        "(the byte 0xc3, which is not UTF-8)"]


def test_controls_in_a_prompt_are_text_and_a_title_stays_one_line(run):
    for prompt in PROMPTS:
        for title in generate(run, prompt, 3, max_tokens=6):
            assert len(title.splitlines()) <= 1
            assert Path(run).parent.name.startswith("challenge") or title.startswith(" ".join(prompt.split()))


# --- as you type ---


CHAT = "import sys; from mainrun_nb.cli import generate_cli; sys.argv[0] = 'mainrun-generate'; generate_cli()"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    "A run whose titles are long, since it has learned next to nothing."
    folder = tmp_path_factory.mktemp("chat") / "run"
    short = ("hyperparams.max_steps=2", "hyperparams.context_length=256", "hyperparams.batch_size=1", "hyperparams.num_titles=300")
    train(tiny(*short), folder, progress=False)
    return folder


def test_piped_lines_are_completed_one_a_line(spoken):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHAT, str(spoken), "--chat", "--temperature", "0.5"]
    done = subprocess.run(command, input=b"Show HN:\n\nA \x1b[2J title", env=env, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3 and lines[0].startswith("Show HN:") and lines[2].startswith(r"A \x1b[2J title") and b"\x1b" not in done.stdout
    env |= {"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, input=b"fine\ncaf\xe9\n", env=env, capture_output=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and done.stderr.startswith(b"mainrun-generate: "), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of Unix")
def test_at_a_terminal_ctrl_c_stops_a_title_and_ctrl_d_ends(spoken):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
        os.execv(sys.executable, [sys.executable, "-c", CHAT, str(spoken), "--chat", "--n", "500"])  # there is always one to stop
    seen = b""

    def until(words: bytes) -> bytes:
        "What the terminal shows up to these words."
        nonlocal seen
        while words not in seen:
            assert select.select([terminal], [], [], 120)[0], f"waited for {words!r}, saw {seen!r}"
            seen += os.read(terminal, 4096)
        shown, _, seen = seen.partition(words)
        return shown

    assert b"Ctrl-D ends" in until(b"> ")
    for typed in (b"Show HN:\n", b"\x1b[A\n"):  # the arrow brings the line before
        os.write(terminal, b"half a line")
        until(b"half a line")  # readline is listening
        # CPython's readline misses a signal that comes between reading a character and waiting for the next;
        # a person presses Ctrl-C again then, and so does this.
        os.write(terminal, b"\x03")  # dropped
        while not select.select([terminal], [], [], 2)[0]:
            os.write(terminal, b"\x03")
        until(b"> ")
        os.write(terminal, typed)
        until(b"Show HN:")  # as it is typed
        until(b"Show HN:")  # a title begins
        os.write(terminal, b"\x03")
        until(b"mainrun-generate: stopped")
        until(b"> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
