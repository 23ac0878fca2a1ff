"""Transform from the product hidden @ weight to the logits of the softmax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """z = cap(logit_scale * (h.w + bias)) / temperature, with cap(x) = softcap * tanh(x / softcap).

    Cohere and Granite scale their logits, Gemma caps them. For other models z = (h.w + bias) / temperature.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def gain(self) -> float:
        """Derivative dz/d(h.w) without the cap."""
        return self.logit_scale / self.temperature

    @property
    def cap(self) -> float:
        """Largest |z| with a softcap; 0 without one."""
        return 0.0 if self.softcap is None else self.softcap / self.temperature
