"""Each tracker with its real package, offline: metrics, evaluation, and tables of lessons and completions."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path

import pytest

from experiences import experience
from mel_lite.resilience.tracker_tables import COLUMNS, MOST_CHARACTERS, lesson_cells, markdown
from mel_lite.resilience.trackers import AsyncTracker
from real_packages import with_sites
from run_folders import evaluation, make_run
from trainers import step_log

SCRIPT = Path(__file__).parents[1] / "helpers" / "tracked_run.py"
EVALUATED = evaluation([1, 2, 4])
RULE = "- If a question joins two numbers, then name the operation before computing anything."


def tracked(tmp_path: Path, tracker: str) -> list[float]:
    """Train two steps with a tracker in a process of its own. Returns: the pass rates in metrics.jsonl."""
    done = with_sites([], SCRIPT, tmp_path, tracker, cwd=tmp_path)  # a cold one: trackers set themselves up on import
    assert "failed" not in done.stderr and "has not answered" not in done.stderr, done.stderr
    return [row["mel/pass_rate"] for row in step_log(tmp_path / "run")]


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rates = tracked(tmp_path, "tensorboard")
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/mel/pass_rate")] == list(enumerate(rates, 1))
    assert events.Scalars("eval/avg_at_k")[0].value == pytest.approx(EVALUATED.avg_at_k.value)
    assert events.Scalars("eval/avg_at_k_low")[0].value == pytest.approx(EVALUATED.avg_at_k.low)
    tables = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("lessons/text_summary")]
    assert len(tables) == 2 and all(RULE in table and table.startswith("| step | id |") for table in tables)
    assert [re.findall(r"^\| (\d+) \| (\d+) \| kept", table, re.MULTILINE) for table in tables] == [
        [("1", "1"), ("1", "2")], [("2", "3"), ("2", "4")],
    ]  # fmt: skip


@pytest.mark.slow
def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL itself calls trackio outside the thread that knows the run, which ended training."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    rates = tracked(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as db:
        logged = [(name, json.loads(metrics)) for name, metrics in db.execute("SELECT run_name, metrics FROM metrics")]
    assert {name for name, _ in logged} == {"mine"}, "the evaluation after training belongs to the same run"
    rows = [row for _, row in logged]
    assert [row["train/mel/pass_rate"] for row in rows if "train/mel/pass_rate" in row] == rates
    assert [row["eval/pass_at_1"] for row in rows if "eval/pass_at_1" in row] == [EVALUATED.pass_at_1.value]
    lessons = [row["lessons"]["_value"] for row in rows if "lessons" in row]
    assert [[cells["id"] for cells in table] for table in lessons] == [[1, 2], [3, 4]]
    assert lessons[0][0]["heuristic"] == RULE and tuple(lessons[0][0]) == COLUMNS
    assert any("completions" in row for row in rows) and any("profiling/" in key for row in rows for key in row)


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    rates = tracked(tmp_path, "wandb")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (records,) = run.glob("*.wandb")
    log = records.read_bytes()
    found = [float(value) for value in re.findall(rb"train/mel/pass_rate\x82?[^0-9]{1,4}([0-9.]+)", log)]
    assert list(dict.fromkeys(found)) == rates, "each also stands in the summary"
    (score,) = re.findall(rb"eval/pass_at_1[^0-9_]{1,4}([0-9.]+)", log)[:1]
    assert float(score) == pytest.approx(EVALUATED.pass_at_1.value)
    tables = [json.loads(file.read_text()) for file in (run / "files" / "media" / "table").glob("lessons_*.json")]
    tables.sort(key=lambda table: table["data"][0][0])
    assert [table["columns"] for table in tables] == [list(COLUMNS)] * 2
    assert [[row[1] for row in table["data"]] for table in tables] == [[1, 2], [3, 4]]
    assert tables[0]["data"][0][5] == RULE
    assert list((run / "files" / "media" / "table").glob("completions_*.json"))


def test_cells_are_safe_and_short(tmp_path: Path) -> None:
    from mel_lite.lessons.store import ExperienceStore

    folder = make_run(tmp_path / "run", lessons=2, hostile=True)
    with ExperienceStore(folder / "experiences.sqlite") as store:
        store.add([experience(3, text="raw")])
        cells = [lesson_cells(row) for row in store.list()]
    assert [row[:3] for row in cells] == [[1, 1, "kept"], [2, 2, "replay_failed"], [4, 3, "kept"]]
    assert all(
        len(cell) <= MOST_CHARACTERS and "\x1b" not in cell for row in cells for cell in row if isinstance(cell, str)
    )
    assert cells[0][6:] == [1.0, 0.412, 0.387]
    table = markdown([[1, 2, "kept", "a|b\nc", "", "r", None, 0.5, None]])
    assert table.splitlines()[2] == "| 1 | 2 | kept | a\\|b c |  | r |  | 0.5 |  |"


def test_posts_keep_their_order_with_the_events() -> None:
    tracker, seen = AsyncTracker("x"), []

    def on_log(args: object, state: object, control: object, **_: object) -> None:
        seen.append("event")

    tracker.send(on_log, None, object(), object())
    tracker.post(seen.append, "post")
    tracker.send(on_log, None, object(), object())
    tracker.post(lambda: seen.append("last"))
    assert seen == ["event", "post", "event", "last"]
