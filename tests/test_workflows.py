"""GitHub's files: that they are what GitHub reads, and that they call what this tree has."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github"
NAMES = ("ci", "docs", "gpu", "wheels")

if not FOLDER.is_dir():
    pytest.skip("no .github here: an sdist has none", allow_module_level=True)
yaml = pytest.importorskip("yaml")


def workflow(name: str) -> dict:
    found = yaml.safe_load((FOLDER / "workflows" / f"{name}.yml").read_text())
    found["on"] = found.pop(True)  # YAML 1.1 reads the key "on" as a truth value
    return found


def steps(name: str) -> list[dict]:
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def test_these_are_all():
    assert sorted(path.stem for path in (FOLDER / "workflows").iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_is_whole(name):
    """Each has a trigger, and rights that only read unless a job asks for more.

    Every job that builds has a machine and a limit.
    """
    found = workflow(name)
    assert found["name"] == name
    assert set(found["on"]) <= {"push", "pull_request", "workflow_dispatch"}
    assert found["permissions"] == {"contents": "read"}
    for job in found["jobs"].values():
        assert job["runs-on"]
        assert "timeout-minutes" in job or job.get("needs")
        assert set(job.get("needs", "").split()) <= set(found["jobs"])
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


@pytest.mark.parametrize("name", NAMES)
def test_actions_are_pinned(name):
    for step in steps(name):
        action = step.get("uses", "actions/checkout@v4")
        assert re.fullmatch(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", action)


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = [step["run"] for step in steps(name) if "run" in step]
    called = {match for command in commands for match in re.findall(r"^make ([\w-]+)", command, re.M)}
    assert called <= targets
    if name == "ci":
        assert commands == [".ci/run"]
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    else:
        assert called == {{"gpu": "gpu-check", "docs": "docs", "wheels": "wheels"}[name]}


def test_only_a_tag_publishes_and_only_that_job_may():
    jobs = workflow("wheels")["jobs"]
    assert jobs["publish"]["if"] == "github.event_name == 'push'"
    assert workflow("wheels")["on"]["push"] == {"tags": ["v*"]}
    assert jobs["publish"]["needs"] == "wheels"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in jobs["wheels"]
    assert not [step for step in steps("wheels") if "secrets" in str(step)]


def test_the_gpu_job_runs_on_a_labelled_machine_of_ones_own():
    job = workflow("gpu")["jobs"]["gpu-check"]
    assert {"self-hosted", "gpu"} <= set(job["runs-on"])
    assert "label.name == 'gpu'" in job["if"]


def test_every_owned_path_exists():
    for line in (FOLDER / "CODEOWNERS").read_text().splitlines():
        if line and not line.startswith("#"):
            path, *owners = line.split()
            assert owners
            assert all(owner.startswith("@") for owner in owners)
            assert path == "*" or (ROOT / path.strip("/")).exists(), path
