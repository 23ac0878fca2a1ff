"""Judges decide if a completion of a group is right. A verdict is not a reward: rewards may be shaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from mel_lite.data.cells import Fault, read_answer
from mel_lite.data.tasks import ANSWER_COLUMNS
from mel_lite.errors import DataError
from mel_lite.seeds import prompt_hash
from mel_lite.text import shorten
from mel_lite.types import Group, Verdict
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.thoughts import opened_thought

Judge = Callable[[Sequence[Group], Sequence[str]], list[Verdict]]
"""`judge(groups, texts)` returns the verdict on each text as an answer to its group's question, in order."""

VERDICT_COLUMN, REWARD_COLUMN = "mel_verdict", "mel_reward"
"""Columns of verdict and weighted reward: in what reward functions receive, and in the logged tables of rollouts."""


def answer_column(columns: Sequence[str]) -> str | None:
    """Return the dataset column that holds the reference answer, by its usual names. None when there is none."""
    return next((name for name in ANSWER_COLUMNS if name in columns), None)


def group_of(row: Mapping[str, Any], answer_column: str | None, prompt_end: str = "") -> Group:
    """Return the question of a dataset row as a Group without rollouts.

    `answer` is the text of `answer_column`, None where it has none; `columns` are all others but `prompt`.

    Raises: DataError for an answer that `read_answer` refuses.
    """
    value = None if answer_column is None else row.get(answer_column)
    try:
        answer = read_answer(value) or None
    except Fault as fault:
        raise DataError(f"column {answer_column!r}: {shorten(repr(value))} {fault}.") from fault
    columns = {name: value for name, value in row.items() if name not in ("prompt", answer_column)}
    return Group(row["prompt"], prompt_hash(row["prompt"]), (), answer, columns, prompt_end)


class AnswerJudge:
    """Judge that compares with the reference answer, in the worker processes of a `VerifyPool`.

    A completion whose prompt opened a thought is judged with that tag in front, so that it has no answer until the
    thought ends.
    """

    def __init__(self, pool: VerifyPool) -> None:
        self._pool = pool

    def __call__(self, groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        tags = self._pool.think_tags
        return self._pool.verify(
            [
                (opened_thought(g.prompt_end, tags) + text, g.answer or "", g.columns)
                for g, text in zip(groups, texts, strict=True)
            ]
        )


class RewardJudge:
    """Judge for datasets with reward functions but no reference answer: RIGHT when the weighted reward >= `threshold`.

    `rewards(groups, texts)` returns one reward per text. NaN (every function abstained) gives ABSTAIN.
    """

    def __init__(self, rewards: Callable[[Sequence[Group], Sequence[str]], Sequence[float]], threshold: float) -> None:
        self._rewards = rewards
        self._threshold = threshold

    def __call__(self, groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        return [self.verdict(reward) for reward in self._rewards(groups, texts)]

    def verdict(self, reward: float) -> Verdict:
        """Return the verdict for a reward."""
        if reward != reward:
            return Verdict.ABSTAIN
        return Verdict.RIGHT if reward >= self._threshold else Verdict.WRONG


def completion_text(completion: Any) -> str:
    """Return the text of a completion as TRL passes it to reward functions: a string, or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def judged_text(completion: Any) -> str:
    """Return the text of a completion that may hold its answer.

    Of a completion with tool calls, it is what follows the last result: a result is no answer of the model.
    """
    if isinstance(completion, str):
        return completion
    last_turns = list(takewhile(lambda message: message.get("role") != "tool", reversed(completion)))
    return completion_text(last_turns[::-1])
