"""The first batches in one line, and warnings about lessons that do not help: once per run, also over a resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mel_lite.resilience import first_batches
from mel_lite.resilience.checkpoint_files import read_state
from mel_lite.resilience.first_batches import FIRST, MEASURED, TREND, FirstBatches
from train_command import command
from trainers import build

LOG = {"mel/groups": 4, "mel/mixed_groups": 3, "mel/written": 3, "mel/parsed": 2, "mel/quoted": 1, "mel/pass_rate": 0.4}


def watch(*, max_steps: int = 100) -> FirstBatches:
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0, max_steps=max_steps),
        args=SimpleNamespace(mel_weight=0.5, internalisation="distill"),
        accelerator=SimpleNamespace(is_main_process=True),
    )
    return FirstBatches(trainer)


def feed(seen: FirstBatches, logs: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for log in logs:
        seen._trainer.state.global_step += 1
        seen.on_log(log)
        lines += [seen.line] if seen.line else []
    return lines


def test_the_line_has_the_means_and_comes_once() -> None:
    logs = [LOG | {"mel/teacher_shift": 1.0 + i, "mel/score_shift": -0.5} for i in range(3 * FIRST)]
    logs[0] |= {"mel/grad_norm_policy": 0.2, "mel/grad_norm_nll": 0.1, "mel/replay_uplift": 0.25}
    seen = watch()
    assert feed(seen, logs[: FIRST - 1]) == []
    assert feed(seen, logs[FIRST - 1 :]) == [
        "first 5 logs: pass rate 40%, 75% of groups mixed, 67% of analyses parsed, 50% quote the wrong step, replay "
        "uplift +25 points, scored shift -0.50 nats, teacher shift +3.00 nats, lesson / policy gradient 0.50"
    ]
    assert seen.line is None


def test_a_short_run_gets_its_line_at_its_end() -> None:
    assert feed(watch(max_steps=2), [LOG, LOG])[0].startswith("first 2 logs: pass rate 40%, 75% of groups mixed")
    assert feed(watch(), [{"eval_reward": 0.5}, {"loss": 1.0}, {"train_runtime": 3.0}] * 20) == []


@pytest.mark.parametrize(
    ("log", "times", "words"),
    [
        ({"mel/teacher_shift": 0.0}, TREND, ["'distill' is no better than the student", "+0.00 nats"]),
        ({"mel/teacher_shift": -2.0}, TREND, ["-2.00 nats", "internalisation_options", "algorithm='grpo'"]),
        ({"mel/replay_uplift": -0.125}, TREND, ["-12 points", "replay_criterion='uplift'"]),
        (
            {"mel/grad_norm_policy": 0.1, "mel/grad_norm_nll": 0.4},
            MEASURED,
            ["norm 0.4 against 0.1", "Lower mel_weight from 0.5 to 0.12 or less"],
        ),
        ({"mel/grad_norm_nll": 0.4}, MEASURED, ["against 0 ", "No group had an advantage"]),
    ],
)
def test_each_warning_comes_once_with_figures_and_the_knob(
    log: dict[str, float], times: int, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen = watch()
    with caplog.at_level(logging.WARNING, first_batches.__name__):
        feed(seen, [LOG | log] * (times - 1))
        assert caplog.text == ""
        feed(seen, [LOG | log] * 50)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Step {times}: ")
    for word in words:
        assert word in record.getMessage()


def test_analyses_of_which_none_can_be_read_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, first_batches.__name__):
        feed(watch(max_steps=3), [LOG | {"mel/written": 1, "mel/parsed": 0}] * 3)
        feed(watch(max_steps=3), [LOG | {"mel/written": 2, "mel/parsed": 0}] * 2 + [LOG])
        assert caplog.text == "", "three are too few, and some were read"
        feed(watch(max_steps=2), [LOG | {"mel/written": 2, "mel/parsed": 0}] * 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("None of 4 analyses could be read") and "mel-lite warmup" in record.message


def test_lessons_that_help_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    good = {"mel/teacher_shift": 0.1, "mel/replay_uplift": 0.05, "mel/grad_norm_policy": 0.2, "mel/grad_norm_nll": 0.2}
    with caplog.at_level(logging.WARNING, first_batches.__name__):
        feed(watch(), [LOG | good, LOG | good | {"mel/teacher_shift": float("nan")}] * 40)
    assert caplog.text == ""


def test_a_state_goes_through_json_and_decides_the_same() -> None:
    logs = [LOG | {"mel/teacher_shift": i - 6.0} for i in range(20)]
    whole, first, second = watch(), watch(), watch()
    lines = feed(whole, logs)
    got = feed(first, logs[:3])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second._trainer.state.global_step = 3
    assert got + feed(second, logs[3:]) == lines and len(lines) == 1
    assert second.state_dict() == whole.state_dict()
    old = watch()
    old.load_state_dict({"micro_step": 3})
    assert old.state_dict() == watch().state_dict(), "a checkpoint of an older version starts anew"


@pytest.mark.slow
def test_a_resumed_run_warns_where_the_whole_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scripted policy ignores lessons, so on the same seeds the uplift is 0."""
    monkeypatch.setattr(first_batches, "TREND", 3)
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "replay_control": True}
    common |= {"verifier_deadline_s": 60.0}  # on a busy machine, too
    whole = build(tmp_path, **common)
    with caplog.at_level(logging.WARNING, first_batches.__name__):
        whole.train()
        assert caplog.text.count("Step 3: Lessons do not lift replays over plain resampling: +0 points") == 1
        for checkpoint, warnings in ((2, 1), (3, 0)):
            caplog.clear()
            resumed = build(tmp_path, **common)
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
            assert caplog.text.count("Lessons do not lift replays") == warnings
            assert resumed.collapse.first_batches.state_dict() == whole.collapse.first_batches.state_dict()
    saved = read_state(tmp_path / "run" / "checkpoint-2")["first_batches"]
    assert saved["logs"]["mel/replay_uplift"] == 2


@pytest.mark.slow
def test_the_command_prints_the_line(tmp_path: Path) -> None:
    shown = " ".join(command(tmp_path).stdout.split())
    assert "first 1 logs: pass rate 0%, 0% of groups mixed" in shown
