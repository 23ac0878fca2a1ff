"""Reading with the policy: log-probs and next-token distributions along texts, without gradient.

T tokens of one text, H hidden size, N positions of several texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mel_lite.types import Lesson

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """Predictions of the policy along one text's target ids, at the policy's temperature, without gradient."""

    logp_T: Tensor
    """Log-probs of the target ids, float32."""
    hidden_TH: Tensor
    """Hidden states that predict them: with the head, the whole next-token distribution."""


class Scorer(Protocol):
    """Scores texts with the model being trained, without gradient."""

    def __call__(self, texts: Sequence[Lesson], *, temperature: float = 1.0, adapter: bool = True) -> list[Tensor]:
        """Return log pi(target_ids | context_ids) of each text, (T,) float32; `adapter=False` scores the base model."""
        ...

    def logps(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[Tensor]:
        """Return log pi(target_ids | context_ids) of each text, (T,) float32, at the policy's temperature.

        `frozen`: of the policy as it was at the start of the run.
        """
        ...

    def read(self, texts: Sequence[Lesson], *, frozen: bool = False) -> list[Reading]:
        """Return the same log-probs with the hidden states that give the whole distributions."""
        ...

    def kl(self, hidden_NH: Tensor, other_NH: Tensor) -> Tensor:
        """Return KL(p || q) (N,) in nats between the distributions that two readings' hidden states give."""
        ...


__all__ = ["Reading", "Scorer"]
