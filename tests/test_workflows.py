"""The rules that every workflow keeps; zizmor and the schema checks run in `make lint`."""
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {p.stem: yaml.load(p.read_text(encoding="utf-8"), yaml.BaseLoader) for p in FOLDER.glob("*.yml")}
SCRIPTS = sorted(p for p in (ROOT / ".github" / "scripts").iterdir() if p.is_file()) + [ROOT / ".ci" / "run"]


def self_hosted(name: str) -> bool:
    return any("self-hosted" in job["runs-on"] for job in WORKFLOWS[name]["jobs"].values())


def steps(name: str) -> list[dict]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def test_the_six_workflows_exist_and_which_are_self_hosted():
    assert set(WORKFLOWS) == {"ci", "train", "sweep", "gpu-status", "update-runner", "docs"}
    assert {n for n in WORKFLOWS if self_hosted(n)} == {"train", "sweep", "gpu-status", "update-runner"}


def test_actions_are_pinned_by_commit_with_their_version_beside_it_and_everywhere_the_same():
    used = {name: re.findall(r"uses: (.+)", (FOLDER / f"{name}.yml").read_text()) for name in WORKFLOWS}
    for name, actions in used.items():
        assert actions, name
        for action in actions:
            assert re.fullmatch(r"[\w/.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), f"{name}: {action}"
    everywhere = {u for actions in used.values() for u in actions}
    assert len(everywhere) == len({u.split("@")[0] for u in everywhere}), "two versions of one action"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_may_do_the_least_and_ends(name):
    assert WORKFLOWS[name]["permissions"] in ({"contents": "read"}, "{}", {})
    for job in WORKFLOWS[name]["jobs"].values():
        wanted = job.get("permissions", {})
        assert "write" not in wanted.values() or (name == "docs" and set(wanted) == {"pages", "id-token"})
        assert 0 < int(job["timeout-minutes"]) <= 7200
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


@pytest.mark.parametrize("name", [n for n in WORKFLOWS if self_hosted(n)])
def test_self_hosted_runners_serve_people_only(name):
    on = WORKFLOWS[name]["on"]
    assert set(on) == {"workflow_dispatch"} or (name == "update-runner" and on == {"push": {"branches": ["main"]}})
    assert all("environment" in job for job in WORKFLOWS[name]["jobs"].values()), "a person approves"


def test_nothing_is_cancelled_while_it_runs_or_waits():
    for name in set(WORKFLOWS) - {"ci"}:
        assert WORKFLOWS[name]["concurrency"]["cancel-in-progress"] == "false", name
    assert "github.run_id" in WORKFLOWS["train"]["concurrency"]["group"]
    assert "inputs.name" in WORKFLOWS["sweep"]["concurrency"]["group"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_commands_are_short_and_take_their_inputs_from_the_environment(name):
    for step in steps(name):
        run = step.get("run", "")
        assert len(run.splitlines()) <= 3 and "${{" not in run
        for script in re.findall(r"\.(?:github/scripts|ci)/[\w.-]+", run):
            assert (ROOT / script).stat().st_mode & 0o111, f"{script} cannot be executed"


def test_no_token_comes_near_a_remote_and_shell_scripts_stop_at_the_first_error():
    for path in [*FOLDER.glob("*.yml"), *SCRIPTS]:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"x-access-token|://[^/\s]*@|secrets\.|GITHUB_TOKEN|GH_TOKEN|github\.token|remote (add|set-url)", text)
        assert not found, f"{path.name}: {found and found[0]}"
        if path in SCRIPTS and path.suffix != ".py":
            assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text, path.name
