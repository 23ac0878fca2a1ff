"""Exact log-probabilities of a language-model head without ever holding its logits.

    from mel_lite.kernels import fused_logprobs
    logp_N, entropy_N, lse_N = fused_logprobs(hidden_NH, weight_VH, target_N, temperature=0.8)

One pass over the head gives, for every row, the log-probability of its target, the entropy, the log-normaliser and
u = d logp / d hidden; the backward pass only scales u. This package knows nothing of the trainer and works alone with
torch (and Triton on a GPU).
"""

from __future__ import annotations

if __name__ == "kernels":
    raise ImportError(
        "this folder is not the package 'kernels' (Hugging Face publishes one): import mel_lite.kernels, and run "
        "Python with PYTHONSAFEPATH=1 from the repository root"
    )

from .api import fused_logprobs, reference_logprobs
from .head import HeadSpec, check_head_spec, head_logprobs, head_spec, why_not_fused
from .mel_loss import LossTerms, MelLoss, fused_mel_loss

__all__ = [
    "HeadSpec",
    "LossTerms",
    "MelLoss",
    "fused_logprobs",
    "fused_mel_loss",
    "head_spec",
    "reference_logprobs",
]
