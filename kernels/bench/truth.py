"""Log-probability, entropy, log-normalizer, KL and u in float64, by autograd, for the tests and the error columns.

N rows, R rows of a block, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tiles import Divergence, Scored
from ..transform import LogitTransform

BLOCK_BYTES = 256 * 2**20
"""Bytes of float64 logits in one block of rows."""


def true_head(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Scored:
    """Return logp, entropy, lse and u = d logp / d hidden in float64; every target must be a token.

    Shares no code with the operators: whole rows of logits, the target excluded from the normalizer, autograd.
    """
    weight_VH = weight_VH.detach().double()
    block = max(1, BLOCK_BYTES // (len(weight_VH) * 8))
    parts = [
        _block(hidden_NH[i : i + block], weight_VH, target_N[i : i + block], bias_V, transform or LogitTransform())
        for i in range(0, max(len(hidden_NH), 1), block)
    ]
    return Scored(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def true_kl(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Divergence:
    """Return KL(student || teacher) and u = d kl / d student in float64, from whole rows of logits and by autograd."""
    weight_VH, transform = weight_VH.detach().double(), transform or LogitTransform()
    block = max(1, BLOCK_BYTES // (len(weight_VH) * 16))
    parts = [
        _kl_block(student_NH[i : i + block], teacher_NH[i : i + block], weight_VH, bias_V, transform)
        for i in range(0, max(len(student_NH), 1), block)
    ]
    return Divergence(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@torch.enable_grad()
def _kl_block(
    student_RH: Tensor, teacher_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    student_RH = student_RH.detach().double().requires_grad_()
    log_p_RV = _logits(student_RH, weight_VH, bias_V, transform).log_softmax(1)
    log_q_RV = _logits(teacher_RH.detach().double(), weight_VH, bias_V, transform).log_softmax(1)
    # The terms sum(q - p) = 0 remove the rounding of the normalizers; a banned token has p = q = 0.
    alive_RV = log_p_RV.detach() > -torch.inf
    log_p_RV, log_q_RV = torch.where(alive_RV, log_p_RV, -1e4), torch.where(alive_RV, log_q_RV, -1e4)
    p_RV, r_RV = log_p_RV.exp(), log_p_RV - log_q_RV
    small_RV = torch.where(r_RV.abs() < 1, r_RV, 0.0)
    terms_RV = torch.where(
        r_RV.abs() < 1, p_RV * (torch.expm1(-small_RV) + small_RV), p_RV * r_RV + log_q_RV.exp() - p_RV
    )
    (u_RH,) = torch.autograd.grad(terms_RV.sum(), student_RH)
    return terms_RV.detach().sum(1), u_RH


def _logits(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> Tensor:
    z_RV = hidden_RH @ weight_VH.T
    if bias_V is not None:
        z_RV = z_RV + bias_V.detach().double()
    z_RV = z_RV * transform.logit_scale
    if transform.softcap is not None:
        z_RV = transform.softcap * torch.tanh(z_RV / transform.softcap)
    return z_RV / transform.temperature


@torch.enable_grad()
def _block(
    hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor, bias_V: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden_RH = hidden_RH.detach().double().requires_grad_()
    z_RV = _logits(hidden_RH, weight_VH, bias_V, transform)
    target_R1 = target_R.long()[:, None]
    z_t_R = z_RV.gather(1, target_R1)[:, 0]
    if len(weight_VH) == 1:
        logp_R = z_t_R - z_t_R
    else:
        logp_R = F.logsigmoid(z_t_R - torch.logsumexp(z_RV.scatter(1, target_R1, -torch.inf), 1))
    (u_RH,) = torch.autograd.grad(logp_R.sum(), hidden_RH)
    log_p_RV = z_RV.detach().log_softmax(1).scatter(1, target_R1, logp_R.detach()[:, None])
    entropy_R = -(log_p_RV.exp() * log_p_RV.clamp(min=-1e300)).sum(1)
    return logp_R.detach(), entropy_R, z_RV.detach().logsumexp(1), u_RH
