"""Judges: who says whether a completion of a group is right. A verdict is not a reward; rewards may be shaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mel_lite.data.tasks import ANSWER_COLUMNS
from mel_lite.types import Group, Verdict
from mel_lite.verify.pool import VerifyPool

Judge = Callable[[Sequence[Group], Sequence[str]], list[Verdict]]
"""`judge(groups, texts)`: the verdict on each text as an answer to the group's question, in order."""


def answer_column(columns: Sequence[str]) -> str | None:
    """The dataset column that holds the reference answer, by its usual names; None when there is none."""
    return next((name for name in ANSWER_COLUMNS if name in columns), None)


class AnswerJudge:
    """Compares with the reference answer, in the killable worker processes of a `VerifyPool`."""

    def __init__(self, pool: VerifyPool) -> None:
        self._pool = pool

    def __call__(self, groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        return self._pool.verify([(text, g.answer or "", g.columns) for g, text in zip(groups, texts, strict=True)])


class RewardJudge:
    """Right when the weighted reward reaches a threshold: for datasets that have reward functions but no answer.

    `rewards(groups, texts)` returns one reward per text; NaN (every function abstained) gives ABSTAIN.
    """

    def __init__(self, rewards: Callable[[Sequence[Group], Sequence[str]], Sequence[float]], threshold: float) -> None:
        self._rewards = rewards
        self._threshold = threshold

    def __call__(self, groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        return [self.verdict(reward) for reward in self._rewards(groups, texts)]

    def verdict(self, reward: float) -> Verdict:
        """The verdict a reward stands for."""
        if reward != reward:
            return Verdict.ABSTAIN
        return Verdict.RIGHT if reward >= self._threshold else Verdict.WRONG


def completion_text(completion: Any) -> str:
    """The text of a completion as TRL hands it to reward functions: a string, or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)
