"""Measure what the sampling options cut from the policy's distribution, which scoring takes whole.

Scores of the cut distribution would need all logits of every position: those kept at sampling time, and their
gradient. The fused operator never has them at once. B completions, C padded width.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from mel_lite.config import WHOLE_DISTRIBUTION
from mel_lite.types import Algorithm

logger = logging.getLogger(__name__)


class CutMass:
    """Measurement of each micro-batch, with one warning that names the first.

    Args:
        trainer: A MELTrainer whose sampling options are settled. RFT trains on texts of any origin, so nothing is cut.
    """

    def __init__(self, trainer: Any) -> None:
        values = {name: getattr(trainer, name) for name in WHOLE_DISTRIBUTION}
        given = {name: value for name, value in values.items() if value not in WHOLE_DISTRIBUTION[name]}
        self.options = ", ".join(f"{name}={value}" for name, value in given.items())
        """The options that change the distribution, as text; empty when it is whole."""
        self._measures = bool(given) and trainer.args.estimator != Algorithm.RFT
        self._truncates = not given.keys() <= {"repetition_penalty"}
        self._reported = False

    def measure(self, logp_BC: torch.Tensor | None, inputs: Any) -> dict[str, float]:
        """Return `mel/cut_mass` and `mel/sampling_kl` of a micro-batch, given the trainer's log-probs of its tokens.

        With p the policy and q the distribution sampled from, they are the means over tokens of 1 - p/q and log q/p.
        The first estimates the mass of p outside of what q can sample; if q is a cut p, each token gives exactly the
        mass cut at its position, in [0, 1). It is left out if q samples all tokens. The second is the KL divergence in
        nats per token. Empty without tokens, or if the engine reports no log-probs.
        """
        sampled_BC = inputs.get("sampling_per_token_logps")
        if not self._measures or logp_BC is None or sampled_BC is None:
            return {}
        off_T = (sampled_BC - logp_BC.detach())[inputs["completion_mask"].bool()].double()
        if not len(off_T) or not off_T.isfinite().all():
            return {}
        found = {"mel/sampling_kl": float(off_T.mean())}
        if self._truncates:
            found["mel/cut_mass"] = float(-torch.expm1(-off_T).mean())
        if not self._reported:
            cut = f"cut {found['mel/cut_mass']:.1%} of" if self._truncates else "changed"
            logger.warning(
                "%s %s the policy's probability per token in the first batch (%.2g nats per token). Importance ratios "
                "and the gradient are off by that; %s log it.",
                self.options, cut, found["mel/sampling_kl"], " and ".join(sorted(found)),
            )  # fmt: skip
            self._reported = True
        return found
