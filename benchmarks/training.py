"""Training steps side by side: ours at each setting, a challenge-style step, and Hugging Face's GPT-2, on one batch.

    python benchmarks/training.py                        both shapes -> benchmarks/results/training.json
    python benchmarks/training.py --shape small --rounds 5 --only challenge ours_bf16

Shapes: the challenge's baseline (6 x 512, V 16,000, T 128; 27.2M parameters) and sweeps/base/small.yaml (3.9M). All variants of a shape
train on the same random tokens and take turns, round after round, so that a busy moment of the machine falls on all of them. A figure is
the median over the rounds, a ratio is the median of the rounds' ratios. The optimizer is AdamW unless the name says otherwise (the
challenge's way has SGD). One step is everything a loop pays for an update: the batch, forward, backward, clipping, the optimizer, the
schedule, and reading the loss. Operations are counted as 6 N per token, and set against the machine's matrix rate in bf16 and fp32,
measured in the same rounds. After the rounds one more step of each is profiled: the share of its time in matrix products and the rate
there, operations by the products' shapes, say how far the rest of the step is from nothing. The trainer's setting of the C library's
allocator holds for the whole process, so every variant gains from it. On a busy CPU, `--threads 1 --clock cpu` counts CPU seconds (the
profiler's times are wall time all the same, and mean little there).
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainrun_nb.config import Config, load_config
from mainrun_nb.data import Batches
from mainrun_nb.models import count_parameters
from mainrun_nb.runtime import freed_memory_kept
from mainrun_nb.trainer import make_state, read_steps, take_step

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 16_000
SHAPES = {"baseline": "sweeps/base/baseline.yaml", "small": "sweeps/base/small.yaml"}
CPU_ROWS = {"baseline": 16, "small": 16}  # rows of a batch on a CPU, where 64 of the baseline's take ten seconds and more

Step = Callable[[], float]  # one update; returns the loss
VARIANTS: dict[str, Callable[[Config, Tensor], tuple[Step, int]]] = {}  # name -> (configuration, stream) -> step and parameters


def variant(name: str):
    "Register a builder of a training step."

    def add(build):
        VARIANTS[name] = build
        return build

    return add


# --- the challenge's way: materialised attention, all logits at once, plain SGD, fp32 ---


class ChallengeAttention(nn.Module):
    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.resid_drop = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("tril", torch.tril(torch.ones(length, length)))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(C // self.heads))
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        y = self.attn_drop(F.softmax(scores, dim=-1)) @ v
        return self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))


class ChallengeBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = ChallengeAttention(width, heads, length, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class ChallengeGPT(nn.Module):
    def __init__(self, cfg: Config) -> None:
        super().__init__()
        gpt, length, heads = cfg.model_configs.gpt, cfg.hyperparams.context_length, cfg.attn_configs.causal.n_head
        self.tokens, self.positions = nn.Embedding(VOCAB, gpt.d_model), nn.Parameter(torch.zeros(1, length, gpt.d_model))
        self.drop, width = nn.Dropout(gpt.dropout), gpt.hidden_layer
        same = width == gpt.d_model
        self.inner, self.outer = (nn.Identity() if same else nn.Linear(*io) for io in [(gpt.d_model, width), (width, gpt.d_model)])
        self.blocks = nn.Sequential(*(ChallengeBlock(width, heads, length, gpt.dropout) for _ in range(gpt.n_layer)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(gpt.d_model, VOCAB, bias=False)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.inner(self.drop(self.tokens(idx) + self.positions[:, : idx.shape[1]]))
        logits = self.head(self.outer(self.norm(self.blocks(x))))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))


@variant("challenge")
def challenge(cfg: Config, stream: Tensor) -> tuple[Step, int]:
    hp, model = cfg.hyperparams, ChallengeGPT(cfg).to(stream.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=6e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10_000)
    x, y = pair(stream, hp.batch_size, hp.context_length)

    def step() -> float:
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()

    return step, count_parameters(model)


def pair(stream: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    "The first batch of the stream and its targets, each (rows, length)."
    return stream[: rows * length].view(rows, length), stream[1 : rows * length + 1].view(rows, length)


# --- ours: the trainer's own step ---


def ours(name: str, **settings) -> None:
    "Add our step with some settings of `hyperparams`."

    @variant(name)
    def build(cfg: Config, stream: Tensor) -> tuple[Step, int]:
        cfg = load_config(ROOT / SHAPES[cfg.name], [f"hyperparams.batch_size={cfg.hyperparams.batch_size}", "data.source=synthetic"])
        hp = cfg.hyperparams
        vars(hp).update({"amp_bool": False, "optimizer": "adamw", **settings})
        state = make_state(cfg, VOCAB, stream.device)
        batches, everything = Batches(stream, hp, stream.device), slice(0, hp.batch_size)

        def step() -> float:
            return read_steps([take_step(state, state.model, batches, everything, hp, 10_000)])[0]["train/loss"]

        return step, count_parameters(state.model)


ours("ours_fp32")
ours("ours_fp32_compiled", compile=True)
ours("ours_bf16_all_logits", amp_bool=True, loss_chunk=0)
ours("ours_bf16", amp_bool=True)
ours("ours_bf16_compiled", amp_bool=True, compile=True)
ours("ours_bf16_muon", amp_bool=True, optimizer="muon")


# --- Hugging Face: GPT2LMHeadModel, its own loss, torch's AdamW ---


def hugging_face(name: str, bf16: bool = False, compiled: bool = False) -> None:
    "Add a step of transformers' GPT-2 of the same shape, or of the nearest one that it can express."

    @variant(name)
    def build(cfg: Config, stream: Tensor) -> tuple[Step, int]:
        from transformers import GPT2Config, GPT2LMHeadModel

        hp, gpt, heads = cfg.hyperparams, cfg.model_configs.gpt, cfg.attn_configs.causal.n_head
        width = gpt.d_model if gpt.d_model == gpt.hidden_layer else 160  # small.yaml's two widths are one here; about as many parameters
        drop = {k: gpt.dropout for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCAB, n_positions=hp.context_length, n_embd=width, n_layer=gpt.n_layer, n_head=heads if width % heads == 0 else 5,
            attn_implementation="sdpa", use_cache=False, bos_token_id=1, eos_token_id=1, **drop)).to(stream.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        run, parameters = torch.compile(model) if compiled else model, count_parameters(model)
        x, _ = pair(stream, hp.batch_size, hp.context_length)

        def step() -> float:
            with torch.autocast(stream.device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = run(input_ids=x, labels=x).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step, parameters


hugging_face("hf_fp32")
hugging_face("hf_bf16", bf16=True)
hugging_face("hf_bf16_compiled", bf16=True, compiled=True)


# --- the measurement ---


def matrix_seconds(a: Tensor, clock: Callable[[], float]) -> float:
    "The time of one product of a square matrix with itself."
    began = clock()
    (a @ a)[0, 0].item()  # reading a value waits for the device
    return clock() - began


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::linear_cross_entropy")


def products(step: Step) -> dict[str, float]:
    "The share of a step's time that is spent in matrix products, and operations per second there; nothing of a step that is compiled."
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds, with_flops=True, record_shapes=True) as prof:
        step()
    events = prof.key_averages()
    spent = {e.key: e.self_device_time_total if torch.cuda.is_available() else e.self_cpu_time_total for e in events}
    inside = sum(t for key, t in spent.items() if key.startswith(PRODUCTS))
    flops = sum(e.flops for e in events if e.key.startswith(PRODUCTS))
    if not inside:
        return {}
    return {"products_share": inside / sum(spent.values()), "products_gflops": flops / inside / 1e3}


def measure(shape: str, names: list[str], rounds: int, seconds: float, rows: int, device: torch.device, clock: Callable[[], float]) -> dict:
    "All variants on one shape, taking turns; stops after `rounds`, or once `seconds` are spent and 3 rounds are done."
    cfg = load_config(ROOT / SHAPES[shape], [f"hyperparams.batch_size={rows}", "data.source=synthetic"])
    cfg.name = shape  # type: ignore[attr-defined]
    tokens = rows * cfg.hyperparams.context_length
    stream = torch.randint(3, VOCAB, (4 * tokens + 1,), generator=torch.Generator().manual_seed(0)).to(device)
    steps, parameters, times, rates = {}, {}, {n: [] for n in names}, {"bf16": [], "fp32": []}
    n = 2048 if device.type == "cpu" else 8192
    square = {"bf16": torch.randn(n, n, device=device).bfloat16(), "fp32": torch.randn(n, n, device=device)}
    for name in names:
        torch.manual_seed(0)
        steps[name], parameters[name] = VARIANTS[name](cfg, stream)
        losses = [steps[name]() for _ in range(2)]  # compiles, allocates
        assert abs(losses[0] - math.log(VOCAB)) < 0.7, f"{name} begins at a loss of {losses[0]:.2f}"
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name in names:
            began = clock()
            steps[name]()  # reads the loss, which waits for the device
            times[name].append(clock() - began)
        for key, a in square.items():
            rates[key].append(2 * n**3 / min(matrix_seconds(a, clock) for _ in range(3)))
    rate = {k: median(v) for k, v in rates.items()}
    out = {}
    for name in names:
        t = median(times[name])
        flops = 6 * parameters[name] * tokens / t
        out[name] = {"ms": 1e3 * t, "tokens_per_second": tokens / t, "gflops": flops / 1e9, "of_bf16_matrix_rate": flops / rate["bf16"],
                     "of_fp32_matrix_rate": flops / rate["fp32"], "parameters": parameters[name], "rounds": len(times[name])}
        out[name] |= products(steps[name]) if "compiled" not in name else {}
        if "challenge" in times:
            out[name]["speedup"] = median(c / o for c, o in zip(times["challenge"], times[name], strict=True))
    return {"rows": rows, "context_length": cfg.hyperparams.context_length,
            "matrix_gflops": {k: v / 1e9 for k, v in rate.items()}, "variants": out}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    ap.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    ap.add_argument("--rounds", type=int, default=15, help="at most this many rounds per shape")
    ap.add_argument("--seconds", type=float, default=180, help="per shape; at least 3 rounds are made")
    ap.add_argument("--rows", type=int, help="rows of a batch; default: the configuration's (on a CPU 16 of the baseline's 64)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds of this process, for --threads 1")
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training.json")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    machine = {"clock": args.clock, "cpu": platform.processor() or platform.machine(), "threads": args.threads, "gpu": gpu,
               "torch": torch.__version__, "python": platform.python_version()}
    result: dict = {"machine": machine, "shapes": {}}
    for shape in args.shape:
        rows = args.rows or (CPU_ROWS[shape] if device.type == "cpu" else load_config(ROOT / SHAPES[shape]).hyperparams.batch_size)
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        with freed_memory_kept():
            found = result["shapes"][shape] = measure(shape, args.only, args.rounds, args.seconds, rows, device, clock)
        rates = ", ".join(f"{k} {v:.0f}" for k, v in found["matrix_gflops"].items())
        print(f"{shape}: {rows} x {found['context_length']} tokens; matrix products run at {rates} GFLOP/s")
        for name, row in found["variants"].items():
            inside = f", {row['products_share']:.0%} in products at {row['products_gflops']:.0f}" if "products_share" in row else ""
            print(f"  {name:22s} {row['ms']:9.1f} ms {row['tokens_per_second']:10.0f} tokens/s {row['gflops']:9.1f} GFLOP/s (6N) "
                  f"{row['of_bf16_matrix_rate']:6.1%} of bf16 {row.get('speedup', float('nan')):6.2f}x challenge{inside}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
