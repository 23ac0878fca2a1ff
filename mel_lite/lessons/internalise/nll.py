"""Internalizations by NLL: train on a text that a meta-experience becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.internalise.options import check_flag
from mel_lite.lessons.internalise.protocol import DrawnBatch, Internalisation, ScoredMicroBatch
from mel_lite.lessons.prompts import question_prompt
from mel_lite.models.chat import neutralize
from mel_lite.types import Experience, Finish, Lesson, Verdict

if TYPE_CHECKING:
    from torch import Tensor


class LessonNLL(Internalisation):
    """Add lambda * mean over lessons of -1/T sum_t log pi(target_t | context, target_<t): the paper's J_MEL."""

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        import torch

        if not scored.lessons:
            return None
        nlls = [-logp_T.mean() for logp_T in scored.lesson_logps]
        return scored.lesson_weight * torch.stack(nlls).sum()


class AnalysisNLL(LessonNLL):
    """Train on the whole analysis as sampled, given C_retro; redacted ones as in `ExperienceNLL` (the paper).

    Args:
        shuffled: train each analysis given C_retro of another question of the batch, a control for what its content is
            worth; one without such another question is left out.

    Raises: ConfigError for an option of another type.
    """

    trains_whole_analysis = True

    def __init__(self, *, shuffled: bool = False) -> None:
        check_flag("shuffled", shuffled)
        self.shuffled = shuffled

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        lessons = [_as_sampled(row_id, each, drawn.context.tokenizer) for row_id, each in drawn.kept]
        return _in_other_contexts(drawn, lessons) if self.shuffled else lessons


class ExperienceNLL(LessonNLL):
    """Train on the canonical text of (s*, C, H), given C_retro."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [_canonical(row_id, each, drawn.context.tokenizer) for row_id, each in drawn.kept]


class ReplayNLL(LessonNLL):
    """Train on the first right replay as an answer to the question alone: what M made possible, without M."""

    needs_replay = True

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        tokenizer = drawn.context.tokenizer
        lessons = []
        for row_id, each in drawn.kept:
            assert each.replay is not None, "a kept meta-experience was replayed"
            answers = zip(each.replay.texts, each.replay.verdicts, strict=True)
            text = next(text for text, verdict in answers if verdict is Verdict.RIGHT)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            lessons.append(Lesson(row_id, _question(each, drawn.context), (*ids, tokenizer.eos_token_id)))
        return lessons


class RightNLL(LessonNLL):
    """Train on the pair's right solution as an answer to the question: the control that needs no lesson."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [
            Lesson(row_id, _question(each, drawn.context), each.analysis.pair.right.completion_ids)
            for row_id, each in drawn.kept
        ]


class AnalysisAndReplayNLL(LessonNLL):
    """Train on the analysis and on the first right replay."""

    trains_whole_analysis = True
    texts_per_experience = 2
    needs_replay = True

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return AnalysisNLL().lessons(drawn) + ReplayNLL().lessons(drawn)


def _in_other_contexts(drawn: DrawnBatch, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return each lesson in the context of the next one that is about another question."""
    questions = [each.analysis.pair.group.prompt_hash for _, each in drawn.kept]
    shuffled = []
    for number, lesson in enumerate(lessons):
        later = [*range(number + 1, len(lessons)), *range(number)]
        other = next((each for each in later if questions[each] != questions[number]), None)
        if other is not None:
            shuffled.append(replace(lesson, context_ids=lessons[other].context_ids))
    return shuffled


def _question(experience: Experience, context: LessonContext) -> tuple[int, ...]:
    """Return the rollouts' prompt: x alone."""
    group = experience.analysis.pair.group
    return question_prompt(group, context.tokenizer, chat_template_kwargs=context.chat_template_kwargs)


def _as_sampled(row_id: int, experience: Experience, tokenizer: Any) -> Lesson:
    """Return the analysis's own ids; a redacted analysis is never trained on as sampled."""
    if experience.leak is not None and experience.leak.redacted is not None:
        return _canonical(row_id, experience, tokenizer)
    return Lesson(row_id, experience.analysis.context_ids, experience.analysis.analysis_ids)


def _canonical(row_id: int, experience: Experience, tokenizer: Any) -> Lesson:
    """Return the text of (s*, C, H), minus what the prefill in the context already says, and an end id."""
    analysis = experience.analysis
    redacted = experience.leak.redacted if experience.leak else None
    parsed = redacted or experience.parsed
    assert parsed is not None, "a kept meta-experience was parsed"
    text = neutralize(parsed.as_text(), tokenizer)
    sampled = str(tokenizer.decode(list(analysis.analysis_ids), skip_special_tokens=True))
    prefill = analysis.text.removesuffix(sampled)
    overlap = next((n for n in range(min(len(prefill), len(text)), 0, -1) if prefill.endswith(text[:n])), 0)
    ids = list(tokenizer(text[overlap:], add_special_tokens=False)["input_ids"])
    # The id that ended the sampled analysis ends a turn of this model, whatever its tokenizer calls end-of-sequence.
    eos_id = analysis.analysis_ids[-1] if analysis.finish is Finish.STOP else tokenizer.eos_token_id
    return Lesson(row_id, analysis.context_ids, (*ids, *(() if eos_id is None else (eos_id,))))
