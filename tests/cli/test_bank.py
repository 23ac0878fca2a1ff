"""`mel-lite experiences bank`, `eval --with-lessons` and `train --lessons-from`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lesson_banks import bank_of, rule, write_checkpoint
from mel_lite.cli.main import app
from mel_lite.errors import ConfigError
from mel_lite.types import BankLesson
from tiny_models import save_tiny


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    bank = bank_of(("zap", "from"), ("dax", "add"), ("lor", "take"))
    bank.adopt([BankLesson(5, "- [bold]If\x1b[2J I see gud[/], then wait.", "1 gud 2?", 0.75, 4, False, 9)])
    bank.reexamine([(1, 0.5), (2, -1.0), (2, -0.25)])
    write_checkpoint(tmp_path / "run", bank)
    return tmp_path / "run"


def test_the_table_is_sorted_by_score_and_safe_for_a_terminal(run: Path) -> None:
    done = invoke("experiences", "bank", run)
    rows = [re.sub(r"[\s\u2502\u2503]+", " ", line).strip() for line in done.output.splitlines()]
    assert [row for row in rows if re.match(r"-?\d+ -?\d", row)] == [
        f"1 1.50 2 active 4 {rule('zap', 'from')}",
        f"3 1.00 1 active 4 {rule('lor', 'take')}",
        "-1 0.75 4 active - [bold]If\N{REPLACEMENT CHARACTER}[2J I see gud[/], then wait.",
        f"2 -0.25 3 retired 4 {rule('dax', 'add')}",
    ]
    assert rows[-1] == "4 lessons: 3 active, 1 retired" and "\x1b[2J" not in done.output


def test_a_users_truth_is_shown_and_counted(run: Path) -> None:
    done = invoke("experiences", "bank", run, "--truth", "lesson_banks:truth")
    rows = [re.sub(r"[\s\u2502\u2503]+", " ", line).strip() for line in done.output.splitlines()]
    found = [row.split()[4:6] for row in rows if re.match(r"-?\d+ -?\d", row)]
    assert found == [["4", "yes"], ["4", "?"], ["no", "-"], ["4", "no"]]
    assert rows[-1] == "4 lessons: 3 active (1 of 2 true), 1 retired (0 of 1 true)"


def test_json_has_every_field(run: Path) -> None:
    lessons = json.loads(invoke("experiences", "bank", run, "--json").output)
    assert lessons[0] == {
        "id": 1, "heuristic": rule("zap", "from"), "question_text": "3 zap 7?", "score": 1.5, "votes": 2,
        "retired": False, "step": 4,
    }  # fmt: skip
    with_truth = json.loads(invoke("experiences", "bank", run, "--json", "--truth", "lesson_banks:truth").output)
    assert [each.pop("true") for each in with_truth] == [True, None, False, False] and with_truth == lessons


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("lesson_banks:no_truth", "--truth 'lesson_banks:no_truth' returned 'yes' for lesson 1. Return True, False"),
        ("lesson_banks:nothing", "--truth = 'lesson_banks:nothing': 'lesson_banks' has no 'nothing'"),
    ],
)
def test_a_truth_that_cannot_be_used_is_refused(run: Path, truth: str, message: str) -> None:
    done = invoke("experiences", "bank", run, "--truth", truth)
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)


def test_eval_measures_lessons_against_none(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} {op} 3?", "answer": "4"}) + "\n" for i, op in enumerate(["zap", "bli"]))
    )
    write_checkpoint(tmp_path / "run", bank_of(("zap", "from")))
    tasks = ("--dataset", tmp_path / "t.jsonl", "--verifier", "numeric")
    arguments = ("eval", "--model", base, *tasks, "--k", 2, "--max-new-tokens", 4)
    output = tmp_path / "result.json"
    done = invoke(*arguments, "--with-lessons", tmp_path / "run", "--output", output)
    assert done.exit_code == 0, done.output
    assert "1 of 2 tasks have lessons, 1.0 each" in re.sub(r"\s+", " ", done.output)
    result = json.loads(output.read_text())
    assert (result["tasks"], result["taught"], result["over_context"], result["lessons_per_task"]) == (2, 1, 0, 1.0)
    assert result["plain"]["n"] == result["with_lessons"]["n"] == 2
    assert set(result["difference"]) == {"pass_at_1", "avg_at_k"}
    plain = json.loads(invoke(*arguments, "--output", output).output and output.read_text())
    assert plain == result["plain"], "the plain half is the evaluation without lessons"


def test_eval_refuses_a_run_without_lessons_before_it_loads_a_model(tmp_path: Path) -> None:
    done = invoke("eval", "--model", tmp_path / "no-model", "--with-lessons", tmp_path)
    assert isinstance(done.exception, ConfigError) and "--with-lessons=" in str(done.exception)


def test_train_refuses_a_folder_without_lessons_before_it_loads_a_model(tmp_path: Path) -> None:
    done = invoke("train", "--gpu", "cpu", "--lessons-from", tmp_path / "none", "--output-dir", tmp_path / "run")
    assert isinstance(done.exception, ConfigError)
    assert re.search("lessons_from='.*none' holds no lessons: neither a checkpoint with a bank", str(done.exception))
    assert not (tmp_path / "run").exists()
