"""Update a lesson bank with a training batch: mixed groups re-examine what matches them, then kept lessons enter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mel_lite.lessons.bank import LessonBank, examine
from mel_lite.lessons.bank.bank import Shifts
from mel_lite.lessons.internalise import DrawnBatch
from mel_lite.lessons.scored import score_shifts
from mel_lite.models.chat import question_text
from mel_lite.types import Group

Gather = Callable[[list[Any]], list[Any]]
"""Concatenates the lists of all ranks."""


def unsettled(bank: LessonBank | None, groups: Sequence[Group]) -> list[Group]:
    """Return the groups that lessons are written for: all, or with a bank those whose questions are not settled."""
    return [group for group in groups if bank is None or not bank.settled(question_text(group.prompt))]


def update_bank(bank: LessonBank, drawn: DrawnBatch, *, rank: int, world: int, gather: Gather) -> dict[str, float]:
    """Examine, then add the kept lessons of this batch; returns the bank's metrics.

    In that order, since a lesson was validated by the very group it was drawn from. Every rank scores its share of the
    examinations and gets all results, so that all banks stay equal.
    """
    settled = len(drawn.groups) - len(unsettled(bank, drawn.groups))
    shifts = spread(partial(score_shifts, context=drawn.context), rank=rank, world=world, gather=gather)
    examinations = examine(bank, drawn.groups, shifts)
    for row_id, experience in drawn.kept:
        bank.add(row_id, experience)
    return bank.metrics(drawn.groups) | {
        "mel/bank_settled_groups": float(settled),
        "mel/bank_examinations": float(examinations),
    }


def spread(shifts: Shifts, *, rank: int, world: int, gather: Gather) -> Shifts:
    """Return `shifts` with its items shared out to the ranks; every rank gets all results, in order."""

    def shared(items: Sequence[tuple[Group, str]]) -> list[float | None]:
        mine = range(rank, len(items), world)
        local = list(zip(mine, shifts([items[i] for i in mine]), strict=True))
        return [shift for _, shift in sorted(gather(local), key=lambda each: each[0])]

    return shared


__all__ = ["spread", "unsettled", "update_bank"]
