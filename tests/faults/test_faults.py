"""A part of every kind: a few seconds of each in the fast half, minutes of each in the slow half; `make faults` does them all."""
import importlib
from collections.abc import Iterator

import pytest
from actions import COMMANDS
from ground import Case, Ground, sample
from judge import HANGS, Wrong
from planted import PLANTS
from workers import Worker, compiled, entry_points

pytestmark = pytest.mark.skipif(compiled() is None, reason="needs Linux and a C compiler")


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """What all cases start from."""
    ground = Ground(Worker())
    yield ground
    ground.close()


def survived(ground: Ground, cases: list[Case]) -> None:
    """Every case; the failure lists those that were not survived."""
    wrong = [f"{case.kind}: {case.name}: {why}" for case in cases if (why := case.fails(ground))]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)


def cases_of(kind: str, ground: Ground) -> list[Case]:
    return importlib.import_module(kind).cases(ground)


def test_every_console_command_has_arguments_here():
    assert set(entry_points()) <= set(COMMANDS), f"say in actions.py what {set(entry_points()) - set(COMMANDS)} is to be given"


# A report, a resumed run and a command's streams cost little; kills and sweeps are for the slow half.
FAST = [("writes", "a resumed run", 4), ("writes", "a run's report", 4), ("damage", "resume half a run: checkpoints", 5),
        ("damage", "evaluate: checkpoints", 5), ("stdio", "mainrun-eval", 3), ("stdio", "mainrun-train", 3), ("configs", "", 100)]


def limited(kind: str, words: str, count: int) -> dict[str, object]:
    """What spares a kind from preparing more than these cases need."""
    name = words.split(":")[0]
    return {"configs": {"count": count}, "writes": {"scenes": (name,)}, "damage": {"tries": (name,)}}.get(kind, {})


@pytest.mark.parametrize(("kind", "words", "count"), FAST, ids=[f"{kind}-{words}" for kind, words, _ in FAST])
def test_a_few(ground, kind, words, count):
    cases = importlib.import_module(kind).cases(ground, **limited(kind, words, count))
    survived(ground, sample([case for case in cases if words in case.name], count))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("writes", 24), ("damage", 48), ("configs", 500), ("stdio", 20), ("kills", 4)])
def test_more(ground, kind, count):
    survived(ground, sample(cases_of(kind, ground), count))


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_seen(ground, plant):
    module, arguments = importlib.import_module(plant.kind), limited(plant.kind, plant.where_seen, plant.count)
    if plant.kind == "damage":
        module.undamaged(ground, plant.where_seen)  # before the fault is there
    ground.patch, loaded = plant.patch, ground.__dict__.pop("loaded", None)
    try:
        with ground.copy() as where:
            assert ground.run(where, "nothing").code == 0, "the fault could not be planted"
        cases = [case for case in module.cases(ground, **arguments) if all(word in case.name for word in plant.words)]
        assert cases, plant.words
        assert any(case.fails(ground) not in ("", HANGS) for case in sample(cases, plant.count)), "no case sees it"
    except Wrong as e:
        assert str(e) != HANGS  # else it is seen without a fault
    finally:
        ground.patch = ""
        ground.__dict__["loaded"] = loaded or []


def test_what_is_killed_holds_up_no_other(ground):
    """All jobs are forks of one process; the bars of tqdm had one lock for all of them."""
    with ground.copy() as where:
        assert ground.run(where, "killed_while_it_draws").code == -9
        assert ground.run(where, "mainrun-train").code == 0


def test_a_case_that_goes_wrong_is_told(ground):
    def check(ground: Ground) -> None:
        raise Wrong("as it should")

    assert Case("any", "case", check).fails(ground) == "as it should"
    assert sample(list(range(10)), 3) == [0, 3, 6]  # type: ignore[arg-type, comparison-overlap]
