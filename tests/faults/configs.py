"""Kind 3: valid configurations and overrides, mutated with a fixed seed; load_config gives a Config, or one line, and never a secret."""
import json
import random
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from actions import SMALLEST
from ground import Case, Ground
from judge import Wrong, check_words

SECRET = "sk-0123456789abcdef-not-for-any-eye"
VALUES = [
    "0", "-1", "1e400", ".inf", ".nan", "1_000", "0123", "0x1F", "1:30", "yes", "~", "''", "' '", "é", "\\u2028", '"\\0"', '"\\x1b[31m"',
    '"a\\nb"', "[", "[=1", "]", "{", "{a: 1}", "[[[1]]]", "- 1", "? x", "*nowhere", "&a [*a]", "<<: {lr: 1}", "!!int x", "!!float [1]",
    "!!python/object/apply:os.system [id]", "!!binary x", "!!timestamp x", "!!set {a}", "!own 1", "2026-11-29", "${nope}", "${",
    "${oc.env:WANDB_API_KEY}", "${oc.env:WANDB_API_KEY,x}", "${oc.env:HN_TITLES,hackernews}", "${oc.decode:${oc.env:WANDB_API_KEY}}",
    "${oc.create:{}}", "${hyperparams}", "${.lr}", "${data.source}", "${hyperparams.lr}", "???", "%", "@x", "`x`", "|", ">", "#", "---",
    "...", "9" * 5000, "x" * 5000, "[" * 1500, "{a: " * 1500, "a.b", "=", "==1", "a=b", "../../x", "/etc/passwd", "a" * 256, "NULL",
    "None", SECRET, f"[{SECRET}]",
]
KEYS = [
    "lr", "hyperparams.lr", "", " ", "é", "1", "null", "true", "<<", "a b", "a\tb", "__class__", "hyperparams", "x" * 300, "data",
    "!!str lr", "? lr", "[lr]", ".".join(["a"] * 3000), "lr\x07", "epilson", "hyperparam",
]
BYTES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\t", b"\r", b"\r\n", b"\x85", b"\xe2\x80\xa8", b"%YAML 9.9\n", b"---\n", b"...\n", b"&a ",
    b"*a", b"!!x ", b"'",
]


def valid(draw: random.Random) -> list[str]:
    """The lines of a small file of three sections or more."""
    tree: dict[str, Any] = {}
    for item in draw.sample(SMALLEST, draw.randint(4, len(SMALLEST))):
        key, _, value = item.partition("=")
        node = tree
        for part in key.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[key.split(".")[-1]] = yaml.safe_load(value)
    return yaml.safe_dump(tree).splitlines()


def other_value(lines: list[str], draw: random.Random) -> None:
    """A setting gets another value."""
    at = draw.choice([i for i, line in enumerate(lines) if ": " in line] or [0])
    lines[at] = lines[at].split(": ")[0] + ": " + draw.choice(VALUES)


def other_key(lines: list[str], draw: random.Random) -> None:
    """A setting or a section gets another name."""
    at = draw.randrange(len(lines))
    indent = re.match(" *", lines[at])
    lines[at] = (indent[0] if indent else "") + draw.choice(KEYS) + ":" + lines[at].partition(":")[2]


def other_shape(lines: list[str], draw: random.Random) -> None:
    """A line twice, elsewhere, or indented otherwise."""
    at = draw.randrange(len(lines))
    line = lines.pop(at) if draw.random() < 0.5 else lines[at]
    lines.insert(draw.randint(0, len(lines)), " " * draw.randint(0, 6) + line.strip())


def more_levels(lines: list[str], draw: random.Random) -> None:
    """Sections within sections, as many as 3,000."""
    lines += [" " * i + "a:" for i in range(draw.choice([3, 1500, 3000]))]


LINES: list[Callable[[list[str], random.Random], None]] = [other_value, other_value, other_value, other_key, other_shape, more_levels]


def mutated(seed: int) -> tuple[bytes, list[str]]:
    """A file and overrides, of which something is not as it should be."""
    draw = random.Random(seed)
    lines, overrides = valid(draw), draw.sample(SMALLEST, draw.randint(0, 3))
    for change in draw.choices(LINES, weights=[6, 6, 6, 4, 4, 1], k=draw.randint(0, 2)):
        change(lines, draw)
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"
    if draw.random() < 0.25:
        at = draw.randrange(len(data))
        one = bytes([draw.randrange(256)])
        data = draw.choice([data[:at], data[:at] + draw.choice(BYTES) + data[at:], data[:at] + one + data[at + 1 :]])
    if draw.random() < 0.5:
        key = draw.choice([draw.choice(SMALLEST).split("=")[0], draw.choice(KEYS)])
        overrides.append(key + draw.choice(["=", "=", "=", "", ":", "=="]) + draw.choice(VALUES))
    return data, overrides


def load(file: str, *overrides: str) -> None:
    """In the worker: load it, as a command would, and print what became of it as JSON."""
    from mainrun_nb.config import InputError, flatten, load_config

    began, said = time.process_time(), ""
    try:
        said = json.dumps(flatten(load_config(file, overrides)), default=str)
        outcome = "config"
    except InputError as e:
        outcome, said = "refused", str(e)
    except Exception as e:
        outcome, said = "raised", f"{type(e).__name__}: {e}"
    print(json.dumps({"outcome": outcome, "said": said, "seconds": time.process_time() - began}))


def many(folder: str, first: str, last: str) -> None:
    """In the worker: all seeds of a range, a line each."""
    warnings.simplefilter("ignore")
    for seed in range(int(first), int(last)):
        data, overrides = mutated(seed)
        path = Path(folder) / "mutated.yaml"
        path.write_bytes(data)
        load(str(path), *overrides)


def judge(seed: int, found: dict) -> None:
    """A Config, or a refusal in one line that can be printed, within five seconds, and no secret."""
    if found["outcome"] == "raised":
        raise Wrong(found["said"].replace("\n", " ")[:250])
    if found["outcome"] == "refused" and (re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", found["said"]) or len(found["said"]) > 1000):
        raise Wrong(f"more than a line, or {len(found['said'])} characters: {found['said'][:200]!r}")
    if SECRET in found["said"]:
        raise Wrong("the value of WANDB_API_KEY is shown")
    if found["seconds"] > 5:
        raise Wrong(f"takes {found['seconds']:.1f} s")


def results(ground: Ground, count: int) -> list[dict]:
    """What became of the first `count` seeds, all loaded in one process; once."""
    known = ground.__dict__.setdefault("loaded", [])
    if len(known) < count:
        with ground.copy() as where:
            done = ground.run(where, "many_configs", str(where), str(len(known)), str(count), env={"WANDB_API_KEY": SECRET}, limit=500)
            check_words(done)
            known += [json.loads(line) for line in done.out.splitlines()]
        if len(known) < count:
            known += [{"outcome": "raised", "said": f"the process ended with {done.code} at seed {len(known)}", "seconds": 0.0}]
    return known


def check(seed: int, count: int, ground: Ground) -> None:
    """One seed of those that were loaded together."""
    found = results(ground, count)
    judge(seed, found[seed] if seed < len(found) else {"outcome": "raised", "said": "never reached", "seconds": 0.0})


def cases(ground: Ground, count: int = 500) -> list[Case]:
    """So many seeds."""
    return [Case("mutated configurations", f"seed {seed}", partial(check, seed, count)) for seed in range(count)]
