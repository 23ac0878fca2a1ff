"""Protocol of an internalization: what a training step passes to it, and what it may return.

A training step calls a way three times:

    lessons         the texts that the batch's meta-experiences become; each is one row of the training forward
    batch_entries   changes to the rollout batch, such as token advantages, from scoring passes without gradient
    loss            the term added to the policy loss of each micro-batch

Shapes: B rollouts of this rank (or of one micro-batch), C padded completion width, T tokens of one text, K of them
with a teacher, H hidden size, N positions of several texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.reading import Scorer
from mel_lite.lessons.store import Effect
from mel_lite.types import Experience, Group, Lesson, Rollout, Status

if TYPE_CHECKING:
    from torch import Tensor

    from mel_lite.lessons.bank import LessonBank


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """The meta-experiences of one generation batch, the same on every rank."""

    experiences: tuple[tuple[int, Experience], ...]
    """Row id in the store and experience, kept or not, in pair order; with `overlap`, those of earlier batches."""
    groups: tuple[Group, ...]
    """All groups of the batch, over all ranks."""
    context: LessonContext
    pairs: int
    """Number of pairs, including those that did not fit the context."""
    weight: float = 1.0
    """lambda of this batch."""
    bank: LessonBank | None = None
    """Lessons of the run so far; None unless the way uses the bank."""

    @property
    def kept(self) -> list[tuple[int, Experience]]:
        """The meta-experiences that passed every stage: M*."""
        return [(row_id, each) for row_id, each in self.experiences if each.status is Status.KEPT]

    def place_of(self, rollout: Rollout) -> tuple[int, int]:
        """Return the number of a rollout's group within `groups`, and of the rollout within its group."""
        return divmod(rollout.index, len(self.groups[0].rollouts))

    def group_of(self, rollout: Rollout) -> Group:
        """Return the whole group of a rollout."""
        return self.groups[self.place_of(rollout)[0]]


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """This rank's rollouts, in the row order of `entries`."""

    rows: tuple[tuple[Group, Rollout], ...]
    entries: Mapping[str, Any]
    """TRL's batch: `advantages` (B,) or (B, C) float32, `completion_ids` and `completion_mask` (B, C), ..."""

    def token_advantages(self) -> Tensor:
        """Return a copy of the advantages per token, (B, C)."""
        advantages = self.entries["advantages"]
        width = self.entries["completion_ids"].shape[1]
        return (advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, width)).clone()


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
    token_weight: float
    """The factor of a sum over the rollouts' tokens that makes the step's total lambda * mean over all of them."""
    kl_BC: Tensor | None = None
    """KL(policy || teacher) in nats at the positions of `teacher_mask`, with a gradient; None without that entry."""


@dataclass(frozen=True, slots=True)
class TokenReading:
    """Change of each token of a rollout by notes in the prompt."""

    row: int
    """Row of the rollout in the batch."""
    way: str
    """Name of the internalization."""
    shift_T: Tensor
    """log pi with the notes minus log pi without them, in nats."""
    effect: Effect
    """Unit of `effect_T`."""
    effect_T: Tensor
    """Effect of the way on each token."""


class Internalisation:
    """One way for lessons to enter the weights. Override what the way needs; the defaults are no-ops."""

    trains_whole_analysis: bool = False
    """The text around the analysis's parsed parts is trained on, so the leak guard must read it."""
    texts_per_experience: int = 1
    """Most texts that `lessons` returns per kept meta-experience; `mel-lite plan` reserves memory for them."""
    needs_every_rollout: bool = False
    """`loss` uses rollouts whose advantage is 0, so `skip_zero_advantage` must not drop them."""
    needs_replay: bool = False
    """It trains on a replay, so a kept meta-experience must have one."""
    writes_lessons: bool = True
    """Analyses are written. False for a way that learns from the rollouts alone."""
    needs_own_lessons: bool = False
    """It reads the lessons of the batch's own groups, which come later with `mel_schedule='overlap'`: refused there."""
    uses_bank: bool = False
    """It reads the lesson bank."""
    needs_frozen_head: bool = False
    """Its divergence is between hidden states under one head, which must not train."""
    teacher_states: int = 0
    """Hidden states per token of all rollouts that `batch_entries` holds at once; at most one stays until the update.
    `mel-lite plan` reserves memory for them."""
    needs_frozen_reader: bool = False
    """It reads with the policy as it was at the start of the run."""

    reads_tokens: bool = False
    """It reads rollouts with and without notes, and `token_readings` tells what it read."""

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        """Return the texts to train on. Every rank gets the same `drawn` and must return the same list."""
        return []

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        """Return entries to replace in or add to the rollout batch; the first dimension of each is B.

        New `advantages` may have shape (B,) or (B, C). Rows are shuffled and split together with the batch.
        `teacher_mask` (B, C) bool and `teacher_hidden` (B, K, H), the hidden states at each row's true positions in
        order, make the training forward take the divergence of the policy from that teacher (`ScoredMicroBatch.kl_BC`).
        """
        return {}

    def metrics(self) -> dict[str, float]:
        """Return numbers about this rank's last batch; their means over the ranks that return them are logged."""
        return {}

    def token_readings(self) -> list[TokenReading]:
        """Return what this rank's last batch was told about its tokens, for people to see."""
        return []

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        """Return the weighted loss to add, or None.

        Must be a sum over rows, since a micro-batch may be split into parts.
        """
        return None


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


@dataclass(frozen=True, slots=True)
class LessonShare:
    """The lessons of one micro-batch."""

    lessons: tuple[Lesson, ...] = ()
    weight: float = 0.0
    """Factor of each lesson's loss, before the division by the accumulation steps."""


def deal_lessons(
    lessons: Sequence[Lesson],
    *,
    rank: int,
    world: int,
    micro_batches: int,
    total_weight: float,
    denominator: int | None = None,
) -> list[LessonShare]:
    """Deal lessons to ranks and micro-batches; their weighted losses add up to total_weight * sum / denominator.

    The denominator of None is the number of lessons of the same way. The loss of each micro-batch is divided by the
    accumulation steps, and gradients are averaged over ranks; the weight cancels both.
    """
    if denominator is None:
        denominator, of_way = len(lessons), Counter(lesson.way for lesson in lessons)
        lessons = [replace(lesson, scale=len(lessons) / of_way[lesson.way]) for lesson in lessons]
    local = lessons[rank::world]
    weight = total_weight * micro_batches * world / max(1, denominator)
    return [
        LessonShare(tuple(each for j, each in enumerate(local) if j * micro_batches // len(local) == i), weight)
        for i in range(micro_batches)
    ]
