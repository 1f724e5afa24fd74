"""The grammar of synthetic titles: exact probabilities, independent draws, one derivation per title."""
import hashlib
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from mainrun_nb.documents import Documents
from mainrun_nb.synthetic import Grammar, clashes, default_grammar, entropy, floor_nats, sample_titles, title_log_prob


def test_draws_are_the_same_for_ever():
    # The floor of every recorded synthetic run belongs to these titles: a change of the grammar is a change of the data.
    digest = hashlib.sha256("\n".join(sample_titles(2000, seed=1337)).encode()).hexdigest()
    assert digest == "b2461c5481c458a32f2c6db87792521d1ec1f0b5be3815d769007b6b3089e58f"


def test_draws_are_clean_lines_with_finite_prices():
    titles = sample_titles(3000, seed=5)
    assert all(t == t.strip() and t.isprintable() and "<eos>" not in t and "  " not in t for t in titles)
    assert not any(c in t for t in titles for c in "{}")
    assert all(-60 < title_log_prob(t) < 0 for t in titles)


def test_draws_do_not_depend_on_their_number_in_distribution():
    whole = Counter(title.split()[0] for title in sample_titles(20_000, seed=0))
    parts = Counter(sample_titles(1, seed=s)[0].split()[0] for s in range(1500))
    for word in ("Show", "Ask"):
        p = whole[word] / 20_000
        assert abs(parts[word] / 1500 - p) < 5 * math.sqrt(p * (1 - p) / 1500)


def test_titles_repeat_and_are_independent_of_their_neighbours():
    titles = sample_titles(30_000, seed=2)
    assert len(set(titles)) < len(titles), "never de-duplicated"
    site = np.array([t.startswith("Show HN") for t in titles], dtype=float)
    assert abs(np.corrcoef(site[:-1], site[1:])[0, 1]) < 5 / math.sqrt(len(site))


@pytest.mark.parametrize("seed", range(3))
def test_mean_price_is_the_entropy(seed):
    grammar = default_grammar()
    nats = np.array([-title_log_prob(t) for t in sample_titles(6000, seed=100 + seed)])
    H = entropy(grammar.patterns, grammar.lexicon)
    assert abs(nats.mean() - H) < 4.5 * nats.std() / math.sqrt(len(nats))


def test_one_derivation_for_each_title():
    grammar = default_grammar()
    assert clashes(grammar.tree, grammar.tables) == []
    ambiguous = Grammar("1 {a} {noun} ship\n1 a boat ship", "x: 1 y", "sea: deep | boat | crew | sail", {})
    assert len(clashes(ambiguous.tree, ambiguous.tables)) == 1
    assert ambiguous.log_prob("a boat ship") == pytest.approx(0.0)


@pytest.mark.parametrize("edit", [
    lambda t: t + "x", lambda t: t + " ", lambda t: " " + t, lambda t: t.swapcase(), lambda t: t.rsplit(" ", 1)[0] + "  x",
    lambda t: t + "\n", lambda t: t.replace(" ", "\u00a0")])
def test_a_title_that_was_touched_is_impossible(edit):
    # Other titles of the grammar are possible after a touch only by accident; none of these is one.
    for title in sample_titles(200, seed=9):
        assert title_log_prob(edit(title)) == -math.inf, edit(title)


def test_prefixes_are_mostly_impossible_and_their_sum_never_exceeds_one():
    titles = set(sample_titles(4000, seed=3))
    cut = {t.rsplit(" ", k)[0] for t in titles for k in (1, 2)}
    assert math.fsum(math.exp(title_log_prob(t)) for t in titles | cut) < 1


def test_floor_is_the_sum_and_infinite_for_the_impossible():
    titles = sample_titles(50, seed=8)
    assert floor_nats(titles) == pytest.approx(-sum(map(title_log_prob, titles)), abs=1e-9)
    assert floor_nats([]) == 0
    assert floor_nats([*titles, "no such title"]) == math.inf


def test_it_is_light_and_fast_to_import():
    code = "import sys, mainrun_nb.synthetic as s; print(sum(m in sys.modules for m in ('torch', 'matplotlib', 'omegaconf')))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "0"


def test_documents_are_the_same_for_ever_and_need_their_first_lines():
    # The floor of a committed benchmark belongs to these documents.
    form = Documents(facts=5, between=7)
    documents = form.sample(50, seed=1337)
    digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
    assert digest == "736c2604b1ff22284b603374146b66fdf70aa6c507ed633cc3c60994cfd02bbd"
    for document in documents:
        lines = document.split(" / ")
        titles = sum(map(title_log_prob, lines[5:12]))
        assert form.log_prob(document) < titles - 5 * math.log(len(form.companies)) - math.log(math.factorial(5))
        for start, end in form.references(document):
            said = document[start:end]
            assert document.count(f" {said}") >= 2 and form.log_prob(document[:start] + "Velora" * 2 + document[end:]) == -math.inf


def test_documents_as_often_as_their_probability_with_equal_companies_too():
    form = Documents(1, 0, default_grammar(), {"Ada": 0.75, "Bo": 0.25}, {"Velora": 0.5, "Lumix": 0.5})
    seen = Counter(form.sample(20_000, seed=0))
    assert len(seen) == 4
    assert all(abs(n / 20_000 - math.exp(form.log_prob(d))) < 0.015 for d, n in seen.items())


def test_references_are_found_by_whoever_knows_the_next_token(benchmark):
    """Of benchmarks/far.py: what it calls found, and the spans that it looks at."""
    far = benchmark("far")
    form = Documents(4, 3, far.BETWEEN)
    tokenizer = far.train_tokenizer(form.sample(200, seed=3), (), "bpe", 700)
    exam, documents = far.Exam(form, 5, tokenizer, seed=2), form.sample(5, seed=2)
    for (_, y, spans), document in zip(exam.rows, documents, strict=True):
        said = sorted(tokenizer.decode(y[a:b].tolist()).strip() for a, b in spans)
        assert said == sorted(line.split(" ")[1] for line in document.split(" / ")[-4:])

    class Knows(torch.nn.Module):
        def __init__(self, how_well):
            super().__init__()
            self.how_well = how_well

        def forward(self, x):
            y, = [y for seen, y, _ in exam.rows if torch.equal(seen[None], x)]
            return (self.how_well * torch.nn.functional.one_hot(y.clamp(min=0), tokenizer.vocab_size).float()[None],)

    everything, nothing = exam.mark(Knows(50.0)), exam.mark(Knows(0.0))
    assert everything["found"] == 1 and abs(everything["above_floor"] + exam.floor) < 0.1
    assert nothing["found"] == 0 and nothing["above_floor"] > exam.floor
