"""The files around the code: hooks, workflows, forms, version numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mel_lite

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, with its folder of programs as it is by default."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert found is not None, f"the Makefile has no target {target}"
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_the_hooks_are_make_lint() -> None:
    local, other = parsed(".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == recipe("lint") != []
    for hook in local["hooks"]:
        assert hook["language"] == "system" and hook["always_run"] and not hook["pass_filenames"], hook["id"]
    (limit,) = other["hooks"]
    assert limit["id"] == "check-added-large-files" and limit["args"] == ["--maxkb=500"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", other["rev"])


@pytest.mark.parametrize("form", ["bug.yml", "feature.yml"])
def test_issue_forms_have_what_github_asks_for(form: str) -> None:
    content = parsed(f".github/ISSUE_TEMPLATE/{form}")
    assert content["name"] and content["description"]
    fields = [part for part in content["body"] if part["type"] != "markdown"]
    names = [part["id"] for part in fields]
    assert len(set(names)) == len(names) > 2
    assert {part["type"] for part in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_the_form_chooser_and_dependabot_are_valid() -> None:
    assert parsed(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}
    (update,) = parsed(".github/dependabot.yml")["updates"]
    assert (update["package-ecosystem"], update["schedule"]) == ("github-actions", {"interval": "weekly"})


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_are_bounded_and_read_only(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 60, f"{name} may hang for hours"
        for target in re.findall(r"\bmake (?:--\S+ )*([a-z-]+)", "\n".join(str(s.get("run")) for s in job["steps"])):
            assert recipe(target) or target == "venv", target


def test_a_release_is_built_checked_and_published_without_a_token() -> None:
    workflow = parsed(".github/workflows/release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    runs = [step["run"] for step in build["steps"] if "run" in step]
    (tests,) = [re.search(r"pytest (\S+)", run) for run in runs if "pytest" in run]
    assert runs[0] == "make wheel" and tests is not None and (ROOT / tests[1]).is_file()
    assert publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert publish["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    citation = parsed("CITATION.cff")
    assert citation["version"] == mel_lite.__version__
    assert citation["references"][0]["identifiers"] == [{"type": "other", "value": "arXiv:2602.10224"}]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, *released = re.findall(r"^## \[(.+)\](?: - \d{4}-\d{2}-\d{2})?$", changes, re.MULTILINE)
    assert newest == "Unreleased", "changes after a release need a place"
    assert released[:1] == [mel_lite.__version__] or f"first one will be {mel_lite.__version__}." in changes
