"""Kind 5: SIGKILL at random moments, up to three in a row, of a run alone and of one or both of two ranks; then the run goes on."""
import random
import socket
from functools import partial
from pathlib import Path

from ground import Case, Done, Ground
from judge import Wrong, check_refusal, check_words, same_run

COMMAND = ("mainrun-train", "--config", "small.yaml", "--out", "run", "--resume", "hyperparams.heartbeat=6")


def run(ground: Ground, where: Path, ranks: int, kill: tuple[int, float] | None = None) -> Done:
    """The run in so many processes, one or all of which (rank -1) are killed after so many seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])} if ranks > 1 else {}
    return ground.run(where, *COMMAND, ranks=ranks, kill=kill, env=env, limit=200)


def whole(ground: Ground, ranks: int) -> tuple[Path, float]:
    """The run in so many processes that nothing happens to, and how long it takes; made once."""
    known = ground.__dict__.setdefault("whole_runs", {})
    if ranks not in known:
        with ground.copy() as where:
            done = run(ground, where, ranks)
            if any(done.codes):
                raise Wrong(f"{ranks} ranks: fails undisturbed: {done.err[-300:]}")
            kept = ground.folder / f"ranks-{ranks}"
            (where / "run").rename(kept)
            known[ranks] = kept, done.seconds
    return known[ranks]


def check(seed: int, ranks: int, ground: Ground) -> None:
    """Kill, kill again, and go on."""
    draw, (wanted, seconds) = random.Random(seed), whole(ground, ranks)
    with ground.copy() as where:
        for _ in range(draw.randint(1, 3)):
            which = draw.choice([-1, *range(ranks)]) if ranks > 1 else 0
            done = run(ground, where, ranks, (which, draw.uniform(0, seconds)))
            check_words(done)
            survivors = [code for code in done.codes if code != -9]
            if any(code not in (0, 1) for code in survivors):
                raise Wrong(f"a survivor ends with {survivors}")
            if ranks > 1 and which == 1 and done.code == 1:
                check_refusal(done, "run", allowed=(1,))
        done = run(ground, where, ranks)
        check_words(done)
        if any(done.codes):
            raise Wrong(f"exit codes {done.codes}: {done.err.strip()[-200:]}")
        same_run(where / "run", wanted)


def cases(ground: Ground, alone: int = 30, together: int = 12) -> list[Case]:
    """So many seeds of each."""
    return [*(Case("kills of a run", f"seed {seed}", partial(check, seed, 1)) for seed in range(alone)),
            *(Case("kills of two ranks", f"seed {seed}", partial(check, seed, 2)) for seed in range(together))]
