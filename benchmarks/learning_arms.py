"""The arms of the learning study: options of MELConfig, and changes to a step that no option makes (ablations)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mel_lite import MELTrainer
from mel_lite.lessons.parsing import lesson_from
from mel_lite.lessons.prompts import question_prompt
from mel_lite.types import Experience, Lesson, Status, Verdict

MEL: dict[str, Any] = {"algorithm": "mel"}


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch's lessons as the trainer makes them, and what they were made from."""

    lessons: list[Lesson]
    experiences: list[tuple[int, Experience]]
    """With their row ids, whatever became of them."""
    tokenizer: Any
    chat_template_kwargs: dict[str, Any]

    def kept(self) -> list[tuple[int, Experience]]:
        return [(number, each) for number, each in self.experiences if each.status is Status.KEPT]

    def question(self, each: Experience) -> tuple[int, ...]:
        """x alone."""
        return question_prompt(each.analysis.pair.group, self.tokenizer, chat_template_kwargs=self.chat_template_kwargs)


def failed(drawn: Drawn) -> list[Lesson]:
    """The analyses whose replay was wrong, in place of those whose replay was right."""
    return [
        lesson_from(
            each.analysis, each.parsed, tokenizer=drawn.tokenizer, redacted=None, train_on="analysis", experience_id=row
        )
        for row, each in drawn.experiences
        if each.status is Status.REPLAY_FAILED and each.parsed is not None
    ]


def replayed(drawn: Drawn) -> list[Lesson]:
    """The right replay as an answer to the question without M: what M made possible, not M."""
    lessons = []
    for row, each in drawn.kept():
        assert each.replay is not None
        text = next(t for t, v in zip(each.replay.texts, each.replay.verdicts, strict=True) if v is Verdict.RIGHT)
        ids = drawn.tokenizer(text, add_special_tokens=False)["input_ids"]
        lessons.append(Lesson(row, drawn.question(each), (*ids, drawn.tokenizer.eos_token_id)))
    return lessons


def right(drawn: Drawn) -> list[Lesson]:
    """The pair's right solution, which needed no lesson, as an answer to the question."""
    return [Lesson(row, drawn.question(each), each.analysis.pair.right.completion_ids) for row, each in drawn.kept()]


def both(drawn: Drawn) -> list[Lesson]:
    """M and the right replay."""
    return drawn.lessons + replayed(drawn)


ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "mel": MEL,
    "mel-replay": MEL | {"lessons": replayed},
    "mel-quarter": MEL | {"mel_weight": 0.25},
    "mel-tenth": MEL | {"mel_weight": 0.1},
    "mel-failed": MEL | {"lessons": failed},
    "mel-uplift": MEL | {"replay_criterion": "uplift", "replay_attempts": 2},
    "mel-right": MEL | {"lessons": right},
    "mel-both": MEL | {"lessons": both},
    "mel-experience": MEL | {"mel_train_on": "experience"},
    "mel-prompts": MEL | {"mel_normalization": "prompts"},
    "mel-pairs": MEL | {"pairs_per_group": 2},
    "rft": {"algorithm": "rft"},
    "rft-mel": {"algorithm": "rft", "meta_experience": True},
}


class StudyTrainer(MELTrainer):
    """MELTrainer whose NLL term may be taken over other texts than M*: `lessons_of` says which, None leaves M*."""

    def __init__(self, *args: Any, lessons_of: Callable[[Drawn], list[Lesson]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lessons_of = lessons_of
        self._experiences: list[tuple[int, Experience]] = []

    def _record(self, experiences: list[Experience]) -> list[int]:
        ids = super()._record(experiences)
        self._experiences = list(zip(ids, experiences, strict=True))
        return ids

    def _share_out(self, lessons: Sequence[Lesson], *, prompts: int) -> None:
        if self._lessons_of is not None:
            drawn = Drawn(list(lessons), self._experiences, self._tokenizer, self.chat_template_kwargs)
            lessons = self._lessons_of(drawn)
        super()._share_out(list(lessons), prompts=prompts)
