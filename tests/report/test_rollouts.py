"""Rollouts read back from the logged tables: filters, ids, older and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError, DataError
from mel_lite.report.rollouts import RolloutLog

OLD_RUN = Path(__file__).resolve().parents[1] / "resilience" / "old_runs" / "cli" / "run"


def table(folder: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    path = folder / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(question: str, text: str, verdict: str, **more: Any) -> dict[str, Any]:
    reward = {"right": 1.0, "wrong": 0.0}.get(verdict, float("nan"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return {
        "step": 1, "prompt": messages, "completion": [{"role": "assistant", "content": text}], "f": reward,
        "mel_verdict": verdict, "mel_reward": reward, "advantage": reward - 0.5, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    table(tmp_path, 1, [row("3 + 8?", "It is 11", "right"), row("3 + 8?", "It is 12", "wrong")])
    table(tmp_path, 2, [row("Seven minus TWO?", "5", "right"), row("Seven minus TWO?", "??", "abstain")])
    table(tmp_path, 10, [row("3 + 9?", "It is 11", "wrong", note="\x1b[2J"), row("3 + 9?", "12", "right")])
    return tmp_path


def test_rollouts_are_found_by_step_task_text_and_verdict(run: Path) -> None:
    log = RolloutLog(run)

    def ids(**wanted: Any) -> list[str]:
        return [each.id for each in log.find(**wanted)]

    assert ids() == ["1.0", "1.1", "2.0", "2.1", "10.0", "10.1"]
    assert ids(limit=3) == ["2.1", "10.0", "10.1"] and ids(limit=6) == ids()
    assert ids(step=2) == ["2.0", "2.1"]
    assert ids(verdict="wrong") == ["1.1", "10.0"] and ids(verdict="right", limit=1) == ["10.1"]
    assert ids(task="minus seven") == ["2.0", "2.1"] and ids(task="11") == []
    assert ids(text="11 IS") == ["1.0", "10.0"] and ids(text="3 11", task="9") == ["10.0"]
    with pytest.raises(ConfigError, match=r"--step 3: no rollouts of this step were logged; steps 1 to 10 have some"):
        log.find(step=3)


def test_a_rollout_has_what_was_logged_about_it(run: Path) -> None:
    found = RolloutLog(run).get("10.0")
    assert (found.question, found.text, found.verdict, found.reward) == ("3 + 9?", "It is 11", "wrong", 0.0)
    assert (found.step, found.row, found.advantage) == (10, 0, -0.5)
    assert found.columns == {"f": 0.0, "note": "\x1b[2J"} and found.prompt[0]["content"] == "Be brief."
    abstained = RolloutLog(run).get("2.1")
    assert (abstained.verdict, abstained.reward, abstained.columns) == ("abstain", None, {"f": None})


@pytest.mark.parametrize(
    ("id_", "message"),
    [("7", "'7' is no id"), ("a.1", "is no id"), ("3.0", "no rollouts of this step"), ("2.2", r"2\.0 to 2\.1")],
)
def test_an_id_that_is_not_there_is_named(run: Path, id_: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutLog(run).get(id_)


def test_logs_of_an_older_release_tell_the_verdict_by_the_reward() -> None:
    rows = RolloutLog(OLD_RUN).find(step=1)
    assert {(each.verdict, each.reward) for each in rows} == {("right", 1.0), ("wrong", 0.0)}
    assert len(rows) == len(RolloutLog(OLD_RUN).find(step=1, verdict="right")) + len(
        RolloutLog(OLD_RUN).find(step=1, verdict="wrong")
    )


def test_several_rewards_of_an_older_release_have_no_sum(tmp_path: Path) -> None:
    table(tmp_path, 1, [{"step": 1, "prompt": "a", "completion": "b", "f": 1.0, "g": 0.5, "advantage": 0.0}])
    (found,) = RolloutLog(tmp_path).find()
    assert (found.verdict, found.reward, found.columns) == (None, None, {"f": 1.0, "g": 0.5})


def test_damaged_files_are_named_and_the_others_read(run: Path) -> None:
    path = table(run, 2, [{"step": 2, "completion": "no prompt"}])
    (run / "completions" / "completions_00010.parquet").write_bytes(b"PAR1 cut off")
    (run / "completions" / "completions_00011.parquet").write_bytes(b"")
    log = RolloutLog(run)
    assert [each.id for each in log.find()] == ["1.0", "1.1"]
    assert [problem.partition(" (")[0] for problem in log.problems] == [
        f"completions/completions_{step:05d}.parquet cannot be read" for step in (11, 10, 2)
    ]
    assert "'prompt'" in log.problems[2] and path.exists()
    done = CliRunner().invoke(app, ["rollouts", "list", str(run)])
    assert done.stderr.count("note:") == 1 and done.stderr.rstrip().endswith("2 more files cannot be read.")
    with pytest.raises(DataError, match=r"completions_00010\.parquet cannot be read"):
        RolloutLog(run).get("10.0")


@pytest.mark.parametrize("made", [False, True])
def test_a_run_without_rollouts_is_one_message(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "completions").mkdir()
    with pytest.raises(ConfigError, match=r"no logged rollouts.*train\.log_completions=true"):
        RolloutLog(tmp_path)
