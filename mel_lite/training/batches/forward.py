"""The training forward of one micro-batch: its rows, and their values over passes that score some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mel_lite.training.batches.packing import Row
from mel_lite.training.scoring import RowScores


class MicroBatchForward:
    """The training forward of one micro-batch, passed to TRL's loss in place of the model.

    TRL passes only `model` on, so this object carries the rows in and the log-probs out.
    """

    def __init__(self, model: Any, rows: Sequence[Row], rollouts: int, logps: Sequence[torch.Tensor]) -> None:
        self.model = model
        self.rows = list(rows)
        """Rollouts first, then lessons."""
        self.rollouts = rollouts
        self.part = list(range(len(self.rows)))
        """Numbers of the rows that carry a gradient in the current pass."""
        self.leaves_out = False
        """True when rows stay out of all passes, so that metrics come from a pass of the loss alone."""
        self.idle: torch.Tensor | None = None
        """Zero () of a pass without rows, whose backward takes part in those of other processes."""
        self.logps = list(logps)
        """Per row (scored_tokens,): its log-probs without gradient once it was scored, a stand-in before."""
        self.entropies = [torch.zeros_like(logp_T) for logp_T in logps]
        self.kls = [torch.zeros_like(logp_T) for logp_T in logps]
        self.logp_BC: torch.Tensor | None = None
        """Log-probs of the rollouts in the last pass."""
        self.kl_BC: torch.Tensor | None = None
        """Divergence of the rollouts from their teachers in the last pass, 0 without one; None if no row has one."""
        self.lesson_logps: tuple[torch.Tensor, ...] = ()
        """Per lesson (T,): its log-probs in the last pass."""

    @property
    def has_teachers(self) -> bool:
        """True when the divergence of some row from a teacher is taken."""
        return any(row.teacher is not None for row in self.rows)

    def merged(self, scores: RowScores) -> RowScores:
        """Return the values of all rows, those of the part with their graph, and keep the part's values."""
        kls = scores.kls or [self.kls[i] for i in self.part]
        whole = []
        columns = (self.logps, scores.logps), (self.entropies, scores.entropies), (self.kls, kls)
        for kept, new in columns:
            values = list(kept)
            for i, value in zip(self.part, new, strict=True):
                values[i] = value
                kept[i] = value.detach()
            whole.append(values)
        return RowScores(whole[0], whole[1], scores.aux_loss, whole[2])

    def blank(self, numbers: Sequence[int]) -> None:
        """Exclude these rows' tokens from the metrics."""
        for i in numbers:
            self.logps[i] = self.entropies[i] = self.kls[i] = self.logps[i][:0]
