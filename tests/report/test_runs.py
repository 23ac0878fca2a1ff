"""Reading run folders: those of older versions, unfinished, incomplete and damaged ones."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from mel_lite.errors import ConfigError
from mel_lite.report.figures import funnel_table
from mel_lite.report.runs import generated_tokens, phase_seconds, read_run, series, training_seconds
from run_folders import make_run, metrics

OLD_RUNS = Path(__file__).resolve().parents[1] / "resilience" / "old_runs"


def test_a_complete_run_has_no_problems(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", before=[1, 2], after=[2, 4], lessons=3))
    assert run.problems == () and run.finished
    assert (run.steps, run.planned_steps, len(run.lessons)) == (12, 12, 3)
    assert run.option("train.num_generations") == 8 and run.option("train.absent") is None
    assert run.after is not None and [score.samples_right for score in run.after.scores] == [2, 4]


def test_runs_of_an_older_version_are_read(tmp_path: Path) -> None:
    cli, trainer = (shutil.copytree(OLD_RUNS / name / "run", tmp_path / name) for name in ("cli", "trainer"))
    run = read_run(cli)
    assert run.problems == () and not run.finished
    assert (run.steps, run.planned_steps) == (5, 8) and run.record == {}
    assert run.before is not None and run.after is None
    script = read_run(trainer)
    assert len(script.lessons) == 8 and script.steps == 4
    assert "config.yaml is missing" in script.problems[0]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.yaml", "train: [", "config.yaml cannot be read"),
        ("config.yaml", "train: 3", "config.yaml cannot be read"),
        ("eval/after.json", '{"k": 4}', "eval/after.json: not an evaluation result"),
        ("experiences.sqlite", "no database at all, but long enough for a header of SQLite", "file is not a database"),
        ("run.json", "[1, 2", ""),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: str, problem: str) -> None:
    folder = make_run(tmp_path / "run", before=[1], after=[2])
    (folder / name).write_text(content)
    run = read_run(folder)
    assert run.steps == 12
    assert [text for text in run.problems if problem in text] == list(run.problems) and (not problem or run.problems)


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=4)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "rew')
        file.write(b"\xff\n[1]\n")
    run = read_run(folder)
    assert run.steps == 4 and run.problems == ("metrics.jsonl: 2 of 6 lines cannot be read and are left out.",)


def test_a_damaged_row_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with sqlite3.connect(folder / "experiences.sqlite") as db:
        db.execute("UPDATE experiences SET status = 'good' WHERE id = 2")
    run = read_run(folder)
    assert run.steps == 12 and run.lessons == ()
    assert len(run.problems) == 1 and "a row is damaged ('good' is not a valid Status)" in run.problems[0]


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="holds no run" if made else "no such folder"):
        read_run(tmp_path / "other")


@pytest.mark.parametrize("every", [1, 4])
def test_totals_do_not_depend_on_how_often_the_trainer_logs(tmp_path: Path, every: int) -> None:
    """With logging_steps above 1, a row holds means over its steps."""
    run = read_run(make_run(tmp_path / "run", rows=metrics(12, every=every)))
    assert phase_seconds(run.rows) == {"rollout": 24.0, "update": 12.0}
    assert generated_tokens(run.rows)[-1] == 1200.0 and training_seconds(run.rows)[-1] == 36.0
    assert [count for _, count, _ in funnel_table(run)] == [48, 24, 24, 24, 18, 12, 6]
    assert [share for _, _, share in funnel_table(run)][-2:] == [12 / 18, 6 / 12]


def test_batches_that_serve_several_updates_are_counted_once(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rows=metrics(12, every=4), num_iterations=2))
    assert [count for _, count, _ in funnel_table(run)][:2] == [24, 12]


def test_updates_on_an_earlier_batch_again_add_their_time_and_no_tokens(tmp_path: Path) -> None:
    rows = metrics(12)
    for row in rows:
        if row["step"] % 4 != 1:  # no rollouts: the step logs a loss, and no reward
            del row["reward"], row["time/rollout_s"]
            row |= {"loss": 0.1, "mel/generated_tokens": 0.0}
    run = read_run(make_run(tmp_path / "run", rows=rows, num_iterations=4))
    assert run.steps == 12 and len(run.rows) == 12
    assert generated_tokens(run.rows)[-1] == 300.0
    assert phase_seconds(run.rows) == {"rollout": 6.0, "update": 12.0}


def test_numbers_that_are_none_or_not_finite_are_no_points(tmp_path: Path) -> None:
    rows = metrics(3)
    rows[1] |= {"mel/pass_rate": None, "entropy": float("nan")}
    folder = make_run(tmp_path / "run", rows=rows)
    assert "NaN" in (folder / "metrics.jsonl").read_text()
    assert series(read_run(folder).rows, "mel/pass_rate") == ([1.0, 3.0], [1 / 3, 1.0])
    assert series(read_run(folder).rows, "entropy")[0] == [1.0, 3.0]
