"""F27: a tracker that raises or hangs, a full disk for logs, a closed terminal: training continues with one warning."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from mel_lite.resilience import trackers
from mel_lite.run.progress import LiveDisplay
from mel_lite.training import metrics
from trainers import assert_learned, build, digest, step_log, trainable

STEPS = 4


class Tracker(TensorBoardCallback):
    """Tracker callback of transformers with a configurable fault."""

    def __init__(self, *, fails: tuple[str, ...] = (), hangs: bool = False, late_s: float = 0) -> None:
        self.fails, self.late_s = fails, late_s
        self.seen: list[tuple[str, int]] = []
        self.released, self.finished = threading.Event(), threading.Event()
        if not hangs:
            self.released.set()

    def _event(self, name: str, state: Any) -> None:
        if name == "on_log":
            self.released.wait()
            time.sleep(self.late_s)
        if name in self.fails:
            raise ConnectionError(f"no network in {name}")
        self.seen.append((name, state.global_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._event("on_train_begin", state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._event("on_log", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._event("on_train_end", state)
        self.finished.set()


def _train(tmp_path: Path, *callbacks: TrainerCallback, **options: Any) -> Any:
    trainer = build(tmp_path, max_steps=STEPS, callbacks=list(callbacks), **options)
    trainer.train()
    assert_learned(trainer)
    assert [row["step"] for row in step_log(Path(trainer.args.output_dir))] == list(range(1, STEPS + 1))
    return trainer


def test_a_healthy_tracker_sees_every_event_in_order(tmp_path: Path) -> None:
    tracker = Tracker()
    _train(tmp_path, tracker)
    assert tracker.seen[0] == ("on_train_begin", 0) and tracker.seen[-1] == ("on_train_end", STEPS)
    assert [step for name, step in tracker.seen if name == "on_log"] == [1, 2, 3, 4, 4]


@pytest.mark.slow
def test_a_tracker_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(fails=("on_train_begin", "on_log"))
    quiet = _train(tmp_path, output_dir=tmp_path / "quiet")
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.trackers"):
        loud = _train(tmp_path, tracker)
    assert caplog.text.count("Training continues") == 1 and "no network in on_train_begin" in caplog.text
    assert digest(trainable(loud)) == digest(trainable(quiet))
    assert tracker.seen == [("on_train_end", STEPS)], "one failure does not end the others"


def test_training_waits_once_for_a_tracker_that_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s: list[float | None] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited_s.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Event)
    tracker = Tracker(hangs=True)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.trackers"):
        _train(tmp_path, tracker)
    assert tracker.seen == [("on_train_begin", 0)], "training is over, and the first log still hangs"
    assert waited_s.count(trackers.PATIENCE_S) == 1
    assert caplog.text.count("has not answered for 0.5 s") == 1
    tracker.released.set()
    assert tracker.finished.wait(30)
    assert tracker.seen[-1] == ("on_train_end", STEPS)


def test_a_late_tracker_catches_up_with_the_steps_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.01)
    tracker = Tracker(late_s=0.1)
    _train(tmp_path, tracker)
    assert tracker.finished.wait(30)
    assert [step for name, step in tracker.seen if name == "on_log"] == [1, 2, 3, 4, 4]


def test_a_callback_of_the_users_own_may_stop_the_run(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        build(tmp_path, max_steps=2, callbacks=[Stops()]).train()


def test_a_service_that_only_fails_is_left_alone() -> None:
    service, calls = trackers.SideService("x"), []

    def fails() -> None:
        calls.append(1)
        raise OSError

    for _ in range(50):
        service.call(fails)
    assert len(calls) == trackers.MAX_FAILURES


def test_a_full_disk_for_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines are kept until the disk accepts them, and no line is half written."""
    original, calls = metrics.MetricsWriter._write, []

    def full_for_two(writer: Any, text: str) -> None:
        calls.append(text)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        original(writer, text)

    monkeypatch.setattr(metrics.MetricsWriter, "_write", full_for_two)
    with caplog.at_level(logging.WARNING, "mel_lite.training.metrics"):
        _train(tmp_path)
    assert caplog.text.count("No space left on device") == 1
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Uses a real full device: Linux's /dev/full rejects every byte."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = metrics.MetricsWriter(tmp_path / "metrics.jsonl")

    class State:
        is_world_process_zero, global_step = True, 1

    writer.on_log(None, State, None, {"reward": 1.0})
    assert len(writer._unwritten) == 1
    (tmp_path / "metrics.jsonl").unlink()
    writer.on_log(None, State, None, {"reward": 2.0})
    assert [json.loads(line)["reward"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.0, 2.0]


def test_tables_and_uploads_that_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder of completion tables is missing, as on an unmounted disk."""
    trainer = build(tmp_path, max_steps=STEPS, log_completions=True)
    folder = tmp_path / "run" / "completions"
    folder.rmdir()
    folder.write_text("not a folder")
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.trackers"):
        trainer.train()
        trainer._staging = None

        def fails(*_: Any) -> None:
            raise ConnectionError("no Hub")

        trainer.args.push_to_hub = True
        trainer.push_to_hub = fails
        trainer.hub_model_id = "x/y"
        trainer._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-4"))
    assert_learned(trainer)
    assert caplog.text.count("Training continues") == 1
    assert len(step_log(tmp_path / "run")) == STEPS


def test_a_closed_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream))
    stream.close()
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.trackers"):
        _train(tmp_path, display)
    assert caplog.text.count("LiveDisplay failed") == 1
