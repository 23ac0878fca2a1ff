"""What the probe measures on lessons: shifts from the fork on, and which the run's criterion keeps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiences import experience, lesson_context
from mel_lite.run.probe.lessons import settled, shift_from_fork
from mel_lite.types import Group, Replay, Rollout, Status, Verdict
from tiny_models import tiny_tokenizer

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG


def test_the_share_of_a_shift_from_the_fork_on() -> None:
    """Two wrong rollouts that leave the right one after 2 tokens: |shift| 1 + 1 + 3 + 1 and 0 + 1 + 2."""
    right = Rollout(0, (5, 6, 7, 2), "a", RIGHT)
    wrong = (Rollout(1, (5, 6, 8, 2), "b", WRONG), Rollout(2, (5, 6, 9), "c", WRONG))
    group = Group("q", "h", (right, *wrong), answer="1")
    lesson = experience()
    lesson = replace(lesson, analysis=replace(lesson.analysis, pair=replace(lesson.analysis.pair, group=group)))
    with_lesson = [[-1.0, 1.0, -3.0, -1.0], [0.0, -1.0, 2.0]]

    def logps(texts: Any) -> list[torch.Tensor]:
        rows = [*with_lesson, [0.0] * 4, [0.0] * 3]
        assert [text.target_ids for text in texts] == [rollout.completion_ids for rollout in wrong] * 2
        assert len(texts[0].context_ids) > len(texts[2].context_ids), "the lesson is in the first prompts"
        return [torch.tensor(row) for row in rows]

    context = lesson_context(tiny_tokenizer(), scorer=SimpleNamespace(logps=logps))
    assert shift_from_fork([lesson], context) == pytest.approx((6 / 9, 3 / 7))
    assert shift_from_fork([], context) is None


@pytest.mark.parametrize(
    ("criterion", "shift", "solved", "control", "status"),
    [
        ("solved", -1.0, 2, 2, Status.KEPT),
        ("solved", 1.0, 1, 0, Status.REPLAY_FAILED),
        ("uplift", -1.0, 1, 0, Status.KEPT),
        ("uplift", 1.0, 2, 2, Status.REPLAY_FAILED),
        ("scored", 1.0, 0, 2, Status.KEPT),
        ("scored", 0.0, 2, 0, Status.NOT_LIFTING),
        ("scored", None, 2, 0, Status.NOT_LIFTING),
        ("scored+solved", 1.0, 1, 0, Status.REPLAY_FAILED),
        ("scored+uplift", 1.0, 1, 0, Status.KEPT),
    ],
)
def test_the_runs_own_criterion_keeps(
    criterion: str, shift: float | None, solved: int, control: int, status: Status
) -> None:
    verdicts = (RIGHT,) * solved + (WRONG,) * (2 - solved)
    without = (RIGHT,) * control + (WRONG,) * (2 - control)
    proved = settled(replace(experience(), replay=Replay(verdicts, ("", ""), without)), shift, criterion)
    assert proved.status is status and proved.shift_nats == shift and bool(proved.reason) == (status != "kept")
