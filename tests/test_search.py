"""Search files mean what W&B's published schema and engine mean by them.

The schema (github.com/wandb/sweeps, src/sweeps/config/schema.json) is restated here in our own words, for jsonschema and scipy to judge by:
neither reads a line of ours. Where this project is stricter on purpose, or wider, the cases are listed with the reason.
"""
import copy
import itertools
import json
import math
import random
import warnings

import jsonschema
import numpy as np
import pytest
from scipy import stats

from mainrun_nb.config import InputError, load_config
from mainrun_nb.search import Dimension, Grid, Search, brackets, for_wandb, grid_points, is_behind, random_point, read_early, read_search

# --- W&B's schema, restated ---

NUMBER, POSITIVE, ANY = {"type": "number"}, {"type": "number", "exclusiveMinimum": 0}, {}
LIST, INTEGER, TEXT = {"type": "array", "minItems": 1}, {"type": "integer", "format": "integer"}, {"type": "string"}
LIMITS, VALUES, BELL, BETA, Q = (
    {"min": NUMBER, "max": NUMBER}, {"min": POSITIVE, "max": NUMBER}, {"mu": NUMBER, "sigma": {"type": "number", "minimum": 0}},
    {"a": {"type": "number", "minimum": 0}, "b": {"type": "number", "minimum": 0}}, {"q": POSITIVE})  # fmt: skip
DISTRIBUTIONS = {  # keys; which of them must be there; whether the name may be left out
    "constant": ({"value": ANY}, {"value"}, True), "categorical": ({"values": LIST}, {"values"}, True),
    "categorical_w_probabilities": (
        {"values": LIST, "probabilities": {"type": "array", "items": {"type": "number", "minimum": 0}}}, {"values", "probabilities"}, True),
    "int_uniform": ({"min": INTEGER, "max": INTEGER}, {"min", "max"}, True), "uniform": (LIMITS, {"min", "max"}, True),
    "q_uniform": ({**LIMITS, **Q}, {"min", "max"}, False), "log_uniform_values": (VALUES, {"min", "max"}, False),
    "inv_log_uniform_values": (VALUES, {"min", "max"}, False), "q_log_uniform_values": ({**VALUES, **Q}, {"min", "max"}, False),
    "log_uniform": (LIMITS, {"min", "max"}, False), "inv_log_uniform": (LIMITS, {"min", "max"}, False),
    "q_log_uniform": ({**LIMITS, **Q}, {"min", "max"}, False), "normal": (BELL, set(), False), "log_normal": (BELL, set(), False),
    "q_normal": ({**BELL, **Q}, set(), False), "q_log_normal": ({**BELL, **Q}, set(), False), "beta": (BETA, set(), False),
    "q_beta": ({**BETA, **Q}, set(), False)}  # fmt: skip


def a_mapping(required, **properties):
    return {"type": "object", "required": sorted(required), "properties": properties, "additionalProperties": False}


ENTRY = {"anyOf": [a_mapping(needed | (set() if implied else {"distribution"}), distribution={"enum": [name]}, **keys)
                   for name, (keys, needed, implied) in DISTRIBUTIONS.items()]}
ENTRY["anyOf"].append(a_mapping({"parameters"}, parameters={"$ref": "#/$defs/all"}))
HYPERBAND = {"anyOf": [{"required": ["max_iter", "s"]}, {"required": ["min_iter"]}], **a_mapping(
    {"type"}, type={"enum": ["hyperband"]}, min_iter={"type": "integer", "minimum": 1}, max_iter={"type": "integer"}, s=NUMBER,
    eta={"type": "number", "exclusiveMinimum": 1}, strict={"type": "boolean"})}  # fmt: skip
SCHEMA = {"$defs": {"entry": ENTRY, "all": {"type": "object", "minProperties": 1, "additionalProperties": {"$ref": "#/$defs/entry"}}},
          **a_mapping({"method", "parameters"}, method={"enum": ["grid", "random", "bayes"]}, parameters={"$ref": "#/$defs/all"},
                      metric=a_mapping({"name"}, name=TEXT, goal={"enum": ["minimize", "maximize"]}, target=NUMBER,
                                       impute={"enum": ["latest", "best", "worst"]}),
                      early_terminate=HYPERBAND, run_cap={"type": "integer", "minimum": 1}, kind={"enum": ["sweep"]},
                      controller={"type": "object", "required": ["type"], "properties": {"type": {"enum": ["local", "cloud"]}}},
                      command={"type": "array"}, **dict.fromkeys(("program", "name", "description", "project", "entity", "job"), TEXT))}
FORMATS = jsonschema.FormatChecker(())
FORMATS.checks("integer")(lambda x: isinstance(x, int))
VALID = jsonschema.Draft202012Validator(SCHEMA, format_checker=FORMATS)


def form(entry) -> str:
    """The distribution that an entry means; empty if it is none."""
    for name in ("int_uniform", *DISTRIBUTIONS):
        keys, needed, implied = DISTRIBUTIONS[name]
        shape = a_mapping(needed | (set() if implied else {"distribution"}), distribution={"enum": [name]}, **keys)
        if jsonschema.Draft202012Validator(shape, format_checker=FORMATS).is_valid(entry):
            return name
    return ""


def ppf(name: str, entry: dict, u):
    """W&B's quantile function, by scipy."""
    if name.startswith("q_"):
        q = entry.get("q", 1)
        return np.round(ppf(name[2:], entry, u) / q) * q
    low, high = entry.get("min"), entry.get("max")
    mu, sigma = entry.get("mu", 0), entry.get("sigma", 1)
    return {"uniform": lambda: stats.uniform.ppf(u, low, high - low), "int_uniform": lambda: stats.randint.ppf(u, low, high + 1),
            "normal": lambda: stats.norm.ppf(u, mu, sigma), "log_normal": lambda: stats.lognorm.ppf(u, s=sigma, scale=np.exp(float(mu))),
            "beta": lambda: stats.beta.ppf(u, entry.get("a", 1), entry.get("b", 1)),
            "log_uniform_values": lambda: stats.loguniform.ppf(u, low, high),
            "log_uniform": lambda: np.exp(stats.uniform.ppf(u, low, high - low)),
            "inv_log_uniform_values": lambda: 1 / stats.loguniform.ppf(1 - u, 1 / high, 1 / low),
            "inv_log_uniform": lambda: np.exp(-stats.uniform.ppf(1 - u, low, high - low))}[name]()


# --- what the settings take, restated ---


def whole(least, most):
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and float(v).is_integer() and least <= v <= most


def real(allowed):
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and allowed(v) and v <= 1e9


TAKES = {"hyperparams.lr": real(lambda v: v > 0), "hyperparams.weight_decay": real(lambda v: v >= 0),
         "hyperparams.warmup": real(lambda v: 0 <= v < 1), "hyperparams.batch_size": whole(1, 2**20),
         "model_configs.gpt.n_layer": whole(1, 1000), "hyperparams.amp_bool": lambda v: isinstance(v, bool),
         "hyperparams.optimizer": lambda v: v in ("adamw", "sgd", "muon")}
WHOLE = {"hyperparams.batch_size", "model_configs.gpt.n_layer"}
NAMED = {"hyperparams.amp_bool", "hyperparams.optimizer"}


def suits(key: str, entry: dict, method: str) -> bool:
    """Whether an entry that W&B takes can be of this setting, with this method."""
    name, takes = form(entry), TAKES[key]
    if not name or ("min" in entry and entry["min"] >= entry["max"]):
        return False
    if name in ("constant", "categorical", "categorical_w_probabilities"):
        values = entry.get("values", [entry.get("value")])
        return all(map(takes, values)) and (name != "categorical_w_probabilities" or method == "random")
    if key in NAMED or (method == "grid" and name not in ("int_uniform", "q_uniform")):
        return False
    if key in WHOLE and name != "int_uniform" and not (name.startswith("q_") and float(entry.get("q", 1)).is_integer()):
        return False
    if method == "grid":
        steps = np.arange(entry["min"], entry["max"], entry.get("q", 1)) if name == "q_uniform" else [entry["min"], entry["max"]]
        return bool(takes(float(steps[0])) and takes(float(steps[-1])))
    if name in ("log_uniform", "q_log_uniform", "inv_log_uniform") and 0 < entry["min"] and (entry["max"] <= 1 or entry["min"] < 0.05):
        return False
    ends = (1e-9, 1 - 1e-9) if "min" in entry else (0.5,)
    with np.errstate(all="ignore"):
        finite = np.isfinite(ppf(name, entry, np.array([1e-9, 1 - 1e-9]))).all()
        return bool(finite) and all(takes(float(ppf(name, entry, u))) for u in ends)


def leaves(tree: dict, prefix: str = ""):
    for name, entry in tree.items():
        yield from leaves(entry["parameters"], f"{prefix}{name}.") if "parameters" in entry else [(f"{prefix}{name}", entry)]


def meant(file: dict) -> bool:
    """Whether a file is one, by the schema, by what W&B checks beside it, and by the settings."""
    if not VALID.is_valid(file):
        return False
    entries = list(leaves(file["parameters"]))
    for _, entry in entries:
        if "probabilities" in entry and not (
                len(entry["values"]) == len(entry["probabilities"]) and np.isclose(sum(entry["probabilities"]), 1)):
            return False
        if 0 in (entry.get("sigma"), entry.get("a"), entry.get("b")):
            return False  # W&B takes these and draws nan
    keys = [key for key, _ in entries]
    if len(set(keys)) < len(keys) or not set(keys) <= set(TAKES):
        return False
    early = file.get("early_terminate", {})
    if early.get("max_iter") and "s" in early:
        whole_steps = early["s"] >= 1 and float(early["s"]).is_integer()
        if not whole_steps or early["max_iter"] < early.get("eta", 3):  # W&B takes these and stops with an error of its own
            return False
    return all(suits(key, entry, file["method"]) for key, entry in entries)


# --- files of our own making ---


def an_entry(rng: random.Random, key: str, method: str) -> dict:
    """An entry, most often one that can be of the setting."""
    for _ in range(6):
        if suits(key, entry := any_entry(rng, key), method):
            break
    return entry


def any_entry(rng: random.Random, key: str) -> dict:
    """An entry in some form."""
    if key in NAMED:
        choices = [True, False] if key.endswith("bool") else ["adamw", "sgd", "muon"]
        some = rng.sample(choices, rng.randint(1, len(choices)))
        share = [round(1 / len(some), 7)] * len(some)
        return rng.choice([{"value": some[0]}, {"values": some}, {"values": some, "probabilities": share},
                           {"values": some, "probabilities": share, "distribution": "categorical_w_probabilities"}])
    least = 1 if key in WHOLE else 0
    low = least + rng.choice([0, 1, 2.0, 3]) if key in WHOLE else rng.choice([0, 0.001, 0.1, 1])
    high = low + rng.choice([1, 4, 16, 61.0]) if key in WHOLE else low + rng.choice([0.05, 0.5, 1, 2.5])
    name = rng.choice(list(DISTRIBUTIONS))
    drawn = {"constant": {"value": high}, "categorical": {"values": [low, high]}, "categorical_w_probabilities": {
        "values": [low, high, low + 1], "probabilities": [0.25, 0.25, 0.5]}}.get(name)  # fmt: skip
    if not drawn and "min" in DISTRIBUTIONS[name][0]:
        drawn = {"min": low, "max": high}
        if "log" in name and "values" not in name:
            drawn = {"min": rng.choice([-9.5, -3, 0, 1]), "max": rng.choice([2, 2.5, 4])}
    drawn = drawn or {}
    for extra, choices in {"q": [1, 2, 16.0, 0.5, 0.1], "mu": [0.3, 2, 5.0], "sigma": [0.1, 1, 3], "a": [0.5, 2], "b": [1, 3.5]}.items():
        if extra in DISTRIBUTIONS[name][0] and rng.random() < 0.6:
            drawn[extra] = rng.choice(choices)
    return drawn if DISTRIBUTIONS[name][2] and rng.random() < 0.6 else {**drawn, "distribution": name}


ODD = [None, True, False, "1e-3", "banana", [1], {"a": 1}, -1, 0, 1, 1.0, 0.5, 3.0, 1e30]


def spoiled(rng: random.Random, entry: dict) -> dict:
    """An entry with one thing about it changed."""
    entry = copy.deepcopy(entry)
    what = rng.randrange(6)
    if what == 0:
        entry.pop(rng.choice(list(entry)))
    elif what == 1:
        names = ["min", "max", "q", "mu", "sigma", "a", "b", "value", "values", "probabilities", "stp", "parameters"]
        entry[rng.choice(names)] = rng.choice(ODD)
    elif what == 2:
        entry[rng.choice(list(entry))] = rng.choice(ODD)
    elif what == 3:
        entry["distribution"] = rng.choice([*DISTRIBUTIONS, "loguniform", "gaussian", 3])
    elif "min" in entry and what == 4:
        entry["min"], entry["max"] = entry["max"], entry["min"]
    else:
        for key in ("min", "max", "q", "mu", "sigma"):
            if isinstance(entry.get(key), int | float):
                entry[key] = rng.choice([float, int, lambda v: -v, lambda v: v * 1000])(entry[key])
    if entry.get("distribution") == "categorical" and "probabilities" in entry:
        entry["distribution"] += "_w_probabilities"  # the one spelling that only we take, for the sake of older files
    return entry


def nested(tree: dict, key: str, entry: dict) -> None:
    """Put an entry under its nested name."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {"parameters": {}})["parameters"]
    tree[last] = entry


def a_file(seed: int) -> dict:
    """A search file: about half as they should be, the others with something about them changed."""
    rng = random.Random(seed)
    parameters, method = {}, rng.choice(["random", "random", "random", "grid", "bayes"])
    for key in rng.sample(list(TAKES), rng.randint(1, 3)):
        entry = an_entry(rng, key, method)
        entry = spoiled(rng, entry) if rng.random() < 0.3 else entry
        nested(parameters, key, entry) if rng.random() < 0.3 else parameters.update({key: entry})
    file = {"method": method, "parameters": parameters, "program": "train.py"}
    if rng.random() < 0.5:
        file["metric"] = {"name": "val/loss", "goal": rng.choice(["minimize", "maximize"])}
    if rng.random() < 0.3:
        file["early_terminate"] = {"type": "hyperband", **rng.choice(
            [{"min_iter": 2}, {"min_iter": 1, "eta": 1.5}, {"max_iter": 27, "s": 2, "eta": 3.0}, {"max_iter": 8, "s": 2, "strict": False}])}
    if rng.random() < 0.3:
        file |= rng.choice([{"run_cap": 5}, {"run_cap": 7.0}, {"description": "d", "name": "n"}, {"project": "p", "entity": "e"},
                            {"command": ["${env}", "${program}", "${args}"]}, {"controller": {"type": "local"}}, {"kind": "sweep"}])
    if rng.random() < 0.15:
        section = rng.choice([file, file, file.get("metric", file), file.get("early_terminate", file)])
        names = ["run_cap", "goal", "target", "eta", "s", "strict", "min_iter", "name", "method", "kind", "colour"]
        section[rng.choice(names)] = rng.choice(ODD)
    return file


@pytest.fixture(scope="module")
def base():
    return load_config()


def read(tmp_path, file, base) -> Search:
    """A file, given as a tree or as text."""
    path = tmp_path / "search.yaml"
    path.write_text(file if isinstance(file, str) else json.dumps(file))  # JSON is YAML, and a text in it stays one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_search(path, base)


FILES = 400


def test_verdicts_and_draws_are_those_of_the_schema(tmp_path, base):
    """Several hundred files: the same ones refused, and the same values drawn or walked through in the others."""
    u, taken, differ = np.linspace(0.013, 0.987, 7), [], []
    for seed in range(FILES):
        file = a_file(seed)
        try:
            search, complaint = read(tmp_path, file, base), ""
            taken.append(seed)
        except InputError as e:
            search, complaint = None, str(e)
            assert "\n" not in complaint and str(tmp_path) in complaint
        if bool(search) != meant(file):
            differ.append(f"{seed}: {file}: {complaint or 'taken'}")
        elif search:
            assert [d.key for d in search.dimensions] == [key for key, _ in leaves(file["parameters"])]
            for d, (_, entry) in zip(search.dimensions, leaves(file["parameters"]), strict=True):
                same_values(d, entry, u)
    assert not differ, "\n".join(differ)
    assert FILES * 0.3 < len(taken) < FILES * 0.7, f"{len(taken)} of {FILES} were taken: the cases have become one-sided"


def same_values(d: Dimension, entry: dict, u) -> None:
    """Whether a dimension draws what scipy does, or walks through what numpy does; whole numbers for a setting that takes them."""
    name, drawn = form(entry), [d.at(float(x)) for x in u]
    if d.draw:
        np.testing.assert_allclose(drawn, ppf(name, entry, u), rtol=5e-6, atol=1e-12, err_msg=str(entry))
    elif name == "int_uniform":
        assert list(d.values) == list(range(entry["min"], entry["max"] + 1))
    elif name == "q_uniform":
        np.testing.assert_allclose(list(d.values), np.arange(entry["min"], entry["max"], entry.get("q", 1)), rtol=1e-9, atol=1e-12)
    else:
        assert list(d.values) == entry.get("values", [entry.get("value")]) and d.weights == entry.get("probabilities")
    assert d.key not in WHOLE or all(isinstance(value, int) for value in drawn)


# --- cases by hand ---

LR, BATCH = "parameters: {hyperparams.lr: %s}", "parameters: {hyperparams.batch_size: %s}"


@pytest.mark.parametrize("text, says", [
    (BATCH % "{min: 16, max: 64, q: 16}", "'q' does not go with int_uniform, which takes min, max"),
    (LR % "{distribution: normal, mu: 0.1, min: 0, max: 1}", "'min' does not go with normal, which takes mu, sigma"),
    (LR % "{distribution: beta, a: 1, sigma: 2}", "'sigma' does not go with beta"),
    (LR % "{value: 0.1, values: [0.1]}", "'values' does not go with constant"),
    (LR % "{values: [0.1], min: 0.1}", "'min' does not go with categorical"),
    ("parameters: {hyperparams: {values: [1], parameters: {lr: {value: 1}}}}", "parameters.hyperparams: unknown key 'values'"),
    ("parameters: {hyperparams: {parameters: {}}}", "parameters.hyperparams.parameters: needs at least one"),
    ("parameters: {hyperparams.lr: {value: 1}, data: {parameters: {}}}", "parameters.data.parameters: needs at least one"),
    ("parameters: {1: {value: 1}}", "'1' is not a setting"),
    ("parameters: {hyperparams.lr: {value: 1}, hyperparams: {parameters: {lr: {value: 2}}}}", "hyperparams.lr: is given twice"),
    (LR % "{min: false, max: 1.0}", "min: expected a number, found False"),
    (LR % "{min: 0.1, max: '1.0'}", "max: expected a number, found '1.0'"),
    (LR % "{min: 0.1, max: 0.1}", "min 0.1 is not below max 0.1"),
    (LR % "{mu: 0.1, sigma: 1}", "or a distribution"),
    (LR % "{distribution: [normal]}", "distribution: ['normal'] is none"),
    (LR % "{distribution: q_uniform, min: 0.1, max: 1, q: -1}", "q: expected a number above 0"),
    (LR % "{distribution: log_uniform_values, min: -11, max: -7}", "min: expected a number above 0, found -11"),
    (LR % "{distribution: log_uniform, min: 1.0e-5, max: 1.0e-3}", "log_uniform_values takes values"),
    (LR % "{distribution: q_log_uniform, min: 1.0e-5, max: 100}", "q_log_uniform_values takes values"),
    ("parameters: {model_configs.gpt.dropout: {distribution: log_uniform, min: 0.1, max: 0.5}}", "log_uniform_values takes values"),
    (BATCH % "{distribution: q_log_uniform, min: 16, max: 2048}", "q_log_uniform_values takes values"),
    (LR % "{distribution: log_normal, mu: 1000}", "numbers too large to hold"),
    (LR % "{distribution: log_normal, sigma: 1000}", "numbers too large to hold"),
    (LR % ("{min: 0.1, max: 1" + "0" * 400 + "}"), "max: expected a number, found"),
    (BATCH % "{values: [16, 32.5]}", "must be of type int, found 32.5"),
    (BATCH % "{values: [16, [32]]}", "must be of type int, found [32]"),
    (BATCH % "{values: [16, 0]}", "must be above 0, found 0"),
    (BATCH % "{min: 16.0, max: 64}", "takes whole numbers, and uniform draws others; int_uniform"),
    (BATCH % "{distribution: q_uniform, min: 16, max: 64, q: 0.5}", "a whole q would not"),
    (BATCH % "{distribution: normal, mu: 64}", "q_normal would not"),
    (BATCH % "{distribution: q_uniform, min: 1, max: 64, q: 16}", "must be above 0, found 0, drawn by q_uniform"),
    ("method: grid\n" + BATCH % "{distribution: q_uniform, min: 0.5, max: 64, q: 16}", "steps of 16 from 0.5 are others"),
    ("method: grid\n" + LR % "{distribution: q_uniform, min: 0, max: 1, q: 0.1}", "must be above 0, found 0"),
    ("method: grid\n" + LR % "{distribution: q_normal, mu: 1}", "method grid needs values"),
    ("method: grid\nparameters: {hyperparams.seed: {min: 0, max: 9223372036854775807}}", "more values than can be counted"),
    ("method: grid\n" + LR % "{values: [1, 2], probabilities: [0.5, 0.5]}", "method grid does not look at probabilities"),
    (LR % "{values: [1, 2], probabilities: [0.5, 0.25, 0.25]}", "found 3 for 2 values"),
    (LR % "{min: 0, max: 1}", "limits with a point, as in 1.0, mean uniform"),
    ("parameters: {hyperparams.amp_bool: {values: [0, 1]}}", "takes true and false, found 0"),
    ("parameters: {hyperparams.amp_bool: {min: 0, max: 1}}", "takes bool, which has no distribution"),
    ("parameters: {hyperparams.optimizer: {values: [sgd, lion]}}", "must be one of sgd, adam"),
    ("parameters: {hyperparams.betas: {values: [[0.9, true]]}}", "must be of type list[float], found [0.9, True]"),
    ("parameters: {hyperparams.lr: {value: null}}", "must be of type float, found None"),
    ("parameters: {lr: {value: 0.1}}", "'lr' is not a setting. Did you mean 'hyperparams.lr'?"),
    ("parameters: {hyperparams.n_head: {value: 8}}", "Did you mean 'attn_configs.causal.n_head'?"),
    ("parameters: {hyperparams: {value: 1}}", "'hyperparams' is a section; its settings are nested under 'parameters'"),
    ("parameters: {zzzz: {value: 1}}", "sweeps/base/baseline.yaml lists all"),
    ("parameters: null", "parameters: expected a mapping, found None"),
    ("run_cap: 0\n" + LR % "{value: 1}", "run_cap: expected a whole number from 1 on, found 0"),
    ("run_cap: 2.5\n" + LR % "{value: 1}", "run_cap: expected a whole number"),
    ("controller: {type: lokal}\n" + LR % "{value: 1}", "controller: expected type: local or cloud"),
    ("description: 7\n" + LR % "{value: 1}", "description: expected a text, found 7"),
    ("metric: {target: low}\n" + LR % "{value: 1}", "metric.target: expected a number, found 'low'"),
    ("metric: {goal: min}\n" + LR % "{value: 1}", "metric.goal: expected one of minimize, maximize"),
    ("method: custom\n" + LR % "{value: 1}", "method: expected one of grid, random, bayes, found 'custom'"),
])  # fmt: skip
def test_what_is_not_meant_is_refused_with_its_reason(tmp_path, base, text, says):
    with pytest.raises(InputError) as e:
        read(tmp_path, text, base)
    assert says in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("key, entry, drawn", [
    ("hyperparams.batch_size", "{distribution: q_uniform, min: 16, max: 64, q: 16.0}", [32, 32, 48]),
    ("hyperparams.batch_size", "{values: [16.0, 64.0]}", [16, 64]),
    ("hyperparams.batch_size", "{distribution: q_log_uniform, min: 3, max: 5}", [33, 55, 90]),
    ("hyperparams.lr", "{values: [9e-6, 1e-5]}", [9e-6, 1e-5]),
    ("hyperparams.lr", "{distribution: log_uniform_values, min: 9e-6, max: 9e-2}", [9e-5, 9e-4, 9e-3]),
    ("hyperparams.lr", "{distribution: log_uniform, min: -11, max: -7}", [math.exp(-10), math.exp(-9), math.exp(-8)]),
    ("hyperparams.weight_decay", "{distribution: beta}", [0.25, 0.5, 0.75]),
    ("hyperparams.amp_bool", "{values: [false, true], distribution: categorical_w_probabilities, probabilities: [1, 0]}", [False, True]),
    ("hyperparams.amp_bool", "{values: [false, true], distribution: categorical, probabilities: [0.9, 0.1]}", [False, True]),
    ("hyperparams.max_steps", "{values: [null, 10]}", [None, 10]),
    ("hyperparams.optimizer", "{values: [AdamW, SGD]}", ["adamw", "sgd"]),
    ("model_configs.unet_gpt.hidden_layer_list", "{values: [[64, 32.0], [16]]}", [[64, 32], [16]]),
    ("data.source", "{values: ['${oc.env:HN_TITLES,hackernews}', synthetic]}", ["${oc.env:HN_TITLES,hackernews}", "synthetic"]),
])  # fmt: skip
def test_values_are_what_the_setting_holds(tmp_path, base, key, entry, drawn):
    d = read(tmp_path, f"parameters: {{{key}: {entry}}}", base).dimensions[0]
    found = [d.at(u) for u in (0.25, 0.5, 0.75)] if d.draw else list(d.values)
    assert [type(x) for x in found] == [type(x) for x in drawn]
    assert found == (pytest.approx(drawn, rel=5e-6) if d.draw else drawn)


def test_a_range_of_fifty_millions_is_not_written_out(tmp_path, base):
    search = read(tmp_path, "method: grid\nparameters: {hyperparams.seed: {min: 0, max: 50000000}, hyperparams.weight_decay: "
                            "{distribution: q_uniform, min: 0, max: 1, q: 2.0e-8}}", base)  # fmt: skip
    points = grid_points(search)
    assert points.size == 50_000_001 * 50_000_000 and search.wanted(None) == points.size and search.wanted(7) == 7
    assert points[0] == {"hyperparams.seed": 0, "hyperparams.weight_decay": 0.0}
    assert points[50_000_001] == {"hyperparams.seed": 1, "hyperparams.weight_decay": 2e-8}
    assert points[points.size - 1] == {"hyperparams.seed": 50_000_000, "hyperparams.weight_decay": 0.99999998}
    with pytest.raises(IndexError):
        points[points.size]
    assert [p["hyperparams.weight_decay"] for p, _ in zip(points, range(3), strict=False)] == [0.0, 2e-8, 4e-8]


def test_a_grid_is_walked_as_a_product(tmp_path):
    dims = [Dimension("a", [1, 2]), Dimension("b", range(3)), Dimension("c", ["x", None])]
    assert [tuple(p.values()) for p in Grid(dims)] == list(itertools.product(*(d.values for d in dims)))


def test_keys_for_wandbs_own_agent_are_read_and_named_once(tmp_path, base):
    text = ("program: train.py\nname: n\ndescription: d\nproject: p\nentity: e\ncommand: ['${env}', '${program}', '${args}']\n"
            "controller: {type: local}\nmetric: {name: val/loss, impute: worst}\n" + LR % "{value: 1}")  # fmt: skip
    (tmp_path / "search.yaml").write_text(text)
    with pytest.warns(UserWarning) as said:
        read_search(tmp_path / "search.yaml", base)
    assert [str(w.message).split(": ", 1)[1] for w in said] == ["command, controller, metric.impute: read, but without effect here"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "search.yaml").write_text("program: train.py\nname: n\ndescription: d\nproject: p\n" + LR % "{value: 1}")
        read_search(tmp_path / "search.yaml", base)


def test_run_cap_bounds_the_trials_and_trials_beats_it(tmp_path, base):
    grid = "method: grid\nrun_cap: %s\nparameters: {hyperparams.seed: {min: 0, max: 9}}"
    assert [read(tmp_path, grid % 4, base).wanted(n) for n in (None, 2, 7, 99)] == [4, 2, 7, 10]
    assert read(tmp_path, grid % 50, base).wanted(None) == 10
    assert [read(tmp_path, f"run_cap: 4\n{LR % '{min: 0.1, max: 1.0}'}", base).wanted(n) for n in (None, 2, 99)] == [4, 2, 99]


def test_what_wandb_is_sent(tmp_path, base):
    text = ("controller: {type: local}\nrun_cap: 4\nmetric: {target: 1.2}\nparameters: {hyperparams: {parameters: {lr: {distribution: "
            "categorical, values: [1e-3, 9e-6], probabilities: [0.5, 0.5]}}}, hyperparams.seed: {min: 1, max: 2}}")  # fmt: skip
    search = read(tmp_path, text, base)
    sent, lr = for_wandb(search, 9), {"values": [1e-3, 9e-6], "probabilities": [0.5, 0.5]}
    assert sent == {"run_cap": 9, "method": "random", "metric": {"name": "val/loss", "goal": "minimize", "target": 1.2},
                    "parameters": {"hyperparams": {"parameters": {"lr": lr}}, "hyperparams.seed": {"min": 1, "max": 2}}}  # fmt: skip
    assert VALID.is_valid(sent) and for_wandb(search, None)["run_cap"] == 4
    for kind, low, high in [("log_uniform", -7, -3), ("q_log_uniform", -7, -3), ("inv_log_uniform", 3, 7)]:
        entry = f"{{distribution: {kind}, min: {low}, max: {high}}}".replace("}", ", q: 1.0e-4}" if kind[0] == "q" else "}")
        theirs = for_wandb(read(tmp_path, LR % entry, base), None)["parameters"]["hyperparams.lr"]
        assert theirs["distribution"] == f"{kind}_values" and (theirs["min"], theirs["max"]) == pytest.approx((math.exp(-7), math.exp(-3)))
    with pytest.raises(InputError, match="median is not W&B's"):
        for_wandb(read(tmp_path, "early_terminate: {type: median}\n" + LR % "{value: 1}", base), None)


# --- stopping early ---


def hyperband(**numbers) -> dict:
    return read_early({"type": "hyperband", **numbers})


def stopped_by_wandb(numbers: dict, own: list, others: list, sign: int) -> bool:
    """W&B's rule, from its description: among the best 1/eta at the last bracket reached, or out."""
    eta, last = numbers.get("eta", 3), numbers.get("max_iter")
    at = ([last / eta**i for i in range(1, numbers["s"] + 1)] if "s" in numbers else [numbers["min_iter"] * eta**i for i in range(30)])
    reached = [int(x + 1e-9) for x in at if 1 <= int(x + 1e-9) <= len(own)]
    if not reached:
        return False
    bracket = max(reached)
    rank = sorted(sign * run[bracket - 1] for run in [own, *others] if len(run) >= bracket)
    mine = sign * own[bracket - 1] if numbers.get("strict", True) else min(sign * x for x in own)
    return sum(x < mine for x in rank) > int(len(rank) / eta)


def test_hyperband_is_wandbs():
    """Two thousand looks at random histories, with brackets from either end."""
    rng, said = random.Random(0), []
    for _ in range(2000):
        numbers = rng.choice([{"min_iter": 1}, {"min_iter": 2, "eta": 2}, {"min_iter": 3, "eta": 1.5}, {"max_iter": 27, "s": 2},
                              {"max_iter": 16, "s": 3, "eta": 2.0}, {"min_iter": 1, "strict": False},
                              {"max_iter": 9, "s": 1, "strict": False}])
        histories = [[round(rng.gauss(3 - 0.2 * i, 1), 2) for i in range(rng.randint(0, 12))] for _ in range(rng.randint(1, 12))]
        own, *others = histories
        sign = rng.choice([1, -1])
        found = is_behind(hyperband(**numbers), [99.0 * sign, *own], [(rng.random() < 0.5, [99.0 * sign, *h]) for h in others],
                          "minimize" if sign == 1 else "maximize")
        assert found == stopped_by_wandb(numbers, own, others, sign), (numbers, histories, sign)
        said.append(found)
    assert 300 < sum(said) < 1700


def test_brackets():
    assert brackets(hyperband(max_iter=27, s=2, eta=3)) == [3, 9] and brackets(hyperband(max_iter=27.0, s=9.0, eta=3.0)) == [1, 3, 9]
    assert brackets(hyperband(min_iter=3))[:4] == [3, 9, 27, 81] and brackets(hyperband(min_iter=2, eta=1.5))[:5] == [2, 3, 4, 6, 10]
    assert brackets(hyperband(min_iter=1, max_iter=9)) == [1, 3, 9]
    with pytest.warns(UserWarning, match="min_iter has no effect beside max_iter and s"):
        assert brackets(hyperband(min_iter=1, max_iter=27, s=1)) == [9]
    with pytest.warns(UserWarning, match="s has no effect beside min_iter"):
        hyperband(min_iter=1, s=2)


# val/loss of twelve real runs, at each evaluation: a GPT of two layers and width 32, AdamW, seven passes over 1,500 synthetic titles, at
# learning rates from 0.003 to 0.3 and with warmups from 0 to 0.6. The best is number 9, whose warmup is the longest.
TWELVE = [[float(x) for x in line.split()] for line in """
    2.92 2.55 2.50 2.39 2.25 2.09 1.96 1.85 1.77 1.70 1.65 1.61 1.58 1.55 1.53 1.51 1.50 1.49 1.48 1.48 1.47 1.47 1.47 1.47
    2.96 2.73 2.52 2.45 2.31 2.13 2.00 1.89 1.79 1.71 1.66 1.61 1.58 1.54 1.53 1.51 1.48 1.47 1.45 1.44 1.43 1.43 1.43 1.43
    2.94 2.69 2.53 2.44 2.34 2.25 2.16 2.08 2.02 1.96 1.91 1.88 1.84 1.82 1.80 1.78 1.77 1.76 1.75 1.75 1.74 1.74 1.74 1.74
    2.95 2.58 2.52 2.45 2.39 2.34 2.30 2.21 2.10 1.99 1.89 1.83 1.79 1.72 1.67 1.64 1.59 1.57 1.54 1.53 1.51 1.50 1.50 1.50
    2.96 2.73 2.52 2.51 2.41 2.33 2.23 2.14 2.04 1.96 1.88 1.82 1.77 1.73 1.69 1.66 1.64 1.62 1.61 1.60 1.60 1.60 1.60 1.60
    2.91 2.56 2.53 2.53 2.53 2.53 2.52 2.52 2.52 2.53 2.51 2.53 2.52 2.51 2.51 2.52 2.51 2.51 2.51 2.51 2.51 2.51 2.51 2.51
    2.94 2.54 2.49 2.40 2.34 2.29 2.23 2.19 2.15 2.10 2.04 2.01 1.98 1.94 1.92 1.90 1.88 1.86 1.85 1.84 1.83 1.83 1.83 1.83
    2.96 2.68 2.53 2.44 2.29 2.20 2.03 1.90 1.80 1.74 1.68 1.64 1.61 1.56 1.52 1.50 1.46 1.45 1.42 1.40 1.39 1.39 1.38 1.38
    2.96 2.92 2.81 2.65 2.53 2.45 2.35 2.25 2.15 2.06 1.99 1.93 1.88 1.84 1.81 1.78 1.76 1.75 1.74 1.73 1.73 1.73 1.73 1.73
    2.96 2.83 2.57 2.46 2.31 2.10 1.90 1.77 1.69 1.64 1.61 1.57 1.55 1.52 1.50 1.46 1.44 1.41 1.39 1.37 1.34 1.33 1.32 1.32
    2.93 2.58 2.58 2.54 2.53 2.53 2.53 2.56 2.54 2.54 2.53 2.57 2.55 2.54 2.53 2.54 2.54 2.52 2.51 2.51 2.50 2.50 2.50 2.50
    2.92 2.57 2.53 2.52 2.51 2.51 2.50 2.50 2.49 2.48 2.46 2.46 2.45 2.44 2.43 2.42 2.42 2.41 2.41 2.41 2.41 2.40 2.40 2.40
""".strip().splitlines()]


def replay(early: dict, first: int = 1) -> dict[int, int]:
    """The trials that are stopped when they run one after another, and after which evaluation; `first` is the number of the first one."""
    past, stopped = [], {}
    for number, run in enumerate(TWELVE):
        seen = [math.nan] * (1 - first) + run  # with one before it, the evaluation after the first step counts
        n = next((n for n in range(1, len(seen)) if is_behind(early, seen[:n], past)), None)  # the last one is spared
        stopped |= {number: n - 1} if n else {}
        past.append((n is None, seen[: n or len(seen)]))
    return stopped


def test_a_long_warmup_is_not_stopped_for_its_first_step():
    """Counted from the first step on, ten of twelve go, the best one after that step; as it is, none goes before the first bracket."""
    assert min(range(12), key=lambda i: TWELVE[i][-1]) == 9
    assert replay(hyperband(min_iter=1), first=0)[9] == 1
    assert min(replay(hyperband(max_iter=27, s=2, eta=3)).values()) == 3
    at_nine = replay(hyperband(max_iter=27, s=1, eta=3))
    assert 9 not in at_nine and set(at_nine.values()) == {9} and len(at_nine) == 9
    assert 9 not in replay(hyperband(max_iter=22, s=1, eta=2)) and 9 not in replay(read_early({"type": "median", "min_iter": 9}))


def test_a_loss_that_is_not_finite_is_behind_all():
    others = [(True, [9.0, 3.0, 2.0])] * 5
    assert is_behind(hyperband(min_iter=1), [9.0, math.nan], others) and is_behind(hyperband(min_iter=1), [9.0, math.inf], others)
    assert not is_behind(hyperband(min_iter=1), [9.0, 2.9], [(False, [9.0, math.nan])] * 5)


def test_the_median_rule_waits_for_four_complete_trials():
    early, good = read_early({"type": "median", "min_iter": 2}), [9.0, 2.0, 1.0]
    assert is_behind(early, [9.0, 3.0, 3.0], [(True, good)] * 4)
    assert not is_behind(early, [9.0, 3.0], [(True, good)] * 4), "before min_iter"
    assert not is_behind(early, [9.0, 3.0, 3.0], [(True, good)] * 3 + [(False, good)] * 9)
    assert is_behind(early, [0.0, 1.0, 1.0], [(True, [0.0, 2.0, 2.0])] * 4, "maximize")


@pytest.mark.parametrize("text, says", [
    ("{type: hyperband}", "needs min_iter, or max_iter and s"), ("{type: hyperband, max_iter: 9}", "needs min_iter, or max_iter and s"),
    ("{type: hyperband, s: 2}", "needs min_iter, or max_iter and s"), ("{type: hyperband, max_iter: 9, s: banana}", "s: expected a whole"),
    ("{type: hyperband, max_iter: 9, s: 1.5}", "s: expected a whole number"), ("{type: hyperband, max_iter: 9, s: true}", "s: expected"),
    ("{type: hyperband, max_iter: 2, s: 1, eta: 3}", "no evaluation to look at"),
    ("{type: hyperband, min_iter: 9, max_iter: 3}", "no evaluation to look at"),
    ("{type: hyperband, min_iter: 2, eta: 1}", "eta: expected a number above 1, found 1"),
    ("{type: hyperband, min_iter: 2, eta: '3'}", "eta: expected a number above 1, found '3'"),
    ("{type: hyperband, min_iter: 2, strict: 1}", "strict: expected true or false, found 1"),
    ("{}", "needs 'type'"), ("null", "mapping"),
    ("{type: [hyperband], min_iter: 1}", "type: expected one of hyperband, median"), ("{type: median, eta: 3}", "unknown key 'eta'"),
    ("{type: hyperband, min_iter: 40}", "looks first at evaluation 40, and a run has at most 36 (about 21); it would stop none"),
    ("{type: median, min_iter: 36}", "it would stop none"), ("{type: hyperband, max_iter: 300, s: 1}", "evaluation 100"),
    ("{type: hyperband, min_iter: 1}\nmetric: {name: val/challenge_loss}", "the first and the last evaluation only"),
])  # fmt: skip
def test_a_rule_that_cannot_act_is_refused(tmp_path, base, text, says):
    with pytest.raises(InputError) as e:
        read(tmp_path, f"early_terminate: {text}\n{LR % '{value: 1}'}", base)
    assert says in str(e.value) and "search.yaml" in str(e.value)


@pytest.mark.parametrize("entry, first, ends", [
    ("hyperparams.epochs: {values: [1, 20]}", 50, "taken"), ("hyperparams.epochs: {min: 1, max: 3}", 16, "refused"),
    ("hyperparams.evals_per_epoch: {values: [1, 2]}", 14, "said"), ("hyperparams.max_steps: {values: [10, null]}", 20, "taken"),
    ("hyperparams.max_steps: {values: [10, 20]}", 20, "refused"), ("hyperparams.max_steps: {value: 100}", 3, "said"),
    ("hyperparams.max_steps: {value: 100}", 2, "taken"), ("hyperparams.max_steps: {value: 270}", 5, "taken"),
    ("hyperparams.lr: {value: 1}", 20, "taken"),
    ("hyperparams.lr: {value: 1}", 22, "said"), ("hyperparams.epochs: {values: ['${oc.env:MAINRUN_EPOCHS,1}']}", 9999, "taken"),
])  # fmt: skip
def test_what_a_search_varies_decides_how_many_evaluations_there_are(tmp_path, base, entry, first, ends):
    (tmp_path / "search.yaml").write_text(f"early_terminate: {{type: hyperband, min_iter: {first}}}\nparameters: {{{entry}}}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            read_search(tmp_path / "search.yaml", base)
            found = "said" if said else "taken"
        except InputError:
            found = "refused"
    assert found == ends


def test_the_same_points_as_before(tmp_path, base):
    """Drawn by version 0.1 from these entries and seeds."""
    text = ("parameters: {hyperparams.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}, hyperparams.optimizer: "
            "{values: [adamw, adagrad]}, model_configs.gpt.n_layer: {min: 1, max: 3}}")  # fmt: skip
    search = read(tmp_path, text, base)
    assert [tuple(random_point(search, i, 0).values()) for i in range(3)] == [
        (0.00187899, "adamw", 1), (0.00601835, "adagrad", 3), (0.000145094, "adamw", 2)]
