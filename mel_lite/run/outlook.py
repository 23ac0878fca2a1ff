"""Remaining time of a run, from the phases measured so far."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping

WINDOW = 10
"""Steps that means are taken over."""
OTHER = "other"
"""Time of a step outside its phases: checkpoints, logs, the optimizer."""


class Outlook:
    """Adds up phases, steps and evaluations, and predicts the rest from their means over the last WINDOW steps."""

    def __init__(self) -> None:
        self._steps: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._tokens: deque[int] = deque(maxlen=WINDOW)
        self._current: defaultdict[str, float] = defaultdict(float)
        self._evaluation_s: float | None = None

    def phase_ended(self, name: str, seconds_s: float) -> None:
        """Count a phase of the current step."""
        self._current[name] += seconds_s

    def step_ended(self, seconds_s: float, tokens: int) -> None:
        """Count a step that took `seconds_s` in all, without evaluations, and generated `tokens`."""
        self._current[OTHER] = max(0.0, seconds_s - sum(self._current.values()))
        self._steps.append(dict(self._current))
        self._tokens.append(tokens)
        self._current.clear()

    def evaluated(self, seconds_s: float) -> None:
        """Note how long one evaluation takes."""
        self._evaluation_s = seconds_s

    def steps_for(self, tokens_left: int) -> int | None:
        """Return the steps in which that many tokens are generated; None before the first step, or without tokens."""
        generated = sum(self._tokens)
        return math.ceil(max(0, tokens_left) * len(self._tokens) / generated) if generated else None

    def remaining_s(
        self, steps_left: int, *, evaluations_left: int = 0, open_phase: tuple[str, float] = ("", 0.0)
    ) -> float | None:
        """Return the seconds until the end; None before the first step.

        Of the current step, each phase still takes its mean minus what it has taken so far.

        Args:
            steps_left: steps that are not done, with the current one.
            open_phase: the phase that is going on, and the seconds since it began.
        """
        if not self._steps:
            return None
        if steps_left < 1:
            return self._evaluations_s(evaluations_left)
        means: defaultdict[str, float] = defaultdict(float)
        steps = tuple(self._steps)  # a copy, since the view is drawn in a thread of its own
        for step in steps:
            for name, seconds_s in step.items():
                means[name] += seconds_s / len(steps)
        spent = defaultdict(float, self._current)
        spent[open_phase[0]] += open_phase[1]
        current_s = sum(max(0.0, mean_s - spent[name]) for name, mean_s in means.items())
        return current_s + (steps_left - 1) * sum(means.values()) + self._evaluations_s(evaluations_left)

    def _evaluations_s(self, count: int) -> float:
        return count * (self._evaluation_s or 0.0)


__all__ = ["Outlook"]
