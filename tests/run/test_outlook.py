"""Remaining time of a run: from phases, steps, tokens and evaluations with known lengths."""

from __future__ import annotations

import pytest

from mel_lite.run.outlook import WINDOW, Outlook


def measured(*steps: tuple[float, float, float], tokens: int = 100) -> Outlook:
    """Steps as (rollout, update, whole step) in seconds."""
    outlook = Outlook()
    for rollout_s, update_s, step_s in steps:
        outlook.phase_ended("rollout", rollout_s)
        outlook.phase_ended("update", update_s)
        outlook.step_ended(step_s, tokens)
    return outlook


def test_nothing_is_known_before_the_first_step() -> None:
    outlook = Outlook()
    outlook.phase_ended("rollout", 5.0)
    outlook.evaluated(60.0)
    assert outlook.remaining_s(9, open_phase=("update", 1.0)) is None and outlook.steps_for(1000) is None


def test_a_step_takes_the_mean_of_those_before() -> None:
    outlook = measured((6.0, 2.0, 10.0), (8.0, 4.0, 14.0))
    assert outlook.remaining_s(5) == 5 * 12.0
    assert outlook.remaining_s(0) == 0.0
    many = measured(*[(100.0, 100.0, 200.0)] * 5, *[(6.0, 2.0, 10.0)] * WINDOW)
    assert many.remaining_s(3) == pytest.approx(30.0), "the last ten count"


def test_the_current_step_takes_what_its_phases_have_not_taken_yet() -> None:
    outlook = measured((6.0, 2.0, 10.0))
    assert outlook.remaining_s(2, open_phase=("rollout", 4.0)) == 16.0
    outlook.phase_ended("rollout", 5.0)  # a second less than the step before: it is over all the same
    assert outlook.remaining_s(1, open_phase=("update", 0.5)) == (6.0 - 5.0) + (2.0 - 0.5) + 2.0
    assert outlook.remaining_s(1, open_phase=("rollout", 50.0)) == 4.0, "a long phase leaves the other ones"


def test_evaluations_to_come_are_added() -> None:
    outlook = measured((6.0, 2.0, 10.0))
    assert outlook.remaining_s(2, evaluations_left=1) == 20.0, "none was measured yet"
    outlook.evaluated(33.0)
    assert outlook.remaining_s(2, evaluations_left=2) == 20.0 + 66.0
    assert outlook.remaining_s(0, evaluations_left=1) == 33.0


def test_a_token_budget_is_a_number_of_steps() -> None:
    outlook = measured((6.0, 2.0, 10.0), tokens=300)
    outlook.step_ended(10.0, 100)
    assert outlook.steps_for(1000) == 5 and outlook.steps_for(1001) == 6 and outlook.steps_for(-5) == 0
    assert measured((6.0, 2.0, 10.0), tokens=0).steps_for(10) is None
