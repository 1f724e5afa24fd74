"Tokenizers beyond the chapter's own asserts: fuzzed texts, Hugging Face's ids, damage, determinism."

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from tokenizers import pre_tokenizers

from mainrun_nb import tokenizer as tk
from mainrun_nb.config import InputError, load_config
from mainrun_nb.data import load_titles
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import KINDS, Tokenizer, load_tokenizer, train_challenge, train_tokenizer

POOLS = [
    "abcdefghij ABC 0123456789 .,:;!?'\"()[]$%–—…",
    " \t\n\r\x0b\x0c\x85\xa0\u1680\u2000\u2009\u200b\u2028\u2029\u202f\u3000\ufeff",
    "éüñçøßœŁžİıſ\u0301\u0308\u0327",
    "日本語中文한국어ひらがなカタカナกขคहिन्दीعربيעברית",
    "😀🎉👩‍💻👨‍👩‍👧🇺🇸🏳️‍🌈\ufe0f\u200d",
    "\x00\x01\x1f\x7f\x80\xff\ufffd\ufffe\uffff\U00010000\U0010ffff",
    "½²³①ⅣⅧ٣४",
]
LITERALS = ["<eos>", "<pad>", "<unk>", "<eos", "eos>", "<", ">", "<|endoftext|>", "Ġ", "▁", "</s>", "'s", "'LL"]


def fuzz(n: int, seed: int) -> list[str]:
    "Texts of every script, with controls, odd spaces and special tokens; no surrogates."
    rng = random.Random(seed)

    def part() -> str:
        what = rng.random()
        if what < 0.1:
            return rng.choice(LITERALS)
        if what < 0.25:
            code = rng.randrange(0x110000 - 0x800)
            return chr(code if code < 0xD800 else code + 0x800)
        return "".join(rng.choices(rng.choice(POOLS), k=rng.randint(1, 8)))

    return ["".join(part() for _ in range(rng.randint(0, 8))) for _ in range(n)]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(sample_titles(2_000, 0), sample_titles(200, 1), kind, 1_500) for kind in KINDS}


def same_ids(train: list[str], batches: list[list[str]], vocab_size: int) -> None:
    "Our challenge tokenizer and the original procedure give the same ids on every batch."
    original, ours = train_challenge(train, vocab_size), train_tokenizer(train, (), "challenge", vocab_size)
    assert ours.vocab_size == original.get_vocab_size()
    for batch in batches:
        expected = original.encode("<eos>".join(batch) + "<eos>").ids
        assert np.array_equal(ours.encode_titles(batch), expected)


def test_challenge_ids_are_hugging_faces() -> None:
    titles = sample_titles(1_000, 5) + fuzz(1_000, 5)
    random.Random(0).shuffle(titles)
    unseen = sample_titles(300, 6) + fuzz(700, 6)
    same_ids(titles, [titles, unseen, [""], ["", "", "x"]], 1_500)
    same_ids(sample_titles(200, 7), [titles, unseen], 600)  # most bytes unknown


def test_challenge_ids_after_training_on_repetitive_text() -> None:
    "Overlapping pairs, where merging by pair and by bytes would differ first."
    rng = random.Random(1)
    runs = ["".join(rng.choices(letters, k=rng.randint(1, 24))) for letters in ("a", "ab", "aab b", "abc ") for _ in range(250)]
    for size in (12, 40, 200):
        same_ids(runs[::2], [runs], size)


@pytest.mark.slow
@pytest.mark.real
def test_challenge_ids_on_100_000_real_titles(hn_titles) -> None:
    titles = load_titles(load_config(overrides=[f"data.source={hn_titles}"]))
    assert len(titles) == 100_000
    same_ids(titles, [titles], 16_000)


@pytest.mark.slow
def test_word_classes_agree_on_every_code_point() -> None:
    "Rust's regular expressions and Hugging Face's sort Unicode alike into letters, digits, spaces and the rest."
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    chars = [chr(i) for i in range(0x33480) if not 0xD800 <= i < 0xE000]  # the planes beyond hold no letters
    for start in range(0, len(chars), 70_000):
        chunk = chars[start : start + 70_000]
        for neighbour in "a1!":
            ranks = {bytes([b]): b for b in range(256)}
            for c in chunk:
                ranks.setdefault((neighbour + c).encode(), len(ranks))
            encode = tiktoken.Encoding("probe", pat_str=tk.WORDS, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
            differ = [c for c in chunk if (len(encode(neighbour + c)) == 1) != (len(split(neighbour + c)) == 1)]
            assert not differ, [hex(ord(c)) for c in differ[:10]]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_round_trip_of_any_unicode(trained: dict[str, Tokenizer], kind: str) -> None:
    texts, tokenizer = fuzz(5_000, 11), trained[kind]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2}
    stream = tokenizer.encode_titles(texts)
    assert stream.dtype == np.int32 and stream.max() < tokenizer.vocab_size
    ends = np.flatnonzero(stream == tokenizer.eos_id)
    assert len(ends) == len(texts)
    parts = [part[1:] if i else part for i, part in enumerate(np.split(stream, ends))][:-1]
    assert [tokenizer.decode(part) for part in parts] == texts


def unicode(n: int, seed: int) -> list[str]:
    "Texts from all planes, most of them from a few neighbouring code points, with marks, joiners, controls and literals; no surrogates."
    rng = random.Random(seed)
    marks = "\u0301\u0308\u20dd\u200d\u200e\u200f\u202e\u2066\u2069\ufe0f\U000e0041\U0001f3fd\0\x1b\x85 \t\n"

    def part() -> str:
        if rng.random() < 0.1:
            return rng.choice(LITERALS)
        start = rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x10000), rng.randrange(0x110000)])
        codes = [min(start + rng.randrange(64), 0x10FFFF) for _ in range(rng.randint(1, 6))]
        return "".join(chr(c) + rng.choice(marks) * (rng.random() < 0.2) for c in codes if not 0xD800 <= c < 0xE000)

    ends = ["", "", " ", "  ", "\n", "\u3000"]
    return [rng.choice(ends) + "".join(part() for _ in range(rng.randint(0, 6))) + rng.choice(ends) for _ in range(n)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_round_trip_of_2_000_texts_from_all_planes(trained: dict[str, Tokenizer], kind: str) -> None:
    for text in unicode(2_000, 19):
        assert trained[kind].decode(trained[kind].encode(text)) == text, ascii(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_round_trip_of_every_code_point(trained: dict[str, Tokenizer], kind: str) -> None:
    "All 1,112,064 of them, in titles of 1,024."
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["".join(map(chr, codes[at : at + 1_024])) for at in range(0, len(codes), 1_024)]
    stream = trained[kind].encode_titles(texts)
    assert trained[kind].decode(stream) == "<eos>".join(texts) + "<eos>"


NO_TEXT = ["caf\udcc3", "\ud83d", "\ude00\ud83d", "\ud83d\ude00", "<eos>\udc80", None, b"caf\xc3", b"", 7, 1.5, ["a"], np.array(["a", "b"])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", NO_TEXT, ids=ascii)
def test_what_is_no_text_is_refused_alike_everywhere(trained: dict[str, Tokenizer], kind: str, bad) -> None:
    "One line that says where; the same for every kind, for a text, for titles, and in training."
    calls = {
        "the text to encode ": lambda: trained[kind].encode(bad),
        "titles to encode: title 2 ": lambda: trained[kind].encode_titles(["a", bad, None]),
        "training titles: title 3 ": lambda: train_tokenizer(["a", "<eos>", bad], (), kind, 300),
        "validation titles: title 1 ": lambda: train_tokenizer(["a"], [bad], kind, 300),
    }
    said = set()
    for where, call in calls.items():
        with pytest.raises(InputError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(where) and "\n" not in message and message.isascii()
        said.add(message.removeprefix(where))
    assert len(said) == 1 and said.pop().startswith("holds half a surrogate pair" if isinstance(bad, str) else "is ")


@pytest.mark.parametrize("train", [tk.train_bpe, tk.train_unigram, train_challenge])
def test_the_trainers_alone_refuse_too(train) -> None:
    for bad in ("\ud83d", None):
        with pytest.raises(InputError, match="titles to train on: title 2 "):
            train(iter(["a", bad]), 300)


@pytest.mark.parametrize("kind", KINDS)
def test_titles_are_a_list_of_texts(trained: dict[str, Tokenizer], kind: str) -> None:
    "Not one text, which is a list of characters; but any iterable, and subclasses of `str` for their text."
    tokenizer, titles = trained[kind], ["Show HN", "", "日本 😀", "\0\x1b\x85"]
    for bad in ("Show HN", b"Show HN", None, 3):
        with pytest.raises(InputError, match="expected a list of titles, found a "):
            tokenizer.encode_titles(bad)
        with pytest.raises(InputError, match="training titles: expected a list"):
            train_tokenizer(bad, (), kind, 300)

    class Odd(str):
        def __str__(self) -> str:
            return "something else"

        __repr__ = __str__

        def __format__(self, spec: str) -> str:
            return "something else"

    want = tokenizer.encode_titles(titles).tolist()
    for same in (tuple(titles), iter(titles), np.array(titles), [*map(Odd, titles)], [*map(np.str_, titles)]):
        assert tokenizer.encode_titles(same).tolist() == want
    for title in titles:
        assert tokenizer.encode(Odd(title)) == tokenizer.encode(np.str_(title)) == tokenizer.encode(title)
    assert train_tokenizer(np.array(titles), (), kind, 300).tokens == train_tokenizer(titles, (), kind, 300).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_the_titles_one_by_one(trained: dict[str, Tokenizer], kind: str) -> None:
    titles, tokenizer = sample_titles(200, 3) + ["", "¿ñ?"] + fuzz(200, 3), trained[kind]
    one_by_one = [i for title in titles for i in [*tokenizer.encode(title), tokenizer.eos_id]]
    assert tokenizer.encode_titles(titles).tolist() == one_by_one
    assert tokenizer.encode_titles(titles[:200]).tolist() == [i for t in titles[:200] for i in [*tokenizer.encode(t), 1]]


def test_literal_specials(trained: dict[str, Tokenizer]) -> None:
    "Text in the lossless kinds; separators, and counted, in the challenge's."
    titles = ["<eos> is a token", "a<eos>b<eos>", "<pad> and <unk>"]
    for kind in ("bpe", "unigram"):
        assert np.flatnonzero(trained[kind].encode_titles(titles) <= 2).size == 3
        assert trained[kind].encode("<eos>") != [1]
        assert train_tokenizer(titles, (), kind, 300).meta["eos_in_titles"] == 3
    ids = trained["challenge"].encode_titles(titles)
    assert [int((ids == special).sum()) for special in (0, 1, 2)] == [1, 6, 1]
    meta = train_tokenizer(titles[:2], titles[2:], "challenge", 300).meta
    assert (meta["eos_in_titles"], meta["pad_in_titles"], meta["unk_in_titles"], meta["unknown_bytes"]) == (3, 1, 1, 0)
    assert meta["trained_on"] == "train+validation" and trained["bpe"].meta["trained_on"] == "train"


def test_validation_titles_are_seen_by_the_challenge_only() -> None:
    train, val = sample_titles(300, 0), ["Qwyjibo Qwyjibo Qwyjibo"] * 300
    for kind in KINDS:
        blind, sighted = (train_tokenizer(train, v, kind, 600).tokens for v in ((), val))
        assert (blind == sighted) == (kind != "challenge")


def test_the_same_titles_give_the_same_file_on_any_number_of_threads(tmp_path) -> None:
    code = (
        "from mainrun_nb.synthetic import sample_titles; from mainrun_nb.tokenizer import KINDS, train_tokenizer; import sys\n"
        "for kind in KINDS: train_tokenizer(sample_titles(2_000, 0), (), kind, 900).save(f'{sys.argv[1]}/{kind}')"
    )
    for threads in "12":
        env = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / threads)], env=env, check=True, cwd=tk.Path(tk.__file__).parents[1])
    for kind in KINDS:
        one, two = ((tmp_path / threads / kind / tk.FILE).read_bytes() for threads in "12")
        assert one == two
        here = train_tokenizer(sample_titles(2_000, 0), (), kind, 900)
        assert load_tokenizer(tmp_path / "1" / kind).tokens == here.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(trained: dict[str, Tokenizer], kind: str, tmp_path) -> None:
    trained[kind].save(tmp_path / "deep" / "folder")
    again = load_tokenizer(tmp_path / "deep" / "folder")
    texts = sample_titles(200, 9) + fuzz(500, 9)
    assert np.array_equal(again.encode_titles(texts), trained[kind].encode_titles(texts))
    for name in ("kind", "vocab_size", "tokens", "scores", "meta"):
        assert getattr(again, name) == getattr(trained[kind], name)
    assert [f.name for f in (tmp_path / "deep" / "folder").iterdir()] == [tk.FILE]


def test_damage_is_found(trained: dict[str, Tokenizer], tmp_path) -> None:
    trained["unigram"].save(tmp_path)
    file, rng = tmp_path / tk.FILE, random.Random(0)
    good = file.read_bytes()
    bad = [good[: rng.randrange(len(good))] for _ in range(20)] + [b"\xff\xfe", b"null", b'"text"', b"3", b"[" * 100_000, bytes(1_000)]
    for _ in range(60):
        at = rng.randrange(len(good))
        bad.append(good[:at] + bytes([good[at] ^ (1 << rng.randrange(8))]) + good[at + 1 :])
    for content in bad:
        file.write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_tokenizer(tmp_path)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_another_format_is_named(trained: dict[str, Tokenizer], tmp_path) -> None:
    trained["bpe"].save(tmp_path)
    file = tmp_path / tk.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": "mainrun_nb tokenizer 9"}))
    with pytest.raises(InputError, match="tokenizer 9"):
        load_tokenizer(tmp_path)


def test_missing_and_unwritable_folders(trained: dict[str, Tokenizer], tmp_path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be"):
        trained["bpe"].save(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "file")


def test_a_failed_save_keeps_the_old_file(trained: dict[str, Tokenizer], tmp_path, monkeypatch) -> None:
    trained["bpe"].save(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        trained["unigram"].save(tmp_path)
    monkeypatch.undo()
    assert load_tokenizer(tmp_path).kind == "bpe"
    assert [f.name for f in tmp_path.iterdir()] == [tk.FILE]


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_inputs(kind: str) -> None:
    for titles in ([""], [" "], ["a"], ["é"], ["x" * 5_000], ["", "ab ab"], ["<eos>"], fuzz(3, 0)):
        for size in (4, 300, 20_000):
            tokenizer = train_tokenizer(titles, (), kind, size)
            assert tokenizer.vocab_size == len(tokenizer.tokens) == len(set(tokenizer.tokens)) == tokenizer.meta["vocab_size"]
            assert kind == "challenge" or 259 <= tokenizer.vocab_size <= max(size, 259)
            ids = tokenizer.encode_titles(titles)
            assert ids[-1] == 1 and ids.max() < tokenizer.vocab_size
            assert kind == "challenge" or tokenizer.decode(ids) == "".join(f"{title}<eos>" for title in titles)
