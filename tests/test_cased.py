"""Letters and case apart: one normalised distribution over ordinary tokens, whatever the model around it."""
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mainrun_nb.case import fold
from mainrun_nb.checkpoint import load_run
from mainrun_nb.config import CausalAttnConfig, GPTConfig, InputError, tiny
from mainrun_nb.embedding import find_ngrams
from mainrun_nb.evaluate import evaluate
from mainrun_nb.generate import stream_title, write_titles
from mainrun_nb.gpt import GPT
from mainrun_nb.hub import export_run, load_exported
from mainrun_nb.memory import measured_peak, simulate_step
from mainrun_nb.models import build_model
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import train_tokenizer
from mainrun_nb.trainer import evaluate_run, train

CASED = ("tokenizer.kind=cased", "hyperparams.num_titles=600", "hyperparams.epochs=1")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sample_titles(3000, 1), kind="cased", vocab_size=700)


def small(tokenizer, **options) -> GPT:
    torch.manual_seed(0)
    shape = dict(d_model=24, hidden_layer=24, n_layer=2, dropout=0.0) | options
    model = GPT(GPTConfig(**shape), CausalAttnConfig(n_head=4), tokenizer.vocab_size, 48, title_mask=True, pairs=tokenizer.pairs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def by_hand(model: GPT, hidden: torch.Tensor) -> torch.Tensor:
    """log p of every id in float64, one id at a time, from the weights and the definition alone."""
    head, w = model.case_head, model.head_weight.double()
    piece_of, class_of = head.piece.tolist(), head.case.tolist()
    logp = (hidden.double() @ w.T).log_softmax(-1)
    rows = []
    for n, h in enumerate(hidden.double()):
        of_state = head.of_state.weight.double() @ h + head.of_state.bias.double()
        inner = [of_state + head.of_piece.weight.double() @ w[u] for u in range(len(w))]
        inner = [x * (1 + torch.erf(x / math.sqrt(2))) / 2 for x in inner]
        z = [(head.classes.weight.double() @ x + head.classes.bias.double()).tolist() for x in inner]
        total = [0.0] * len(w)
        for u, c in zip(piece_of, class_of, strict=True):
            total[u] += math.exp(z[u][c])
        rows.append([logp[n, u].item() + z[u][c] - math.log(total[u]) for u, c in zip(piece_of, class_of, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_logits_are_the_definition(tokenizer):
    model = small(tokenizer)
    idx = torch.tensor(tokenizer.encode_titles(sample_titles(3, 9))[:12])[None].long()
    with torch.no_grad():
        hidden = model.features(idx)[0]
        expected = by_hand(model, hidden)
        torch.testing.assert_close(expected.exp().sum(-1), torch.ones(12, dtype=torch.float64))
        torch.testing.assert_close(model(idx)[0][0].double().log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
        targets = torch.randint(tokenizer.vocab_size, (12,))
        targets[3] = -100
        nats = -expected.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0)
        torch.testing.assert_close(model.token_nats(hidden, targets).double(), nats, rtol=1e-5, atol=1e-5)
        for chunk in (0, 5, 512):
            model.loss_chunk = chunk
            torch.testing.assert_close(model(idx, targets[None])[1].double(), nats.sum() / 11, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_the_chunks(tokenizer):
    idx, targets = torch.randint(tokenizer.vocab_size, (2, 3, 16))
    grads = []
    for chunk in (0, 7):
        model = small(tokenizer)
        model.loss_chunk = chunk
        model(idx, targets, r_drop=2.0)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-6)


def test_the_case_of_a_token_tells_nothing_of_earlier_ones_nor_its_own_piece(tokenizer):
    model, pairs = small(tokenizer), tokenizer.pairs
    idx = torch.tensor(tokenizer.encode_titles(sample_titles(4, 3))[:40])[None].long()
    logits = model(idx)[0]
    others = {u: [i for i in np.flatnonzero(pairs.piece == u)] for u in set(pairs.piece[idx[0].numpy()])}
    tried = 0
    for t in range(1, 40):
        choices = [i for i in others[pairs.piece[idx[0, t]]] if i != idx[0, t]]
        if choices:
            changed = idx.clone()
            changed[0, t] = int(choices[0])
            again = model(changed)[0]
            assert torch.equal(again[:, :t], logits[:, :t])
            assert not torch.equal(again[:, t], logits[:, t])
            tried += 1
    assert tried > 10
    hidden = model.features(idx)
    piece = F.linear(hidden, model.head_weight).log_softmax(-1)  # of the next piece: the sum over its cases, whatever they are
    summed = torch.zeros_like(piece).index_add(-1, model.case_head.piece, logits.softmax(-1))
    torch.testing.assert_close(summed, piece.exp(), rtol=1e-4, atol=1e-6)


def test_evaluate_sees_ordinary_tokens(tokenizer):
    class LogitsOnly(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, idx):
            return self.model(idx)

    model, titles = small(tokenizer), sample_titles(60, 5)
    ids = torch.tensor(tokenizer.encode_titles(titles)).long()
    a, b = (evaluate(m, ids, titles, 48, 4) for m in (model, LogitsOnly(model)))
    assert a.nats_per_char == pytest.approx(b.nats_per_char, rel=1e-6) and a.challenge_loss == pytest.approx(b.challenge_loss, rel=1e-6)


def test_generation_by_cache_and_stream(tokenizer):
    model = small(tokenizer, position="rope")
    titles = write_titles(model, tokenizer, "Show HN", n=3, seed=1, max_tokens=20)
    assert all(title.startswith("Show HN") for title in titles)
    texts = list(stream_title(model, tokenizer, "Show", temperature=0, max_tokens=12))
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    idx = torch.randint(tokenizer.vocab_size, (2, 30))
    cache, parts = model.make_cache(2), []
    for a, b in [(0, 4), (4, 5), (5, 30)]:
        parts.append(model.logits(model.features(idx[:, a:b], cache), cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", [
    [],
    ["hyperparams.model_architecture=unet_gpt", "model_configs.unet_gpt.hidden_layer_list=[32,16,32]", "model_configs.unet_gpt.d_model=32"],
    ["hyperparams.optimizer=muon", "hyperparams.lr=0.01", "hyperparams.r_drop=1.0", "hyperparams.amp_bool=true", "hyperparams.ema=0.9"],
    ["model_configs.gpt.attention_layer=sparsek", "model_configs.gpt.tied=false", "hyperparams.grad_accum=2"],
    ["hyperparams.optimizer=muon", "model_configs.gpt.embedding_cutoff=300", "model_configs.gpt.embedding_ngrams=400",
     "model_configs.gpt.embedding_rank=8", "model_configs.gpt.token_shift=true"],
])
def test_a_run_of_every_kind_trains_resumes_and_is_read_back(overrides, tmp_path):
    cfg = tiny(*CASED, *overrides)
    whole = train(cfg, tmp_path / "whole", progress=False)
    stop = RuntimeError("stop")

    def interrupt(event):
        if event["event"] == "validation_step" and event["step"] > 1:
            raise stop

    with pytest.raises(RuntimeError):
        train(cfg, tmp_path / "half", progress=False, on_event=interrupt)
    again = train(cfg, tmp_path / "half", resume=True, progress=False)
    assert again.loss == whole.loss
    assert evaluate_run(tmp_path / "half")["val/loss"] == pytest.approx(whole.loss, rel=1e-6)
    _, model, tokenizer = load_run(tmp_path / "half")
    assert model.vocab_size == tokenizer.vocab_size > tokenizer.n_pieces == model.embed.tokens.num_embeddings
    assert whole.metrics["data"]["tokenizer"]["pieces"] == tokenizer.n_pieces


def test_pieces_are_folded_and_every_title_comes_back(tokenizer):
    rng = random.Random(0)
    for title in sample_titles(300, 4):
        odd = "".join(c.upper() if rng.random() < 0.3 else c for c in title)
        for text in (title, odd, title.upper(), fold(title)):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            if text.isascii():  # of others a capital may be spelled in bytes, which have no case
                assert tokenizer.decode(tokenizer.pairs.piece[tokenizer.encode(text)]) == fold(text)


def test_memory_is_predicted_for_pairs():
    gpt = ["model_configs.gpt." + s for s in ("d_model=96", "hidden_layer=96", "n_layer=2")]
    cfg = tiny(*CASED, *gpt, "hyperparams.vocab_size=3000", "hyperparams.context_length=64", "hyperparams.batch_size=16")
    predicted = simulate_step(cfg, 3000)[0]["total"]
    assert measured_peak(cfg, 3000) == pytest.approx(predicted, rel=0.05)


def test_a_model_of_ones_own_that_knows_no_pairs_is_refused(monkeypatch):
    from mainrun_nb import models

    class Own(torch.nn.Module):
        def __init__(self, section, attn_section, vocab_size, context_length, title_mask, loss_chunk, checkpoint_activations):
            super().__init__()

    monkeypatch.setitem(models._MODELS, "gpt", Own)
    build_model(tiny(), 50)
    with pytest.raises(InputError, match="Own takes no `pairs`"):
        build_model(tiny("tokenizer.kind=cased"), 50)
    with pytest.raises(InputError, match="Own takes no `pieces`, which embedding_ngrams needs"):
        build_model(tiny("model_configs.gpt.embedding_cutoff=20", "model_configs.gpt.embedding_ngrams=20"), 50)


@pytest.mark.parametrize("kind", ["cased", "unigram", "bpe"])
def test_ngrams_are_those_of_the_runs_own_pieces(kind, tmp_path):
    gpt = [f"model_configs.gpt.embedding_{s}" for s in ("cutoff=300", "ngrams=400", "rank=8")]
    run = train(tiny(*CASED, f"tokenizer.kind={kind}", "hyperparams.max_steps=3", *gpt), tmp_path / "run", progress=False)
    _, model, tokenizer = load_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run")["val/loss"] == pytest.approx(run.loss, rel=1e-6)
    found, ngrams = find_ngrams(tokenizer.pieces, 400), model.embed.tokens.ngrams
    assert len(found.counts) == tokenizer.n_pieces and not found.counts[:3].any()
    assert ngrams.ids.tolist() == found.ids.tolist()
    _, exported, _ = load_exported(export_run(tmp_path / "run", tmp_path / "export"))
    torch.testing.assert_close(exported.embed.tokens.weight, model.embed.tokens.weight)


@pytest.mark.parametrize("cutoff", [599, 600])
def test_a_cutoff_beyond_the_pieces_is_said_to_have_no_effect(cutoff, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(tiny(f"model_configs.gpt.embedding_cutoff={cutoff}", "hyperparams.max_steps=2"), tmp_path, progress=False)
    told = [str(w.message) for w in said if "embedding_cutoff" in str(w.message)]
    assert told == ["model_configs.gpt.embedding_cutoff=600: no effect, there are 600 pieces"] * (cutoff == 600)
