"""Public log-prob operators and their backward pass.

N rows, K rows that are computed, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import choose_impl, exact_products, run_frozen
from .checks import check_head, check_transform
from .reference import reference_head, weight_head
from .rows import live_rows, scale_rows, spread, take
from .transform import LogitTransform

Impl = Literal["auto", "triton", "torch", "reference"]


def fused_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_u: bool = True,
    impl: Impl = "auto",
    keep_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log-probability of each row's target, the entropy and the log-normalizer, without (N, V) logits.

    With z = cap(logit_scale (hidden @ weight.T + bias)) / temperature and cap(x) = softcap tanh(x / softcap):

        lse_i = log sum_j exp(z_ij)      logp_i = z_i,target - lse_i      entropy_i = - sum_j p_ij log p_ij

    Args:
        hidden_NH: float32, bfloat16 or float16 (float64 is for tests), any strides. Autocast is disabled inside.
        weight_VH: weight of the head, same dtype as hidden. It gets a gradient only with `impl="reference"`.
        target_N: int64 or int32 token ids in [0, V), or -100 for a row that is not scored.
        temperature, logit_scale, softcap: finite and above 0; `softcap=None` means no cap.
        bias_V: bias of the head, any float dtype.
        compute_u: keep u = d logp / d hidden for the backward pass. False is for scoring: half the cost, the same
            three results to the bit, and no gradient.
        impl: "torch" and "triton" require a frozen head; "reference" also trains weight and bias. "auto" selects
            "reference" if weight or bias requires grad, else "triton" on a GPU that runs it, else "torch".
        keep_N: bool; a row where it is False is not computed, exactly as if its target were -100.

    Returns: (logp_N, entropy_N, lse_N) in nats, float32 (float64 for float64 inputs); 0 in rows not computed. logp is
        differentiable in hidden (once); rows not computed get a zero gradient. Entropy and lse are detached.
    Raises: TypeError or ValueError with the argument, its value and the expected one.
    Source: docs/kernels.md, "The identity".
    """
    transform = check_transform(temperature, logit_scale, softcap)
    check_head(hidden_NH, weight_VH, target_N, bias_V)
    training = compute_u and torch.is_grad_enabled()
    chosen = choose_impl(impl, hidden_NH, weight_VH, bias_V, training=training)
    if chosen == "reference":
        with torch.set_grad_enabled(training):
            logp_N, entropy_N, lse_N = _reference(hidden_NH, weight_VH, target_N, bias_V, transform, keep_N)
        return logp_N, entropy_N.detach(), lse_N.detach()
    want_u = training and hidden_NH.requires_grad
    if bias_V is not None:
        bias_V = bias_V.detach()
    with exact_products(hidden_NH.device):
        index_K = live_rows(target_N, len(weight_VH), keep_N)
        logp_N, entropy_N, lse_N = _FrozenHead.apply(
            hidden_NH if want_u else hidden_NH.detach(),
            weight_VH.detach(), target_N, bias_V, transform, index_K, want_u, chosen,
        )  # fmt: skip
    return logp_N, entropy_N, lse_N


def reference_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy_grad: bool = False,
    keep_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `fused_logprobs(impl="reference")`; with `entropy_grad` the entropy has a gradient, too.

    Use it for an entropy bonus in the loss: u does not contain the gradient of the entropy. Arguments, results and
    errors are those of `fused_logprobs`; hidden, weight and bias get gradients.
    """
    transform = check_transform(temperature, logit_scale, softcap)
    check_head(hidden_NH, weight_VH, target_N, bias_V)
    logp_N, entropy_N, lse_N = _reference(hidden_NH, weight_VH, target_N, bias_V, transform, keep_N)
    return logp_N, entropy_N if entropy_grad else entropy_N.detach(), lse_N.detach()


def _reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    keep_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with exact_products(hidden_NH.device):
        index_K = live_rows(target_N, len(weight_VH), keep_N)
        hidden_KH, target_K = take(hidden_NH, index_K), take(target_N, index_K)
        scored = reference_head(weight_head(weight_VH, bias_V), len(weight_VH), hidden_KH, target_K, transform)
    logp_N, entropy_N, lse_N = (spread(part_K, index_K, len(target_N)) for part_K in scored)
    return logp_N, entropy_N, lse_N


class _FrozenHead(torch.autograd.Function):
    """Operator for a frozen head. Forward computes u, too; backward: d loss / d hidden_i = (d loss / d logp_i) u_i."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        transform: LogitTransform,
        index_K: Tensor | None,
        want_u: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtype, rows = hidden_NH.dtype, len(target_N)
        scored = run_frozen(
            impl, take(hidden_NH, index_K), weight_VH, take(target_N, index_K), bias_V, transform, want_u=want_u
        )
        ctx.save_for_backward(scored.u_NH, index_K)
        logp_N, entropy_N, lse_N = (spread(part_K, index_K, rows) for part_K in scored[:3])
        ctx.mark_non_differentiable(entropy_N, lse_N)
        return logp_N, entropy_N, lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        u_KH, index_K = ctx.saved_tensors
        return scale_rows(u_KH, grad_logp_N, index_K, ctx.dtype), *[None] * 7
