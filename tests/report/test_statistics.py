"""Intervals against published values, at their edges, and by how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from mel_lite.intervals import share_of_tasks, wilson
from mel_lite.report.statistics import difference, interval


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 100, 0.0018, 0.0545)],
)
def test_wilson_has_its_published_values(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (right / n, low, high)


@pytest.mark.parametrize(("right", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_what_is_no_share_is_refused(right: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"right={right} of n={n}"):
        wilson(right, n)


def test_a_task_counts_once_where_its_samples_are_all_alike() -> None:
    """Ten tasks that are always or never solved are ten answers, however many samples each has."""
    alike = share_of_tasks([1.0] * 5 + [0.0] * 5, samples=8)
    assert alike.value == 0.5 and abs(alike.low - 0.2366) < 0.02 and abs(alike.high - 0.7634) < 0.02
    coins = share_of_tasks([0.5] * 10, samples=8)
    assert coins == wilson(40, 80)
    for value in (0.0, 1.0):
        assert share_of_tasks([value] * 10, samples=8) == wilson(10 * value, 10)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 0.3), (9.0, 1.0)])
def test_the_share_of_tasks_holds_the_truth_as_often_as_it_says(a: float, b: float) -> None:
    generator, samples, held = np.random.default_rng(7), 4, 0
    for _ in range(400):
        right = generator.binomial(samples, generator.beta(a, b, size=40))
        found = share_of_tasks((right / samples).tolist(), samples)
        held += found.low <= a / (a + b) <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_the_bootstrap_is_of_runs_and_of_tasks() -> None:
    values = np.array([[0.1, 0.3, 0.2, 0.4], [0.5, 0.7, 0.6, 0.8]])
    both = interval(values)
    assert both.value == pytest.approx(0.45)
    one = interval(values[:1])
    assert one.value == pytest.approx(0.25) and 0.1 < one.low < 0.2 and 0.3 < one.high < 0.4
    assert both.high - both.low > 2 * (one.high - one.low), "two runs that differ by 0.4"
    # Runs alone: their mean is 0.25, 0.45 or 0.65 with probabilities 1/4, 1/2 and 1/4.
    flat = interval(np.array([[0.25] * 4, [0.65] * 4]))
    assert (flat.low, flat.high) == (pytest.approx(0.25), pytest.approx(0.65))


def test_no_change_on_few_tasks_is_not_certainty() -> None:
    none = interval(np.zeros((1, 12)))
    assert none.value == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 12)) and none.low == -none.high
    assert none.high > interval(np.zeros((1, 200))).high > 0.018
    assert not none.excludes_zero
    certain = interval(np.ones((1, 12)))
    assert certain.high == 1 and certain.low == pytest.approx(0.025 ** (1 / 12))


def test_a_pair_of_runs_with_the_same_seeds_is_compared_seed_by_seed() -> None:
    """The runs differ much from seed to seed, and the arms differ by 0.1 on every seed."""
    luck = np.array([[0.1], [0.3], [0.5], [0.7]]) + np.zeros((1, 20))
    paired = difference(luck + 0.1, luck, paired_runs=True)
    assert paired.value == pytest.approx(0.1) and paired.low > 0
    independent = difference(luck + 0.1, luck, paired_runs=False)
    assert independent.value == pytest.approx(0.1) and independent.low < 0 < independent.high


def test_estimates_are_shown_as_shares_and_as_points() -> None:
    found = wilson(5, 10)
    assert found.as_share() == "50.0% [23.7%, 76.3%]"
    assert found.as_points() == "+50.0 [+23.7, +76.3]"
