"""The combined loss in one call: clipped policy gradient on some rows, negative log-likelihood on the others.

N rows, K rows that are computed, R rows of a block, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .api import Impl
from .backends import choose_impl, exact_products, run_frozen
from .checks import FLOATS, check_head, check_like, check_number, check_tensor, check_transform
from .reference import reference_head, weight_head
from .rows import live_rows, scale_rows, spread, take
from .transform import LogitTransform

MAX_LOG_RATIO = 20.0
"""exp of a log-ratio stays finite: beyond e^20 a row says nothing but that the policy has left it."""


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What each row adds to the loss; the caller folds every normalisation into `weight_N`.

    NLL rows (`is_nll_N`):  weight * -logp.  Policy rows, with r = exp(logp - old_logp) and d = ref_logp - logp:

        weight * (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp(d) - d - 1))

    Without `old_logp_N` the policy is the one that sampled: r is 1 and carries the gradient. All log-probabilities in
    nats, all tensors (N,); the three last may be numbers or (N,) tensors.
    """

    is_nll_N: Tensor
    weight_N: Tensor
    advantage_N: Tensor
    old_logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    clip_low: float | Tensor = 0.2
    clip_high: float | Tensor = 0.2
    kl_weight: float | Tensor = 0.0

    def take(self, rows: Tensor | slice | None) -> LossTerms:
        """The terms of some rows."""
        if rows is None:
            return self
        values = {name: value[rows] for name, value in self.tensors().items()}
        return replace(self, **values)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that hold one value per row."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def finite(self) -> Tensor:
        """(N,) rows without a NaN or infinity in the numbers their kind of loss reads."""
        policy_N = torch.ones_like(self.is_nll_N)
        for name, value_N in self.tensors().items():
            if name not in ("is_nll_N", "weight_N"):
                policy_N = policy_N & value_N.isfinite()
        return self.weight_N.isfinite() & (self.is_nll_N | policy_N)

    def matters(self) -> Tensor:
        """(N,) rows whose loss is not identically zero."""
        policy_N = self.advantage_N != 0
        if self.ref_logp_N is not None:
            policy_N = policy_N | (torch.as_tensor(self.kl_weight, device=policy_N.device) != 0)
        return (self.weight_N != 0) & (self.is_nll_N | policy_N)


class MelLoss(NamedTuple):
    """`loss` is what to call backward on; the rest is detached. Rows not computed have logp and entropy 0."""

    loss: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    metrics: dict[str, Tensor]


def fused_mel_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    terms: LossTerms,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> MelLoss:
    """The sum of all rows' terms (see `LossTerms`), its gradient in hidden, and its metrics, in one pass over the head.

    d loss / d hidden is formed in the forward pass, block by block, and rounded once; the backward pass multiplies it
    by one number. Rows that cannot matter are left out before the matrix products: target -100, weight 0, and policy
    rows with advantage 0 and no KL term. Rows with a non-finite number in `terms` are left out and counted.

    Args: as `fused_logprobs`; `terms` holds one entry per row.
    Returns: MelLoss; its metrics are 0-dim tensors on the device, means being over the rows computed.
    Raises: TypeError or ValueError naming the argument, its value and what was expected.
    Source: clipped surrogate arXiv 1707.06347 eq. 7; KL estimator k3 as in GRPO, arXiv 2402.03300 eq. 4.
    """
    transform = check_transform(temperature, logit_scale, softcap)
    check_head(hidden_NH, weight_VH, target_N, bias_V)
    _check_terms(terms, len(target_N), hidden_NH.device)
    training = torch.is_grad_enabled()
    chosen = choose_impl(impl, hidden_NH, weight_VH, bias_V, training=training)
    finite_N = terms.finite()
    with exact_products(hidden_NH.device):
        index_K = live_rows(target_N, len(weight_VH), finite_N & terms.matters())
        terms_K = terms.take(index_K)
        if chosen == "reference":
            hidden_KH, target_K = take(hidden_NH, index_K), take(target_N, index_K)
            scored = reference_head(weight_head(weight_VH, bias_V), len(weight_VH), hidden_KH, target_K, transform)
            loss, logp_K, entropy_K = row_losses(scored[0], terms_K).sum(), scored[0].detach(), scored[1].detach()
        else:
            loss, logp_K, entropy_K = _FusedLoss.apply(
                hidden_NH, weight_VH.detach(), target_N, None if bias_V is None else bias_V.detach(),
                transform, index_K, terms_K, training and hidden_NH.requires_grad, chosen,
            )  # fmt: skip
    rows = len(target_N)
    metrics = _metrics(logp_K, entropy_K, terms_K)
    metrics["rows_not_finite"] = (~finite_N).sum()
    metrics["rows_dropped"] = logp_K.new_tensor(rows - len(logp_K))
    return MelLoss(loss, spread(logp_K, index_K, rows), spread(entropy_K, index_K, rows), metrics)


def row_losses(logp_K: Tensor, terms: LossTerms) -> Tensor:
    """Each row's term of the loss, as `LossTerms` states it; differentiable in logp. The only copy of that formula."""
    policy = _Policy.of(logp_K, terms)
    loss_K = -torch.minimum(policy.ratio_K * policy.advantage_K, policy.clipped_K * policy.advantage_K)
    if terms.ref_logp_N is not None:
        loss_K = loss_K + policy.kl_weight * policy.kl_K
    return terms.weight_N.to(logp_K.dtype) * torch.where(terms.is_nll_N, -logp_K, loss_K)


class _Policy(NamedTuple):
    """The policy loss's ingredients. NLL rows get harmless values, so that no NaN reaches a gradient through them."""

    advantage_K: Tensor
    ratio_K: Tensor
    clipped_K: Tensor
    kl_K: Tensor
    kl_weight: Tensor | float

    @classmethod
    def of(cls, logp_K: Tensor, terms: LossTerms) -> _Policy:
        def read(value: Tensor | float, harmless: Tensor | float) -> Tensor:
            return torch.where(terms.is_nll_N, harmless, torch.as_tensor(value, device=logp_K.device)).to(logp_K.dtype)

        here_K = logp_K.detach()
        old_K = here_K if terms.old_logp_N is None else read(terms.old_logp_N, here_K)
        ref_K = here_K if terms.ref_logp_N is None else read(terms.ref_logp_N, here_K)
        ratio_K = (logp_K - old_K).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        low_K, high_K = read(terms.clip_low, 0.0), read(terms.clip_high, 0.0)
        away_K = (ref_K - logp_K).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return cls(
            advantage_K=read(terms.advantage_N, 0.0),
            ratio_K=ratio_K,
            clipped_K=torch.minimum(torch.maximum(ratio_K, 1.0 - low_K), 1.0 + high_K),
            kl_K=torch.expm1(away_K) - away_K,
            kl_weight=read(terms.kl_weight, 0.0),
        )


@torch.no_grad()
def _metrics(logp_K: Tensor, entropy_K: Tensor, terms: LossTerms) -> dict[str, Tensor]:
    """Sums of the two losses, and means over the computed rows of each kind (0 where there is none)."""
    policy = _Policy.of(logp_K, terms)
    loss_K = row_losses(logp_K, terms)
    is_policy_K = ~terms.is_nll_N

    def mean(value_K: Tensor, rows_K: Tensor) -> Tensor:
        return torch.where(rows_K, value_K, 0.0).sum() / rows_K.sum().clamp(min=1)

    too_low_K = (policy.ratio_K < policy.clipped_K) & (policy.advantage_K < 0)
    too_high_K = (policy.ratio_K > policy.clipped_K) & (policy.advantage_K > 0)
    return {
        "policy_loss": torch.where(is_policy_K, loss_K, 0.0).sum(),
        "nll_loss": torch.where(terms.is_nll_N, loss_K, 0.0).sum(),
        "nll_mean": mean(-logp_K, terms.is_nll_N),
        "entropy_mean": mean(entropy_K, is_policy_K),
        "kl_mean": mean(policy.kl_K, is_policy_K),
        "ratio_mean": mean(policy.ratio_K, is_policy_K),
        "ratio_max": torch.cat([torch.where(is_policy_K, policy.ratio_K, 0.0), logp_K.new_zeros(1)]).max(),
        "clip_low_fraction": mean(too_low_K.to(logp_K.dtype), is_policy_K),
        "clip_high_fraction": mean(too_high_K.to(logp_K.dtype), is_policy_K),
        "policy_rows": is_policy_K.sum(),
        "nll_rows": terms.is_nll_N.sum(),
    }


class _FusedLoss(torch.autograd.Function):
    """Forward: loss and d loss / d hidden. Backward: that, times the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        transform: LogitTransform,
        index_K: Tensor | None,
        terms_K: LossTerms,
        want_gradient: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype, ctx.rows = hidden_NH.dtype, len(target_N)

        def coefficient(block: slice, logp_R: Tensor) -> Tensor:
            with torch.enable_grad():
                logp_R = logp_R.detach().requires_grad_()
                total = row_losses(logp_R, terms_K.take(block)).sum()
            return torch.autograd.grad(total, logp_R)[0]

        scored = run_frozen(
            impl, take(hidden_NH, index_K), weight_VH, take(target_N, index_K), bias_V, transform,
            want_u=want_gradient, coefficient=coefficient,
        )  # fmt: skip
        ctx.save_for_backward(scored.u_NH, index_K)
        ctx.mark_non_differentiable(scored.logp_N, scored.entropy_N)
        return row_losses(scored.logp_N, terms_K).sum(), scored.logp_N, scored.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient_KH, index_K = ctx.saved_tensors
        # One number per row: a 0-dim factor would be rounded to bfloat16 first.
        return scale_rows(gradient_KH, grad_loss.expand(ctx.rows), index_K, ctx.dtype), *[None] * 8


def _check_terms(terms: object, rows: int, device: torch.device) -> None:
    if not isinstance(terms, LossTerms):
        raise TypeError(f"terms is a {type(terms).__name__}: expected LossTerms")
    required = ("is_nll_N", "weight_N", "advantage_N")
    for name in required + tuple(name for name in terms.tensors() if name not in required):
        value = getattr(terms, name)
        check_tensor(f"terms.{name}", value, "N", (torch.bool,) if name == "is_nll_N" else FLOATS)
        check_like(f"terms.{name}", value, rows, "hidden_NH has rows", device)
    for name in ("clip_low", "clip_high", "kl_weight"):
        value = getattr(terms, name)
        if not isinstance(value, Tensor):
            check_number(f"terms.{name}", value, minimum=0.0)
    if terms.ref_logp_N is None and (isinstance(terms.kl_weight, Tensor) or terms.kl_weight != 0):
        raise ValueError(f"terms.kl_weight is {terms.kl_weight!r} and terms.ref_logp_N None: expected both or neither")
