"""Notes in a teacher's prompt: the texts that may be put before the question of each rollout of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mel_lite.lessons.bank import notes_text
from mel_lite.lessons.internalise.protocol import DrawnBatch, RolloutBatch
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.models.chat import question_text
from mel_lite.types import Choice, Group, Lesson, Rollout, Verdict


class NoteSource(Choice):
    """Origin of the notes that a teacher reads."""

    OWN = "own", "The kept meta-experiences of the rollout's own group."
    BANK = "bank", "The heuristics of the lesson bank that match the question."
    SIBLING = "sibling", "Another right rollout of the group; no lesson is written."
    SIBLING_BANK = "sibling+bank", "A sibling where there is one, else the bank."
    NONE = "none", "No notes; a control."


class LessonsPerPrompt(Choice):
    """Number of lessons in one teacher prompt."""

    ONE = "one", "One; the rollouts of a group take turns."
    ALL = "all", "All that match."


class TaughtRows(Choice):
    """Rollouts that are taught."""

    ALL = "all", "All with notes, also in groups where every rollout is wrong."
    WRONG = "wrong", "Wrong ones."


def notes_of(
    drawn: DrawnBatch, batch: RolloutBatch, source: str, *, per_prompt: str, shuffled: bool
) -> list[str | None]:
    """Return the notes for each rollout of this rank, None where there are none.

    `shuffled` takes the notes of the next group that has some: the control for what the content of a lesson is worth.
    """
    offers = [_offer(drawn, group, source) for group in drawn.groups]
    notes: list[str | None] = []
    for _, rollout in batch.rows:
        number, turn = drawn.place_of(rollout)
        offer = offers[number]
        if shuffled:
            others = offers[number + 1 :] + offers[:number]
            offer = next(filter(None, others), _Offer())
        notes.append(offer.pick(rollout, turn, per_prompt))
    return notes


def taught_notes(batch: RolloutBatch, notes: Sequence[str | None], taught: str) -> list[str | None]:
    """Return the notes of the rollouts that `taught`, a TaughtRows, names; abstained ones are never taught."""
    verdicts = (Verdict.WRONG,) if taught == TaughtRows.WRONG else (Verdict.RIGHT, Verdict.WRONG)
    rows = zip(notes, batch.rows, strict=True)
    return [note if rollout.verdict in verdicts else None for note, (_, rollout) in rows]


def teacher_texts(drawn: DrawnBatch, batch: RolloutBatch, notes: Sequence[str | None]) -> list[Lesson | None]:
    """Return each rollout as an answer to its question with the notes in the prompt.

    None where there are no notes, where the rollout is masked, or where the text does not fit the model's context.
    """
    context = drawn.context
    live = batch.entries["completion_mask"].any(dim=1).tolist()
    texts: list[Lesson | None] = []
    for (group, rollout), note, is_live in zip(batch.rows, notes, live, strict=True):
        text = None
        if note is not None and is_live:
            kwargs = context.chat_template_kwargs
            if note:
                prompt = replay_prompt(group, note, context.tokenizer, context.templates, chat_template_kwargs=kwargs)
            else:
                prompt = question_prompt(group, context.tokenizer, chat_template_kwargs=kwargs)
            if len(prompt) + len(rollout.completion_ids) <= context.context_tokens:
                text = Lesson(0, prompt, rollout.completion_ids)
        texts.append(text)
    return texts


def plain_text(drawn: DrawnBatch, group: Group, rollout: Rollout) -> Lesson:
    """Return a rollout as an answer to its question alone."""
    context = drawn.context
    prompt = question_prompt(group, context.tokenizer, chat_template_kwargs=context.chat_template_kwargs)
    return Lesson(0, prompt, rollout.completion_ids)


@dataclass(frozen=True, slots=True)
class _Offer:
    """All notes that a group offers."""

    siblings: tuple[Rollout, ...] = ()
    lessons: tuple[Any, ...] = ()
    join: Callable[[Sequence[Any]], str] = "\n\n".join
    """Makes one text of some of the lessons."""

    def __bool__(self) -> bool:
        return bool(self.siblings or self.lessons)

    def pick(self, rollout: Rollout, turn: int, per_prompt: str) -> str | None:
        """Return the notes for a rollout: another right rollout, else one lesson or all."""
        siblings = [each.text for each in self.siblings if each.index != rollout.index]
        if siblings:
            return siblings[turn % len(siblings)]
        if not self.lessons:
            return None
        every = per_prompt == LessonsPerPrompt.ALL
        return self.join(self.lessons if every else [self.lessons[turn % len(self.lessons)]])


def _offer(drawn: DrawnBatch, group: Group, source: str) -> _Offer:
    if source == NoteSource.NONE:
        return _Offer(lessons=("",))
    if source == NoteSource.OWN:
        first = group.rollouts[0].index
        kept = [each for _, each in drawn.kept if each.analysis.pair.group.rollouts[0].index == first]
        return _Offer(lessons=tuple(each.text for each in kept))
    siblings = group.right if source != NoteSource.BANK and group.is_mixed else ()
    if source == NoteSource.SIBLING:
        return _Offer(siblings)
    assert drawn.bank is not None, "a way that uses the bank gets one"
    return _Offer(siblings, tuple(drawn.bank.retrieve(question_text(group.prompt))), notes_text)


__all__ = [
    "LessonsPerPrompt",
    "NoteSource",
    "TaughtRows",
    "notes_of",
    "plain_text",
    "taught_notes",
    "teacher_texts",
]
