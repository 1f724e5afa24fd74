"""The scripts of the workflows, run here: real bash and git, with stand-ins for docker, papermill and the console commands."""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / ".github" / "scripts"
IMAGE_INPUTS = ["docker/Dockerfile", ".dockerignore", "constraints.txt", "settings.ini", "setup.py", "pyproject.toml"]

# A docker that keeps a list of its images and a log of what it was asked.
DOCKER = """#!/usr/bin/env bash
echo "$@" >>"$STUBS/docker.log"
case "$1" in
  image) grep -qx "$3" "$STUBS/images" 2>/dev/null ;;
  ps) cat "$STUBS/left" 2>/dev/null ;;
  build) [ ! -f "$STUBS/no-build" ] && echo "$5" >>"$STUBS/images" ;;
esac
"""


class Place:
    """A workplace: a checkout, a runner's home, and a folder of stand-ins that comes first on the path."""

    def __init__(self, tmp: Path) -> None:
        self.code, self.home, self.stubs = tmp / "code", tmp / "home", tmp / "stubs"
        for folder in (self.code, self.home, self.stubs):
            folder.mkdir()
        self.summary = tmp / "summary.md"
        self.env = {
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "HOME": str(tmp),
            "STUBS": str(self.stubs),
            "MAINRUN_HOME": str(self.home),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GIT_CONFIG_GLOBAL": os.devnull,
        }

    def stub(self, name: str, text: str) -> None:
        (self.stubs / name).write_text(text)
        (self.stubs / name).chmod(0o755)

    def files(self, *names: str) -> None:
        for name in names:
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.code / name)

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(SCRIPTS / script), *args]
        return subprocess.run(command, cwd=self.code, env={**self.env, **env}, capture_output=True, text=True,
                              errors="surrogateescape", timeout=60)

    def log(self, name: str = "docker.log") -> list[str]:
        path = self.stubs / name
        return path.read_text().splitlines() if path.exists() else []

    def builds(self) -> int:
        return sum(line.startswith("build ") for line in self.log())


@pytest.fixture
def place(tmp_path) -> Place:
    place = Place(tmp_path)
    place.stub("docker", DOCKER)
    return place


# --- image.sh and in-image.sh ---


def test_the_image_is_built_once_and_again_only_when_an_input_changes(place):
    place.files(*IMAGE_INPUTS, "mainrun_nb/config.py")
    first = place.run("image.sh").stdout
    assert first.startswith("mainrun-nb:") and place.builds() == 1
    (place.code / "mainrun_nb/config.py").write_text("changed = True\n")
    assert place.run("image.sh").stdout == first and place.builds() == 1
    with (place.code / "constraints.txt").open("a") as f:
        f.write("# changed\n")
    assert place.run("image.sh").stdout != first and place.builds() == 2


def test_the_container_sees_the_gpus_the_code_read_only_and_no_key_on_its_command_line(place):
    place.files(*IMAGE_INPUTS)
    (place.home / ".env").write_text("WANDB_API_KEY=secret-key\n")
    assert place.run("in-image.sh", "mainrun-train", "--out", "a b").returncode == 0
    line = place.log()[-1]
    assert line.startswith("run --rm --init") and "--gpus all" in line and f"--volume {place.code}:/app:ro" in line
    assert f"--env-file {place.home}/.env" in line and "secret-key" not in " ".join(place.log())
    assert f"--user {os.getuid()}:{os.getgid()}" in line and line.endswith("mainrun-train --out a b")


def test_a_job_first_stops_what_a_killed_one_left_on_the_gpu(place):
    place.files(*IMAGE_INPUTS)
    (place.stubs / "left").write_text("0123abcd\n")
    assert place.run("in-image.sh", "papermill", MAINRUN_JOB="train-2-1").returncode == 0
    asked, stop, *_, run = place.log()
    assert (asked, stop) == ("ps --quiet --filter label=mainrun-job", "stop -t 600 0123abcd")
    assert run.startswith("run ") and "--label mainrun-job --name train-2-1" in run
    assert place.run("in-image.sh", "mainrun-gpu").returncode == 0
    assert sum(line.startswith("stop") for line in place.log()) == 1 and "--label" not in place.log()[-1]


def test_without_a_home_nothing_starts(place):
    done = place.run("in-image.sh", "true", MAINRUN_HOME="")
    assert done.returncode != 0 and "MAINRUN_HOME" in done.stderr and not place.log()


# --- train.sh ---

PAPERMILL = """#!/usr/bin/env bash
echo "start $5" >>"$STUBS/papermill.log"; sleep "${PAUSE:-0}"
mkdir -p "$(dirname "$5")/run"
echo '{}' >"$5"
echo '{"val/loss": 1.25, "parameters": 27172864, "commit": "a|b"}' >"$(dirname "$5")/run/result.json"
echo "end $5" >>"$STUBS/papermill.log"
exit "${PAPERMILL_EXIT:-0}"
"""
TRAIN = {"CONFIG": "sweeps/base/a.yaml", "RUN": "train-1-1", "MAINRUN_LOCAL": "1"}


@pytest.fixture
def trainer(place) -> Place:
    (place.code / "sweeps/base").mkdir(parents=True)
    (place.code / "sweeps/base/a.yaml").write_text("")
    place.stub("papermill", PAPERMILL)
    return place


def test_train_hands_its_inputs_to_papermill_and_keeps_what_comes_back(trainer):
    done = trainer.run("train.sh", **TRAIN, OVERRIDES="hyperparams.lr=1.0e-3  hyperparams.betas=[0.9,0.95]", SEED="7")
    assert done.returncode == 0, done.stderr
    folder = trainer.home / "runs/train-1-1"
    assert yaml.safe_load((folder / "parameters.yaml").read_text()) == {
        "config": "sweeps/base/a.yaml",
        "seed": 7,
        "out": f"{folder}/run",
        "overrides": ["hyperparams.lr=1.0e-3", "hyperparams.betas=[0.9,0.95]"],
    }
    assert {p.name for p in (trainer.code / "artifacts").iterdir()} == {"trial.ipynb", "parameters.yaml", "result.json"}
    text = trainer.summary.read_text()
    assert "## train-1-1" in text and "| val/loss | 1.2500 |" in text and "| parameters | 27,172,864 |" in text and "a\\|b" in text


def parameters(place: Place) -> dict:
    return yaml.safe_load((place.home / "runs/train-1-1/parameters.yaml").read_text())


def test_a_new_line_separates_overrides_and_a_seed_is_a_decimal_number(trainer):
    given = "a.b=1\nc.d=2\r\n\te.f=[1,2]  data.source=/data/titles.txt.gz\n"
    assert trainer.run("train.sh", **TRAIN, OVERRIDES=given, SEED="0123").returncode == 0
    assert parameters(trainer)["overrides"] == ["a.b=1", "c.d=2", "e.f=[1,2]", "data.source=/data/titles.txt.gz"]
    assert parameters(trainer)["seed"] == 123


def test_train_without_overrides_gives_an_empty_list(trainer):
    assert trainer.run("train.sh", **TRAIN).returncode == 0
    assert yaml.safe_load((trainer.home / "runs/train-1-1/parameters.yaml").read_text())["overrides"] == []


def test_train_refuses_what_is_no_plain_input(trainer):
    for key, value in [
        ("CONFIG", "sweeps/../sweeps/base/a.yaml"),  # it exists
        ("CONFIG", "sweeps/base/none.yaml"),
        ("CONFIG", "/etc/passwd"),
        ("RUN", "../other"),
        ("RUN", "-rf"),
        ("SEED", "1;id"),
        ("OVERRIDES", "a=$(id)"),
        ("OVERRIDES", 'a=1 b="x"'),
        ("OVERRIDES", "--flag"),
        ("OVERRIDES", "a=1;id"),
        ("OVERRIDES", "a=1\nb=2\n--flag"),
        ("OVERRIDES", "hyperparams.log_file=log.jsonl"),
        ("OVERRIDES", "a=1\r\nb=/etc/passwd"),
        ("OVERRIDES", "data.source=../titles.txt"),
        ("OVERRIDES", "data.source=/data/../etc/passwd"),
        ("OVERRIDES", "data.source=titles.txt"),
        ("RUN", "a" * 256),
        ("RUN", "a\nb"),
        ("MAINRUN_HOME", "relative"),
        ("MAINRUN_HOME", '/srv/a"b'),
    ]:
        done = trainer.run("train.sh", **{**TRAIN, key: value})
        assert done.returncode == 2 and key in done.stderr, f"{key}={value}: {done.stderr}"
        assert len(done.stderr.splitlines()) == 1
    assert not trainer.log("papermill.log") and not (trainer.home / "runs").exists()


ODD = ["", " ", "\n", "\r\n", "\t", "'", '"', "`id`", "$(id)", "${HOME}", "\\", "/", "..", "-", "--help", "*", "?", "~", "#", "&", "|", ";",
       ">x", "<x", "!", "%s", "{a: 1}", "[1,2]", ": ", "!!int", "é", "٣", "\udcff", "\x1b[31m", "0123", "1e9", "9" * 30,
       "a" * 300, "a=1", "hyperparams.lr=0.1", "sweeps/base/a.yaml", "sweeps/search/s.yaml", "local", "yes", "null"]


def odd_inputs(seed: int, names: list[str], usual: dict[str, str]) -> dict[str, str]:
    """The usual inputs, but for one or two that are pieced together from odd ones."""
    draw = random.Random(seed)
    odd = {name: "".join(draw.choices(ODD, k=draw.choice([1, 1, 1, 2, 3]))) for name in draw.sample(names, draw.choice([1, 1, 2]))}
    return {**usual, **odd}


def refused(done: subprocess.CompletedProcess, inputs: dict[str, str]) -> bool:
    """Whether a script has refused its inputs; if so, in one line that can be printed."""
    if done.returncode:
        assert len(done.stderr.splitlines()) == 1 and "\x1b" not in done.stderr and done.returncode in (1, 2), (inputs, done)
        assert any(word in done.stderr for word in [*inputs, "a file sweeps/**.yaml", "no such file"]), (inputs, done.stderr)
    return bool(done.returncode)


def test_whatever_train_is_given_arrives_as_it_is_or_is_refused_in_one_line(trainer):
    count = 0
    for seed in range(150):
        inputs = odd_inputs(seed, ["CONFIG", "RUN", "SEED", "OVERRIDES"], {**TRAIN, "OVERRIDES": "a.b=1", "SEED": "7"})
        before = len(trainer.log("papermill.log"))
        if refused(trainer.run("train.sh", **inputs), inputs):
            assert len(trainer.log("papermill.log")) == before, inputs
            continue
        folder = trainer.home / "runs" / inputs["RUN"]
        found = yaml.safe_load((folder / "parameters.yaml").read_text())
        assert found == {"config": inputs["CONFIG"], "seed": int(inputs["SEED"] or 1337), "out": f"{folder}/run",
                         "overrides": inputs["OVERRIDES"].split()}, inputs
        assert folder.parent == trainer.home / "runs"
        shutil.rmtree(folder)
        count += 1
    assert 3 < count < 120


def test_train_never_writes_into_another_run(trainer):
    assert trainer.run("train.sh", **TRAIN).returncode == 0
    before = (trainer.home / "runs/train-1-1/trial.ipynb").stat().st_mtime_ns
    done = trainer.run("train.sh", **TRAIN)
    assert done.returncode == 2 and "already a run" in done.stderr
    assert (trainer.home / "runs/train-1-1/trial.ipynb").stat().st_mtime_ns == before


def test_a_failed_run_still_hands_over_its_notebook(trainer):
    assert trainer.run("train.sh", **TRAIN, PAPERMILL_EXIT="1").returncode == 1
    assert (trainer.code / "artifacts/trial.ipynb").is_file()


def test_two_jobs_on_one_machine_take_turns(trainer):
    env = {**trainer.env, **TRAIN, "PAUSE": "0.5"}
    jobs = [
        subprocess.Popen(["bash", str(SCRIPTS / "train.sh")], cwd=trainer.code, env={**env, "RUN": name}, stdout=subprocess.DEVNULL)
        for name in ("one", "two")
    ]
    assert [job.wait(timeout=30) for job in jobs] == [0, 0]
    assert [line.split()[0] for line in trainer.log("papermill.log")] == ["start", "end", "start", "end"]


def test_summary_says_when_a_run_left_no_result_or_a_damaged_one(tmp_path):
    result = tmp_path / "result.json"
    for content in (None, b"", b'{"val/loss": 1.2', b"[1]", b"null", b"\xff\xfe", b"[" * 100_000):
        if content is not None:
            result.write_bytes(content)
        done = subprocess.run([sys.executable, SCRIPTS / "summary.py", "run", result], capture_output=True, text=True)
        assert done.returncode == 0 and f"left {'no' if content is None else 'a'} result.json" in done.stdout, content


@pytest.mark.slow
def test_train_with_the_real_papermill(place):
    """The job's own command line on synthetic titles, without the container."""
    for name in ("sweeps", "mainrun_nb"):
        shutil.copytree(ROOT / name, place.code / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    env = {"PYTHONPATH": str(place.code), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    small = "hyperparams.epochs=1 hyperparams.num_titles=400 hyperparams.vocab_size=400 hyperparams.batch_size=8"
    command = ["bash", str(SCRIPTS / "train.sh")]
    inputs = {"CONFIG": "sweeps/base/quickstart.yaml", "RUN": "real", "OVERRIDES": small, "SEED": "3", "MAINRUN_LOCAL": "1"}
    done = subprocess.run(command, cwd=place.code, env={**place.env, **env, **inputs}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((place.code / "artifacts/result.json").read_text())
    assert result["seed"] == 3 and 0 < result["val/loss"] < 10
    assert (place.code / "artifacts/curves.png").is_file() and "| val/loss |" in place.summary.read_text()


# --- sweep.sh ---

SWEEP = {"SEARCH": "sweeps/search/s.yaml", "BASE": "sweeps/base/b.yaml", "NAME": "lr", "TRIALS": "3", "MAINRUN_LOCAL": "1"}


@pytest.fixture
def sweeper(place) -> Place:
    for name in (SWEEP["SEARCH"], SWEEP["BASE"]):
        (place.code / name).parent.mkdir(parents=True, exist_ok=True)
        (place.code / name).write_text("")
    place.stub("mainrun-sweep", '#!/usr/bin/env bash\necho "$@" >>"$STUBS/sweep.log"\nmkdir -p "$5"\nexit "${SWEEP_EXIT:-0}"\n')
    place.stub("mainrun-report", '#!/usr/bin/env bash\necho "<html>" >"$1/report.html"\n')
    return place


def test_a_sweep_is_resumed_by_its_name(sweeper):
    assert sweeper.run("sweep.sh", **SWEEP).returncode == 0
    out = f"{sweeper.home}/runs/sweep-lr"
    first = f"sweeps/search/s.yaml --config sweeps/base/b.yaml --out {out} --trials 3 --jobs 1 --engine local"
    assert sweeper.run("sweep.sh", **SWEEP).returncode == 0
    assert sweeper.log("sweep.log") == [first, first + " --resume"]
    assert (sweeper.code / "artifacts/report.html").is_file()


def test_a_stopped_sweep_still_reports_and_says_how_to_go_on(sweeper):
    assert sweeper.run("sweep.sh", **SWEEP, SWEEP_EXIT="1").returncode == 1
    assert (sweeper.code / "artifacts/report.html").is_file()
    assert "exit code 1. Start the workflow again with the same name" in sweeper.summary.read_text()


def test_a_wandb_sweep_is_never_resumed(sweeper):
    assert sweeper.run("sweep.sh", **SWEEP, ENGINE="wandb", SWEEP_EXIT="1").returncode == 1
    assert "Start the workflow again with another name" in sweeper.summary.read_text()
    done = sweeper.run("sweep.sh", **SWEEP, ENGINE="wandb")
    assert done.returncode == 2 and "start it with another name" in done.stderr
    assert len(sweeper.log("sweep.log")) == 1


def test_sweep_refuses_what_is_no_plain_input(sweeper):
    wrong = {"SEARCH": "../x.yaml", "BASE": "sweeps/no.yaml", "NAME": "a/b", "TRIALS": "0", "JOBS": "many", "ENGINE": "slurm"}
    for key, value in wrong.items():
        done = sweeper.run("sweep.sh", **{**SWEEP, key: value})
        assert done.returncode == 2 and value in done.stderr, f"{key}={value}: {done.stderr}"
    assert not sweeper.log("sweep.log")


def test_whatever_sweep_is_given_arrives_as_it_is_or_is_refused_in_one_line(sweeper):
    usual, count = {**SWEEP, "JOBS": "2", "ENGINE": "local"}, 0
    for seed in range(150):
        inputs = odd_inputs(seed, [k for k in usual if k != "MAINRUN_LOCAL"], usual)
        before = len(sweeper.log("sweep.log"))
        if refused(sweeper.run("sweep.sh", **inputs), inputs):
            assert len(sweeper.log("sweep.log")) == before, inputs
            continue
        folder = sweeper.home / "runs" / f"sweep-{inputs['NAME']}"
        asked = f"{inputs['SEARCH']} --config {inputs['BASE']} --out {folder} --trials {inputs['TRIALS'] or 20} "
        assert sweeper.log("sweep.log")[-1] == asked + f"--jobs {inputs['JOBS'] or 1} --engine {inputs['ENGINE'] or 'local'}", inputs
        shutil.rmtree(folder)
        count += 1
    assert 3 < count < 120


# --- gpu-status.sh ---


def test_gpu_status_goes_to_the_summary_and_sees_the_hosts_processes(place):
    place.files(*IMAGE_INPUTS)
    place.stub("docker", DOCKER + '[ "$1" != run ] || echo "| 0 | H100 |"\n')
    done = place.run("gpu-status.sh")
    assert done.returncode == 0 and "H100" in done.stdout and "H100" in place.summary.read_text()
    assert "--pid host" in place.log()[-1] and place.log()[-1].endswith(" mainrun-gpu")


def test_gpu_status_fails_when_the_gpu_does(place):
    place.stub("mainrun-gpu", "#!/usr/bin/env bash\necho 'nvidia-smi does not answer'\nexit 1\n")
    done = place.run("gpu-status.sh", MAINRUN_LOCAL="1")
    assert done.returncode == 1 and "does not answer" in place.summary.read_text()


# --- update-runner.sh ---


@pytest.fixture
def runner(place) -> Place:
    """A repository with the image's inputs and one commit; `place.code` is the workflow's own checkout of it."""
    place.files(*IMAGE_INPUTS)
    git(place, "init", "--quiet", "--initial-branch=main")
    # What a careless checkout leaves behind; none of it may get into the runner's copy.
    git(place, "remote", "add", "origin", "https://x-access-token:ghs_secret@example.com/repo.git")
    commit(place, "code.py", "one")
    return place


def git(place: Place, *args: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", *args]
    return subprocess.run(command, cwd=place.code, env=place.env, check=True, capture_output=True, text=True).stdout.strip()


def commit(place: Place, name: str, text: str) -> str:
    (place.code / name).write_text(text)
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "--message", text)
    return git(place, "rev-parse", "HEAD")


def update(place: Place, sha: str) -> subprocess.CompletedProcess:
    return place.run("update-runner.sh", str(place.code), sha)


def test_update_brings_the_commit_and_holds_no_token_and_no_remote(runner):
    sha = git(runner, "rev-parse", "HEAD")
    done = update(runner, sha)
    assert done.returncode == 0, done.stderr
    assert (runner.home / "current/code.py").read_text() == "one"
    remotes = subprocess.run(["git", "-C", runner.home / "repo.git", "remote"], capture_output=True, text=True, check=True).stdout
    assert remotes == ""
    found = subprocess.run(["grep", "-r", "ghs_secret", runner.home], capture_output=True, text=True)
    assert found.returncode == 1, found.stdout


def test_in_the_container_a_worktree_still_knows_its_commit(runner, tmp_path):
    sha = git(runner, "rev-parse", "HEAD")
    update(runner, sha)
    where = (runner.home / "current").resolve()
    command = ["bash", str(SCRIPTS / "in-image.sh"), "mainrun-train"]
    assert subprocess.run(command, cwd=where, env=runner.env, capture_output=True).returncode == 0
    assert f"--volume {runner.home}/repo.git:{runner.home}/repo.git:ro" in runner.log()[-1]
    app = shutil.copytree(where, tmp_path / "app")  # as it is seen there: the same files under another name, and that volume
    assert subprocess.run(["git", "-C", app, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip() == sha


def test_a_running_job_keeps_its_code_while_the_runner_moves_on(runner):
    update(runner, git(runner, "rev-parse", "HEAD"))
    where = (runner.home / "current").resolve()
    script = "import sys, time, pathlib\npathlib.Path(sys.argv[1]).touch(); time.sleep(1.5); print(open('code.py').read())"
    started = runner.stubs / "started"
    job = subprocess.Popen([sys.executable, "-c", script, started], cwd=where, stdout=subprocess.PIPE, text=True)
    while not started.exists():
        time.sleep(0.01)
    done = update(runner, commit(runner, "code.py", "two"))
    assert done.returncode == 0 and job.poll() is None, done.stderr
    assert (runner.home / "current/code.py").read_text() == "two"
    assert job.communicate(timeout=30)[0].strip() == "one" and (where / "code.py").read_text() == "one"


def test_update_builds_an_image_only_when_its_inputs_change(runner):
    update(runner, git(runner, "rev-parse", "HEAD"))
    assert runner.builds() == 1
    update(runner, commit(runner, "code.py", "two"))
    assert runner.builds() == 1
    update(runner, commit(runner, "constraints.txt", "torch==9\n"))
    assert runner.builds() == 2


def test_update_never_goes_back_and_can_be_repeated(runner):
    old = git(runner, "rev-parse", "HEAD")
    new = commit(runner, "code.py", "two")
    for sha in (old, new, old, new):
        assert update(runner, sha).returncode == 0
    assert os.readlink(runner.home / "current") == f"worktrees/{new}"


def test_a_failed_build_leaves_the_runner_where_it_was(runner):
    old = git(runner, "rev-parse", "HEAD")
    update(runner, old)
    (runner.stubs / "no-build").touch()
    new = commit(runner, "constraints.txt", "broken\n")
    assert update(runner, new).returncode != 0
    assert os.readlink(runner.home / "current") == f"worktrees/{old}"
    (runner.stubs / "no-build").unlink()
    assert update(runner, new).returncode == 0
    assert os.readlink(runner.home / "current") == f"worktrees/{new}"


# A git that is killed together with the script that called it: before, in the midst of, or after the n-th command.
MORTAL_GIT = """#!/usr/bin/env bash
echo >>"$STUBS/calls"
[ "$(wc -l <"$STUBS/calls")" = "${DIE_AT:-0}" ] || exec REAL "$@"
[ "$DIE_WHEN" = before ] || { REAL "$@" & { [ "$DIE_WHEN" = amid ] && sleep "$DIE_AFTER"; } || wait; }
kill -9 0
"""


def killed_at(runner: Place, sha: str, at: int, when: str, after: float = 0.0) -> bool:
    """Whether the update to a commit came to its n-th git command, and was killed there."""
    (runner.stubs / "calls").unlink(missing_ok=True)
    env = {**runner.env, "DIE_AT": str(at), "DIE_WHEN": when, "DIE_AFTER": f"{after:.4f}"}
    command = ["bash", str(SCRIPTS / "update-runner.sh"), str(runner.code), sha]
    return subprocess.run(command, env=env, start_new_session=True, capture_output=True).returncode == -9


@pytest.mark.parametrize(("when", "first"), [
    ("before", True), ("amid", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("before", False), ("amid", True), ("after", True), ("after", False)])])
def test_an_update_that_is_killed_anywhere_can_be_done_again(runner, when, first):
    shas = [git(runner, "rev-parse", "HEAD"), commit(runner, "code.py", "two")]
    runner.stub("git", MORTAL_GIT.replace("REAL", shutil.which("git") or "git"))
    draw, at = random.Random(0), 0
    while True:
        at += 1
        shutil.rmtree(runner.home)
        runner.home.mkdir()
        if not first:
            assert update(runner, shas[0]).returncode == 0
        if not all([killed_at(runner, sha, at, when, draw.uniform(0, 0.006)) for sha in (shas if first else shas[1:])]):
            break
        done = update(runner, shas[1])
        assert done.returncode == 0, (at, done.stderr)
        where = (runner.home / "current").resolve()
        assert where.name == shas[1] and (where / "code.py").read_text() == "two"
        seen = subprocess.run(["git", "-C", where, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert seen == shas[1] and subprocess.run(["git", "-C", where, "status", "--porcelain"], capture_output=True).stdout == b""
    assert at > 6


def test_update_refuses_what_is_no_commit(runner):
    done = runner.run("update-runner.sh", "--help", "0" * 40)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "there is no such folder" in done.stderr
    for sha in ("main", "--upload-pack=id", "0" * 39 + "\n"):
        done = update(runner, sha)
        assert done.returncode == 2 and "allowed are 40 hexadecimal digits" in done.stderr, sha
    assert update(runner, "0" * 40).returncode != 0
    assert not (runner.home / "current").exists()


# --- notebooks.sh, .ci/run ---


def bare_repository(place: Place, script: str) -> Path:
    """A small repository of its own with one of our scripts in it, since these scripts go to the root of theirs."""
    target = place.code / script
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / script, target)
    return target


@pytest.mark.parametrize("stale", [False, True])
def test_notebooks_script_finds_a_module_without_a_notebook(place, stale):
    script = bare_repository(place, ".github/scripts/notebooks.sh")
    place.stub("make", "#!/usr/bin/env bash\n")
    (place.code / "mainrun_nb").mkdir()
    header = "# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/00_a.ipynb.\n"
    for name in ["a", "old"] if stale else ["a"]:
        (place.code / f"mainrun_nb/{name}.py").write_text(header)
    (place.code / "mainrun_nb/__init__.py").write_text("")
    tools = place.code / ".venv/bin"
    tools.mkdir(parents=True)
    for name, text in [("nbdev-test", ""), ("nbdev-clean", ""), ("nbdev-export", f"printf '{header[:-1]}\\n' >mainrun_nb/a.py")]:
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    (place.code / ".gitignore").write_text(".venv/\n")
    git(place, "init", "--quiet")
    git(place, "add", "--all")
    git(place, "commit", "--quiet", "--message", "all")
    done = subprocess.run(["bash", script], cwd=place.code, env=place.env, capture_output=True, text=True)
    assert done.returncode == int(stale), done.stderr
    assert ("mainrun_nb/old.py" in done.stderr) == stale


@pytest.mark.parametrize(("titles", "slow"), [(False, ""), (True, "0")])
def test_ci_runs_the_slow_tests_with_every_extra_and_finds_the_real_titles(place, titles, slow):
    script = bare_repository(place, ".ci/run")
    place.stub("apt-get", "#!/usr/bin/env bash\nexit 100\n")  # no network: the tests run all the same
    place.stub("make", '#!/usr/bin/env bash\necho "$* ${MAINRUN_SLOW:-unset} ${HN_TITLES:-unset}"\n')
    path = place.code.parent / "shared/data/hn_titles.txt.gz"
    if titles:
        path.parent.mkdir(parents=True)
        path.touch()
    env = {**place.env, **({"MAINRUN_SLOW": slow} if slow else {})}
    done = subprocess.run(["bash", script], cwd="/", env=env, capture_output=True, text=True)
    assert done.stdout.split() == [".venv/.all", "test", slow or "1", str(path) if titles else "unset"], done.stderr
