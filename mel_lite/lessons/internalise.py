"""Internalisation: the ways for lessons to enter the weights. One class per way, one row in `INTERNALISATIONS`.

A training step calls a way three times:

    lessons         the texts that the batch's meta-experiences become; each is one row of the training forward
    batch_entries   changes to the rollout batch, such as token advantages, from scoring passes without gradient
    loss            the term added to the policy loss of each micro-batch

Shapes: B rollouts of this rank (or of one micro-batch), C padded completion width, T tokens of one text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mel_lite.errors import ConfigError
from mel_lite.imports import load_object
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import question_prompt
from mel_lite.models.chat import neutralize
from mel_lite.text import did_you_mean
from mel_lite.types import Experience, Finish, Group, Lesson, LessonShare, Rollout, Status, Verdict

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """The meta-experiences of one generation batch, the same on every rank."""

    experiences: tuple[tuple[int, Experience], ...]
    """Row id in the store and experience, kept or not, in pair order."""
    groups: tuple[Group, ...]
    """All groups of the batch, over all ranks."""
    context: LessonContext
    pairs: int
    """Number of pairs, including those that did not fit the context."""

    @property
    def kept(self) -> list[tuple[int, Experience]]:
        """The meta-experiences that passed every stage: M*."""
        return [(row_id, each) for row_id, each in self.experiences if each.status is Status.KEPT]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """This rank's rollouts, in the row order of `entries`."""

    rows: tuple[tuple[Group, Rollout], ...]
    entries: Mapping[str, Any]
    """TRL's batch: `advantages` (B,) or (B, C) float32, `completion_ids` and `completion_mask` (B, C), ..."""


class Scorer(Protocol):
    """Scores texts with the model being trained, without gradient."""

    def __call__(self, texts: Sequence[Lesson], *, temperature: float = 1.0, adapter: bool = True) -> list[Tensor]:
        """Return log pi(target_ids | context_ids) of each text, (T,) float32; `adapter=False` scores the base model."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredMicroBatch:
    """One micro-batch after the training forward; log-probs carry the gradient."""

    entries: Mapping[str, Any]
    """TRL's micro-batch, with what `batch_entries` added to its rows."""
    logp_BC: Tensor
    """Log-probs of the rollouts at the policy's temperature, 0 where masked."""
    lessons: tuple[Lesson, ...]
    lesson_logps: tuple[Tensor, ...]
    """Per lesson (T,): log pi(target_ids | context_ids) at temperature 1."""
    weight: float
    """lambda / accumulation steps: the factor of a loss that is a mean over the micro-batch."""
    lesson_weight: float
    """The factor of a sum over lessons that makes the step's total lambda * mean over lessons (or prompts)."""


class Internalisation:
    """One way for lessons to enter the weights. Override what the way needs; the defaults are no-ops."""

    trains_whole_analysis: ClassVar[bool] = False
    """The text around the analysis's parsed parts is trained on, so the leak guard must read it."""
    texts_per_experience: ClassVar[int] = 1
    """Most texts that `lessons` returns per kept meta-experience; `mel-lite plan` reserves memory for them."""
    needs_every_rollout: ClassVar[bool] = False
    """`loss` uses rollouts whose advantage is 0, so `skip_zero_advantage` must not drop them."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        """Return the texts to train on. Every rank gets the same `drawn` and must return the same list."""
        return []

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        """Return entries to replace in or add to the rollout batch; the first dimension of each is B.

        New `advantages` may have shape (B,) or (B, C). Rows are shuffled and split together with the batch.
        """
        return {}

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        """Return the weighted loss to add, or None.

        Must be a sum over rows, since a micro-batch may be split into parts.
        """
        return None


class LessonNLL(Internalisation):
    """Add lambda * mean over lessons of -1/T sum_t log pi(target_t | context, target_<t): the paper's J_MEL."""

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        import torch

        if not scored.lessons:
            return None
        nlls = [-logp_T.mean() for logp_T in scored.lesson_logps]
        return scored.lesson_weight * torch.stack(nlls).sum()


class AnalysisNLL(LessonNLL):
    """Train on the whole analysis as sampled, given C_retro; redacted ones as in `ExperienceNLL` (the paper)."""

    trains_whole_analysis = True

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [_as_sampled(row_id, each, drawn.context.tokenizer) for row_id, each in drawn.kept]


class ExperienceNLL(LessonNLL):
    """Train on the canonical text of (s*, C, H), given C_retro."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [_canonical(row_id, each, drawn.context.tokenizer) for row_id, each in drawn.kept]


class ReplayNLL(LessonNLL):
    """Train on the first right replay as an answer to the question alone: what M made possible, without M."""

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

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return AnalysisNLL().lessons(drawn) + ReplayNLL().lessons(drawn)


INTERNALISATIONS: dict[str, type[Internalisation]] = {
    "analysis": AnalysisNLL,
    "experience": ExperienceNLL,
    "replay": ReplayNLL,
    "right": RightNLL,
    "both": AnalysisAndReplayNLL,
}


def get_internalisation(name: str) -> Internalisation:
    """Return the way called `name`: a key of `INTERNALISATIONS`, or a dotted path to an `Internalisation` class.

    Raises: ConfigError for an unknown name, a path that does not import, or an object that is no Internalisation.
    """
    if name in INTERNALISATIONS:
        return INTERNALISATIONS[name]()
    if ":" not in name and "." not in name:
        raise ConfigError(
            f"internalisation={name!r} is not one of {', '.join(INTERNALISATIONS)}."
            f"{did_you_mean(name, INTERNALISATIONS)} Set internalisation to one of them, or to a dotted path such as "
            "'my_module:MyInternalisation'."
        )
    found = load_object(name, field="internalisation", error=ConfigError)
    if not (isinstance(found, type) and issubclass(found, Internalisation)):
        raise ConfigError(
            f"internalisation={name!r} is not a subclass of mel_lite.lessons.internalise.Internalisation. Derive it "
            "from that class."
        )
    try:
        return found()
    except TypeError as err:
        raise ConfigError(
            f"internalisation={name!r} cannot be built without arguments: {err}. Give its parameters defaults, or "
            "derive a class that sets them."
        ) from err


def checked_entries(way: Internalisation, entries: dict[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what `batch_entries` returned. Raises: ConfigError for an entry that does not fit the B rollouts."""
    rows, width = batch["completion_ids"].shape
    for name, value in entries.items():
        shape = tuple(getattr(value, "shape", ()))
        fits = shape[:1] == (rows,) and (name != "advantages" or shape in ((rows,), (rows, width)))
        if not fits:
            wanted = f"({rows},) or ({rows}, {width})" if name == "advantages" else f"({rows}, ...)"
            raise ConfigError(
                f"{type(way).__name__}.batch_entries returned {name!r} of shape {shape}, but this batch has {rows} "
                f"rollouts of width {width}. Return a tensor of shape {wanted}."
            )
    return entries


def deal_lessons(
    lessons: Sequence[Lesson],
    *,
    rank: int,
    world: int,
    micro_batches: int,
    total_weight: float,
    denominator: int,
) -> list[LessonShare]:
    """Deal lessons to ranks and micro-batches; their weighted losses add up to total_weight * sum / denominator.

    The loss of each micro-batch is divided by the accumulation steps, and gradients are averaged over ranks; the weight
    cancels both.
    """
    local = lessons[rank::world]
    weight = total_weight * micro_batches * world / max(1, denominator)
    return [
        LessonShare(tuple(each for j, each in enumerate(local) if j * micro_batches // len(local) == i), weight)
        for i in range(micro_batches)
    ]


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
