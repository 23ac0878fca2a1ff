"""Difficulty memory: prompts that teach nothing now rest for some batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mel_lite.types import Group, Rollout, Verdict

MOST_DOUBLINGS = 5
"""A prompt rests at most 2**5 times as long as at first."""


class DifficultyMemory:
    """Rests a prompt after `after` groups in a row that were all right, or that had no right completion.

    A rest lasts `batches` generation batches, and twice as long each time the prompt comes back unchanged. A group of
    another outcome ends the row. All methods are deterministic, so ranks that see the same groups stay equal.
    """

    def __init__(self, after: int, batches: int) -> None:
        self.after, self.batches = after, batches
        self._streaks: dict[str, list[int]] = {}
        """By prompt hash: outcome (1 solved, -1 failed), groups in a row, rests so far, first batch after the rest."""

    def rests(self, prompt_hash: str, batch: int) -> bool:
        """Return True while the prompt rests at this generation batch."""
        return prompt_hash in self._streaks and batch < self._streaks[prompt_hash][3]

    def resting(self, batch: int) -> int:
        """Return the number of prompts that rest at this generation batch."""
        return sum(batch < row[3] for row in self._streaks.values())

    def saw(self, group: Group, batch: int) -> None:
        """Count a group that was sampled at this generation batch."""
        key, outcome = group.prompt_hash, _outcome(group.rollouts)
        if outcome == 0:
            self._streaks.pop(key, None)
            return
        before, streak, rests, until = self._streaks.get(key, (outcome, 0, 0, 0))
        if before != outcome:
            streak, rests, until = 0, 0, 0
        streak += 1
        if streak >= self.after:
            until = batch + 1 + self.batches * 2 ** min(rests, MOST_DOUBLINGS)
            streak, rests = self.after - 1, rests + 1  # back from its rest, one more such group is enough
        self._streaks[key] = [outcome, streak, rests, until]

    def state_dict(self) -> dict[str, Any]:
        return {"difficulty_memory": self._streaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._streaks = {key: list(row) for key, row in state.get("difficulty_memory", {}).items()}


def _outcome(rollouts: Sequence[Rollout]) -> int:
    """Return 1 when all completions are right, -1 when none is, else 0."""
    right = sum(rollout.verdict is Verdict.RIGHT for rollout in rollouts)
    return 1 if right == len(rollouts) else -1 if right == 0 else 0
