"""The data analysis: counts by hand, overlaps against their definition, any source from one title to real ones."""
import html
import io
import json
import random
import re
import resource
import struct
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from mainrun_nb import eda
from mainrun_nb.config import InputError, load_config
from mainrun_nb.data import joined_chars, load_titles, split_titles
from mainrun_nb.eda import by_script, count_tokens, describe, markdown, openings, script_rows, title_script, token_rows, zipf_fit
from mainrun_nb.overlap import RunIndex, duplicates, explore_overlap, overlap, overlap_plain
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import train_tokenizer


def synthetic(n: int):
    return load_config(overrides=["data.source=synthetic", f"hyperparams.num_titles={n}"])


def explore(cfg, out, make_tokenizer=None):
    "All that `mainrun-eda` does."
    return eda.explore(cfg, out, make_tokenizer, more=[explore_overlap])


def bpe(train, val):
    return train_tokenizer(train, val, "bpe", 600)


# --- counting ---


def test_counts_agree_with_a_plain_count():
    titles = sample_titles(500, seed=1)
    found = describe(titles)
    assert found["characters, <eos> as five"] == joined_chars(titles) == len("<eos>".join(titles)) + 5
    assert found["unique words"] == len({w for t in titles for w in t.split()})
    assert found["characters of the longest title"] == max(map(len, titles))
    assert len(titles[found["index of the longest title"]]) == max(map(len, titles))
    assert openings(titles, 2, 3) == Counter(" ".join(t.split()[:2]) for t in titles).most_common(3)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "cased", "challenge"])
def test_token_counts_for_every_tokenizer(kind):
    titles = ["", "a <eos> b", "naïve 青空 – Ünï", *sample_titles(200, seed=2)]
    train, val = titles[:150], titles[150:]
    tokenizer = train_tokenizer(train, val, kind, 500)
    whole, pieces = (count_tokens(train, tokenizer, piece) for piece in (10_000, 7))
    assert whole.counts.tolist() == pieces.counts.tolist()
    assert whole.lengths.tolist() == pieces.lengths.tolist() == [len(tokenizer.encode(t)) for t in train]
    assert whole.counts.sum() == len(tokenizer.encode_titles(train)) and len(whole.counts) == tokenizer.vocab_size
    assert whole.first == tokenizer.encode_titles(train)[:10].tolist()


def test_unseen_tokens_are_counted():
    train, val = sample_titles(300, seed=3), ["Ωmega zzz", *sample_titles(20, seed=4)]
    tokenizer = train_tokenizer(train + val, kind="bpe", vocab_size=800)
    a, b = count_tokens(train, tokenizer), count_tokens(val, tokenizer)
    ids = [set(tokenizer.encode_titles(part).tolist()) for part in (train, val)]
    rows = token_rows(a, b)
    assert rows["tokens never seen in training"] == {"validation": len(ids[1] - ids[0])}
    assert len(ids[1] - ids[0]) > 0
    assert rows["unique tokens"] == {"train": len(ids[0]), "validation": len(ids[1]), "combined": len(ids[0] | ids[1])}


def test_scripts_lose_nothing():
    titles = ["plain", "“quoted”", "é", "Привет", "東京", "カナ", "한국", "αβγ", "ไทย", "नमस्ते", "🎉"]
    assert [title_script(t) for t in titles[:9]] == ["ASCII", "symbols", "Latin", "Cyrillic", "CJK", "Katakana", "Hangul", "Greek", "Thai"]
    for most in (1, 3, 20):
        found = by_script(titles, np.ones(len(titles)), most)
        assert sum(s.titles for s in found.values()) == len(titles)
        assert sum(s.characters for s in found.values()) == sum(map(len, titles))
        shares = [row["combined"] for name, row in script_rows(found).items() if name.startswith("share")]
        assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("exponent, shift", [(0.8, 0.0), (1.0, 2.7), (1.5, 30.0)])
def test_zipf_fit_recovers_what_made_the_counts(exponent, shift):
    counts = 1e12 * (np.arange(1, 5001) + shift) ** -exponent
    fit = zipf_fit(np.random.default_rng(0).permutation(counts))
    assert fit.exponent == pytest.approx(exponent, abs=0.02) and fit.shift == pytest.approx(shift, rel=0.05, abs=0.05)


def test_zipf_fit_survives_odd_counts():
    assert zipf_fit([]) is None and zipf_fit([0] * 50) is None
    assert abs(zipf_fit([7] * 50).exponent) < 1e-9


# --- overlap ---


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_its_definition(n, seed):
    # Few words, so that runs repeat within and across titles; empty titles, punctuation and short titles included.
    r = random.Random(seed)
    words = ["a", "b", "C", "d!", "e", "?", "né", "x-y"]
    train, val = ([" ".join(r.choices(words, k=r.randint(0, 9))) for _ in range(size)] for size in (120, 40))
    fast, plain = overlap(train, val, n), [overlap_plain(train, t, n) for t in val]
    np.testing.assert_allclose(fast.anywhere, [p[0] for p in plain], atol=1e-12)
    np.testing.assert_allclose(fast.in_one, [p[1] for p in plain], atol=1e-12)
    assert fast.measured.tolist() == list(range(len(val)))


def test_postings_do_not_depend_on_the_pieces():
    train, val = sample_titles(400, seed=5), sample_titles(60, seed=6)
    index = RunIndex(val)
    whole, pieces = index.postings(train), index.postings(train, piece=33)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_a_planted_copy_is_found_and_a_stranger_is_not():
    train = [*sample_titles(300, seed=7), "Seven ways to lose a submarine in the desert"]
    found = overlap(train, ["SEVEN ways to lose a submarine, in the desert!", "Nothing like this was ever said before"])
    assert found.in_one.tolist() == [1.0, 0.0] and found.anywhere.tolist() == [1.0, 0.0]
    assert duplicates(train, ["Seven ways to lose a submarine in the desert", "seven ways: to lose a submarine in the desert"]) == {
        "share also in training": 0.5, "share also in training but for case and punctuation": 1.0}


def test_a_limit_measures_fewer_titles_exactly():
    train, val = sample_titles(2000, seed=8), sample_titles(200, seed=9)
    full, part = overlap(train, val), overlap(train, val, limit=1000)
    assert 0 < len(part.measured) < 200
    assert np.array_equal(part.in_one, full.in_one[part.measured]) and np.array_equal(part.anywhere, full.anywhere)
    assert len(overlap(train, val, limit=0).measured) >= 1


# --- the whole ---


def test_explore_writes_what_it_returns(tmp_path):
    cfg = synthetic(400)
    found = explore(cfg, tmp_path / "a" / "b", bpe)
    folder = tmp_path / "a" / "b"
    assert sorted(found["files"]) == sorted(p.name for p in folder.iterdir())
    assert json.loads((folder / "eda.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert (folder / "eda.md").read_text(encoding="utf-8") == markdown(found["rows"])
    for picture in folder.glob("*.png"):
        head = picture.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:])[0] > 400
    train, _ = split_titles(load_titles(cfg), cfg)
    assert train[0].startswith(found["rows"]["first ten ids decoded"]["train"].split("<eos>")[0][:20])
    assert found["rows"]["titles"] == {"train": 360, "validation": 40, "combined": 400}


@pytest.mark.parametrize("n", [1, 2, 11])
def test_explore_works_on_next_to_nothing(tmp_path, n):
    found = explore(synthetic(n), tmp_path, bpe)
    assert found["rows"]["titles"]["combined"] == n
    assert ("validation" in found["rows"]["titles"]) == (n > 1)


def test_overlap_is_a_part_of_its_own_and_its_names_are_still_found_in_eda(tmp_path):
    found = eda.explore(synthetic(50), tmp_path)
    assert not any("3-gram" in name for name in found["rows"]) and "overlap.png" not in found["files"]
    assert eda.RunIndex is RunIndex and eda.overlap is overlap
    with pytest.raises(AttributeError, match="no attribute 'overlaps'"):
        eda.overlaps  # noqa: B018


def test_explore_without_a_tokenizer_has_no_token_rows(tmp_path):
    found = explore(synthetic(50), tmp_path)
    assert not any("token" in name for name in found["rows"]) and "scripts.png" not in found["files"]


@pytest.mark.parametrize("titles", [["x"], ["same title"] * 30, ["|pipe|", "a  b", "?!", "日本語", "tab\tinside", "<eos>"] * 4,
                                    ["PHP: $_$ again", "$5 $10 and more"]])
def test_explore_takes_odd_titles(tmp_path, titles):
    (tmp_path / "titles.txt").write_text("\n".join(titles), encoding="utf-8")
    cfg = load_config(overrides=[f"data.source={tmp_path / 'titles.txt'}", f"hyperparams.num_titles={len(titles)}"])
    found = explore(cfg, tmp_path / "out", bpe)
    width = {line.replace("\\|", "").count("|") for line in (tmp_path / "out" / "eda.md").read_text(encoding="utf-8").splitlines()}
    assert len(width) == 1, "every row of the table has the same number of cells"
    assert found["rows"]["titles"]["combined"] == len(titles)


@pytest.mark.parametrize("opening", ["PHP: $_$", "$5 $10", r"\$5 $", "$x^2$ {"])
def test_an_opening_is_drawn_as_it_is_written(opening):
    """Not as a formula, for which matplotlib takes what stands between two dollars."""
    fig = Figure()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        eda.plot_openings(fig.subplots(), [f"{opening} dollars", "Show HN: no dollars"])
        fig.savefig(buffer := io.StringIO(), format="svg")
    drawn = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", buffer.getvalue())]
    assert opening in drawn and "Show HN:" in drawn


def test_the_tables_do_not_wait_for_the_pictures(tmp_path):
    def draw(ax):
        raise ValueError("what matplotlib cannot draw")

    with pytest.raises(ValueError, match="cannot draw"):
        eda.explore(synthetic(20), tmp_path, more=[lambda train, val: ({"a row": {"train": 1}}, {"a picture": [draw]})])
    assert "| a row | 1 |" in (tmp_path / "eda.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "eda.json").read_text(encoding="utf-8"))["rows"]["a row"] == {"train": 1}


def test_explore_complains_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for cfg, out in [(synthetic(5), tmp_path / "file"), (load_config(overrides=["data.source=no/such.txt"]), tmp_path)]:
        with pytest.raises(InputError) as e:
            explore(cfg, out)
        assert "\n" not in str(e.value)


@pytest.mark.real
def test_real_titles(hn_titles, tmp_path):
    cfg = load_config(overrides=[f"data.source={hn_titles}", "hyperparams.num_titles=20000"])
    rows = explore(cfg, tmp_path, lambda train, val: train_tokenizer(train, kind="bpe", vocab_size=8000))["rows"]
    assert rows["titles"] == {"train": 18_000, "validation": 2000, "combined": 20_000}
    assert 0.02 < rows["share with Show HN"]["combined"] < 0.10
    assert 0.05 < rows["share with Ask HN"]["combined"] < 0.12
    assert 0.10 < rows["share of titles with non-ASCII characters"]["combined"] < 0.18
    assert rows["share of near-duplicates (0.8 of its 3-grams in one training title)"]["validation"] < 0.03


@pytest.mark.slow
def test_many_titles_fit_in_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = explore(synthetic(400_000), tmp_path)
    assert found["rows"]["titles"]["combined"] == 400_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: one GiB
    assert Path(tmp_path / "eda.md").stat().st_size < 20_000
