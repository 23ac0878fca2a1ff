"""Gradients of a trainer's losses without an update, and their cosines with a policy gradient from other prompts.

Each gradient is that of training: the trainer's own loss, in its own parts. Only one prompt's is held at a time, next
to a few sums in host memory. D weights that train, B rollouts of a batch, C padded completion width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import split_tensor_dict

from mel_lite import signals
from mel_lite.intervals import Estimate
from mel_lite.lessons.internalise import (
    DrawnBatch,
    Internalisation,
    LessonShare,
    RolloutBatch,
    checked_entries,
    deal_lessons,
)
from mel_lite.report.statistics import interval
from mel_lite.run.probe.result import WayGradient
from mel_lite.types import Group, Lesson, LessonNormalization, Rollout


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """One generation batch of a probe."""

    rows: tuple[tuple[Group, Rollout], ...]
    groups: tuple[Group, ...]
    entries: Mapping[str, Any]
    """TRL's batch, rows in the order of `rows`."""


class GradientProbe:
    """Takes gradients per prompt. The model's weights and gradients are left as they were.

    Args: trainer: a MELTrainer inside `train`, before its first step, whose micro-batches are parts of one prompt.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        self.reference_D: torch.Tensor | None = None
        """Policy gradient of the reference batches; None before `set_reference`, and when it is 0."""

    def set_reference(self, batches: Sequence[ProbeBatch]) -> Estimate | None:
        """Sum the policy gradient of these batches; returns the cosine of its halves, None when one of them is 0.

        The interval is over the prompts of the second half.
        """
        middle = len(batches) // 2
        first = _Sum()
        for batch in batches[:middle]:
            for grad_D in self.policy(batch):
                first.add(grad_D, None)
        second = _Sum()
        for batch in batches[middle:]:
            for grad_D in self.policy(batch):
                second.add(grad_D, first.total_D)
        cosine = second.cosine(first.total_D)
        if first.total_D is not None and second.total_D is not None:
            total_D = first.total_D + second.total_D
            self.reference_D = total_D if float(total_D.norm()) > 0 else None
        return cosine

    def policy(self, batch: ProbeBatch) -> Iterator[torch.Tensor]:
        """Yield the gradient (D,) of the policy loss on each prompt of a batch; they sum to the batch's."""
        with self._training_on(Internalisation()):
            yield from self._per_prompt(batch.groups, batch.entries, ())

    def of_way(self, way: Internalisation, drawn: DrawnBatch, batch: ProbeBatch) -> Iterator[torch.Tensor]:
        """Yield the gradient (D,) that a way adds to the policy loss on each prompt of a batch.

        The policy loss is linear in the advantages where the ratio is 1, as it is here, so new advantages add the
        gradient of their difference from the old ones.
        """
        trainer = self._trainer
        rollouts = RolloutBatch(batch.rows, batch.entries)
        trainer.engine.sleep()  # scoring needs the memory
        added = dict(checked_entries(way, way.batch_entries(drawn, rollouts, trainer.scorer), batch.entries))
        before = batch.entries["advantages"]
        after = added.get("advantages", before)
        added["advantages"] = after - (before if before.dim() == after.dim() else before[:, None])
        with self._training_on(way):
            yield from self._per_prompt(batch.groups, {**batch.entries, **added}, self._shares(way, drawn, batch))

    def measure(self, way: WayGradient, batches: Sequence[Iterator[torch.Tensor]]) -> WayGradient:
        """Return `way` with the cosine, norm and number of prompts of its gradients, one iterator per batch."""
        total, norms = _Sum(), []
        for batch in batches:
            of_batch = _Sum()
            for grad_D in batch:
                total.add(grad_D, self.reference_D)
                of_batch.add(grad_D, None)
            norms.append(of_batch.norm())
        return replace(
            way,
            cosine=total.cosine(self.reference_D),
            norm=sum(norms) / max(1, len(norms)),
            prompts=total.moved,
        )

    # ---- one prompt ----

    @contextmanager
    def _training_on(self, way: Internalisation) -> Iterator[None]:
        """Let the trainer's loss use this way."""
        trainer, before = self._trainer, self._trainer.internalisation
        trainer.internalisation = way
        try:
            yield
        finally:
            trainer.internalisation = before

    def _shares(self, way: Internalisation, drawn: DrawnBatch, batch: ProbeBatch) -> list[LessonShare]:
        """Return each micro-batch's lessons, those of its prompt, with the weights of training."""
        args = self._trainer.args
        dealt = deal_lessons(
            way.lessons(drawn),
            rank=0,
            world=1,
            micro_batches=args.steps_per_generation,
            total_weight=drawn.weight,
            denominator=None if args.mel_normalization == LessonNormalization.KEPT else len(batch.groups),
        )
        rollout_of = {row_id: each.analysis.pair.right for row_id, each in drawn.experiences}
        of_prompt: list[list[Lesson]] = [[] for _ in batch.groups]
        for lesson in (each for share in dealt for each in share.lessons):
            known = rollout_of.get(lesson.experience_id)
            of_prompt[0 if known is None else drawn.place_of(known)[0]].append(lesson)
        parts = args.steps_per_generation // len(batch.groups)
        return [
            LessonShare(tuple(lessons[part::parts]), dealt[0].weight) for lessons in of_prompt for part in range(parts)
        ]

    def _per_prompt(
        self, groups: Sequence[Group], entries: Mapping[str, Any], shares: Sequence[LessonShare]
    ) -> Iterator[torch.Tensor]:
        steps = self._trainer.args.steps_per_generation
        dealt = shares or [LessonShare()] * steps
        parts = zip(split_tensor_dict(dict(entries), steps), dealt, strict=True)
        micro_batches = [part | {"lessons": share} for part, share in parts]
        each = steps // len(groups)
        for number in range(len(groups)):
            yield self._gradient(micro_batches[number * each : (number + 1) * each])

    def _gradient(self, micro_batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Return the gradient (D,) float32 of micro-batches, in host memory."""
        trainer = self._trainer
        for weight in self._weights:
            weight.grad = None
        trainer.model.train()
        for inputs in micro_batches:
            signals.poll()
            loss = trainer.compute_loss(trainer.model_wrapped, inputs)
            if loss.requires_grad:
                trainer.accelerator.backward(loss)
        trainer.trained_lessons.clear()
        scaler = getattr(trainer.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        grad_D = torch.cat([grad.detach().float().flatten().cpu() for grad in grads]) / scale
        for weight in self._weights:
            weight.grad = None
        return grad_D


class _Sum:
    """Sum of gradients, and the product of each with a reference."""

    def __init__(self) -> None:
        self.total_D: torch.Tensor | None = None
        self.products: list[float] = []
        self.moved = 0
        """Gradients that are not 0."""

    def add(self, grad_D: torch.Tensor, reference_D: torch.Tensor | None) -> None:
        self.total_D = grad_D.clone() if self.total_D is None else self.total_D.add_(grad_D)
        self.products.append(0.0 if reference_D is None else float(torch.dot(grad_D.double(), reference_D.double())))
        self.moved += bool(grad_D.any())

    def norm(self) -> float:
        return 0.0 if self.total_D is None else float(self.total_D.double().norm())

    def cosine(self, reference_D: torch.Tensor | None) -> Estimate | None:
        """Return the sum's cosine with the reference, and its interval over draws of the summed gradients.

        The draws vary the products with the reference; both norms stay those measured. None when one of them is 0.
        """
        norms = self.norm() * (0.0 if reference_D is None else float(reference_D.double().norm()))
        if norms == 0:
            return None
        values = [len(self.products) * product / norms for product in self.products]
        found = interval(np.array([values]))
        return Estimate(*(max(-1.0, min(1.0, value)) for value in (found.value, found.low, found.high)))


__all__ = ["GradientProbe", "ProbeBatch"]
