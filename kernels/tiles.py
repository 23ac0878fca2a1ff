"""Tile loop: logits exist one tile at a time, and the BLAS library computes both matrix products.

For a block of R rows, with o over all tokens except the row's target t, z the logits in float32 and
slope_o = cap'(.) (1 without a softcap):

    m = max_o z_o      s = sum_o exp(z_o - m)      a = sum_o exp(z_o - m) (z_o - m)
    acc = sum_o exp(z_o - m) slope_o w_o

are updated tile by tile, as in flash attention (arXiv 2205.14135), with the head's weight as both keys and values. With
d = z_t - m - log s, the log-odds of the target, and gain = dz/d(h.w):

    logp    = log sigmoid(d)
    entropy = p_t (-logp) + (1 - p_t) (softplus(d) + log s - a / s)
    u       = (1 - p_t) gain (slope_t w_t - acc / s) = d logp / d h        where 1 - p_t = sigmoid(-d)

The target is excluded from the sums and never subtracted from them, so nothing cancels, even for p_t close to 1.

Letters: N rows, R rows of a block, T columns of a tile, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .gemm import accumulate, accumulate_dtype, project


@dataclass(frozen=True, slots=True)
class Tiling:
    """Size of one tile of logits, fixed per process and shape: another size rounds the sums differently."""

    rows: int
    columns: int


class Scored(NamedTuple):
    """Results per row, in nats. `u_NH` = d logp / d hidden, None if it was not requested."""

    logp_N: Tensor
    entropy_N: Tensor
    lse_N: Tensor
    u_NH: Tensor | None


class Running(NamedTuple):
    """Sums m, s and a over the tiles so far, and the logit of the target."""

    m_R: Tensor
    s_R: Tensor
    a_R: Tensor
    z_t_R: Tensor


class Steps(Protocol):
    """Elementwise work between the two products; implemented in torch and in Triton."""

    operand_dtype: torch.dtype
    """Dtype in which hidden, weight and p enter the products."""

    def fold(
        self,
        z_RT: Tensor,
        target_R: Tensor,
        first: int,
        bias_T: Tensor | None,
        run: Running,
        acc_RH: Tensor | None,
    ) -> Tensor:
        """Add the products `z_RT` of tokens first, first + 1, ... to `run`, and rescale `acc_RH` to the new m.

        Returns: p_RT = exp(z - m) slope, zero at the target, times a constant of the implementation. It may overwrite
        `z_RT`, and is undefined if `acc_RH` is None.
        """
        ...

    def finish(self, run: Running, out: Scored) -> tuple[Tensor, Tensor]:
        """Write logp, entropy and lse of the block.

        Returns: (to_target_R, to_others_R) with u = to_target w_t - to_others acc.
        """
        ...

    def direction(
        self,
        to_target_R: Tensor,
        to_others_R: Tensor,
        acc_RH: Tensor,
        target_R: Tensor,
        weight_VH: Tensor,
        u_RH: Tensor,
    ) -> None:
        """Write u, rounded once to its dtype; `u_RH` may be `acc_RH` itself, which is not used afterwards."""
        ...


class _Scratch:
    """Temporary buffers of the loop, reused by all blocks."""

    def __init__(self, weight_VH: Tensor, steps: Steps, tiling: Tiling, rows: int, u_dtype: torch.dtype | None):
        wide, device = accumulate_dtype(weight_VH.dtype), weight_VH.device
        columns, width = min(tiling.columns, weight_VH.shape[0]), weight_VH.shape[1]
        rows = min(tiling.rows, rows)
        # Rows of whole cache lines keep the BLAS library on its fast kernels, even for an odd vocabulary size.
        self.tile_RT = torch.empty(rows, -(-columns // 64) * 64, dtype=wide, device=device)
        self.weight_TH: Tensor | None = None
        if weight_VH.dtype != steps.operand_dtype:
            self.weight_TH = torch.empty(columns, width, dtype=steps.operand_dtype, device=device)
        self.acc_RH: Tensor | None = None
        if u_dtype not in (None, wide):
            self.acc_RH = torch.empty(rows, width, dtype=wide, device=device)
        self.running_4R = torch.empty(4, rows, dtype=wide, device=device)

    def weight(self, weight_TH: Tensor) -> Tensor:
        return weight_TH if self.weight_TH is None else self.weight_TH[: len(weight_TH)].copy_(weight_TH)

    def running(self, rows: int) -> Running:
        self.running_4R.zero_()[0].fill_(-torch.inf)
        return Running(*self.running_4R[:, :rows].unbind())

    def acc(self, out: Scored) -> Tensor | None:
        if out.u_NH is None:
            return None
        return (out.u_NH if self.acc_RH is None else self.acc_RH[: len(out.u_NH)]).zero_()


def frozen_head(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    *,
    steps: Steps,
    tiling: Tiling,
    u_dtype: torch.dtype | None,
) -> Scored:
    """Compute log-probability, entropy and log-normalizer of every row, and u in `u_dtype`; every target is a token.

    Without u (`u_dtype=None`) the second product is skipped and no other operation changes, so the results are the
    same to the bit. Temporary memory is one tile, one block of accumulators and, if weights must be converted, one
    tile of weight. It does not depend on N or V.
    """
    rows, device, wide = len(hidden_NH), hidden_NH.device, accumulate_dtype(hidden_NH.dtype)
    logp_N, entropy_N, lse_N = (torch.empty(rows, dtype=wide, device=device) for _ in range(3))
    u_NH = None if u_dtype is None else torch.empty(hidden_NH.shape, dtype=u_dtype, device=device)
    scratch = _Scratch(weight_VH, steps, tiling, rows, u_dtype)
    for start in range(0, rows, tiling.rows):
        block = slice(start, start + tiling.rows)
        out = Scored(logp_N[block], entropy_N[block], lse_N[block], None if u_NH is None else u_NH[block])
        target_R, acc_RH = target_N[block], scratch.acc(out)
        run = _sums(hidden_NH[block], weight_VH, target_R, bias_V, steps, tiling.columns, scratch, acc_RH)
        to_target_R, to_others_R = steps.finish(run, out)
        if acc_RH is None or out.u_NH is None:
            continue
        steps.direction(to_target_R, to_others_R, acc_RH, target_R, weight_VH, out.u_NH)
    return Scored(logp_N, entropy_N, lse_N, u_NH)


def _sums(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    bias_V: Tensor | None,
    steps: Steps,
    columns: int,
    scratch: _Scratch,
    acc_RH: Tensor | None,
) -> Running:
    """Process one block of rows against the whole vocabulary, tile by tile."""
    hidden_RH, run = hidden_RH.to(steps.operand_dtype), scratch.running(len(target_R))
    for first in range(0, len(weight_VH), columns):
        tokens = slice(first, first + columns)
        weight_TH = scratch.weight(weight_VH[tokens])
        z_RT = scratch.tile_RT[: len(target_R), : len(weight_TH)]
        project(hidden_RH, weight_TH, z_RT)
        p_RT = steps.fold(z_RT, target_R, first, None if bias_V is None else bias_V[tokens], run, acc_RH)
        if acc_RH is not None:
            accumulate(acc_RH, p_RT, weight_TH)
    return run
