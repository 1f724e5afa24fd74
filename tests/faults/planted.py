"""Faults planted in the product, one at a time: the harness must see each.

A plant changes the text of one function, in the fork of a case and nowhere else: the function keeps its name and its place and gets the
code of the changed text, so that whoever holds it has the fault.
"""
from dataclasses import dataclass

PLANTING = '''
import importlib, inspect, textwrap
module, _, path = {where!r}.partition(":")
module = importlib.import_module(module)
function = module
for name in path.split("."):
    function = getattr(function, name)
function = inspect.unwrap(function)
text = textwrap.dedent(inspect.getsource(function))
assert {old!r} in text, "the text is not there any more: plant it anew"
lines = text.replace({old!r}, {new!r}).splitlines()
names = {{}}
start = next(i for i, line in enumerate(lines) if line.startswith("def "))
exec(compile("\\n".join(lines[start:]), "planted", "exec"), vars(module), names)
function.__code__ = names[function.__name__].__code__
'''


@dataclass
class Plant:
    """A fault: where it is, what stands there, what is planted, and the cases of which one must see it (words in their names, how many)."""

    name: str
    where: str  # module:function
    old: str
    new: str
    kind: str
    where_seen: str  # the scene of writes.py or the try of damage.py
    words: tuple[str, ...] = ()
    count: int = 3

    @property
    def patch(self) -> str:
        """The code that plants it."""
        return PLANTING.format(where=self.where, old=self.old, new=self.new)


M = "mainrun_nb."
PLANTS = [
    Plant("a file that is not replaced but overwritten", M + "files:atomic_write", "os.replace(scratch, path)",
          "path.write_bytes(data.encode() if isinstance(data, str) else data)", "writes",
          "a run", ("kill", "write run/config.yaml")),
    Plant("checksums of a checkpoint not compared", M + "checkpoint:read_checkpoint", "!= expected", "== 'x'", "damage",
          "resume half a run", ("step-00000004", "flipped")),
    Plant("a lock ignored", M + "checkpoint:lock", "return False", "return True", "writes", "a resumed run", ("in use",), 1),
    Plant("a log emptied on resume", M + "tracking:replace_log", "os.truncate(path, len(whole))", "os.truncate(path, 0)", "writes",
          "a resumed run", ("EINVAL",)),
    Plant("an error swallowed", M + "checkpoint:save_checkpoint", "raise RunError", "return final\n        raise RunError", "writes",
          "a resumed run", ("EIO", ".step-00000006"), 12),
    Plant("the step before resumed", M + "trainer:TrainState.load", "setattr(self, k, state[k])",
          "setattr(self, k, state[k] - (k == 'step'))", "writes", "a resumed run", ("EINVAL",)),
    Plant("random state not restored", M + "trainer:TrainState.load", "set_rng_state(", "str(", "writes", "a resumed run", ("EINVAL",)),
    Plant("an unreadable tokenizer read", M + "tokenizer:load_tokenizer", "raise InputError", "raise ValueError", "damage",
          "evaluate", ("tokenizer", "truncated")),
    Plant("an error with its traceback", M + "console:outcome_of", "InputError | RunError", "InputError", "writes",
          "a resumed run", ("ENOSPC", "write"), 6),
    Plant("a key that is shown", M + "messages:scrubbed", "return _keys", "return text or _keys", "configs", "", (), 200),
]
