"""Scored proof: the shift of a lesson against full logits, and what it does in the funnel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import ConfigError
from mel_lite.lessons.scored import score_shifts
from mel_lite.types import Group, Status, Verdict
from teaching import Caught, catch, varied
from trainers import build

QUIET: dict[str, Any] = {"internalisation": "analysis", "mel_weight": 0.0}


def shift_by_hand(caught: Caught, group: Group, text: str) -> float:
    """mean over right - mean over wrong of sum_t log pi(y_t | x, M) - log pi(y_t | x), from full logits."""
    gains: dict[Verdict, list[float]] = {verdict: [] for verdict in Verdict}
    for row, (_, rollout) in enumerate(caught.rows):
        if rollout.index in [each.index for each in group.rollouts]:
            verdict = next(each.verdict for each in group.rollouts if each.index == rollout.index)
            gains[verdict].append((caught.picked(row, text).sum() - caught.picked(row).sum()).item())
    right, wrong = gains[Verdict.RIGHT], gains[Verdict.WRONG]
    return sum(right) / len(right) - sum(wrong) / len(wrong)


def test_shifts_are_those_of_full_logits(tmp_path: Path) -> None:
    caught = catch(tmp_path, **QUIET)
    context, groups = caught.trainer.lesson_context, caught.drawn.groups
    mixed = [group for group in groups if group.is_mixed]
    texts = ("## Heuristics\n- Count on fingers.", "Name the operation.")
    items = [(group, text) for group in mixed for text in texts]
    found = score_shifts(items, context)
    assert found == pytest.approx([shift_by_hand(caught, *item) for item in items], rel=1e-4)
    assert len(items) >= 4 and min(abs(shift) for shift in found if shift is not None) > 1e-3


def test_only_judged_rollouts_count_and_only_mixed_groups_have_a_shift(tmp_path: Path) -> None:
    caught = catch(tmp_path, **QUIET)
    context, groups = caught.trainer.lesson_context, caught.drawn.groups
    group = next(group for group in groups if len(group.right) > 1 and group.wrong)
    unsure = replace(group.right[0], verdict=Verdict.ABSTAIN)
    partly = replace(group, rollouts=tuple(unsure if r is group.right[0] else r for r in group.rollouts))
    (whole, part) = score_shifts([(group, "Count."), (partly, "Count.")], context)
    assert part == pytest.approx(shift_by_hand(caught, partly, "Count."), rel=1e-4)
    assert abs(part - whole) > 1e-3
    unmixed = [group for group in groups if not group.is_mixed]
    assert {bool(group.right) for group in unmixed} == {True, False}, "all right, and all wrong"
    assert score_shifts([(group, "Count.") for group in unmixed], context) == [None] * len(unmixed)


def test_rollouts_that_do_not_fit_with_the_lesson_are_not_scored(tmp_path: Path) -> None:
    caught = catch(tmp_path, **QUIET)
    context = caught.trainer.lesson_context
    group = next(group for group in caught.drawn.groups if group.is_mixed)
    row = next(row for row, (_, rollout) in enumerate(caught.rows) if rollout is group.rollouts[0])
    tokens = len(caught.prompt(row, "Count.")) + max(len(each.completion_ids) for each in group.rollouts)
    (fits,) = score_shifts([(group, "Count.")], replace(context, context_tokens=tokens))
    assert fits is not None
    assert score_shifts([(group, "Count.")], replace(context, context_tokens=tokens - 1)) == [None]


BOTH_SIGNS: dict[str, Any] = QUIET | {"analysis": varied, "seed": 0}
"""A batch with lessons of both signs."""


def watch_engine(trainer: Any, events: list[str]) -> None:
    """Record when the engine wakes, sleeps and generates, and when texts are scored."""
    engine = trainer.engine.unmetered
    for owner, name in ((engine, "wake"), (engine, "sleep"), (engine, "generate"), (trainer.scorer, "logps")):
        original = getattr(owner, name)

        def see(*arguments: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            events.append("score" if _name == "logps" else _name)
            return _original(*arguments, **named)

        setattr(owner, name, see)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["scored", "scored+solved", "scored+uplift"])
def test_what_does_not_lift_the_right_rollouts_is_dropped_before_any_replay(tmp_path: Path, criterion: str) -> None:
    caught = catch(tmp_path, replay_criterion=criterion, **BOTH_SIGNS)
    drawn = [each for _, each in caught.drawn.experiences]
    by_hand = [shift_by_hand(caught, each.analysis.pair.group, each.text) for each in drawn]
    assert [each.shift_nats for each in drawn] == pytest.approx(by_hand, rel=1e-4)
    lifting = [shift > 0 for shift in by_hand]
    assert any(lifting) and not all(lifting)
    for each, lifts in zip(drawn, lifting, strict=True):
        replayed = lifts and criterion != "scored"
        assert (each.replay is not None) is replayed
        assert bool(replayed and each.replay.control_verdicts) is (replayed and criterion == "scored+uplift")
        if not lifts:
            assert each.status is Status.NOT_LIFTING
            assert (
                each.reason
                == f"it lifts the right rollouts by {each.shift_nats:+.2f} nats over the wrong ones, more than 0 needed"
            )
        elif criterion == "scored":
            assert (each.status, each.reason) == (Status.KEPT, "")
        else:
            right = each.replay.uplift > 0 if criterion == "scored+uplift" else each.replay.solved_rate > 0.5
            assert each.status is (Status.KEPT if right else Status.REPLAY_FAILED)

    kept = sum(each.status is Status.KEPT for each in drawn)
    rows = caught.trainer.store.list()
    assert [row.status for row in rows] == [each.status for each in drawn]
    assert caught.trainer.store.funnel()[Status.NOT_LIFTING] == lifting.count(False)
    logged = {name: values[-1] for name, values in caught.logged.items()}
    assert logged["mel/score_shift"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)
    assert logged["mel/score_valid"] == pytest.approx(lifting.count(True) / len(lifting))
    assert (logged["mel/unscored"], logged["mel/replay_valid"]) == (0, kept)
    assert ("mel/replay_solved" in logged) is (criterion != "scored")


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("scored", ["wake", "generate", "sleep", "score", "sleep"]),
        ("scored+solved", ["wake", "generate", "sleep", "score", "wake", "generate", "sleep"]),
    ],
)
def test_the_engine_sleeps_while_texts_are_scored(tmp_path: Path, criterion: str, expected: list[str]) -> None:
    events: list[str] = []
    catch(tmp_path, replay_criterion=criterion, change=lambda trainer: watch_engine(trainer, events), **BOTH_SIGNS)
    lessons = events[events.index("wake", 1) :]  # after the rollouts
    changes = [name for i, name in enumerate(lessons) if i == 0 or name != lessons[i - 1]]
    assert changes[: len(expected)] == expected


def test_lessons_over_the_context_are_dropped_with_their_reason_and_counted(tmp_path: Path) -> None:
    def shorten(trainer: Any) -> None:
        trainer.lesson_context = replace(trainer.lesson_context, context_tokens=300)

    caught = catch(tmp_path, replay_criterion="scored", change=shorten, **QUIET)
    rows = caught.trainer.store.list()
    assert rows and {(row.status, row.reason) for row in rows} == {
        (Status.NOT_LIFTING, "the rollouts with it in their prompts do not fit the model's context")
    }
    assert caught.logged["mel/unscored"] == [len(rows)] and "mel/score_shift" not in caught.logged


def test_lessons_that_need_a_replay_are_refused_without_one(tmp_path: Path) -> None:
    for name in ("replay", "both", {"analysis": 1.0, "replay": 0.5}):
        with pytest.raises(ConfigError, match="trains on replays, but replay_criterion='scored' generates none"):
            build(tmp_path, internalisation=name, replay_criterion="scored")
    build(tmp_path, internalisation="replay", replay_criterion="scored+uplift")
