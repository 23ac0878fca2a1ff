"""Score texts and read next-token distributions with the model being trained, without gradient.

T target tokens of a text, H hidden size, N positions of several texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from mel_lite.lessons.reading import Reading
from mel_lite.models.modes import evaluating
from mel_lite.training.packing import Row, lesson_row, pack
from mel_lite.training.scoring import RowScores, divergence, score
from mel_lite.types import Lesson


class Scorer:
    """The trained model as a reader of texts. Dropout is off, and no gradient is kept."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(
        self, texts: Sequence[Lesson], *, temperature: float = 1.0, adapter: bool = True
    ) -> list[torch.Tensor]:
        """Return log pi(target_ids | context_ids) of each text (T,); `adapter=False` scores the base model."""
        return self.rows(self._rows(texts, temperature), adapter=adapter)

    def rows(self, rows: Sequence[Row], *, adapter: bool = True) -> list[torch.Tensor]:
        """Return each row's log-probs (T,); `adapter=False` scores the base model."""
        model = self._trainer.model
        off = not adapter and hasattr(model, "disable_adapter")
        # Limit blocks to the longest row, as training did.
        longest = max((len(row.ids) for row in rows), default=0)
        # Enter eval mode first: `disable_adapter` restores requires_grad, not train mode.
        with evaluating(model), model.disable_adapter() if off else nullcontext():
            return self._score(rows, longest).logps if rows else []

    def logps(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[torch.Tensor]:
        """Return log pi(target_ids | context_ids) of each text (T,) at the policy's temperature.

        `frozen`: of the policy as it was at the start of the run.
        """
        return self._policy(texts, frozen=frozen, want_hidden=False).logps

    def read(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[Reading]:
        """Return the same log-probs with the hidden states that give the whole distributions."""
        scores = self._policy(texts, frozen=frozen, want_hidden=True)
        return [Reading(*each) for each in zip(scores.logps, scores.hiddens or [], strict=True)]

    def kl(self, hidden_NH: torch.Tensor, other_NH: torch.Tensor) -> torch.Tensor:
        """Return KL(p || q) (N,) in nats between the next-token distributions of two readings' hidden states."""
        trainer = self._trainer
        with torch.no_grad():
            return divergence(trainer.model, hidden_NH, other_NH, temperature=trainer.policy_temperature)

    def _policy(self, texts: Sequence[Lesson], *, frozen: bool, want_hidden: bool) -> RowScores:
        """Score texts at the policy's temperature, in blocks of a micro-batch's size."""
        trainer = self._trainer
        if not texts:
            return RowScores([], [])
        rows = self._rows(texts, trainer.policy_temperature)
        longest = max(len(row.ids) for row in rows)
        tokens = trainer.budget_tokens or trainer.args.per_device_train_batch_size * longest
        with evaluating(trainer.model), trainer.frozen_reader.reading() if frozen else nullcontext():
            return self._score(rows, max(tokens, longest), want_hidden=want_hidden)

    def _rows(self, texts: Sequence[Lesson], temperature: float) -> list[Row]:
        return [lesson_row(text, self._trainer.accelerator.device, temperature=temperature) for text in texts]

    def _score(self, rows: Sequence[Row], max_tokens: int, *, want_hidden: bool = False) -> RowScores:
        trainer = self._trainer
        packed = pack(rows, pad_id=trainer._tokenizer.pad_token_id, max_tokens=max_tokens)
        with torch.no_grad(), trainer.accelerator.autocast():
            return score(trainer.model, packed, want_hidden=want_hidden)
