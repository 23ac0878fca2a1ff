"""KL divergence between two hidden states under one head, and its backward pass.

N rows, K rows that are computed, V vocabulary, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .api import Impl
from .backends import choose_impl, exact_products, run_frozen_kl
from .checks import check_pair, check_transform, check_weight
from .reference import reference_kl_head, weight_head
from .rows import kept_rows, scale_rows, spread, take
from .transform import LogitTransform


def fused_kl(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_u: bool = True,
    impl: Impl = "auto",
    keep_N: Tensor | None = None,
) -> Tensor:
    """Compute KL(student || teacher) of each row under one head, without (N, V) logits.

    With p and q the softmax of cap(logit_scale (hidden @ weight.T + bias)) / temperature for student and teacher:

        kl_i = sum_j p_ij log(p_ij / q_ij)

    Args:
        student_NH, teacher_NH: hidden states of one shape: float32, bfloat16 or float16 (float64 is for tests), any
            strides. Autocast is disabled inside. The teacher gets no gradient.
        compute_u: keep u = d kl / d student for the backward pass. False is for measuring: half the cost, the same
            result to the bit, and no gradient.
        keep_N: bool; a row where it is False is not computed.
        weight_VH, temperature, bias_V, logit_scale, softcap, impl: as in `fused_logprobs`.

    Returns: kl_N in nats, at least 0, float32 (float64 for float64 inputs); 0 in rows not computed. It is
        differentiable in student (once); rows not computed get a zero gradient.
    Raises: TypeError or ValueError with the argument, its value and the expected one.
    Source: docs/kernels.md, "The KL divergence".
    """
    transform = check_transform(temperature, logit_scale, softcap)
    check_pair(student_NH, teacher_NH)
    check_weight(student_NH, weight_VH, bias_V, "student_NH")
    training = compute_u and torch.is_grad_enabled()
    chosen = choose_impl(impl, student_NH, weight_VH, bias_V, training=training, kl=True)
    if chosen == "reference":
        with torch.set_grad_enabled(training):
            return _reference(student_NH, teacher_NH, weight_VH, bias_V, transform, keep_N)
    want_u = training and student_NH.requires_grad
    if bias_V is not None:
        bias_V = bias_V.detach()
    with exact_products(student_NH.device):
        index_K = kept_rows(keep_N, student_NH, "student_NH")
        kl_N: Tensor = _FrozenHeadKL.apply(
            student_NH if want_u else student_NH.detach(), teacher_NH.detach(),
            weight_VH.detach(), bias_V, transform, index_K, want_u, chosen,
        )  # fmt: skip
    return kl_N


def reference_kl(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep_N: Tensor | None = None,
) -> Tensor:
    """Compute `fused_kl(impl="reference")`: student, weight and bias get gradients.

    The teacher's distribution is a constant: neither its hidden state nor, through it, the head gets a gradient.
    Arguments, result and errors are those of `fused_kl`.
    """
    transform = check_transform(temperature, logit_scale, softcap)
    check_pair(student_NH, teacher_NH)
    check_weight(student_NH, weight_VH, bias_V, "student_NH")
    return _reference(student_NH, teacher_NH, weight_VH, bias_V, transform, keep_N)


def _reference(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    keep_N: Tensor | None,
) -> Tensor:
    with exact_products(student_NH.device):
        index_K = kept_rows(keep_N, student_NH, "student_NH")
        student_KH, teacher_KH = take(student_NH, index_K), take(teacher_NH, index_K)
        head = weight_head(weight_VH, bias_V)
        kl_K = reference_kl_head(head, len(weight_VH), student_KH, teacher_KH, transform)
    return spread(kl_K, index_K, len(student_NH))


class _FrozenHeadKL(torch.autograd.Function):
    """Operator for a frozen head. Forward computes u, too; backward: d loss / d student_i = (d loss / d kl_i) u_i."""

    @staticmethod
    def forward(
        ctx: Any,
        student_NH: Tensor,
        teacher_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        transform: LogitTransform,
        index_K: Tensor | None,
        want_u: bool,
        impl: str,
    ) -> Tensor:
        ctx.dtype = student_NH.dtype
        student_KH, teacher_KH = take(student_NH, index_K), take(teacher_NH, index_K)
        kl_K, u_KH = run_frozen_kl(impl, student_KH, teacher_KH, weight_VH, bias_V, transform, want_u=want_u)
        ctx.save_for_backward(u_KH, index_K)
        return spread(kl_K, index_K, len(student_NH))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl_N: Tensor) -> tuple[Tensor | None, ...]:
        u_KH, index_K = ctx.saved_tensors
        return scale_rows(u_KH, grad_kl_N, index_K, ctx.dtype), *[None] * 7
