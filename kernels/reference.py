"""Log-probability, entropy and KL in differentiable torch: exact, slower, gradients for everything the head trains.

N rows, R rows of a block, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .gemm import accumulate_dtype
from .transform import LogitTransform

BLOCK_BYTES = 128 * 2**20
"""Bytes of float32 logits in one block of rows; autograd holds a few copies of them during that block."""

FLOOR = -1e30
"""Replacement for a logit of -inf: exp gives 0, and differences and their gradients stay finite."""

Head = Callable[[Tensor], Tensor]


def weight_head(weight_VH: Tensor, bias_V: Tensor | None) -> Head:
    """Return the function hidden -> hidden @ weight.T + bias in float32.

    The weight is converted once, so that its gradient is summed over the blocks in float32 and rounded once.
    """
    wide = accumulate_dtype(weight_VH.dtype)
    weight_VH, bias_V = weight_VH.to(wide), None if bias_V is None else bias_V.to(wide)
    return lambda hidden_RH: F.linear(hidden_RH.to(wide), weight_VH, bias_V)


def reference_head(
    head: Head,
    vocab: int,
    hidden_NH: Tensor,
    target_N: Tensor,
    transform: LogitTransform,
    *,
    keep_rng: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logp, entropy and log-normalizer of every row, all attached to the graph; every target must be a token.

    Blocks of rows are recomputed in the backward pass, so at most one block of logits exists at a time.

    Args:
        keep_rng: restore the random state for the recomputation, for a head with dropout.
    """
    wide = accumulate_dtype(hidden_NH.dtype)
    block = max(1, BLOCK_BYTES // (vocab * wide.itemsize))
    parts = []
    for start in range(0, max(len(hidden_NH), 1), block):  # one empty block keeps an empty batch in the graph
        inputs = (head, hidden_NH[start : start + block], target_N[start : start + block], transform)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_block, *inputs, use_reentrant=False, preserve_rng_state=keep_rng))
        else:
            parts.append(_block(*inputs))
    logp_N, entropy_N, lse_N = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logp_N, entropy_N, lse_N


def reference_kl_head(
    head: Head,
    vocab: int,
    student_NH: Tensor,
    teacher_NH: Tensor,
    transform: LogitTransform,
    *,
    keep_rng: bool = False,
) -> Tensor:
    """Compute KL(student || teacher) of every row, attached to the graph of the student and its head only.

    Blocks and `keep_rng` as in `reference_head`; the logits of a block exist twice.
    """
    wide = accumulate_dtype(student_NH.dtype)
    block = max(1, BLOCK_BYTES // (2 * vocab * wide.itemsize))
    parts = []
    for start in range(0, max(len(student_NH), 1), block):
        inputs = (head, student_NH[start : start + block], teacher_NH[start : start + block], transform)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_kl_block, *inputs, use_reentrant=False, preserve_rng_state=keep_rng))
        else:
            parts.append(_kl_block(*inputs))
    return torch.cat(parts)


def _kl_block(head: Head, student_RH: Tensor, teacher_RH: Tensor, transform: LogitTransform) -> Tensor:
    z_RV = _logits(head, student_RH, transform)
    with torch.no_grad():
        y_RV = _logits(head, teacher_RH, transform)
    # Subtract first: the rounding of logits and normalizers must not be an error of their differences.
    d_RV = z_RV - y_RV
    log_p_RV, log_q_RV = z_RV.log_softmax(1), y_RV.log_softmax(1)
    r_RV = d_RV - (torch.logsumexp(z_RV, 1) - torch.logsumexp(y_RV, 1))[:, None]
    p_RV = log_p_RV.exp()
    # sum(q - p) = 0 makes every term positive, and small where p and q nearly agree.
    near_RV = r_RV.detach().abs() < 1
    small_RV = torch.where(near_RV, r_RV, 0.0)
    excess_RV = p_RV * (torch.expm1(-small_RV) + small_RV)
    return torch.where(near_RV, excess_RV, p_RV * r_RV + (log_q_RV.exp() - p_RV)).sum(1)


def _logits(head: Head, hidden_RH: Tensor, transform: LogitTransform) -> Tensor:
    """Return the logits of the softmax; finite where the head's own are -inf."""
    z_RV = head(hidden_RH).to(accumulate_dtype(hidden_RH.dtype))
    if transform.softcap is None:
        z_RV = z_RV * transform.gain
    else:
        z_RV = torch.tanh(z_RV * (transform.logit_scale / transform.softcap)) * transform.cap
    return torch.where(z_RV < FLOOR, FLOOR, z_RV)  # clamp would stop the gradient of a NaN


def _block(head: Head, hidden_RH: Tensor, target_R: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    z_RV = _logits(head, hidden_RH, transform)
    target_R1 = target_R.to(torch.int64)[:, None]
    banned_R = z_RV.detach().gather(1, target_R1)[:, 0] <= FLOOR
    # Without the target in the sum, 1 - p_t keeps its digits when p_t is close to 1.
    others_RV = z_RV.scatter(1, target_R1, FLOOR)
    m_R1 = others_RV.detach().amax(1, keepdim=True)
    # Subtract first: the rounding of a log-normalizer of 1000 would be an error of the probabilities.
    others_RV = others_RV - m_R1
    log_s_R = torch.logsumexp(others_RV, 1)
    odds_R = (z_RV.gather(1, target_R1) - m_R1)[:, 0] - log_s_R
    log_q_RV = others_RV - log_s_R[:, None]
    others_entropy_R = -(log_q_RV.exp() * log_q_RV).sum(1)
    d_R = odds_R.clamp(-200, 200)  # the entropy is 0 beyond, and infinities would make it NaN
    entropy_R = -F.logsigmoid(d_R) * d_R.sigmoid() + (others_entropy_R - F.logsigmoid(-d_R)) * (-d_R).sigmoid()
    logp_R = torch.where(banned_R, -torch.inf, F.logsigmoid(odds_R))
    return logp_R, entropy_R, torch.logsumexp(z_RV, 1)
