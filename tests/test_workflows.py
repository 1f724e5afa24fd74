"""The rules that every workflow keeps; zizmor and the schema checks run in `make lint`."""
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {p.stem: yaml.load(p.read_text(encoding="utf-8"), yaml.BaseLoader) for p in FOLDER.glob("*.yml")}
JOBS = [(name, job) for name, w in WORKFLOWS.items() for job in w["jobs"]]
SCRIPTS = sorted((ROOT / ".github" / "scripts").iterdir()) + [ROOT / ".ci" / "run"]


def self_hosted(name: str) -> bool:
    return any("self-hosted" in job["runs-on"] for job in WORKFLOWS[name]["jobs"].values())


def steps(name: str) -> list[dict]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def test_the_six_workflows_exist():
    assert set(WORKFLOWS) == {"ci", "train", "sweep", "gpu-status", "update-runner", "docs"}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit_with_their_version_beside_it(name):
    used = re.findall(r"uses: (.+)", (FOLDER / f"{name}.yml").read_text())
    assert used and all(re.fullmatch(r"[\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u) for u in used)


def test_one_action_has_one_version_everywhere():
    used = {u for name in WORKFLOWS for u in re.findall(r"uses: (.+)", (FOLDER / f"{name}.yml").read_text())}
    assert len(used) == len({u.split("@")[0] for u in used})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_permissions_are_the_least(name):
    assert WORKFLOWS[name]["permissions"] in ({"contents": "read"}, "{}", {})
    for job in WORKFLOWS[name]["jobs"].values():
        wanted = job.get("permissions", {})
        assert "write" not in wanted.values() or (name == "docs" and set(wanted) == {"pages", "id-token"})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_checkouts_keep_no_credentials(name):
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_every_job_has_a_time_limit(name, job):
    assert 0 < int(WORKFLOWS[name]["jobs"][job]["timeout-minutes"]) <= 7200


@pytest.mark.parametrize("name", [n for n in WORKFLOWS if self_hosted(n)])
def test_self_hosted_runners_serve_people_only(name):
    on = WORKFLOWS[name]["on"]
    assert set(on) == {"workflow_dispatch"} or (name == "update-runner" and on == {"push": {"branches": ["main"]}})
    assert all("environment" in job for job in WORKFLOWS[name]["jobs"].values()), "a person approves"


def test_which_workflows_are_self_hosted():
    assert {n for n in WORKFLOWS if self_hosted(n)} == {"train", "sweep", "gpu-status", "update-runner"}


@pytest.mark.parametrize("name", [n for n in WORKFLOWS if n != "ci"])
def test_nothing_is_cancelled_while_it_runs(name):
    assert WORKFLOWS[name]["concurrency"]["cancel-in-progress"] == "false"


def test_no_other_run_can_cancel_a_waiting_training_run():
    assert "github.run_id" in WORKFLOWS["train"]["concurrency"]["group"]
    assert "inputs.name" in WORKFLOWS["sweep"]["concurrency"]["group"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_commands_are_short_and_take_their_inputs_from_the_environment(name):
    for step in steps(name):
        run = step.get("run", "")
        assert len(run.splitlines()) <= 3 and "${{" not in run
        for script in re.findall(r"\.(?:github/scripts|ci)/[\w.-]+", run):
            assert (ROOT / script).stat().st_mode & 0o111, f"{script} cannot be executed"


@pytest.mark.parametrize("path", [*FOLDER.glob("*.yml"), *SCRIPTS], ids=lambda p: p.name)
def test_no_token_comes_near_a_remote(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"x-access-token|://[^/\s]*@|secrets\.|GITHUB_TOKEN|GH_TOKEN|github\.token|remote (add|set-url)", text)


@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.suffix != ".py"], ids=lambda p: p.name)
def test_shell_scripts_stop_at_the_first_error(path):
    assert path.read_text().startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in path.read_text()
