"Sources and data beyond the chapters' own asserts: files large and broken, folders, the hub's cache, the known split."

import csv
import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mainrun_nb import data, sources
from mainrun_nb.config import Hyperparams, InputError, load_config
from mainrun_nb.data import (
    IGNORED,
    PAD,
    Batches,
    KneserNey,
    fingerprint,
    get_batch,
    joined_chars,
    ngram_losses,
    reference_losses,
    shuffled_stream,
    split_titles,
    steps_per_epoch,
    title_rows,
    token_stream,
)
from mainrun_nb.sources import HUB_NAME, check_text, check_titles, draw, load_titles, read_titles
from mainrun_nb.tokenizer import train_tokenizer

PIN = load_config().data.revision
ROOT = Path(__file__).resolve().parents[1]


def config(source, n=20, *more):
    return load_config(overrides=[f"data.source={source}", f"hyperparams.num_titles={n}", *more])


def refusal(call, *args):
    "The one line that a call is refused with."
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def titles():
    rng = random.Random(0)
    pieces = ["Show HN:", "a, b", '"quoted"', "l'été", "价格", "🚀", "line\nbreak", "tab\there", "\u2028", "C:\\x", "{json: 1}", "", "'"]
    return [" ".join(rng.choices(pieces, k=rng.randrange(1, 6))).strip() or "none" for _ in range(300)]


def write(path, titles):
    "The titles in the format that the name asks for."
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = path.name.split(".")[1]
    if kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([["id", "title"], *enumerate(titles)])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": 0, "title": t}, ensure_ascii=len(t) % 2 == 0) + "\n" for t in titles), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.table({"id": range(len(titles)), "title": titles}), path)
    else:
        path.write_bytes("\n".join(titles).encode())
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet", "t.parquet.gz"])
def test_columns_keep_every_title(tmp_path, titles, name):
    path = write(tmp_path / name, titles)
    assert read_titles(path) == titles
    assert load_titles(config(path, 100)) == [titles[i] for i in np.random.default_rng(1337).permutation(300)[:100]]
    assert load_titles(config(path, 100)) != load_titles(config(path, 100, "data.seed=1"))


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "T.TXT", "two.dots.txt"])
def test_text_files(tmp_path, titles, name):
    one_line = [t.strip() for t in titles if "\n" not in t and t.strip()]
    path = tmp_path / name
    raw = "\r\n\n".join(f"  {t} " for t in one_line).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read_titles(path) == one_line


def test_other_column_and_home(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("headline,title\nfirst,1\nsecond,2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sorted(load_titles(config("~/a.csv", 2, "data.column=headline"))) == ["first", "second"]


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no titles"),
    ("a.txt.gz", b"", "no titles"),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "no titles"),
    ("a.csv", b"title\n", "no titles"),
    ("a.csv", b"\n\n", "no titles"),
    ("a.txt", b"\x7fELF\x02\x01\x00" + bytes(range(128)), "zero bytes"),
    ("a.txt", "utf-16".encode("utf-16"), "not UTF-8"),
    ("a.txt", b"fine\nfine\ncaf\xe9\n", "line 3"),
    ("a.txt", b"\xef\xbb\xbffine\ncaf\xe9\n", "line 2"),
    ("a.txt.gz", b"plain text", "gzip"),
    ("a.txt.gz", gzip.compress(os.urandom(5000))[:2000], "gzip"),
    ("a.csv", b"a,b\n1,2\n", "no column 'title'"),
    ("a.csv", b"title\n" + b'"' + b"x" * 200_000 + b'"\n', "title 1 has 200,000 characters"),
    ("a.txt", b"fine\n" + b"x" * 200_000, "title 2 has 200,000 characters"),
    ("a.csv", b'title\n"open\n', "not valid CSV"),
    ("a.jsonl", b'{"titel": "x"}\n{"titel": "y"}\n', "no column 'title' (data.column). Did you mean 'titel'"),
    ("a.jsonl", b'{"title": null}\n', "none of 1 values is a title"),
    ("a.jsonl", b'{"title": {"en": "x"}}\n{"title": 7}\n', "none of 2 values is a title ({'en': 'x'} is not text)"),
    ("a.jsonl", b"[" * 100_000, "not valid JSON"),
    ("a.jsonl", b'{"title": "a"}\n{"title": "x\\ud83d"}\n', "title 2 holds half a surrogate pair, '\\ud83d' at character 2"),
    ("a.jsonl", b'{"title": "\\ude00\\ud83d"}\n', "title 1 holds half a surrogate pair"),
    ("a.json", b"[1, true, NaN]", "none of 3 values is a title (1 is not text)"),
    ("a.json", b'{"data": ["a"]}', "no column 'title'"),
    ("a.json", b'{\n"data": ["a"]}', "expected a list of titles"),
    ("a.jsonl", b'{"title": "a\xed\xa0\xbd"}\n', "line 1: not UTF-8"),  # half a pair in the manner of CESU-8
    ("a.txt", b"fine\na\xed\xa0\xbd\xed\xb8\x80\n", "line 2: not UTF-8"),
    ("a.csv", b"title\ncaf\xc3\n", "line 2: not UTF-8"),
    ("a.parquet", b"PAR1 but not really PAR1", "not a whole Parquet file"),
    ("a.xlsx", b"title\n", "unknown kind"),
    ("a", b"title\n", "unknown kind"),
    ("a.gz", b"title\n", "unknown kind"),
])
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    text = refusal(load_titles, config(tmp_path / name))
    assert name in text and words in text


def half_a_character():
    "A Parquet column of two texts, the second of which is none."
    import pyarrow as pa

    offsets = np.array([0, 1, 3], dtype=np.int32).tobytes()
    return pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xc3x")])


def test_bad_parquet(tmp_path, titles):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write(tmp_path / "t.parquet", titles)
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:-20])
    assert "not a whole Parquet file" in refusal(read_titles, path)
    pq.write_table(pa.table({"title": [1, 2]}), path)
    assert "none of 2 values is a title (1 is not text)" in refusal(read_titles, path)
    pq.write_table(pa.table({"title": ["a", None]}), path)
    assert read_titles(path) == ["a"]
    pq.write_table(pa.table({"title": [b"a"]}), path)
    assert "b'a' is not text" in refusal(read_titles, path)
    pq.write_table(pa.table({"title": half_a_character()}), path)
    assert "a title is not UTF-8 text (byte 0xc3)" in refusal(read_titles, path)
    pq.write_table(pa.table({"titles": ["a"]}), path)
    assert "Did you mean 'titles'" in refusal(read_titles, path)


def test_every_character_is_text_but_half_a_pair(tmp_path):
    "Pairs in JSON are one character; zero and control characters come through where the format can carry them."
    (tmp_path / "a.jsonl").write_text(r'{"title": "a\ud83d\ude00"}' + "\n" + r'{"title": "b\u0000\u001b[31m\u0085c"}')
    assert read_titles(tmp_path / "a.jsonl") == ["a😀", "b\0\x1b[31m\x85c"]
    odd = ["a\0b", "\x1b[31m", "\ufffe\uffff\U0010ffff", "\u202eright to left", "e\u0301", "<eos>"]
    assert read_titles(write(tmp_path / "t.parquet", odd)) == odd
    assert [check_text(title, "x") for title in odd] == check_titles(odd, "x") == odd


def test_names_with_odd_characters_make_one_line(tmp_path):
    cfg = load_config()
    for source in ("a\nb.txt", "caf\udcc3.txt", "a\0b.txt"):
        cfg.data.source = source
        refusal(load_titles, cfg).encode()
    cfg.data.source = str(tmp_path / "caf\udcc3.txt")
    Path(cfg.data.source).write_text("a title\n" * 200)  # a name that no config.yaml could hold
    assert refusal(load_titles, cfg).startswith("data.source holds half a surrogate pair")
    assert "cannot be a path" in refusal(read_titles, "a\0b.txt")
    (tmp_path / "a.csv").write_text("title\na\n")
    for column in ("a\nb", "\ud83d"):
        refusal(read_titles, tmp_path / "a.csv", column).encode()


def test_too_few(tmp_path):
    one, five = tmp_path / "one.txt", tmp_path / "five.txt"
    one.write_text("only me\n")
    five.write_text("a\nb\nc\nd\ne\n")
    assert "has 1 title," in refusal(load_titles, config(one))
    assert load_titles(config(one, 1)) == ["only me"]
    assert "each half" in refusal(split_titles, ["only me"], config(one, 1))
    text = refusal(load_titles, config(five))
    assert "has 5 titles" in text
    works = text.rsplit("; ")[1].split()[0]
    assert len(load_titles(load_config(overrides=[f"data.source={five}", works]))) == 5
    assert "5 for training and 0" in refusal(split_titles, list("abcde"), config(five, 5, "hyperparams.val_frac=1.0e-20"))
    assert "0 for training and 5" in refusal(split_titles, list("abcde"), config(five, 5, "hyperparams.val_frac=0.9"))


def test_no_such_source(tmp_path):
    assert "Did you mean 'synthetic'" in refusal(load_titles, config("sinthetic"))
    assert "gone.txt" in refusal(load_titles, config(tmp_path / "gone.txt"))
    assert "HN_TITLES" in refusal(load_titles, config("''"))


def test_unreadable(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mainrun_nb.formats.open", denied, raising=False)
    assert "Permission denied" in refusal(load_titles, config(tmp_path / "a.txt"))


# --- the hub: a folder in its layout, its cache, its absence ---------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    "An empty cache of the package `datasets`."
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield tmp_path / "cache"
    datasets.enable_progress_bars()


def test_folder_in_the_hubs_layout(tmp_path, hub_cache, titles):
    import datasets

    folder = tmp_path / "posts"
    (folder / "data").mkdir(parents=True)
    splits = "  data_files:\n  - split: train\n    path: data/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{splits}---\n")
    for part in (0, 1):
        write(folder / "data" / f"train-0000{part}-of-00002.parquet", titles[part * 150 : part * 150 + 150])
    drawn = load_titles(config(folder, 100))
    theirs = datasets.load_dataset(str(folder), split="train").shuffle(seed=1337).take(100)
    assert drawn == [row["title"].strip() for row in theirs]
    assert drawn == load_titles(config(write(tmp_path / "same.csv", titles), 100))
    assert "has 300 titles" in refusal(load_titles, config(folder, 301))
    assert "Did you mean 'title'" in refusal(load_titles, config(folder, 10, "data.column=titel"))


def test_folders_that_are_something_else(tmp_path, hub_cache):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "empty").mkdir()
    assert "the folder holds no file of titles" in refusal(load_titles, config(tmp_path / "empty"))
    (tmp_path / "half").mkdir()
    pq.write_table(pa.table({"title": half_a_character()}), tmp_path / "half" / "t.parquet")
    assert "a title is not UTF-8 text" in refusal(load_titles, config(tmp_path / "half", 2))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test.csv").write_text("title\na\nb\n")
    assert sorted(load_titles(config(tmp_path / "tests", 2))) == ["a", "b"]
    (tmp_path / "tests" / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: gone/*.csv\n---\n")
    assert "its README.md describes a data set that cannot be loaded" in refusal(load_titles, config(tmp_path / "tests", 2))


def fill_cache(cache, revision, titles):
    "What `load_dataset` leaves behind after it has loaded a revision from the hub."
    from datasets import Dataset, Features, Value
    from datasets.arrow_writer import ArrowWriter

    home = cache / HUB_NAME.replace("/", "___") / "default" / "0.0.0" / revision
    home.mkdir(parents=True)
    features = Features({"title": Value("string")})
    name = HUB_NAME.split("/")[1]
    with ArrowWriter(features=features, path=str(home / f"{name}-train.arrow")) as writer:
        for t in titles:
            writer.write({"title": t})
        n, size = writer.finalize()
    info = Dataset.from_dict({"title": titles}, features=features).info
    info.builder_name, info.dataset_name, info.config_name, info.version = "parquet", name, "default", "0.0.0"
    from datasets.splits import SplitDict, SplitInfo

    info.splits = SplitDict({"train": SplitInfo("train", num_bytes=size, num_examples=n, dataset_name=name)})
    info.write_to_directory(str(home))


def test_offline_reads_the_cache_but_only_the_pinned_revision(hub_cache, titles, monkeypatch):
    import datasets

    monkeypatch.setattr(sources, "hub_silence", lambda hub: "ConnectError")
    before = datasets.config.HF_HUB_OFFLINE
    fill_cache(hub_cache, PIN, titles)
    assert load_titles(config("hackernews", 50)) == [titles[i] for i in draw(300, 50, 1337)]
    assert fingerprint(["a"], ["b"], config("hackernews"), 1)["revision"] == PIN
    assert "cache is not " + "f" * 40 in refusal(load_titles, config("hackernews", 50, "data.revision=" + "f" * 40))
    assert datasets.config.HF_HUB_OFFLINE == before


def test_unreachable_hub_names_the_offline_sources(hub_cache, monkeypatch):
    monkeypatch.setattr(sources, "hub_silence", lambda hub: "ConnectError")
    text = refusal(load_titles, config("hackernews"))
    assert "cannot be reached" in text and "synthetic" in text and ".txt" in text


def test_hub_is_asked_for_the_pinned_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **named):
        asked.append((args, named, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"title": [f" {i} " for i in range(100)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_silence", lambda hub: "")
    assert load_titles(config("hackernews", 10)) == [str(i) for i in draw(100, 10, 1337)]
    assert asked == [(("julien040/hacker-news-posts",), dict(revision=PIN, split="train"), datasets.config.HF_HUB_OFFLINE)]


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the hub as `load_dataset` asks for, with one revision of one data set."

    name, files = HUB_NAME, {"README.md": b"---\nlicense: mit\n---\n"}

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        entries = [dict(type="file", path=p, size=len(raw), oid=hashlib.sha1(raw).hexdigest()) for p, raw in self.files.items()]
        folder = dict(type="directory", path="data", size=0, oid="0" * 40)
        api, found = f"/api/datasets/{self.name}", None
        match self.path.split("?")[0].removeprefix(api), self.path.split("?")[0].split(f"{PIN}/", 1)[-1]:
            case f, _ if f in (f"/revision/{PIN}", "/revision/main"):
                found = dict(_id="0", id=self.name, sha=PIN, private=False, tags=[], siblings=[dict(rfilename=p) for p in self.files])
            case f, _ if f == f"/tree/{PIN}":
                found = [folder, entries[0]]
            case f, _ if f == f"/tree/{PIN}/data":
                found = entries[1:]
            case _, name if name in self.files:
                found = self.files[name]
        raw = found if isinstance(found, bytes) else json.dumps(found or {}).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("X-Repo-Commit", PIN)
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        if found is None:
            missing = "RevisionNotFound" if "/revision/" in self.path else "EntryNotFound"
            missing = missing if f"/{self.name}/" in self.path else "RepoNotFound"
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)


def serve(hub, home):
    "A small hub, and a function that asks it for five titles in a process of its own."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(home))
    code = """if True:
        import sys
        from mainrun_nb.config import InputError, load_config
        from mainrun_nb.data import load_titles
        try:
            print(load_titles(load_config(overrides=["hyperparams.num_titles=5", *sys.argv[1:]])))
        except InputError as e:
            print("refused:", e)"""
    return server, lambda *overrides: subprocess.run([sys.executable, "-c", code, *overrides], env=env, capture_output=True, text=True,
                                                     timeout=300)


class Papers(Hub):
    name, files = "owner/papers", {"README.md": b"---\nlicense: mit\n---\n"}


@pytest.mark.slow
def test_any_data_set_of_a_small_hub(tmp_path):
    "Its column, split and revision by setting; what it does not have; then with the hub gone."
    for split, n in (("train", 300), ("test", 40)):
        path = tmp_path / f"{split}.csv"
        path.write_text("headline,id\n" + "".join(f"{split} {i},{i}\n" for i in range(n)))
        Papers.files |= {f"data/{split}.csv": path.read_bytes()}
    server, ask = serve(Papers, tmp_path / "home")
    own, column = "data.source=hf:owner/papers", "data.column=headline"
    expected = str([f"train {i}" for i in draw(300, 5, 1337)])
    assert ask(own, column).stdout.strip() == expected == ask(own, column, f"data.revision={PIN}").stdout.strip()
    assert ask(own, column, "data.split=test").stdout.strip() == str([f"test {i}" for i in draw(40, 5, 1337)])
    assert "no column 'title' (data.column). Known: headline, id." in ask(own).stdout
    assert "owner/papers could not be loaded from the hub: Unknown split" in ask(own, column, "data.split=validation").stdout
    assert "the hub has no data set owner/paper, or it is private and needs a key in HF_TOKEN" in ask("data.source=hf:owner/paper").stdout
    server.shutdown()
    server.server_close()
    assert ask(own, column).stdout.strip() == expected
    assert "it cannot be reached" in ask("data.source=hf:owner/other").stdout


@pytest.mark.slow
def test_the_real_loader_against_a_small_hub(tmp_path):
    "Download, an unknown revision, then the same two with the hub gone."
    numbered = write(tmp_path / "t.parquet", [f" title {i} " for i in range(300)])
    Hub.files |= {"data/train-00000-of-00001.parquet": numbered.read_bytes()}
    server, run = serve(Hub, tmp_path / "home")

    def ask(revision):
        return run(f"data.revision={revision}")

    expected = str([f"title {i}" for i in draw(300, 5, 1337)])
    first = ask(PIN)
    assert first.stdout.strip() == expected
    assert "Generating train split" in first.stderr  # progress is shown
    assert "has no revision 'ffff" in ask("f" * 40).stdout
    server.shutdown()
    server.server_close()
    assert ask(PIN).stdout.strip() == expected
    assert "cache is not ffff" in ask("f" * 40).stdout


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in refusal(load_titles, config("hackernews"))


def test_scripts_import_both_readers_from_data():
    assert data.load_titles is load_titles and data.read_titles is read_titles


# --- stream, batches, references -------------------------------------------------------------------------------------------


def test_an_epoch_sees_every_whole_batch_once():
    for n, b, t in [(1000, 3, 7), (22, 3, 7), (43, 3, 7), (64, 4, 5), (4097, 32, 128)]:
        ids, ptr, steps = torch.arange(n), 0, steps_per_epoch(n, b, t)
        for _ in range(3):  # every epoch is the same
            firsts = []
            for _ in range(steps):
                x, y, ptr = get_batch(ids, ptr, b, t)
                assert x.shape == y.shape == (b, t) and torch.equal(y, x + 1)
                firsts.append(x[0, 0].item())
            assert firsts == [i * b * t for i in range(steps)] or n % (b * t) == 0


def test_stream_too_short_suggests_what_works():
    for n, b, t in [(900, 64, 128), (8192, 64, 128), (90, 64, 128), (2, 5, 5)]:
        text = refusal(steps_per_epoch, n, b, t)
        values = dict(part.removeprefix("hyperparams.").split("=") for part in text.split("; ")[1].split() if "=" in part)
        assert steps_per_epoch(n, int(values["batch_size"]), int(values.get("context_length", t))) >= 1
    assert "more titles" in refusal(steps_per_epoch, 1, 1, 1)


def test_references_of_known_streams():
    coin = torch.randint(3, 5, (200_000,), generator=torch.Generator().manual_seed(0))
    found = ngram_losses(coin, coin[:5000], 5, 5000)
    assert abs(found["unigram"] - np.log(2)) < 1e-3 and abs(found["bigram"] - np.log(2)) < 1e-3
    cycle = torch.arange(60_000) % 3 + 2
    found = ngram_losses(cycle, cycle[:3000], 5, 3000)
    assert abs(found["unigram"] - np.log(3)) < 1e-3 and found["bigram"] < 1e-3


def titles_stream(rng, n, kinds, longest):
    """A stream of `n` titles of 0 to `longest` tokens."""
    return torch.tensor([i for _ in range(n) for i in [*rng.integers(2, kinds, rng.integers(0, longest + 1)).tolist(), 1]])


def whole_titles(ids, length=10**9):
    """The titles of a stream, sorted; those longer than a row in pieces of its length."""
    titles, found = [[]], []
    for i in ids.tolist():
        titles[-1].append(i)
        if i == 1:
            titles.append([])
    for title in titles:
        found += [tuple(title[k : k + length]) for k in range(0, len(title), length)]
    return sorted(found)


def test_a_drawn_order_keeps_every_title_whole_and_follows_from_seed_and_pass():
    rng = np.random.default_rng(0)
    for n in (1, 2, 50, 400):
        ids = titles_stream(rng, n, 90, 12)
        draws = {(seed, epoch): shuffled_stream(ids, seed, epoch) for seed in (0, 1, 2**62) for epoch in (0, 1, 10**6)}
        assert all(whole_titles(d) == whole_titles(ids) and len(d) == len(ids) and d[-1] == 1 for d in draws.values())
        assert all(torch.equal(d, shuffled_stream(ids, *key)) for key, d in draws.items())
        assert n < 50 or len({tuple(d.tolist()) for d in draws.values()}) == len(draws)


def test_rows_hold_whole_titles_and_each_token_once():
    rng = np.random.default_rng(1)
    for n, longest, length in [(1, 3, 2), (40, 6, 8), (300, 20, 16), (300, 20, 64), (200, 90, 16), (5, 0, 4)]:
        ids = titles_stream(rng, n, 90, longest)
        for order in (None, rng.permutation(n)):
            x, y = title_rows(ids, length, order)
            counted = y != IGNORED
            assert torch.equal(y[counted].sort().values, ids.sort().values) and (x == 1).sum() == n
            assert sorted(map(tuple, _titles_of_rows(x, y))) == whole_titles(ids, length)
            assert (x[~counted] == PAD).all() and (counted[:, 1:] <= counted[:, :-1]).all()
            fewest = -(-len(ids) // length)
            assert fewest <= len(x) <= 1.3 * fewest + 1 or longest > length  # best fit is near the least there can be


def _titles_of_rows(x, y):
    """The targets of each title, or piece of one, in rows: it begins at an `<eos>` or at the start of a row."""
    for row, targets in zip(x.tolist(), y.tolist(), strict=True):
        starts = [i for i, (a, b) in enumerate(zip(row, targets, strict=True)) if b != IGNORED and (a == 1 or i == 0)]
        real = sum(t != IGNORED for t in targets)
        for start, stop in zip(starts, [*starts[1:], real], strict=True):
            assert row[start + 1 : stop] == targets[start : stop - 1]  # each input is the target before it
            yield targets[start:stop]


def test_batches_are_a_function_of_their_number_and_every_pass_is_whole():
    ids = titles_stream(np.random.default_rng(2), 300, 90, 12)
    for options in [{}, dict(shuffle=True), dict(rows="titles"), dict(rows="titles", shuffle=True)]:
        hp = Hyperparams(batch_size=4, context_length=32, title_mask=True, **options)
        batches = Batches(ids, hp)
        n, seen = batches.count, [batches[k] for k in range(3 * batches.count)]
        for k in np.random.default_rng(3).permutation(3 * n):
            assert all(map(torch.equal, Batches(ids, hp)[int(k)], seen[k]))
        for epoch in range(3):  # what a pass leaves out is less than a batch
            y = torch.cat([y.flatten() for _, y in seen[epoch * n : (epoch + 1) * n]])
            assert len(ids) - (y != IGNORED).sum() <= 4 * 32
        assert batches.tokens <= 4 * 32 and (batches.tokens == 4 * 32) == (not batches.whole)
    changed = Batches(ids, replace(hp, seed=1))
    assert not torch.equal(changed[0][1], seen[0][1])


def test_kneser_ney_of_three_titles_counted_by_hand():
    model = KneserNey([3, 4, 1, 3, 4, 1, 3, 1], vocab_size=5, order=2)  # the titles ab, ab and a
    one, two = model.levels
    assert one.counts.tolist() == [2, 1, 1]  # tokens before <eos>, a, b
    assert two.counts.tolist() == [3, 1, 2, 2]  # of (<eos>, a), (a, <eos>), (a, b), (b, <eos>)
    np.testing.assert_allclose(one.discount, [0, 0.5, 2, 3], atol=1e-12)
    np.testing.assert_allclose(two.discount, [0, 0.2, 1.7, 3], atol=1e-12)
    p_a = p_b = 0.5 / 4 + 0.75 / 5
    p_eos = 0.75 / 5
    by_hand = [p_a, (2 - 1.7) / 3 + 1.9 / 3 * p_b, (2 - 1.7) / 2 + 1.7 / 2 * p_eos]
    np.testing.assert_allclose(model.probabilities([3, 4, 1]), by_hand, atol=1e-12)
    np.testing.assert_allclose(model.probabilities([2, 3, 1])[:2], [0.75 / 5, p_a], atol=1e-12)  # a token and a context never seen


@pytest.mark.parametrize("order", [1, 2, 5])
def test_kneser_ney_adds_up_to_one_after_every_context(order):
    rng = np.random.default_rng(order)
    model = KneserNey(titles_stream(rng, 200, 12, 9), 15, order)
    for context in [[], [2], [14], [3, 14], [14, 3, 4], *(rng.integers(2, 15, 7).tolist() for _ in range(8))]:
        asked = [[*context, w, *[1] * (w != 1)] for w in range(15)]
        at = np.cumsum([len(t) for t in asked]) - 1 - np.array([w != 1 for w in range(15)])
        p = model.probabilities(np.concatenate(asked))[at]
        assert abs(p.sum() - 1) < 1e-12 and (p > 0).all()


def test_references_are_kept_and_damage_costs_only_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rng, folder = np.random.default_rng(4), tmp_path / "mainrun_nb" / "references"
    train, val = titles_stream(rng, 300, 90, 12), titles_stream(rng, 30, 90, 12)
    honest = ngram_losses(train, val, 90, 500)
    assert reference_losses(train, val, 90, 500) == honest and not folder.exists()  # counted in no time
    monkeypatch.setattr(data, "KEPT_FROM", 100)
    monkeypatch.setattr(data, "KEPT", 3)
    assert reference_losses(train, val, 90, 500) == honest
    (file,) = folder.iterdir()
    with monkeypatch.context() as m:
        m.setattr(data, "ngram_losses", None)
        assert reference_losses(train, val, 90, 500) == honest
    for damage in ("", "{", file.read_text()[:-9], file.read_text().replace("1", "2", 1), "[1]", "null"):
        file.write_text(damage)
        assert reference_losses(train, val, 90, 500) == honest == json.loads(file.read_text())["losses"]
    for other in [(train[1:], val, 90, 500), (train, val[1:], 90, 500), (train, val, 91, 500), (train, val, 90, 501)]:
        assert reference_losses(*other) == ngram_losses(*other) != honest
    assert len(list(folder.iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "no" / "folder"))
    assert reference_losses(train, val, 90, 500) == honest
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))  # a user without one
    assert reference_losses(train, val, 90, 500) == honest


@pytest.mark.slow
@pytest.mark.real
def test_what_counting_reaches_on_the_recipes_own_tokens():
    cfg = load_config(ROOT / "sweeps/sota/small_first.yaml", [f"data.source={os.environ['HN_TITLES']}"])
    train, val = split_titles(load_titles(cfg), cfg)
    if len(read_titles(os.environ["HN_TITLES"])) == 394_242:
        tokenizer = train_tokenizer(train, kind="unigram", vocab_size=16_000)
        a, b = (token_stream(half, tokenizer) for half in (train, val))
        assert ngram_losses(a, b, tokenizer.vocab_size, joined_chars(val))["kneser_ney"] == pytest.approx(1.28547, abs=5e-6)


@pytest.mark.real
def test_the_known_split_of_real_titles():
    cfg = load_config(overrides=[f"data.source={os.environ['HN_TITLES']}"])
    train, val = split_titles(load_titles(cfg), cfg)
    assert (len(train), len(val)) == (90_000, 10_000)
    if len(read_titles(os.environ["HN_TITLES"])) == 394_242:
        assert joined_chars(val) == 548_676
        assert fingerprint(train, val, cfg, 0)["sha256"].startswith("56ee2642e73a96ff")
