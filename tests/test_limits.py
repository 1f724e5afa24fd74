"""Settings that can only be mistakes: refused in one line by load_config or build_model, before anything is allocated."""
import random
import time

import pytest
import torch
import yaml

from mainrun_nb.config import TINY, Config, InputError, UnetGPTConfig, flatten, load_config
from mainrun_nb.models import build_model
from mainrun_nb.unet_gpt import UNetGPT

ODD = [0, -1, 1, 10**5, 2**63, 10**400, 0.5, 1e5, 1e300, float("inf"), True, None, "", "x", "1e400", "${nope}", "${hyperparams.lr}", "???",
       "a\nb", [], [0], [[1]], {}, {"a": 1}, {1, 2}, b"x", "\ud83d"]
VALUES: dict[type, list] = {  # of the type that the setting has
    int: [1, 1, 2, 3, 4, 7, 8, 16, 24, 32, 32, 64, 100, 1000, 2**20, 2**31 - 1, 0, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**12, 10**400],
    float: [0.0, 1e-320, 1e-9, 0.0005, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0, 2.5, 100.0, 1e9, 1e10, 1e300, float("inf"), float("nan"), -0.5],
    str: ["gpt", "unet_gpt", "causal", "sparse", "sparsek", "swiglu", "relu", "rmsnorm", "post", "rope", "learned", "strided", "x"],
    bool: [True, False], type(None): [None, 1, 10, 2**31 - 1, 0, 2**63, 1e300],
    list: [[], [0], [-1, 2], [64] * 3, [32, 16, 32], [10**9] * 3, [8] * 2000, [0.9, 0.999], [0.9, 1.0], [1e400, 0.9], [10**400, 0.9]],
}


def mutated(draw: random.Random) -> dict:
    """A configuration of which up to three settings have been given a value from the list above."""
    tree: dict = {}
    for item in TINY:
        key, value = item.split("=")
        section, name = key.rsplit(".", 1)
        node = tree
        for part in section.split("."):
            node = node.setdefault(part, {})
        node[name] = yaml.safe_load(value)
    defaults = flatten(Config())
    for key in draw.sample(sorted(defaults), draw.randint(1, 4)):
        *sections, name = key.split(".")
        node = tree
        for part in sections:
            node = node.setdefault(part, {})
        node[name] = draw.choice(ODD if draw.random() < 0.15 else VALUES[type(defaults[key])])
    section, layer = draw.choice(["gpt", "unet_gpt"]), draw.choice(["causal", "sparse", "sparsek"])
    tree["hyperparams"].setdefault("model_architecture", section)
    tree["model_configs"].setdefault(section, {}).setdefault("attention_layer", layer)
    return tree


def build(path) -> None:
    """What a run does first: read, and build without content."""
    cfg = load_config(path)
    with torch.device("meta"):
        build_model(cfg, cfg.hyperparams.vocab_size)


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_configuration_builds_or_is_refused_in_one_line(tmp_path):
    outcomes, slowest = {"built": 0, "refused": 0}, 0.0
    for seed in range(300):
        draw = random.Random(seed)
        tree, path, start = mutated(draw), tmp_path / "config.yaml", time.process_time()
        path.write_bytes(yaml.dump(tree).encode("utf-8", "surrogatepass"))
        try:
            build(path)
            outcomes["built"] += 1
        except InputError as e:
            outcomes["refused"] += 1
            assert "\n" not in str(e) and len(str(e)) < 600, (seed, str(e))
            assert any(word in str(e) for word in (*(k.split(".")[-1] for k in flatten(Config())), path.name)), (seed, str(e))
        except Exception as e:
            raise AssertionError(f"seed {seed}: {tree}") from e
        slowest = max(slowest, time.process_time() - start)
    assert min(outcomes.values()) > 30, outcomes
    assert slowest < 5, slowest


REFUSED = {
    "hyperparams.context_length=1000000000000000000": "hyperparams.context_length: must be at most 1048576, found 1000000000000000000",
    "model_configs.gpt.n_layer=18446744073709551616": "model_configs.gpt.n_layer: must be at most 1000, found 18446744073709551616",
    "hyperparams.lr=1" + 400 * "0": "hyperparams.lr' must be a finite number, found 1000",
    "hyperparams.vocab_size=1000000000000": "hyperparams.vocab_size: must be at most 10000000,",
    "hyperparams.num_titles=1000000000000": "hyperparams.num_titles: must be at most 2147483647,",
    "hyperparams.num_titles=1e5": "must be of type int, found 100000.0",
    "hyperparams.lr=1e400": "hyperparams.lr: must be a finite number, found inf",
    "hyperparams.betas=[0.9,1.0]": "hyperparams.betas: must be two numbers, at least 0 and below 1",
    "hyperparams.gamma=1e300": "hyperparams.gamma: must be at most 1,",
    "hyperparams.seed=9223372036854775808": "hyperparams.seed: must be at least 0 and below 9223372036854775808",
    "hyperparams.memory_budget_gb=1e300": "hyperparams.memory_budget_gb: must be at most",
    "model_configs.unet_gpt.hidden_layer_list=[]": "hidden_layer_list: must be a list of 1 to 1000 whole numbers",
    "model_configs.gpt.mlp_ratio=0.0005": "mlp_ratio: must leave the MLP a width of 1 or more, found 0.0005 in a block of width 32",
    "model_configs.gpt.hidden_layer=2000000000": "hidden_layer and mlp_ratio: make",
    "hyperparams.vocab_size=10000000 model_configs.gpt.d_model=1000000": "vocab_size and d_model: make 1.0e+13 parameters of the embedding",
    "model_configs.gpt.embedding_cutoff=9 model_configs.gpt.embedding_rank=2147483647 hyperparams.vocab_size=1000":
        "vocab_size and embedding_rank: make",
    "model_configs.gpt.embedding_ngrams=5": "embedding_ngrams=5: needs embedding_cutoff",
    "model_configs.gpt.embedding_ngrams=10000001 model_configs.gpt.embedding_cutoff=9": "embedding_ngrams: must be at most 10000000",
    "model_configs.gpt.embedding_ngrams=10000000 model_configs.gpt.embedding_cutoff=9 model_configs.gpt.embedding_rank=20000000":
        "embedding_ngrams and embedding_rank: make",
    "model_configs.gpt.embedding_ngrams=2000 model_configs.gpt.embedding_cutoff=900 model_configs.gpt.d_model=2000000000":
        "vocab_size and d_model: make",
    "attn_configs.causal.n_head=64": "n_head: 64 heads do not divide the layer's width 32",
    "attn_configs.causal.n_head=4 attn_configs.causal.intermediate_dim=2": "n_head: 4 heads do not divide intermediate_dim 2",
    "model_configs.gpt.restart_positions=true": "restart_positions: needs hyperparams.title_mask=true",
    "model_configs.gpt.restart_positions=true model_configs.gpt.position=rope": "restart_positions: has no effect with position=rope",
}


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad[:50])
def test_a_value_that_makes_nothing_is_refused_by_its_key(bad):
    with pytest.raises(InputError) as e, torch.device("meta"):
        cfg = load_config(overrides=[*TINY, *bad.split(" ")])
        build_model(cfg, cfg.hyperparams.vocab_size)
    assert REFUSED[bad] in str(e.value) and "\n" not in str(e.value)


def test_the_largest_values_are_still_values():
    hp = load_config(overrides=[f"hyperparams.{s}" for s in ("seed=9223372036854775807", "gamma=1", "num_titles=2147483647")]).hyperparams
    assert (hp.seed, hp.gamma, hp.num_titles) == (2**63 - 1, 1, 2**31 - 1)


def test_a_model_that_this_machine_cannot_hold_is_refused_before_it_is_allocated():
    cfg = load_config(overrides=[*TINY, "hyperparams.vocab_size=10000000", "model_configs.gpt.d_model=90000"])  # 3.6 TB
    start = time.perf_counter()
    with pytest.raises(InputError, match="parameters of the embedding"):
        build_model(cfg, cfg.hyperparams.vocab_size)
    assert time.perf_counter() - start < 2


def test_values_that_were_set_in_python_meet_the_same_rules():
    for change in [dict(n_layer=2**64), dict(mlp_ratio=float("inf")), dict(d_model="wide"), dict(n_layer=0)]:
        cfg = load_config(overrides=TINY)
        vars(cfg.model_configs.gpt).update(change)
        with pytest.raises(InputError, match=f"model_configs.gpt.{next(iter(change))}: must be"):
            build_model(cfg, 50)
    with pytest.raises(InputError, match="hidden_layer_list"):
        UNetGPT(UnetGPTConfig(hidden_layer_list=[]), None, 50, 16)
