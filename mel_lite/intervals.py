"""Estimates of shares with 95 % intervals that are honest at 0 and 100 %.

P tasks (prompts), N trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True when the whole interval is above or below zero."""
        return self.low > 0 or self.high < 0

    def as_share(self) -> str:
        """Return it in percent, such as `58.5% [51.5%, 65.0%]`."""
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"

    def as_points(self) -> str:
        """Return a difference of shares in percentage points, such as `+4.2 [+1.6, +6.5]`."""
        return " [".join((f"{100 * self.value:+.1f}", f"{100 * self.low:+.1f}, {100 * self.high:+.1f}]"))


def wilson(right: float, n: float) -> Estimate:
    """Return the share right / n with its Wilson score interval, which has a width at 0 and at 1, too.

    Both may be fractions: an effective number of trials. Raises: ValueError unless 0 <= right <= n and n > 0.
    Source: Wilson 1927, J. Am. Stat. Assoc. 22.
    """
    if not (n > 0 and 0 <= right <= n):
        raise ValueError(f"right={right} of n={n} trials is no share.")
    share, z2 = right / n, Z95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def share_of_tasks(values_P: Sequence[float], samples: int = 1) -> Estimate:
    """Return the mean of one share per task, with the Wilson interval of the effective number of answers.

    Samples of one task are alike, so `samples` answers to each of P tasks count less than P x samples independent ones:
    n = p (1 - p) / Var(mean), Var(mean) = the variance between tasks / P, at least P and at most P x samples. At p = 0
    or 1, n = P. Values are in [0, 1].
    """
    count = len(values_P)
    share = math.fsum(values_P) / count
    spread = math.fsum((value - share) ** 2 for value in values_P) / max(1, count - 1) / count
    n = float(count)
    if 0 < share < 1:
        n = min(count * samples, max(n, share * (1 - share) / spread if spread else math.inf))
    return wilson(min(n, max(0.0, share * n)), n)


def widened(value: float, low: float, high: float, tasks: int) -> Estimate:
    """Return the estimate; where low = high, with the interval `value -+ (1 - 0.025^(1/tasks))`.

    That is the share of tasks that could be different and still be missed by this many draws. The value is a share in
    [0, 1], or a difference of shares in [-1, 1].
    """
    if low < high:
        return Estimate(value, low, high)
    missed = 1 - 0.025 ** (1 / tasks)
    return Estimate(value, max(-1.0, value - missed), min(1.0, value + missed))
