"""Titles of one's own: every kind of file, folder and pattern, what is dropped and said, and every way in which they can be wrong."""
import contextlib
import csv
import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import refusal

from mainrun_nb import cli, formats, sources
from mainrun_nb.config import DataConfig, InputError, load_config, tiny
from mainrun_nb.data import fingerprint, read_split
from mainrun_nb.formats import title_files
from mainrun_nb.messages import override
from mainrun_nb.sources import all_titles, draw_titles, load_titles, read_titles
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.trainer import evaluate_run, train

KINDS = ("txt", "csv", "tsv", "jsonl", "json", "parquet")


def config(source, n=20, *more):
    return load_config(overrides=[f"data.source={source}", f"hyperparams.num_titles={n}", *more])


def write(path, titles, column="title"):
    """Titles, and None for a gap, in the format that the name asks for."""
    kind = path.name.split(".")[1]
    if kind == "txt":
        path.write_text("".join(f"{t or ''}\n" for t in titles), encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as f:
            csv.writer(f, delimiter="," if kind == "csv" else "\t").writerows([["id", column], *((i, t) for i, t in enumerate(titles))])
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"id": 0, column: t}) + "\n" for t in titles))
    elif kind == "json":
        path.write_text(json.dumps([{"id": 0, column: t} for t in titles], indent=1))
    else:
        pq.write_table(pa.table({"id": range(len(titles)), column: pa.array(titles, pa.string())}), path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.fixture
def titles():
    rng = random.Random(0)
    pieces = ["On", "a, b", '"quoted"', "l'été", "价格", "🚀", "\u2028", "C:\\x", "{json: 1}", "sparse"]
    return [f"{i} {' '.join(rng.choices(pieces, k=rng.randrange(1, 6)))}".strip() for i in range(60)]


# --- every kind ------------------------------------------------------------------------------------------------------------


def test_a_mixture_of_all_kinds_is_read_whole_and_in_order(tmp_path, titles):
    folder, names = tmp_path / "mine", []
    (folder / "more").mkdir(parents=True)
    for i, kind in enumerate([*KINDS, *(f"{kind}.gz" for kind in KINDS)]):
        names.append(write(folder / ("more" if i % 2 else "") / f"{'xyz'[i % 3]}{i}.{kind}", titles[5 * i : 5 * i + 5]))
    expected = [t for path in sorted(names, key=str) for t in read_titles(path)]
    assert sorted(expected) == sorted(titles)
    assert read_titles(folder) == read_titles(f"{folder}/**/*") == expected
    found, account = draw_titles(config(folder, 60))
    assert sorted(found) == sorted(titles) and (account.files, account.read, account.left_out) == (12, 60, [])


@pytest.mark.parametrize("name", [f"t.{kind}" for kind in KINDS])
def test_gaps_are_dropped_alike_in_every_kind(tmp_path, titles, name):
    kept = [t for i, t in enumerate(titles) if i % 7 and i % 5]
    gaps = [None if i % 7 == 0 else "" if i % 5 == 0 else t for i, t in enumerate(titles)]
    plain = write(tmp_path / "plain.txt", kept)
    found, account = draw_titles(config(write(tmp_path / name, gaps), 20))
    assert read_titles(tmp_path / name) == kept and found == load_titles(config(plain, 20))
    assert account.read == 60 and account.empty + account.null == 60 - len(kept) and account.not_text == 0


def test_what_is_no_text_is_dropped_and_the_word_null_is_a_word(tmp_path):
    odd = ["NULL", "nan", 7, 1.5, True, None, ["a"], "", "  ", "None"]
    (tmp_path / "a.json").write_text(json.dumps(odd).replace("1.5", "NaN"))
    titles, account = all_titles(DataConfig(source=str(tmp_path / "a.json")))
    assert titles == ["NULL", "nan", "None"]
    assert (account.read, account.empty, account.null, account.not_text) == (10, 2, 2, 3)
    assert "dropped: 2 empty, 2 null, 3 not text" in account.text()


def test_line_ends_quoted_newlines_and_marks(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffid,title\r\n1,\"two\r\nlines, one title\"\r\n2,\" \"\"q\"\" \"\r\n".encode())
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo\rthree\n".encode())
    assert read_titles(tmp_path / "a.csv") == ["two\r\nlines, one title", '"q"']
    assert read_titles(tmp_path / "b.txt") == ["one", "two", "three"]
    for name in ("a.csv", "b.txt"):
        (tmp_path / name).write_bytes("\ufeff".encode())
        assert "holds no titles" in refusal(read_titles, tmp_path / name)


def test_json_of_every_layout(tmp_path):
    lists = ['["a", "b"]', '[{"title": "a"}, "b"]', '[{"title":"a"},{"id":1},{"title":"b"}]']
    for text in [*lists, '{"title": "a"}\n{"title": "b"}\n', '"a"\n\n"b"']:
        for name in ("x.json", "x.jsonl") if "\n" in text else ("x.json",):
            (tmp_path / name).write_text(text)
            assert read_titles(tmp_path / name) == ["a", "b"], (name, text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "latin-1", "utf-8-sig", "mac_roman"])
def test_other_encodings_are_one_setting_away(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes("title\nZürich, no\n".replace(", no", "").encode(encoding))
    if not encoding.startswith("utf-8"):
        text = refusal(load_titles, config(path, 1))
        assert "not UTF-8 text" in text and ("data.encoding" in text or encoding == "utf-16-le")
    assert load_titles(config(path, 1, f"data.encoding={encoding}")) == ["Zürich"]


@pytest.mark.parametrize("wrong", ["utf9", "base64", "rot13", "''", "hex", '"a\\nb"', '"a\\0b"'])
def test_an_encoding_that_is_none(wrong):
    assert "data.encoding: Python knows no encoding" in refusal(load_config, None, [f"data.encoding={wrong}"])


# --- accounts --------------------------------------------------------------------------------------------------------------


def test_duplicates_are_counted_kept_or_dropped(tmp_path, titles):
    path = write(tmp_path / "six.csv", titles * 6)
    train_half, val, account = read_split(config(path, 360))
    assert (account.duplicates, account.deduplicated, len(train_half) + len(val)) == (300, False, 360)
    assert account.val_in_train > 0.9 * account.val and "data.deduplicate=true keeps each once" in account.text()
    train_half, val, account = read_split(config(path, 60, "data.deduplicate=true"))
    assert account.val_in_train == 0 and sorted(train_half + val) == sorted(titles) and "300 duplicates dropped" in account.text()
    assert "has 60 titles" in refusal(load_titles, config(path, 61, "data.deduplicate=true"))


def test_long_titles_are_cut_only_if_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short\n" + "é" * 50 + " tail\n")
    assert read_titles(path)[1] == "é" * 50 + " tail"
    titles, account = draw_titles(config(path, 2, "data.max_chars=51"))
    assert sorted(titles) == ["short", "é" * 50] and account.shortened == 1
    path.write_text("x" * 100_001)
    assert "title 1 has 100,001 characters" in refusal(read_titles, path)
    assert load_titles(config(path, 1, "data.max_chars=9")) == ["x" * 9]
    assert "data.max_chars: must be above 0, or null" in refusal(config, path, 1, "data.max_chars=0")


@pytest.mark.parametrize("setting", ["deduplicate=true", "max_chars=20"])
def test_the_grammars_titles_stay_as_they_are(setting):
    assert "cannot be with data.source=synthetic" in refusal(config, "synthetic", 20, f"data.{setting}")


def test_what_is_left_out_is_said(tmp_path, titles):
    for name in ("README.md", "x.pdf", ".hidden.csv", "LICENSE"):
        (tmp_path / name).write_text("title\nx\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.csv").write_text("title\nsecret\n")
    write(tmp_path / "a.csv", titles)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "linked.txt").symlink_to(tmp_path / "README.md")
    found, account = all_titles(DataConfig(source=str(tmp_path)))
    assert found == [*titles, "title", "x"] and account.files == 2
    assert len(account.left_out) == 7 and "and 4 more" in account.text()
    reasons = {"hidden)", "no kind of file that is read)", "a link to a folder)", "holds no titles)"}
    assert {why.rsplit("(", 1)[1] for why in account.left_out} == reasons


def test_a_file_is_read_once_whatever_it_is_called(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "round").symlink_to(".")
    for source in (tmp_path, f"{tmp_path}/**/*.txt", f"{tmp_path}/*"):
        found, account = all_titles(DataConfig(source=str(source)))
        assert found == ["x"] and account.files == 1 and any("the same file as" in why for why in account.left_out)


def test_the_account_is_in_the_log_and_the_result_and_the_line_is_printed_once(tmp_path, capsys):
    words = "On the of deep sparse graph networks learning fast towards a survey".split()
    rng = random.Random(1)
    mine = [" ".join(rng.choices(words, k=6)) for _ in range(300)]
    path = write(tmp_path / "a🎉.csv", [*mine, *mine[:40], None], column="headline")
    cfg = tiny(f"data.source={path}", "data.column=headline", "hyperparams.num_titles=340", "hyperparams.max_steps=2")
    result = train(cfg, tmp_path / "run").metrics
    account = result["data"]["account"]
    assert (account["read"], account["empty"], account["duplicates"], account["val"]) == (341, 1, 40, 34) and account["val_in_train"] > 0
    assert capsys.readouterr().out.count(account["text"]) == 1
    event = next(e for e in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if e["event"] == "dataset_info")
    assert event["account"] == account and event["sha256"] == result["data"]["sha256"]
    again = evaluate_run(tmp_path / "run")
    assert again["val/loss"] == result["val/loss"] and again["account"]["val_in_train"] == account["val_in_train"]
    other = write(tmp_path / "b🎉.tsv", ["deep graph", None, "a survey é"], column="name")
    measured = evaluate_run(tmp_path / "run", str(other), overrides=["data.column=name"])
    assert measured["titles"] == 2 and measured["account"]["read"] == 3
    assert "no column 'headline' (data.column)" in refusal(evaluate_run, tmp_path / "run", str(other))
    assert "has no end" in refusal(evaluate_run, tmp_path / "run", "synthetic")


# --- what cannot be ---------------------------------------------------------------------------------------------------------


def make(tmp_path, name, content):
    """A file, or for a dict a folder of files."""
    if isinstance(content, dict):
        (tmp_path / name).mkdir()
        for inner, raw in content.items():
            make(tmp_path / name, inner, raw)
    else:
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", b"Headline,id\nx,1\n", "no column 'title' (data.column). Known: Headline, id"),
    ("a.csv", b"Title,id\nx,1\n", "Did you mean 'Title'?"),
    ("a.csv", b"id;title\n1;x\n", "one column, 'id;title', which holds ';'"),
    ("a.tsv", b"id,title\n1,x\n", "one column, 'id,title', which holds ','"),
    ("a.csv", b"title,title\nx,y\n", "2 columns are called 'title'"),
    ("mixed", {"a.csv": b"title\nx\n", "b.csv": b"headline\ny\n"}, "b.csv: no column 'title'"),
    ("mixed", {"a.csv": b"title\nx\n", "b.txt.gz": b"plain"}, "b.txt.gz: not a whole gzip file"),
    ("empty", {}, "no file of titles; known: .txt"),
    ("none", {"a.pdf": b"x"}, "a.pdf (no kind of file that is read)"),
    ("blank", {"a.csv": b"title\n", "b.txt": b"\n"}, "holds no titles"),
    ("x.csv", {"y.csv": b"name\nx\n"}, "y.csv: no column 'title'"),
    ("a.json", b'[{"title": {"en": "x"}}]', "none of 1 values is a title ({'en': 'x'} is not text)"),
    ("a.json", b'[1, 2]', "none of 2 values is a title (1 is not text)"),
    ("a.json", b'["\\ud83d"]', "title 1 holds half a surrogate pair"),
    ("a.json", b'["a", null, "\\udfff"]', "title 3 holds half a surrogate pair"),
    ("a.json", b'["a",]', "line 1: not valid JSON"),
    ("a.json", b'[' + b"9" * 5000 + b"]", "not valid JSON (too large or nested too deep)"),
    ("a.csv.gz", gzip.compress(b"title\nx\n", mtime=0)[:-3], "not a whole gzip file"),
    ("a.csv", gzip.compress(b"title\nx\n", mtime=0), "its name must then end in .gz"),
    ("a.csv", b"PK\x03\x04\xff\xfe", "it begins as a zip file or spreadsheet does"),
    ("a.txt", b"x" * 200_000, "title 1 has 200,000 characters"),
    ("split", {"train.csv": b"title\n", "test.csv": b"title\nx\n"}, "holds no titles"),
])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, name, content, words):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, name, content)
    for source in (name, f"{name[:-1]}?"):
        text = refusal(load_titles, config(source, 1))
        assert words in text and len(text) < 400, text


def test_an_error_is_not_told_apart_by_how_a_file_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hashes.csv").write_text("name\nx\n")
    assert refusal(read_titles, "hashes.csv") == "hashes.csv: no column 'title' (data.column). Known: name."
    Path("has.txt").write_text("a\n" + "x" * 100_001)
    assert refusal(read_titles, "has.txt").startswith("has.txt: title 2 has 100,001 characters")


def test_a_pattern_and_a_name_with_a_hash_need_no_quotes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "title #1.csv").write_text("title #2\nx\n")
    for source in ("*.csv", "title #1.csv", "'*.csv'"):
        assert load_titles(config(source, 1, "data.column=title #2")) == ["x"]


@pytest.mark.parametrize("source", ["*🎉.txt", "🎉 #2.txt", "é*🎉\\.txt", "*\x85\u2028\x7f.txt", "*\"'.txt", "a 漢.txt"])
def test_a_name_of_any_characters_is_the_same_as_an_override(source):
    assert load_config(overrides=[override("data.source", source)]).data.source == source  # as a sweep says it
    assert load_config(overrides=[f"data.source={source}"]).data.source == source


def test_places_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nowhere.txt").symlink_to("gone")
    os.mkfifo("pipe.txt")
    assert "a link that leads nowhere" in refusal(load_titles, config("nowhere.txt", 1))
    assert "neither a file nor a folder" in refusal(load_titles, config("pipe.txt", 1))
    assert "the pattern matches no file of titles" in refusal(load_titles, config("*.parquet", 1))
    assert "does not exist" in refusal(load_titles, config("no/such/folder", 1))
    Path("a[1].csv").write_text("title\nx\n")
    assert load_titles(config("'a[1].csv'", 1)) == ["x"]  # a file of that name is no pattern
    Path("shut").mkdir()

    def denied(path, *args, **named):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as m:
        m.setattr(os, "scandir", denied)
        assert "shut: cannot be read (Permission denied)" in refusal(load_titles, config("shut", 1))


def test_a_folder_in_the_hubs_layout_keeps_test_titles_out(tmp_path):
    for name in ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "test-00000-of-00001.csv", "extra.csv"):
        (tmp_path / name).write_text(f"title\n{name}\n")
    found, account = all_titles(DataConfig(source=str(tmp_path)))
    assert found == ["extra.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"]
    assert account.left_out == ["test-00000-of-00001.csv (split test)"]
    assert "test-00000-of-00001.csv" in all_titles(DataConfig(source=str(tmp_path), split="test"))[0]
    text = refusal(all_titles, DataConfig(source=str(tmp_path), split="validation"))
    assert "has no file that is named after 'validation'. Known: test, train." in text


@pytest.mark.parametrize("source, split, read, left", [
    ("ds", "train", "extra.csv train/a.csv", "test/b.csv"),
    ("ds/", "test", "extra.csv test/b.csv", "train/a.csv"),
    ("ds/*", "train", "extra.csv train/a.csv", "test/b.csv"),
    ("ds/**", "train", "extra.csv train/a.csv", "test/b.csv"),
    ("ds/**/*.csv", "test", "extra.csv test/b.csv", "train/a.csv"),
    ("ds/*/*", "train", "train/a.csv", "test/b.csv"),
    ("*/*", "train", "extra.csv train/a.csv flat/train-0.csv", "ds/test/b.csv flat/test.csv"),
    ("flat/**", "train", "train-0.csv", "test.csv"),
    ("flat/*", "test", "test.csv", "train-0.csv"),
    ("flat/t*.csv", "train", "train-0.csv", "test.csv"),
    ("flat/test*.csv", "train", "test.csv", ""),  # asks for the files of one split
    ("flat/test*.csv", "test", "test.csv", ""),
    ("ds/test/*", "train", "b.csv", ""),
    ("ds/test/*", "test", "b.csv", ""),
    ("ds/test", "test", "b.csv", ""),
    ("ds/e*", "train", "extra.csv", ""),
])
def test_patterns_and_folders_keep_to_the_same_split(tmp_path, monkeypatch, source, split, read, left):
    for name in ("ds/train/a.csv", "ds/test/b.csv", "ds/extra.csv", "flat/train-0.csv", "flat/test.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"title\n{name}\n")
    monkeypatch.chdir(tmp_path)
    for where in ("", f"{tmp_path}/"):
        found, account = all_titles(DataConfig(source=where + source, split=split))
        assert len(found) == len(read.split()) and all(any(f.endswith(r) for f in found) for r in read.split())
        assert account.left_out == [f"{name} (split {'test' if 'test' in name else 'train'})" for name in left.split()]


@pytest.mark.parametrize("source", ["flat/test*.csv", "ds/train/*", "ds/train", "ds/e*"])
def test_a_pattern_without_the_split_that_is_asked_for(tmp_path, monkeypatch, source):
    for name in ("ds/train/a.csv", "ds/extra.csv", "flat/test.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("title\nx\n")
    monkeypatch.chdir(tmp_path)
    said = refusal(all_titles, DataConfig(source=source, split="validation"))
    assert f"data.split: {source} has no file that is named after 'validation'." in said


def test_what_is_read_is_not_left_out(tmp_path, monkeypatch):
    for name in ("posts/a.csv", "posts/.b.csv", "posts/notes.md", "elsewhere/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"title\n{name}\n")
    (tmp_path / "posts/link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for source, read, left in [
        ("posts", ["a"], [".b.csv (hidden)", "link (a link to a folder)", "notes.md (no kind of file that is read)"]),
        ("posts/**", ["a", "c"], [".b.csv (hidden)", "notes.md (no kind of file that is read)"]),
        ("posts/.*", [".b"], []),
    ]:
        files, found = title_files(source)
        assert sorted(p.name for p in files) == sorted(f"{name}.csv" for name in read) and found == left


@pytest.mark.parametrize("wrong", ["hf:a/b/c/d", "hf:/x", "hf:../../etc", "'hf:a b'", "hf:https://huggingface.co/datasets/a/b"])
def test_a_name_on_the_hub_is_a_name(wrong):
    assert "data.source: must be hf:OWNER/NAME" in refusal(config, wrong)


def test_an_unreachable_hub_names_what_works_without_it(monkeypatch):
    monkeypatch.setattr(sources, "hub_silence", lambda hub: "ConnectError")
    text = refusal(load_titles, config("hf:owner/papers"))
    assert "data.source: owner/papers could not be loaded from the hub: it cannot be reached" in text and ".parquet" in text
    assert fingerprint(["a"], ["b"], config("hf:owner/papers/cs"), 1)["source"] == "hf:owner/papers/cs"


def test_the_commands_say_one_line_and_end_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("headline\nx\n")
    quick = str(Path(__file__).resolve().parents[1] / "sweeps/base/quickstart.yaml")
    for command in (cli.train_cli, cli.eda_cli):
        with pytest.raises(SystemExit) as ended:
            command("data.source=a.csv", config=quick, out="run")
        said = capsys.readouterr()
        assert ended.value.code == 2 and said.err.count("\n") == 1 and "no column 'title' (data.column). Known: headline." in said.err
    assert not Path("run").exists()


def test_a_limit_holds_for_each_file_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_FILE", 2**16)
    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x\n" * 2**16))
    with pytest.raises(InputError, match="b.txt.gz: holds more than"), contextlib.suppress(KeyError):
        load_titles(config(tmp_path, 1))


def test_titles_that_a_run_was_trained_on_are_counted_and_said(tmp_path):
    path = tmp_path / "titles.txt"
    path.write_text("\n".join(titles := sample_titles(300, 4)))
    train(tiny(f"data.source={path}", "hyperparams.num_titles=300", "hyperparams.max_steps=2"), tmp_path / "run", progress=False)
    with pytest.warns(UserWarning, match="of 300 titles are among those that the run was trained on"):
        account = evaluate_run(tmp_path / "run", str(path))["account"]
    assert account["val"] == 300 and 270 <= account["val_in_train"] <= 300
    (others := tmp_path / "others.txt").write_text("\n".join(set(sample_titles(200, 5)) - set(titles)))
    assert evaluate_run(tmp_path / "run", str(others))["account"]["val_in_train"] == 0
    path.unlink()
    assert evaluate_run(tmp_path / "run", str(others))["account"]["val_in_train"] is None
