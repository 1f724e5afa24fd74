"""Models: their size, every option beside every other, the chunked loss wherever it has to work, and interchange with GPT-2."""
import gzip
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mainrun_nb import hub, models
from mainrun_nb.config import Config, InputError, load_config
from mainrun_nb.generate import stream_ids, write_titles
from mainrun_nb.gpt import GPT, init_weights, parameter_formula, parameter_table
from mainrun_nb.hub import export_gpt2, hf_tokenizer, import_gpt2
from mainrun_nb.loss import linear_cross_entropy, loss_sum
from mainrun_nb.models import build_model, count_parameters
from mainrun_nb.synthetic import sample_titles
from mainrun_nb.tokenizer import load_tokenizer, train_tokenizer

BASE = sorted((Path(__file__).resolve().parents[1] / "sweeps/base").glob("*.yaml"))


# --- size ---


@pytest.mark.parametrize("path", [*BASE, *sorted((BASE[0].parents[1] / "sota").glob("*.yaml"))], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_configuration_has_the_parameters_of_the_formula(path):
    cfg = load_config(path)
    with torch.device("meta"):
        model = build_model(cfg, 16_000)
    attn_cfg = getattr(cfg.attn_configs, model.cfg.attention_layer)
    table = parameter_table(model)
    cased = cfg.tokenizer.kind == "cased"
    assert table == parameter_formula(model.cfg, attn_cfg, 16_000, cfg.hyperparams.context_length, model.widths(), cased)
    assert table["total"] == count_parameters(model) and "other" not in table
    if path.stem == "baseline":
        assert table["total"] == 27_172_864
    if path.stem == "small":
        assert table["total"] <= 4_000_000


def test_there_are_base_configurations():
    assert {"baseline", "quickstart", "small"} <= {p.stem for p in BASE}


LISTS = [  # the assessment's, with whether mirrored layers are equally wide
    ([512, 512, 512, 512, 512, 512], True), ([512, 256, 256, 128, 128, 256], False), ([512, 384, 256, 256, 384, 512], True),
    ([256, 256, 128, 128, 256, 256], True), ([256, 192, 128, 128, 192, 256], True), ([512, 256, 128, 128, 256, 512], True),
    ([256, 512, 1024, 512, 256, 256], False),
]


@pytest.mark.parametrize(("widths", "mirrored"), LISTS, ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else "")
def test_the_lists_of_the_assessment_run(widths, mirrored):
    base = ["hyperparams.model_architecture=unet_gpt", "hyperparams.context_length=16", "model_configs.unet_gpt.d_model=256"]
    base.append(f"model_configs.unet_gpt.hidden_layer_list={widths}")
    bridged = [*base, "model_configs.unet_gpt.skip_connections=true"]
    if not mirrored:
        with pytest.raises(InputError, match="equally wide"):
            build_model(load_config(overrides=bridged), 50)
    model = build_model(load_config(overrides=bridged if mirrored else base), 50)
    idx = torch.randint(50, (1, 9))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert [block.attn.inner.qkv.in_features for block in model.blocks] == widths


@pytest.mark.parametrize("bad", ["[]", "[0]", "[256,-8]", "[256,100]", "[a]", "256"])
def test_lists_that_cannot_be_are_refused(bad):
    overrides = ["hyperparams.model_architecture=unet_gpt", f"model_configs.unet_gpt.hidden_layer_list={bad}"]
    with pytest.raises(InputError, match="hidden_layer_list") as e:
        build_model(load_config(overrides=overrides), 50)
    assert "\n" not in str(e.value)


# --- every option beside every other ---

V, T = 47, 29
CHOICES: dict[str, list[list[str]]] = {  # each choice is a list of overrides; `M` is the model's section
    "model": [["hyperparams.model_architecture=gpt"], ["hyperparams.model_architecture=unet_gpt"],
              ["hyperparams.model_architecture=unet_gpt", "M.skip_connections=true", "M.hidden_layer_list=[24,16,8,16,24]"]],
    "attention": [["M.attention_layer=causal"], ["M.attention_layer=causal", "attn_configs.causal.intermediate_dim=8"],
                  ["M.attention_layer=sparse", "attn_configs.sparse.attn_type=local"],
                  ["M.attention_layer=sparse", "attn_configs.sparse.attn_type=strided"],
                  ["M.attention_layer=sparse", "attn_configs.sparse.attn_type=fixed", "attn_configs.sparse.merged=true"],
                  ["M.attention_layer=sparsek"]],
    "norm_type": [["M.norm_type=pre"], ["M.norm_type=post"]],
    "norm": [["M.norm=layernorm"], ["M.norm=rmsnorm"]],
    "activation": [[f"M.activation_function={name}"] for name in ("gelu", "relu", "swiglu", "gelu_tanh")],
    "position": [["M.position=learned"], ["M.position=rope"]],
    "bias": [["M.bias=true"], ["M.bias=false"]],
    "tied": [["M.tied=true"], ["M.tied=false"]],
    "cutoff": [["M.embedding_cutoff=0"], ["M.embedding_cutoff=10", "M.embedding_rank=4"],
               ["M.embedding_cutoff=10", "M.embedding_rank=4", "M.embedding_ngrams=30"]],
    "gate": [["M.output_gate=false"], ["M.output_gate=true"]],
    "shift": [["M.token_shift=false"], ["M.token_shift=true"]],
    "skips": [["M.embedding_skips=false"], ["M.embedding_skips=true"]],
    "scale": [["M.layer_scale=0"], ["M.layer_scale=0.1"]],
    "init": [[f"M.init_method={name}"] for name in ("normal", "xavier", "kaiming", "uniform")],
    "residual": [["M.residual_scaling=false"], ["M.residual_scaling=true"]],
    "width": [["model_configs.gpt.hidden_layer=16"], ["model_configs.gpt.hidden_layer=24"]],
    "title_mask": [["hyperparams.title_mask=false"], ["hyperparams.title_mask=true"],
                   ["hyperparams.title_mask=true", "M.restart_positions=true"]],
    "recompute": [["hyperparams.checkpoint_activations=false"], ["hyperparams.checkpoint_activations=true"]],
    "chunk": [["hyperparams.loss_chunk=0"], ["hyperparams.loss_chunk=16"]],
    "dropout": [["M.dropout=0"], ["M.dropout=0.1"]],
    "r_drop": [["hyperparams.r_drop=0"], ["hyperparams.r_drop=2"]],
}
COMMON = [f"hyperparams.context_length={T}", "M.d_model=16", "model_configs.gpt.n_layer=2",
          "attn_configs.causal.n_head=4", "attn_configs.sparsek.n_head=4",
          "attn_configs.sparse.n_head=4", "attn_configs.sparse.local_attn_ctx=8", "attn_configs.sparse.sparseblocksize=4",
          "attn_configs.sparse.vertsize=2", "attn_configs.sparse.num_verts=2", "attn_configs.sparsek.k=3", "attn_configs.sparsek.window=4",
          "attn_configs.sparsek.chunk=8"]


def pairwise(sizes: list[int]) -> list[tuple[int, ...]]:
    """Rows of choices in which every two choices of two different factors meet at least once: greedy, and always the same."""
    todo = {(i, a, j, b) for i, j in itertools.combinations(range(len(sizes)), 2) for a in range(sizes[i]) for b in range(sizes[j])}
    found = []
    while todo:
        i, a, j, b = min(todo)
        row = {i: a, j: b}
        for f in sorted(set(range(len(sizes))) - row.keys(), key=lambda f: -sizes[f]):
            gains = [sum((*x, *y) in todo for g in row for x, y in [sorted([(f, c), (g, row[g])])]) for c in range(sizes[f])]
            row[f] = gains.index(max(gains))
        picked = sorted(row.items())
        todo -= {(*x, *y) for x, y in itertools.combinations(picked, 2)}
        found.append(tuple(c for _, c in picked))
    return found


ROWS = pairwise([len(c) for c in CHOICES.values()])


def configure(row: tuple[int, ...]) -> Config:
    """The configuration of one row."""
    picked = [choices[c] for choices, c in zip(CHOICES.values(), row, strict=True)]
    name = "unet_gpt" if row[0] else "gpt"
    overrides = ["model_configs.unet_gpt.hidden_layer_list=[16,8,24]", *COMMON, *itertools.chain(*picked)]
    if "M.position=rope" in overrides and "M.restart_positions=true" in overrides:  # refused
        overrides.remove("M.restart_positions=true")
    return load_config(overrides=[o.replace("M.", f"model_configs.{name}.", 1) if o.startswith("M.") else o for o in overrides])


def test_pairs_are_all_there():
    sizes = [len(c) for c in CHOICES.values()]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert len({(row[i], row[j]) for row in ROWS}) == sizes[i] * sizes[j]


def rows_of_ids() -> torch.Tensor:
    idx = torch.randint(2, V, (3, T + 1))
    idx[:, [0, 9, 20]] = 1
    return idx


def train_three_steps(model: GPT, idx: torch.Tensor, r_drop: float) -> None:
    """Three steps on one batch: finite losses, a gradient for every parameter, and a loss that falls."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(3):
        _, loss = model(idx[:, :-1], idx[:, 1:], r_drop=r_drop)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] < 30, losses


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "".join(map(str, row)))
def test_options_work_beside_each_other(row, tmp_path):
    cfg = configure(row)
    torch.manual_seed(0)
    model, idx = build_model(cfg, V), rows_of_ids()
    train_three_steps(model, idx, cfg.hyperparams.r_drop)
    model.eval()
    with torch.no_grad():
        logits = model(idx[:, :T])[0]
        for t in (1, 10, T - 1):  # causal
            other = idx[:, :T].clone()
            other[:, t:] = torch.randint(2, V, other[:, t:].shape)
            assert torch.equal(model(other)[0][:, :t], logits[:, :t])
        cache = model.make_cache(3)  # the cache changes nothing
        parts = torch.cat([model.features(idx[:, a:b], cache) for a, b in [(0, 11), (11, 12), (12, T)]], 1)
        torch.testing.assert_close(model.logits(parts), logits, rtol=1e-4, atol=1e-4)
        torch.save(model.state_dict(), tmp_path / "state.pt")  # saves and loads
        torch.manual_seed(1)
        again = build_model(cfg, V)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(again.eval()(idx[:, :T])[0], logits)


ATTENTION = "model_configs.gpt.attention_layer"


@pytest.mark.parametrize("kind", [
    [], ["attn_configs.causal.intermediate_dim=16"], ["hyperparams.title_mask=true"],
    *([f"{ATTENTION}=sparse", f"attn_configs.sparse.attn_type={t}"] for t in ("fixed", "strided", "local")),
    [f"{ATTENTION}=sparsek"],
], ids=lambda kind: kind[-1].split("=")[1] if kind else "causal")  # fmt: skip
def test_one_batch_is_learnt_by_heart(kind):
    heads = [f"attn_configs.{a}.n_head=2" for a in ("causal", "sparse", "sparsek")]
    sparse = [f"attn_configs.sparse.{s}" for s in ("local_attn_ctx=4", "sparseblocksize=4", "vertsize=1", "num_verts=1")]
    sparsek = [f"attn_configs.sparsek.{s}" for s in ("k=4", "window=4", "chunk=4")]
    shape = [f"model_configs.gpt.{s}" for s in ("d_model=32", "hidden_layer=32", "n_layer=2", "dropout=0")]
    torch.manual_seed(0)
    model = build_model(load_config(overrides=[*heads, *sparse, *sparsek, *shape, "hyperparams.context_length=24", *kind]), 50)
    idx = torch.randint(2, 50, (4, 24))
    idx[:, 0] = torch.arange(4) + 2  # rows that differ from the first token on
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


# --- positions that restart with a title ---

RESTART = ("hyperparams.title_mask=true", "M.restart_positions=true")


@pytest.mark.parametrize("attention", ["causal", "sparse", "sparsek"])
def test_with_restarted_positions_a_title_does_not_know_its_place(attention):
    """The same title after other titles, at a row's start, and through a cache in random pieces."""
    model = tiny_gpt(*RESTART, f"M.attention_layer={attention}", "attn_configs.sparse.attn_type=all").eval()  # others count in rows
    title, draw = torch.tensor([[1, 5, 6, 7, 8]]), torch.Generator().manual_seed(0)
    alone = model(title)[0]
    for before in ([9, 9, 9], [1, 4, 4, 1], [1, 1], [3, 1, 1, 2, 2, 2, 2]):
        row = torch.cat([torch.tensor([before]), title], 1)
        whole = model(row)[0]
        torch.testing.assert_close(whole[:, len(before):], alone, rtol=1e-4, atol=1e-5)
        for _ in range(5):
            cuts = [0, *sorted(torch.randint(1, row.shape[1], (3,), generator=draw).unique().tolist()), row.shape[1]]
            cache = model.make_cache(1)
            parts = torch.cat([model.features(row[:, a:b], cache) for a, b in itertools.pairwise(cuts)], 1)
            torch.testing.assert_close(model.logits(parts), whole, rtol=1e-4, atol=1e-5)


def test_restarted_positions_by_hand_in_a_batch_of_unequal_rows():
    model = tiny_gpt(*RESTART)
    idx = torch.tensor([[1, 5, 1, 5, 5], [5, 5, 5, 5, 5], [5, 1, 1, 5, 1]])
    expected = [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 0]]
    assert model.embed_positions(idx, torch.arange(5), None).tolist() == expected
    cache = model.make_cache(3)
    pieces = [model.embed_positions(idx[:, a:b], torch.arange(a, b), cache) for a, b in [(0, 2), (2, 3), (3, 5)]]
    assert torch.cat(pieces, 1).tolist() == expected
    with pytest.raises(ValueError, match=f"do not fit in a context of {T}"):  # the limit is the row's
        model(torch.ones(1, T + 1, dtype=torch.long))


# --- the chunked loss ---


def loss_case(n=101, v=307, d=24, passes=1, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = tuple(torch.randn(n, d, dtype=dtype).requires_grad_() for _ in range(passes))
    return hidden, (torch.randn(v, d, dtype=dtype) * 0.3).requires_grad_(), torch.randint(v, (n,))


def value_and_gradients(hidden, weight, targets, chunk, r_drop=0.0):
    loss = linear_cross_entropy(hidden, weight, targets, chunk, r_drop)
    return loss, torch.autograd.grad(loss, (weight, *hidden))


@pytest.mark.parametrize(("passes", "r_drop"), [(1, 0.0), (2, 0.0), (2, 4.0)])
@pytest.mark.parametrize("chunk", [1, 7, 100, 101, 500])
def test_chunks_change_nothing(chunk, passes, r_drop):
    case = loss_case(passes=passes)
    fast, plain = (value_and_gradients(*case, c, r_drop) for c in (chunk, 0))
    for a, b in zip((fast[0], *fast[1]), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("passes", "r_drop"), [(1, 0.0), (2, 0.0), (2, 4.0)])
@pytest.mark.parametrize("chunk", [0, 1, 7, 100])
def test_ignored_targets_are_not_counted_anywhere(chunk, passes, r_drop):
    hidden, weight, targets = loss_case(passes=passes)
    targets[[0, 1, 50, 100, *range(14, 30)]] = -100  # whole chunks among them
    kept = targets != -100
    losses = [sum(F.cross_entropy(F.linear(h, weight), targets, ignore_index=-100) for h in hidden) / passes]
    if r_drop:
        p, q = (F.linear(h, weight)[kept].log_softmax(-1) for h in hidden)
        losses[0] = losses[0] + r_drop / 2 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    losses.append(linear_cross_entropy(hidden, weight, targets, chunk, r_drop))
    expected, found = ([loss, *torch.autograd.grad(loss, (weight, *hidden))] for loss in losses)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all((g[~kept] == 0).all() for g in found[2:])
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, chunk, r_drop), found[0].detach())


@pytest.mark.parametrize("chunk", [0, 7])
def test_no_counted_target_has_no_mean_and_a_wrong_one_is_refused(chunk):
    hidden, weight, targets = loss_case()
    assert F.cross_entropy(F.linear(hidden[0], weight), torch.full_like(targets, -100)).isnan()  # so does torch
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk).isnan()
    for wrong in (-1, -99, 307):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, torch.full_like(targets, wrong), chunk)


def test_ignored_targets_under_mixed_precision_and_in_a_model():
    hidden, weight, targets = loss_case(n=64, passes=2)
    targets[10:40] = -100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast = (value_and_gradients(hidden, weight, targets, chunk, 1.0) for chunk in (0, 16))
    for a, b in zip((fast[0], *fast[1]), (plain[0], *plain[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    model, idx = tiny_gpt(), rows_of_ids()
    y = idx[:, 1:].clone()
    y[1] = -100
    torch.testing.assert_close(model(idx[:, :-1], y)[1], model(idx[[0, 2], :-1], idx[[0, 2], 1:])[1])


@pytest.mark.parametrize("passes", [1, 2])
def test_mixed_precision_stays_as_close_as_the_plain_loss_does(passes):
    hidden, weight, targets = loss_case(n=256, passes=passes)
    exact = value_and_gradients(hidden, weight, targets, 0, passes - 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, fast = (value_and_gradients(hidden, weight, targets, chunk, passes - 1) for chunk in (0, 64))
    assert fast[0].dtype == torch.float32 and abs(fast[0] - exact[0]) <= 2 * abs(plain[0] - exact[0]) + 1e-3
    for a, b, c in zip(fast[1], plain[1], exact[1], strict=True):
        assert a.dtype == torch.float32 and (a - c).norm() <= 1.5 * (b - c).norm() + 1e-6


def test_weights_in_low_precision_get_gradients_in_low_precision():
    hidden, weight, targets = loss_case(dtype=torch.bfloat16)
    loss, grads = value_and_gradients(hidden, weight, targets, 16)
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {torch.bfloat16}


def test_hopeless_predictions_have_finite_losses():
    hidden, weight, targets = loss_case()
    hidden = (hidden[0].detach() * 1000,)
    loss = linear_cross_entropy(hidden, weight, targets, 16)
    assert 1000 < loss < 1e5
    torch.testing.assert_close(loss, loss_sum(weight, targets, *hidden) / len(targets))


def test_two_backward_passes_give_the_same_gradient_and_there_is_no_second_derivative():
    hidden, weight, targets = loss_case()
    loss = linear_cross_entropy(hidden, weight, targets, 16)
    first, second = (torch.autograd.grad(loss * 3, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (dw,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="require grad"):
        dw.sum().backward()


def test_evaluation_without_gradients_holds_one_chunk():
    hidden, weight, targets = loss_case(passes=2)
    for case in [(hidden[:1], 0.0), (hidden, 3.0)]:
        expected = linear_cross_entropy(case[0], weight, targets, 0, case[1])
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = linear_cross_entropy(case[0], weight, targets, 16, case[1])
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected)


def peak(chunk: int, amp: bool, rows: int = 2048, v: int = 16_000, d: int = 512) -> int:
    """Bytes alive at most in a forward and backward pass of the loss, its inputs left out; nothing is allocated."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode(), MemTracker() as tracker:
        hidden, weight = torch.empty(rows, d, requires_grad=True), torch.empty(v, d, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = linear_cross_entropy((hidden,), weight, torch.zeros(rows, dtype=torch.long), chunk)
        loss.backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - (rows + v) * d * 4


@pytest.mark.parametrize(("amp", "chunk"), [(False, 512), (True, 256)])
def test_the_loss_needs_a_quarter_of_the_memory_on_fake_tensors(amp, chunk):
    assert peak(chunk, amp) < peak(0, amp) / 4


def tiny_gpt(*overrides: str, vocab_size: int = V) -> GPT:
    torch.manual_seed(0)
    chosen = [*COMMON, "M.hidden_layer=16", "M.dropout=0", "hyperparams.loss_chunk=16", *overrides]
    return build_model(load_config(overrides=[o.replace("M.", "model_configs.gpt.") for o in chosen]), vocab_size)


def step(model, idx, r_drop=0.0):
    model.zero_grad()
    _, loss = model(idx[:, :-1], idx[:, 1:], r_drop=r_drop)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(("title_mask", "restart"), [("false", "false"), ("true", "false"), ("true", "true")])
def test_the_rest_of_the_model_compiles_in_one_piece(title_mask, restart):
    model, idx = tiny_gpt(f"hyperparams.title_mask={title_mask}", f"M.restart_positions={restart}"), rows_of_ids()
    graphs = []

    def backend(graph, inputs):  # tracing is what may fail; what a real backend makes of the graphs is not ours to test
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]  # a Function's passes are graphs inside
        graphs.append([node.target for part in parts for node in part.graph.nodes])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for r_drop in (0.0, 2.0):
        for a, b in zip(step(compiled, idx, r_drop), step(model, idx, r_drop), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    whole = [targets for targets in graphs if targets != ["output"]]  # the others hand on what a function returned
    assert len(whole) <= 4, "the model fell into pieces"  # up to the loss, and the division after it; for one pass and for two
    assert not any(torch.softmax in targets for targets in graphs), "the loop over chunks was traced"


def test_distributed_training_gets_the_same_gradients(tmp_path):
    model, idx = tiny_gpt(), rows_of_ids()
    expected = step(model, idx)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for a, b in zip(step(wrapped, idx), expected, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


# --- interchange with GPT-2 ---


def test_scripts_still_import_the_interchange_from_where_it_was():
    for name in ("export_gpt2", "import_gpt2", "hf_tokenizer"):
        assert getattr(models, name) is getattr(hub, name)
    with pytest.raises(AttributeError, match="no attribute 'export_gpt3'"):
        _ = models.export_gpt3


@pytest.fixture(scope="module")
def titles():
    return sample_titles(600, seed=3)


def larger_weights(model: GPT) -> GPT:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


FORMS = [
    ("bpe", []), ("unigram", ["M.activation_function=relu", "M.tied=false"]),
    ("challenge", ["M.activation_function=gelu_tanh", "M.mlp_ratio=2.5"]),
]


@pytest.mark.parametrize(("kind", "options"), FORMS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_model_crosses_over_to_gpt2_and_back(kind, options, titles, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer(titles, titles, kind, 500)
    model = larger_weights(tiny_gpt(*options, vocab_size=tokenizer.vocab_size))
    folder = export_gpt2(model, tokenizer, tmp_path / "gpt2")
    theirs, cut = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    some = [*titles[:200], "", " led by a space", "Ask HN: <eos> in a title", "naïve 日本語 🎉"]
    assert [cut(t).input_ids for t in some] == [[1, *tokenizer.encode(t)] for t in some]
    assert [cut(t, add_special_tokens=False).input_ids for t in some] == [tokenizer.encode(t) for t in some]
    idx = torch.randint(3, tokenizer.vocab_size, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-4)
        text = torch.ones(1, 1, dtype=torch.long)
        while text.shape[1] < T and text.tolist()[0][1:].count(1) == 0:
            text = torch.cat([text, model(text)[0][:, -1:].argmax(-1)], 1)
    written = theirs.generate(do_sample=False, max_length=T)
    assert written.tolist() == text.tolist()
    assert cut.decode(written[0], skip_special_tokens=True).removeprefix(" ") == tokenizer.decode([i for i in text[0].tolist() if i > 2])
    pipe = transformers.pipeline("text-generation", model=theirs, tokenizer=cut)
    for prompt in ["Show HN", "", titles[0].split()[0]]:
        ours = write_titles(model, tokenizer, prompt, 1, temperature=0)[0]
        assert " ".join(pipe(prompt, do_sample=False)[0]["generated_text"].split()) == ours
        found = theirs.generate(cut(prompt, return_tensors="pt").input_ids, do_sample=False)[0].tolist()
        assert found == [1, *tokenizer.encode(prompt), *(int(i) for i in stream_ids(model, [1, *tokenizer.encode(prompt)], temperature=0))]
        start = [1, *tokenizer.encode(prompt)]
        for seed in range(3):  # a first try, without an option, draws what mainrun-generate draws: from all tokens, at temperature 1
            torch.manual_seed(seed)
            drawn = pipe(prompt)[0]["generated_text"]
            torch.manual_seed(seed)
            ours = cut.decode([*start, *map(int, stream_ids(model, start))], skip_special_tokens=True)
            assert drawn.removeprefix(" ") == ours.removeprefix(" ")
    cfg, back = import_gpt2(folder)
    assert torch.equal(back.eval()(idx)[0], model(idx)[0])
    assert parameter_table(build_model(cfg, tokenizer.vocab_size)) == parameter_table(model)
    assert load_tokenizer(folder / "mainrun_nb").encode(titles[0]) == tokenizer.encode(titles[0])


def weights_of(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MISFITS = {  # what is done to config.json, or to the weights; what is said of it
    "more layers": (dict(n_layer=3), "missing: transformer.h.2.attn.c_attn.bias, .* and 9 more"),
    "fewer layers": (dict(n_layer=1), "without a place: transformer.h.1.attn"),
    "vocabulary": (dict(vocab_size=71), r"transformer.wte.weight \(70x32, not 71x32\)"),
    "positions": (dict(n_positions=25), r"transformer.wpe.weight \(24x32, not 25x32\)"),
    "width of the MLP": (dict(n_inner=64), "of another shape: transformer.h.0.mlp.c_fc.bias"),
    "no MLP": (dict(n_inner=0), "mlp_ratio"),
    "untied without a head": (dict(tie_word_embeddings=False), "missing: lm_head.weight"),
    "far too many layers": (dict(n_layer=10**9), "n_layer: must be at most 1000"),
    "tied with another head": (lambda w: w | {"lm_head.weight": torch.randn(70, 32)}, "lm_head.weight is not transformer.wte.weight"),
    "one more": (lambda w: w | {"score.weight": torch.ones(2)}, "without a place: score.weight"),
    "one less": (lambda w: {k: v for k, v in w.items() if k != "transformer.ln_f.bias"}, "missing: transformer.ln_f.bias"),
    "one of another shape": (lambda w: w | {"transformer.ln_f.bias": torch.ones(5)}, r"transformer.ln_f.bias \(5, not 32\)"),
    "none": (None, "cannot be read as a GPT-2"),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("foreign")
    cfg = transformers.GPT2Config(vocab_size=70, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=69, eos_token_id=69)
    model = transformers.GPT2LMHeadModel(cfg).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_their_configuration_are_refused_by_name(case, foreign, tmp_path):
    shutil.copytree(foreign[0], tmp_path / "gpt2")
    folder, (change, words) = tmp_path / "gpt2", MISFITS[case]
    if isinstance(change, dict):
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    elif change:
        store(folder, change(weights_of(folder)))
    else:
        (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=words) as e:
        import_gpt2(folder)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def as_shards(folder: Path, model) -> None:
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*"))) > 2


FITS = {
    "bf16": lambda folder, model: store(folder, {k: v.bfloat16() for k, v in weights_of(folder).items()}),
    "shards": as_shards,
    "without the prefix": lambda folder, _: store(folder, {k.removeprefix("transformer."): v for k, v in weights_of(folder).items()}),
    "with the mask": lambda folder, _: store(folder, weights_of(folder) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
                                                                           "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}),
    "with the head": lambda folder, model: store(folder, weights_of(folder) | {"lm_head.weight": model.lm_head.weight.detach().clone()}),
}


@pytest.mark.parametrize("form", FITS)
def test_weights_in_another_form_come_in_whole(form, foreign, tmp_path):
    shutil.copytree(foreign[0], tmp_path / "gpt2")
    FITS[form](tmp_path / "gpt2", foreign[1])
    model, idx = import_gpt2(tmp_path / "gpt2")[1].eval(), torch.randint(70, (2, 24))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.eos_id == 69
    bound = 2e-2 if form == "bf16" else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], foreign[1](idx).logits, rtol=0, atol=bound)


@pytest.mark.filterwarnings("ignore:eos_token_id")
@pytest.mark.parametrize(("said", "eos"), [([69], 69), ([5, 69], 5), (None, -1), (50256, -1), ([], -1)], ids=str)
def test_the_end_of_a_text_may_be_a_list_or_nothing(said, eos, foreign, tmp_path):
    shutil.copytree(foreign[0], tmp_path / "gpt2")
    config = tmp_path / "gpt2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(eos_token_id=said)))
    model = import_gpt2(tmp_path / "gpt2")[1].eval()
    assert model.eos_id == eos
    assert len(list(stream_ids(model, [3], max_tokens=5, temperature=0))) >= 1


def test_a_bad_export_leaves_nothing_behind(titles, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(titles, kind="bpe", vocab_size=300)
    with pytest.raises(InputError, match="do not belong together"):
        export_gpt2(tiny_gpt(), tokenizer, tmp_path / "out")
    model = tiny_gpt(vocab_size=tokenizer.vocab_size)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        export_gpt2(model, tokenizer, tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setitem(sys.modules, "transformers", None)  # to write one, nobody needs it
    export_gpt2(model, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="pip install"):
        import_gpt2(tmp_path / "out")


@pytest.mark.real
@pytest.mark.parametrize("kind", ["bpe", "unigram", "challenge"])
def test_real_titles_are_cut_alike(kind, hn_titles):
    opened = gzip.open if hn_titles.suffix == ".gz" else open
    with opened(hn_titles, "rt", encoding="utf-8") as f:
        some = [line.strip() for line in itertools.islice(f, 6000)]
    tokenizer = train_tokenizer(some[:4000], some[4000:5000], kind, 3000)
    theirs = hf_tokenizer(tokenizer)
    theirs.encode_special_tokens = kind != "challenge"
    assert [e.ids for e in theirs.encode_batch(some[3000:])] == [tokenizer.encode(t) for t in some[3000:]]


def test_initialising_a_users_model_goes_by_types_and_not_by_names():
    class Theirs(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.add_module(name, nn.Sequential(nn.Linear(4, 4)))

    weights = []
    for name in ("expand", "other"):
        torch.manual_seed(0)
        model = Theirs(name)
        init_weights(model)
        weights.append(next(model.parameters()))
    assert torch.equal(*weights)
