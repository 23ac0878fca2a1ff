"""Intervals of means and paired differences over runs and tasks.

R runs (seeds), P tasks (prompts).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mel_lite.intervals import Estimate, widened

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 4000


def interval(values_RP: np.ndarray) -> Estimate:
    """Return the mean and its 95 % percentile bootstrap interval; runs and tasks are resampled independently.

    With one run only the tasks are resampled, so the interval says nothing about other seeds. Where all resamples are
    equal, the interval is `widened`. Values are shares in [0, 1], or their differences in [-1, 1].
    """
    import numpy as np

    generator = np.random.default_rng(0)
    runs, tasks = values_RP.shape
    means = [
        values_RP[generator.integers(runs, size=runs)].mean(0)[generator.integers(tasks, size=tasks)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return widened(float(values_RP.mean()), float(low), float(high), tasks)


def difference(one_RP: np.ndarray, other_RP: np.ndarray, *, paired_runs: bool) -> Estimate:
    """Return mean(one) - mean(other) over the same tasks, with its 95 % bootstrap interval.

    Args:
        paired_runs: row i of both has the same seed, so rows are resampled together; otherwise independently.
    """
    import numpy as np

    if paired_runs:
        return interval(one_RP - other_RP)
    generator = np.random.default_rng(0)
    tasks = one_RP.shape[1]
    means = []
    for _ in range(RESAMPLES):
        each_P = [rows[generator.integers(len(rows), size=len(rows))].mean(0) for rows in (one_RP, other_RP)]
        means.append((each_P[0] - each_P[1])[generator.integers(tasks, size=tasks)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return widened(float(one_RP.mean() - other_RP.mean()), float(low), float(high), tasks)


def measures(greedy_right: Any, samples_right: Any, samples: int) -> dict[str, np.ndarray]:
    """Return Pass@1 (greedy), Avg@k and Pass@k for k = samples, each of the shape of the counts (runs, tasks)."""
    import numpy as np

    right_RP = np.asarray(samples_right)
    greedy_RP = np.asarray(greedy_right, dtype=float)
    return {"pass_at_1": greedy_RP, "avg_at_k": right_RP / samples, "pass_at_k": (right_RP > 0).astype(float)}
