"""A run as a folder for others: the same logits for every kind of model, nothing lost, nothing told about the machine; the hub."""
import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from mainrun_nb.checkpoint import load_run, read_sealed, sealed
from mainrun_nb.config import InputError, RunError, tiny
from mainrun_nb.hub import export_run, load_exported
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.trainer import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("hyperparams.max_steps=2", "hyperparams.num_titles=600")
KINDS = {
    "plain": [],
    "rotary": ["model_configs.gpt.position=rope", "model_configs.gpt.norm=rmsnorm", "model_configs.gpt.bias=false", "hyperparams.ema=0.9"],
    "bottleneck": ["attn_configs.causal.intermediate_dim=16", "model_configs.gpt.hidden_layer=64", "model_configs.gpt.tied=false"],
    "sparse": ["model_configs.gpt.attention_layer=sparse", "attn_configs.sparse.n_head=2", "attn_configs.sparse.local_attn_ctx=8",
               "attn_configs.sparse.sparseblocksize=8", "attn_configs.sparse.vertsize=2", "attn_configs.sparse.num_verts=1"],
    "sparsek": ["model_configs.gpt.attention_layer=sparsek", "attn_configs.sparsek.n_head=2", "attn_configs.sparsek.k=4",
                "attn_configs.sparsek.window=8"],
    "unet": ["hyperparams.model_architecture=unet_gpt", "model_configs.unet_gpt.hidden_layer_list=[32,16,32]",
             "model_configs.unet_gpt.d_model=32", "model_configs.unet_gpt.skip_connections=true"],
    "cased": ["tokenizer.kind=cased", "hyperparams.title_mask=true"],
    "unigram": ["tokenizer.kind=unigram"],
    "challenge": ["tokenizer.kind=challenge"],
}
QUICK = ("plain", "cased", "sparsek")


def same(a, b) -> None:
    """Both give the same logits for the same text, and cut it into the same ids."""
    (cfg, model, tokenizer), (_, other, others) = a, b
    ids = tokenizer.encode("Show HN: A very small model, iPhone and naïve")
    assert ids == others.encode("Show HN: A very small model, iPhone and naïve")
    idx = torch.tensor([[1, *ids]])[:, : cfg.hyperparams.context_length]
    with torch.no_grad():
        assert torch.equal(model(idx)[0], other(idx)[0])


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_every_kind_of_run_comes_back_to_the_last_bit(kind, tmp_path):
    train(tiny(*STEPS, *KINDS[kind]), tmp_path / "run", progress=False)
    out = export_run(tmp_path / "run", tmp_path / "out")
    same(load_exported(out), load_run(tmp_path / "run"))
    card = (out / "README.md").read_text(encoding="utf-8")
    head, result = yaml.safe_load(card.split("---\n")[1]), read_sealed(tmp_path / "run" / "result.json")
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(result["val/loss"], 6) and "license" not in head
    assert f"**{result['val/loss']:.4f}**" in card and f"{result['data']['reference/kneser_ney']:.4f}" in card
    assert result["data"]["sha256"] in card
    gpt2 = kind in ("plain", "unigram", "challenge")
    assert (out / "config.json").exists() == gpt2 and head["library_name"] == ("transformers" if gpt2 else "mainrun_nb")
    if gpt2:
        transformers = pytest.importorskip("transformers")
        theirs, their_tokenizer = transformers.AutoModelForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
        _, model, tokenizer = load_exported(out)
        ids = torch.tensor([their_tokenizer("Show HN: A title").input_ids])
        assert ids[0].tolist() == [1, *tokenizer.encode("Show HN: A title")]
        with torch.no_grad():
            assert torch.allclose(theirs(ids).logits, model(ids)[0], atol=1e-4)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A run on titles of one's own, with what must not leave the machine."""
    folder = tmp_path_factory.mktemp("secret-place")
    (folder / "my titles.csv").write_text("\n".join(["when,headline", *(f'1,"{t}"' for t in sample_titles(600, seed=1))]))
    cfg = tiny(*STEPS, f"data.source={folder / 'my titles.csv'}", "data.column=headline", f"hyperparams.log_file={folder / 'log.jsonl'}",
               "tracking.project=hush", "tracking.tags=[inner]", "model_configs.gpt.position=rope")
    train(cfg, folder / "run", progress=False)
    return folder / "run"


def test_nothing_of_the_machine_is_told(own, tmp_path):
    out = export_run(own, tmp_path / "out")
    told = "".join(p.read_text(encoding="utf-8") for p in out.rglob("*") if p.suffix in (".md", ".yaml", ".json"))
    assert "secret-place" not in told and "hush" not in told and "inner" not in told
    assert "`my titles.csv`" in told and "data.source=FILE" in told


def test_what_somebody_has_changed_is_not_lost(own, tmp_path, monkeypatch):
    out = export_run(own, tmp_path / "out")
    assert export_run(own, out) == out  # nobody has touched it
    for name, text in {"README.md": "mine", "LICENSE": "mine", ".gitattributes": "mine"}.items():
        before = (out / name).read_text() if (out / name).exists() else None
        (out / name).write_text(text)
        with pytest.raises(InputError, match=f"{name} is not as it was exported"):
            export_run(own, out)
        assert (out / name).read_text() == text
        (out / name).unlink() if before is None else (out / name).write_text(before)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    (tmp_path / "file").write_text("")
    for place, words in {"thesis": "exists and is not empty", "file": "exists and is not a folder", "file/out": "cannot be written"
                         }.items():
        with pytest.raises(InputError, match=words):
            export_run(own, tmp_path / place)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="is the current folder"):
        export_run(own, ".")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "out", "thesis"]


def test_a_disk_that_fills_up_leaves_the_earlier_export(own, tmp_path, monkeypatch):
    out = export_run(own, tmp_path / "out")
    monkeypatch.setattr("mainrun_nb.hub.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left on device"):
        export_run(own, out)
    monkeypatch.undo()
    same(load_exported(out), load_run(own))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damage_is_named(own, tmp_path):
    for name in ("model.safetensors", "mainrun_nb/config.yaml", "mainrun_nb/tokenizer.json", "mainrun_nb/export.json"):
        out = export_run(own, tmp_path / name.replace("/", "-"))
        (out / name).write_bytes((out / name).read_bytes()[:-3])
        with pytest.raises(InputError, match=f"{name}: is damaged") as caught:
            load_exported(out)
        assert "\n" not in str(caught.value)
        (out / name).unlink()
        with pytest.raises(InputError, match=name):
            load_exported(out)
    with pytest.raises(InputError, match="nowhere"):
        load_exported(tmp_path / "nowhere")


def test_a_result_that_lacks_what_the_card_says_is_one_line(own, tmp_path):
    shutil.copytree(own, tmp_path / "run")
    result = {k: v for k, v in json.loads((own / "result.json").read_text()).items() if k != "seal"}
    for lacks, why in {"val/bits_per_byte": "lacks", "parameters": "lacks", "val/loss": "cannot be read"}.items():
        (tmp_path / "run" / "result.json").write_text(json.dumps(sealed({k: v for k, v in result.items() if k != lacks})))
        with pytest.raises(InputError, match=f"result.json: {why}") as caught:
            export_run(tmp_path / "run", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for; what it was sent is kept."""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, content: dict | list | bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        if "/tree/" in self.path:
            files = self.server.files
            return self.answer([{"type": "file", "path": name, "size": len(raw), "oid": "2" * 40} for name, raw in files.items()])
        if "/resolve/" in self.path:
            raw = self.server.files[self.path.partition("/resolve/main/")[2]]
            return self.answer(raw, headers={"X-Repo-Commit": "1" * 40, "ETag": '"3"'})
        self.answer({"id": "me/titles", "sha": "0" * 40, "siblings": [], "private": True, "name": "me", "type": "user", "orgs": []})

    def do_POST(self) -> None:
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.seen.append(self.path)
        server.tokens.add(self.headers.get("Authorization"))
        if server.refuses:
            return self.answer({"error": f"no, {self.headers['Authorization']}"}, server.refuses)
        if self.path == "/api/repos/create":
            server.made = json.loads(body)
            return self.answer({"url": f"http://{self.headers['Host']}/me/titles", "name": "me/titles", "id": "1"})
        if self.path == "/api/validate-yaml":
            server.head = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            ways = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": f["path"], **ways} for f in json.loads(body)["files"]]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            server.files |= {v["path"]: base64.b64decode(v["content"]) for v in (line["value"] for line in lines if line["key"] == "file")}
            for line in lines:
                if line["key"] == "deletedFile":
                    del server.files[line["value"]["path"]]
            url = f"http://{self.headers['Host']}/me/titles/commit/{'1' * 40}"
            return self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
        self.answer({"error": self.path}, 404)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.tokens, server.files, server.made, server.refuses = [], set(), {}, None, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


TOKEN = "hf_" + "aB3" * 12


def push(hub, run: Path, cwd: Path, repo: str = "me/titles", token: str = TOKEN) -> subprocess.CompletedProcess:
    code = "import sys; from mainrun_nb.cli import export_cli; sys.argv[0] = 'mainrun-export'; export_cli()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_TOKEN": token,
           "HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(run), "out", "--push", repo]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_what_is_pushed_is_what_was_exported(hub, own, tmp_path):
    done = push(hub, own, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "out" and done.stdout.splitlines()[1].endswith("/me/titles")
    assert hub.made.get("private") is True or hub.made["visibility"] == "private"
    assert hub.made["name"] == "titles" and hub.tokens == {f"Bearer {TOKEN}"}
    out = tmp_path / "out"
    assert hub.files == {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert 'snapshot_download("me/titles")' in hub.files["README.md"].decode() and TOKEN not in done.stdout + done.stderr
    for name, raw in hub.files.items():  # as somebody else receives it
        (tmp_path / "theirs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / name).write_bytes(raw)
    same(load_exported(tmp_path / "theirs"), load_run(own))


@pytest.mark.slow
def test_another_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(hub, own, tmp_path):
    """First in GPT-2's form, then a rotary model: transformers must not find the first one's files beside the second's weights."""
    train(tiny(*STEPS), tmp_path / "plain", progress=False)
    hub.files = {"LICENSE": b"mine", "tokenizer_config.json.md": b"mine", ".gitattributes": b"theirs"}
    theirs = dict(hub.files)
    assert push(hub, tmp_path / "plain", tmp_path).returncode == 0 and "config.json" in hub.files and "LICENSE" in hub.files
    done, out = push(hub, own, tmp_path), tmp_path / "out"
    assert done.returncode == 0, done.stderr
    assert hub.files == theirs | {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    hub.files |= {"mainrun_nb/export.json": b"{", "config.json": b"of whom?"}
    assert push(hub, own, tmp_path).returncode == 0 and hub.files["config.json"] == b"of whom?", "a damaged list vouches for nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "token", "refuses", "code", "says"), [
    ("me/titles", TOKEN, 403, 1, "me/titles: the hub did not take it"), ("me/titles", "", 0, 2, "--push: needs a token"),
    ("me/too/deep", TOKEN, 0, 2, "--push: ")])
def test_a_push_that_fails_is_one_line_without_the_token(repo, token, refuses, code, says, hub, own, tmp_path):
    hub.refuses = refuses
    done = push(hub, own, tmp_path, repo, token)
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "out").exists() == (code == 1) and not hub.files  # what was exported stays


def test_a_hub_that_cannot_be_reached_is_one_line(own, tmp_path, monkeypatch):
    from mainrun_nb.hub import push_export

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: (_ for _ in ()).throw(ConnectionError(f"refused\n{TOKEN}")))
    with pytest.raises(RunError, match="the hub did not take it") as caught:
        push_export(export_run(own, tmp_path / "out"), "me/titles")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
