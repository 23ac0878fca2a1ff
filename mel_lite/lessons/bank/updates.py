"""Use and update a lesson bank in training.

Questions and forks that the bank settles get no lesson. Mixed groups examine the lessons that match them, and then the
kept lessons of the batch enter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mel_lite.lessons.bank import LessonBank, examine, notes_text
from mel_lite.lessons.bank.bank import Shifts
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.internalise import DrawnBatch
from mel_lite.lessons.pairs import select_pairs
from mel_lite.lessons.prompts import replay_prompt
from mel_lite.lessons.scored import score_shifts
from mel_lite.models.chat import question_text
from mel_lite.types import Group, Lesson, Pair


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes among which reading is shared out."""

    rank: int
    world: int
    gather: Callable[[list[Any]], list[Any]]
    """Concatenates the lists of all ranks."""


def choose_pairs(
    groups: Sequence[Group],
    bank: LessonBank | None,
    context: LessonContext,
    ranks: Ranks,
    *,
    per_group: int,
    strategy: str,
    step: int,
) -> tuple[list[Pair], dict[str, float]]:
    """Return the pairs of a batch that a lesson is written for, and how many groups and pairs the bank spared one.

    They are those of `select_pairs`; with a bank, only of questions that are not settled, and those with an open fork.
    """
    asked = [group for group in groups if bank is None or not bank.settled(question_text(group.prompt))]
    pairs = select_pairs(asked, per_group=per_group, strategy=strategy, run_seed=context.run_seed, step=step)
    if bank is None:
        return pairs, {}
    with context.clock("forks"):
        still_open = open_forks(bank, pairs, context, ranks)
    return still_open, {
        "mel/bank_settled_groups": float(len(groups) - len(asked)),
        "mel/bank_settled_pairs": float(len(pairs) - len(still_open)),
    }


def open_forks(bank: LessonBank, pairs: Sequence[Pair], context: LessonContext, ranks: Ranks) -> list[Pair]:
    """Return the pairs whose fork the bank's lessons do not settle yet, in order.

    A fork is settled when the policy with the lessons that teach the question in its prompt prefers the right step:
    log pi(a+ | x, M, y_<f) - log pi(a- | x, M, y_<f) >= `settled_nats`, with a+ and a- the first tokens after the f
    tokens that both solutions share. Always open: a question that no lesson teaches, a solution that ends at the fork,
    and a prompt that does not fit the model's context. Every rank scores its share of the pairs and gets all results.
    """
    least = bank.options.settled_nats
    if least is None or not pairs:
        return list(pairs)
    mine = range(ranks.rank, len(pairs), ranks.world)
    texts = {i: text for i in mine if (text := _at_fork(bank, pairs[i], context)) is not None}
    settled = []
    if texts:
        assert context.scorer is not None, "a bank is read by the policy"
        context.engine.sleep()  # scoring needs the memory
        logps = iter(context.scorer.logps([each for both in texts.values() for each in both]))
        settled = [i for i, right, wrong in zip(texts, logps, logps, strict=True) if float(right - wrong) >= least]
    known = set(ranks.gather(settled))
    return [pair for i, pair in enumerate(pairs) if i not in known]


def _at_fork(bank: LessonBank, pair: Pair, context: LessonContext) -> tuple[Lesson, Lesson] | None:
    """Return the right and the wrong token at the fork as targets after the notes; None where there is no telling."""
    fork = pair.common_prefix_tokens
    right, wrong = (rollout.completion_ids[: fork + 1] for rollout in (pair.right, pair.wrong))
    lessons = bank.retrieve(question_text(pair.group.prompt))
    if not lessons or min(len(right), len(wrong)) <= fork:
        return None
    prompt = replay_prompt(
        pair.group, notes_text(lessons), context.tokenizer, context.templates,
        chat_template_kwargs=context.chat_template_kwargs,
    )  # fmt: skip
    if len(prompt) + fork + 1 > context.context_tokens:
        return None
    return Lesson(0, prompt + right[:fork], right[fork:]), Lesson(0, prompt + wrong[:fork], wrong[fork:])


def update_bank(bank: LessonBank, drawn: DrawnBatch, ranks: Ranks) -> dict[str, float]:
    """Examine, then add the kept lessons of this batch; returns the bank's metrics.

    In that order, since a lesson was validated by the very group it was drawn from. Every rank scores its share of the
    examinations and gets all results, so that all banks stay equal.
    """
    shifts = spread(partial(score_shifts, context=drawn.context), ranks)
    examinations = examine(bank, drawn.groups, shifts)
    for row_id, experience in drawn.kept:
        bank.add(row_id, experience)
    return bank.metrics(drawn.groups) | {"mel/bank_examinations": float(examinations)}


def spread(shifts: Shifts, ranks: Ranks) -> Shifts:
    """Return `shifts` with its items shared out to the ranks; every rank gets all results, in order."""

    def shared(items: Sequence[tuple[Group, str]]) -> list[float | None]:
        mine = range(ranks.rank, len(items), ranks.world)
        local = list(zip(mine, shifts([items[i] for i in mine]), strict=True))
        return [shift for _, shift in sorted(ranks.gather(local), key=lambda each: each[0])]

    return shared


__all__ = ["Ranks", "choose_pairs", "open_forks", "spread", "update_bank"]
