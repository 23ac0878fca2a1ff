"""`mel-lite experiences` and `mel-lite rollouts`: text, JSON with stable keys, and runs that hold little or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError
from run_folders import make_run

EXPERIENCE = """id step prompt_hash prompt answer right_text wrong_text right_index wrong_index pair_index
common_prefix_tokens analysis analysis_tokens bifurcation critique heuristic status reason leak_reasons redacted
replay_verdicts replay_texts control_verdicts uplift nll_written nll_before nll_after trained_tokens written_at
quote_start quote_end templates_version shift_nats staleness_steps staleness_versions""".split()
CREDIT = "step rollout_index way verdict effect tokens shift_nats effects all_tokens".split()
ROLLOUT = "id step row prompt question verdict reward advantage text columns".split()
DOCS = Path(__file__).resolve().parents[2] / "docs" / "browsing.md"


def call(*arguments: object, columns: int = 200) -> Any:
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": str(columns)})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", lessons=6, credit=True)
    (folder / "completions").mkdir()
    rows = [
        {"prompt": "3 + 8?", "completion": f"It is {n}", "f": float(n == 11), "mel_verdict": verdict,
         "mel_reward": float(n == 11), "advantage": 0.5}
        for n, verdict in ((11, "right"), (12, "wrong"))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / "completions_00004.parquet")
    return folder


def test_json_of_experiences_has_the_documented_keys(run: Path) -> None:
    rows = json.loads(call("experiences", "list", "--run", run, "--json", "--limit", "2").stdout)
    assert [row["id"] for row in rows] == [5, 6] and list(rows[0]) == EXPERIENCE
    assert rows[0]["status"] == "kept" and rows[0]["replay_verdicts"] == ["right"] and rows[0]["step"] == 5
    found = json.loads(call("experiences", "search", "rule-4:", "--run", run, "--json").stdout)
    assert found == [rows[0]]
    one = json.loads(call("experiences", "show", 5, "--run", run, "--json").stdout)
    assert [list(each) for each in one["token_credit"]] == [CREDIT, CREDIT]
    assert [each["rollout_index"] for each in one.pop("token_credit")] == [6, 4] and one == rows[0]
    kept = json.loads(call("experiences", "list", "--run", run, "--json", "--status", "leaked").stdout)
    assert [row["id"] for row in kept] == [3]


def test_json_of_rollouts_has_the_documented_keys(run: Path) -> None:
    rows = json.loads(call("rollouts", "list", "--run", run, "--json").stdout)
    assert list(rows[0]) == ROLLOUT and [row["verdict"] for row in rows] == ["right", "wrong"]
    assert json.loads(call("rollouts", "show", "4.1", "--run", run, "--json").stdout) == rows[1] | {"token_credit": []}
    assert json.loads(call("rollouts", "search", "IS 12", "--run", run, "--json").stdout) == [rows[1]]
    for option, wanted in (("--right", rows[:1]), ("--wrong", rows[1:])):
        assert json.loads(call("rollouts", "list", "--run", run, "--step", 4, option, "--json").stdout) == wanted
    assert json.loads(call("rollouts", "list", "--run", run, "--task", "minus", "--json").stdout) == []


@pytest.mark.parametrize(
    ("part", "keys"), [("an experience", EXPERIENCE), ("a rollout", ROLLOUT), ("token credit", CREDIT)]
)
def test_the_page_documents_every_key(part: str, keys: list[str]) -> None:
    section = re.search(rf"<!-- keys of {part} -->\n(.*?)\n\n", DOCS.read_text(), re.DOTALL)
    assert section is not None
    assert re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in section[1].splitlines()[2:])) == keys


def test_rollouts_as_text(run: Path) -> None:
    text = call("rollouts", "list", "--run", run).stdout
    assert re.search(r"4\.1\W+wrong\W+0\W+3 \+ 8\?\W+It is 12", text) and "2 rollouts\n" in text
    assert "1 rollout, the newest; more with --limit 2" in call("rollouts", "list", "--run", run, "--limit", 1).stdout
    assert "4.0, right, reward 1\n  3 + 8?\n  It is 11\n" in call("rollouts", "list", "--run", run, columns=40).stdout
    assert "It is 12" in call("rollouts", "show", "4.1", "--run", run).stdout


def test_a_damaged_table_is_a_note(run: Path) -> None:
    (run / "completions" / "completions_00005.parquet").write_bytes(b"PAR1")
    done = call("rollouts", "list", "--run", run, "--json")
    assert len(json.loads(done.stdout)) == 2
    assert done.stderr.startswith("note: completions/completions_00005.parquet cannot be read (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [("list",), ("bank",), ("search", "x", "--run"), ("show", "1", "--run")])
def test_a_run_whose_algorithm_draws_no_lessons_says_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = make_run(tmp_path / "run", lessons=0, algorithm="grpo")
    (folder / "experiences.sqlite").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"train\.algorithm=grpo, which writes no meta-experiences"):
        call("experiences", *command, folder)


def test_a_run_without_rollouts_is_an_error(tmp_path: Path) -> None:
    for command in (("list",), ("show", "1.0"), ("search", "x")):
        with pytest.raises(ConfigError, match="no logged rollouts"):
            call("rollouts", *command, "--run", tmp_path)
