"""`mel-lite report` and `mel-lite compare` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError
from run_folders import make_run


def call(*arguments: str | Path) -> str:
    """Output of a command that succeeds. A user error is raised as it is."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_a_report_goes_into_the_run_or_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "runs" / "one", lessons=3)
    assert call("report", folder) == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert page.count('class="lesson"') == 3
    assert call("report", folder, "--output", tmp_path / "page.html", "--lessons", "1") == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().count('class="lesson"') == 1
    monkeypatch.chdir(tmp_path)
    (folder / "report.html").unlink()
    assert call("report") == "runs/one/report.html\n", "the newest run"


def test_a_report_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--output .*no/page.html: it cannot be written \(No such file"):
        call("report", folder, "--output", tmp_path / "no" / "page.html")
    with pytest.raises(ConfigError, match="holds no run: it has neither config.yaml nor metrics.jsonl"):
        call("report", tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        call("report", tmp_path / "missing")


@pytest.mark.slow
def test_runs_are_compared_in_a_table_or_as_json(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / name, before=[1, 2] * 10, after=after, lessons=0, algorithm=name)
        for name, after in (("grpo", [2, 2] * 10), ("mel", [3, 3] * 10))
    ]
    shown = call("compare", *folders, "--output", tmp_path / "out")
    assert "mel ends 25.0 points" in shown and "note: At least one arm is a single run." in shown
    assert str(tmp_path / "out" / "comparison.html") in shown.splitlines()
    values = json.loads(call("compare", *folders, "--output", tmp_path / "out", "--json"))
    assert values["tasks"] == 20 and values["arms"][1]["difference"]["avg_at_k"]["value"] == 0.25
    with pytest.raises(ConfigError, match="at least two runs"):
        call("compare", folders[0])


@pytest.mark.parametrize(
    "flags",
    [
        ("--arm", "own:train.seed=3"), ("--budget-tokens", "9"), ("--gpu", "cpu"), ("--set", "train.seed=1"),
        ("--seeds", "3"), ("--first-seed", "0"),
    ],
)  # fmt: skip
def test_options_of_training_need_arms(tmp_path: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{flags[0]} trains runs, so it needs --arms"):
        call("compare", tmp_path / "a", tmp_path / "b", *flags)
