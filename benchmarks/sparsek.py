"""Which older tokens SparseK attends to: the k best (the library's rule), or every candidate with a gate above zero (up to C rows).

    HN_TITLES=titles.txt.gz python benchmarks/sparsek.py              both parts -> benchmarks/results/sparsek.json
    HN_TITLES=titles.txt.gz python benchmarks/sparsek.py runs --seeds 1 2 3
    python benchmarks/sparsek.py cost

`runs`: a GPT of 0.7 million parameters without a title mask, two passes over 9,000 titles, the same seeds under both rules: loss, what the
gates of the trained models hold, the norms of the gradients that reach the scorer, and how far its float32 is from its float64.
`cost`: forward + backward of one attention in DESIGN's shape (B 1, H 4, D 32, k 64, C 256, window 128), the rules taking turns; the size
of the cache; and float32 against float64 where scores lie 1e-9 apart, which float32 cannot tell. CPU seconds of one thread.

The rule of C rows is the streaming form of chapter 13 made for k = C, whose gates are then found for the real k; for texts of more than
window + C tokens, below which that form takes every gate for 1.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import attention
import torch
from torch import Tensor

from mainrun_nb.attention import register_attention
from mainrun_nb.config import Config, SparseKAttnConfig, load_config
from mainrun_nb.data import Batches
from mainrun_nb.models import build_model
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.sparsek import Selection, competitors, normalised_scores, sparsek
from mainrun_nb.sparsek_stream import Candidates, Choice, SparseKAttention, SparseKCache, sparsek_fast
from mainrun_nb.trainer import RunData, evaluate_state, make_plan, make_state, prepare_data, take_step

RESULTS = Path(__file__).parent / "results" / "sparsek.json"
LAYERS = {"k best": "sparsek", "all above zero": "sparsek_all"}  # rule: name of its attention


@contextmanager
def all_above_zero(k: int) -> Iterator[None]:
    "Within, gates are found for `k`, and all that are above zero are attended, up to the rows that a Selection's own k makes room for."
    choose = Candidates.choose

    def wider(self: Candidates, rows: int, C: int) -> Choice:
        choice = choose(self, k, C)
        return choice._replace(end=choice.part)

    with patch.object(Candidates, "choose", wider):
        yield


class AllAboveZero(SparseKAttention):
    "SparseK that attends to every candidate with a gate above zero; for training, without a cache."

    def __init__(self, d_model: int, cfg: SparseKAttnConfig, common) -> None:
        super().__init__(d_model, cfg, common)
        self.rule = Selection(self.rule.candidates, self.rule.candidates, cfg.window, cfg.chunk)

    def mix(self, q, k, v, u, titles, cache) -> Tensor:
        with all_above_zero(self.cfg.k):
            return super().mix(q, k, v, u, titles, cache)


# --- trained models ---

GPT = dict(d_model=96, hidden_layer=96, n_layer=3, dropout=0, position="rope", residual_scaling="true")
SECTION = dict(n_head=6, k=8, candidates=32, window=8, chunk=32)
HYPER = dict(num_titles=10_000, epochs=2, vocab_size=4000, context_length=256, batch_size=4, optimizer="muon", lr=0.01, adamw_lr=0.002,
             betas="[0.9,0.95]", scheduler="cosine", warmup=0.05, title_mask="false")


def configured(rule: str, seed: int) -> Config:
    "The run's configuration."
    name = LAYERS[rule]
    parts = {"hyperparams": HYPER | {"seed": seed}, "model_configs.gpt": GPT | {"attention_layer": name}, f"attn_configs.{name}": SECTION}
    return load_config(overrides=["data.source=${oc.env:HN_TITLES,hackernews}", "tokenizer.kind=bpe",
                                  *(f"{path}.{key}={value}" for path, part in parts.items() for key, value in part.items())])


def held(model, x: Tensor) -> dict[str, float]:
    "Means over layers, and queries with more than k older tokens: how many gates are above zero, and what the k best lack of their sum."
    inputs: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, SparseKAttention)]
    hooks = [m.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for m in layers]
    model(x)
    k, found = SECTION["k"], []
    for m, h, hook in zip(layers, inputs, hooks, strict=True):
        hook.remove()
        u = normalised_scores(h, m.score.weight, m.sharpness, m.cfg.epsilon * torch.arange(x.shape[1]))
        z = competitors(u, Selection(k, SECTION["candidates"], SECTION["window"]))[0]
        p = sparsek(z, k)[(z > -torch.inf).sum(-1) > k]
        found.append([(p > 1e-9).sum(-1).double().mean(), 1 - p.topk(k).values.sum(-1).mean() / k])
    above, beyond = torch.tensor(found).mean(0).tolist()
    return {"gates_above_zero": above, "share_beyond_k_best": beyond}


def scorer_gradients(model, x: Tensor, y: Tensor) -> dict[str, float]:
    "Norms, over all layers, of the gradient of the scorers' directions, of their sharpness, and of everything."
    names, loss = dict(model.named_parameters()), model(x, y)[1]
    grads = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    kinds = {"score": "score.weight", "sharpness": "sharpness", "all": ""}
    norm = lambda end: float(torch.stack([g.norm() for n, g in grads.items() if n.endswith(end)]).norm())  # noqa: E731
    return {f"gradient_{kind}": norm(end) for kind, end in kinds.items()}


def double_apart(model, cfg: Config, x: Tensor, vocab: int) -> float:
    "The largest difference between the logits of the model in float32 and in float64."
    wide = build_model(cfg, vocab).double().eval()
    wide.load_state_dict(model.state_dict())
    return max(float((model(part)[0] - wide(part)[0]).abs().max()) for part in x.split(4))


def run(rule: str, seed: int, data: RunData) -> dict[str, float]:
    "Train, and look."
    cfg, cpu = configured(rule, seed), time.process_time()
    plan, state = make_plan(cfg.hyperparams, len(data.train_ids)), make_state(cfg, data.tokenizer.vocab_size, torch.device("cpu"))
    batches = Batches(data.train_ids, cfg.hyperparams)
    while state.step < plan.max_steps:
        take_step(state, state.model, batches, slice(None), cfg.hyperparams, plan.max_steps)
    spent, loss = time.process_time() - cpu, evaluate_state(state, data, cfg, challenge=False)["val/loss"]
    T, model = cfg.hyperparams.context_length, state.model.eval()
    rows = data.val_ids[: 16 * T + 1]
    x, y = rows[:-1].view(-1, T), rows[1:].view(-1, T)
    out = {"val/loss": loss, "steps": state.step, "cpu_seconds": round(spent, 1), **scorer_gradients(model, x, y)}
    with torch.no_grad():
        return out | held(model, x) | {"float64_apart": double_apart(model, cfg, x, data.tokenizer.vocab_size)}


def runs(seeds: list[int]) -> dict:
    "Both rules with each seed."
    register_attention("sparsek_all", AllAboveZero, SparseKAttnConfig)
    data, found = prepare_data(configured("k best", 0)), {rule: {} for rule in LAYERS}
    for seed in seeds:
        for rule, rows in found.items():
            rows[seed] = run(rule, seed, data)
            print(f"{rule}, seed {seed}: {json.dumps(rows[seed])}", flush=True)
    return {"sha256": data.info["sha256"], "hyperparams": HYPER, "gpt": GPT, "attention": SECTION, "rules": found}


# --- what it costs ---

K, C = 64, 256


@attention.variant("sparsek_all")
def every_row(shape: attention.Shape) -> attention.Case:
    "As the variant sparsek, with C rows."
    rule = Selection(C, C, shape.block)
    scores = torch.randn(shape.B, shape.H, shape.T, device=shape.device, requires_grad=True)

    def attend(*args: Tensor) -> Tensor:
        with all_above_zero(K):
            return sparsek_fast(*args, rule)[0]

    return attention.Case(attend, [*shape.qkv(), scores])


def cache_bytes(rows: int, candidates: int) -> int:
    "Of one layer's cache in float32, for one text."
    cache = SparseKCache(1, 4, 32, Selection(rows, candidates, 128))
    return sum(x.nbytes for x in vars(cache).values() if isinstance(x, Tensor))


def near_ties(rule: str) -> float:
    "The largest difference of an output in float32 and float64, with scores on a grid of 1/8, moved by 1e-9."
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 1024, 32, dtype=torch.double, generator=g)
    u, noise = torch.randn(2, 1, 4, 1024, dtype=torch.double, generator=g)
    inputs, outs = (q, k, v, (8 * u).round() / 8 + 1e-9 * noise), []
    for dtype in (torch.float32, torch.double):
        with all_above_zero(K):
            every = sparsek_fast(*(x.to(dtype) for x in inputs), Selection(C, C, 128))[0]
        best = sparsek_fast(*(x.to(dtype) for x in inputs), Selection(K, C, 128))[0]
        outs.append(best if rule == "k best" else every)
    return float((outs[0] - outs[1]).abs().max())


def cost(rounds: int) -> dict:
    "Time, memory, cache and agreement of both rules."
    found: dict = {}
    for T in (1024, 8192):
        with freed_memory_kept():
            rows = attention.measure(T, ["dense", *LAYERS.values()], rounds, 3600, "cpu", {})
        found[f"T {T}"] = {rule: rows[name] for rule, name in {"dense": "dense", **LAYERS}.items()}
        for rule, row in found[f"T {T}"].items():
            print(f"T {T}, {rule}: {json.dumps(row)}", flush=True)
    found["cache_bytes"] = {"k best": cache_bytes(K, C), "all above zero": cache_bytes(C, C)}
    found["near_ties_apart"] = {rule: near_ties(rule) for rule in LAYERS}
    print(found["cache_bytes"], found["near_ties_apart"])
    return found


def main() -> None:
    "Measure, print, and write what was measured into the JSON."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="runs, cost; default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    attention.read_clock = time.process_time
    measures = {"runs": lambda: runs(args.seeds), "cost": lambda: cost(args.rounds)}
    if wrong := set(args.parts) - set(measures):
        parser.error(f"{', '.join(wrong)}: no such part; there are {', '.join(measures)}")
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in args.parts or measures:
        result[part] = measures[part]()
        result["machine"] = attention.machine("cpu")
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
