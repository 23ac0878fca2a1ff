"""`mel-lite report` and `mel-lite compare` from the command line."""

from __future__ import annotations

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
