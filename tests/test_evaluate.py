"The honest loss, the challenge's, and the floor, on more shapes than the chapter shows."

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mainrun_nb.config import InputError, RunError, tiny
from mainrun_nb.evaluate import challenge_windows, check_floor, coverage, evaluate, total_nats, validation_metrics, windows
from mainrun_nb.gpt import GPT
from mainrun_nb.synthetic import floor_nats, sample_titles

V = 50
TITLES = sample_titles(30, seed=3)


class Scale(nn.Module):
    "Logits that depend on the token, its place in the window, and a dropout that must be off."

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, V, generator=generator))
        self.places = nn.Parameter(torch.randn(64, V, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return self.dropout(self.table[x] + self.places[: x.shape[1]]), None


class Equal(nn.Module):
    def forward(self, x):
        return torch.zeros(*x.shape, V), None


def stream(n, seed=0):
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, t", [(1, 1), (2, 7), (63, 64), (64, 64), (65, 64), (1000, 7), (1037, 64)])
def test_every_token_is_scored_once_whatever_the_batch(n, t):
    ids, model = stream(n), Scale()
    before = torch.cat([torch.tensor([1]), ids[:-1]])
    with torch.no_grad():
        logits = model.table[before] + model.places[torch.arange(n) % t]
        expected = F.cross_entropy(logits, ids, reduction="sum").item()
    found = [total_nats(model, windows(ids, t, b)) for b in (1, 3, 64)]
    assert found == pytest.approx([expected] * 3, rel=1e-5)


def test_the_tail_counts():
    ids = stream(640)
    model = Scale()
    whole = evaluate(model, ids, TITLES, 64, 4, challenge=False).total_nats
    with_tail = evaluate(model, torch.cat([ids, ids[:1]]), TITLES, 64, 4, challenge=False).total_nats
    logits = (model.table[ids[-1]] + model.places[0]).detach()
    assert with_tail - whole == pytest.approx(F.cross_entropy(logits[None], ids[:1]).item(), abs=1e-3)


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_comes_back_as_it_was(mode):
    model = Scale().train(mode)
    precision = torch.get_float32_matmul_precision()
    evaluate(model, stream(500), TITLES, 16, 4)
    assert model.training == model.dropout.training == mode and torch.is_grad_enabled()

    class Broken(Scale):
        def forward(self, x):
            raise ZeroDivisionError

    broken = Broken().train(mode)
    with pytest.raises(ZeroDivisionError):
        evaluate(broken, stream(500), TITLES, 16, 4)
    assert broken.training == mode and torch.is_grad_enabled() and torch.get_float32_matmul_precision() == precision


def test_features_and_logits_agree_for_a_gpt_inside_autocast():
    cfg = tiny("model_configs.gpt.n_layer=1", "model_configs.gpt.dropout=0.5")
    torch.manual_seed(0)
    model = GPT(cfg.model_configs.gpt, cfg.attn_configs.causal, V, 32)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    ids = stream(3001)
    plain = total_nats(Whole(), windows(ids, 32, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = total_nats(model, windows(ids, 32, 64))  # 2048 rows, in two chunks of logits
    assert chunked == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    "n, b, t", [(97, 1, 1), (500, 2, 7), (4097, 32, 128), (5000, 1, 4999)]
)
def test_challenge_loss_of_equal_logits_is_the_coverage(n, b, t):
    result = evaluate(Equal(), stream(n), TITLES, t, b)
    assert result.coverage == coverage(n, b, t) == n // (b * t + 1) * b * t / n
    assert result.challenge_loss / (math.log(V) * n / result.n_chars) == pytest.approx(result.coverage, rel=1e-6)
    assert result.nats_per_char == pytest.approx(math.log(V) * n / result.n_chars, rel=1e-6)
    assert result.nats_per_token == pytest.approx(math.log(V), rel=1e-6)
    text = "<eos>".join(TITLES) + "<eos>"
    assert (result.n_chars, result.n_bytes, result.n_tokens) == (len(text), len(text.encode()), n)
    assert result.bits_per_byte == pytest.approx(math.log2(V) * n / len(text.encode()), rel=1e-6)


@pytest.mark.parametrize("n, b, t", [(4096, 32, 128), (100, 64, 16), (17, 2, 16), (2, 1, 2)])
def test_zero_windows_is_an_error_that_says_what_fits(n, b, t):
    with pytest.raises(InputError) as caught:
        evaluate(Equal(), stream(n), TITLES, t, b)
    text = str(caught.value)
    assert "\n" not in text and str(n) in text
    if "batch_size=" in text:
        fits = int(text.rsplit("=")[-1])
        assert len(list(challenge_windows(stream(n), t, fits))) >= 1
        with pytest.raises(InputError):
            challenge_windows(stream(n), t, fits + 1)
    else:
        assert n <= t
    assert evaluate(Equal(), stream(n), TITLES, t, b, challenge=False).challenge_loss is None


def test_no_more_rows_at_once_than_in_a_micro_batch():
    seen = []

    class Watched(Scale):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    setting = ["hyperparams.context_length=16", "hyperparams.batch_size=8"]
    configs = [tiny(*setting, "data.source=hackernews", f"hyperparams.grad_accum={n}") for n in (1, 4)]
    whole, parts = (validation_metrics(Watched(), stream(1000), TITLES, cfg) for cfg in configs)
    assert max(seen[: seen.index(2)]) == 8 and set(seen[seen.index(2) :]) == {1, 2}  # the tail of a stream is one row
    assert parts == pytest.approx(whole, rel=1e-6) and parts["val/coverage"] == whole["val/coverage"]


def test_an_empty_stream_is_refused():
    with pytest.raises(InputError, match="empty"):
        evaluate(Equal(), stream(0), [], 16, 4, challenge=False)


# --- the floor -------------------------------------------------------------------------------------------------------------


class Letters:
    "One token per character, enough for any text."

    def __init__(self, titles):
        self.ids = {c: i + 3 for i, c in enumerate(sorted(set("".join(titles))))}
        self.vocab_size = len(self.ids) + 3

    def stream(self, titles):
        return torch.tensor([i for t in titles for i in [*(self.ids[c] for c in t), 1]])


class Oracle(nn.Module):
    "Looks `ahead` tokens into the future with weight `trust`; blind beyond the window."

    def __init__(self, vocab_size, trust):
        super().__init__()
        self.vocab_size, self.trust = vocab_size, trust

    def forward(self, x):
        p = torch.full((*x.shape, self.vocab_size), (1 - self.trust) / self.vocab_size)
        seen = F.one_hot(x[:, 1:], self.vocab_size) * self.trust
        p[:, :-1] += seen
        p[:, -1] = 1 / self.vocab_size
        return p.log(), None


@pytest.fixture(scope="module")
def letters():
    titles = sample_titles(400, seed=5)
    tokenizer = Letters(titles)
    return titles, tokenizer.stream(titles), tokenizer.vocab_size


def test_a_model_that_sees_ahead_is_caught(letters):
    titles, ids, size = letters
    cfg = tiny("hyperparams.context_length=64", "hyperparams.batch_size=8")
    with pytest.raises(RunError, match="leak"):
        validation_metrics(Oracle(size, 0.9), ids, titles, cfg)


def test_an_honest_model_is_not(letters):
    titles, ids, size = letters
    cfg = tiny("hyperparams.context_length=64", "hyperparams.batch_size=8")
    metrics = validation_metrics(Oracle(size, 0.0), ids, titles, cfg)
    chars = len(ids) + 4 * len(titles)  # `<eos>` is one token and five characters
    assert metrics["val/floor"] * chars == pytest.approx(floor_nats(titles))
    assert metrics["val/floor"] < metrics["val/loss"] == pytest.approx(metrics["val/nats_per_token"] * len(ids) / chars)
    assert 0 < metrics["val/challenge_loss"] < metrics["val/loss"] and 0 < metrics["val/coverage"] < 1


def test_the_true_model_and_a_lucky_one_pass_the_floor(letters):
    titles, _, _ = letters
    floor = floor_nats(titles)
    assert check_floor(floor, titles) == check_floor(floor - 19.9, titles) == floor
    with pytest.raises(RunError, match="leak"):
        check_floor(floor - 20.1, titles)
    with pytest.raises(InputError, match="floor"):
        check_floor(0.0, [*titles, "Not a title of the grammar"])
    check_floor(math.nan, titles)  # a diverged model is not a leak; the trainer has its own words for it


def test_an_evaluation_needs_no_more_memory_the_longer_it_is():
    """Sums that lie between freed tables of logits would keep the next table from their place, in a heap without small gaps."""
    code = """
import resource, torch
from mainrun_nb.config import tiny
from mainrun_nb.evaluate import total_nats, windows
from mainrun_nb.models import build_model
from mainrun_nb.runtime import freed_memory_kept
torch.set_num_threads(1)
model, ids = build_model(tiny("hyperparams.context_length=128"), 16_000), torch.randint(3, 16_000, (60_000,))
with freed_memory_kept():
    full = [torch.zeros(1) for _ in range(100_000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total_nats(model, windows(ids, 128, 16))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 6 * 1024 * 16_000 * 4, f"{int(done.stdout) / 2**20:.0f} MiB"  # six tables of 1,024 rows
