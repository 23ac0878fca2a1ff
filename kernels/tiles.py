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

The KL divergence of a student from a teacher under the same head takes the same loop, with the states of both in one
block. With z of the student, y of the teacher, o over all tokens, k = argmax z and r_o = (z_o - y_o) - (z_k - y_k):

    m = z_k                   s = sum_o exp(z_o - m)        acc_p = sum_o exp(z_o - m) slope_o w_o
    n = max_o (y_o - y_k)     t = sum_o exp(y_o - y_k - n)  acc_r = sum_o exp(z_o - m) r_o slope_o w_o
    a = sum_o exp(z_o - m) r_o                              b = sum_o exp(z_o - m) (exp(-r_o) - 1 + r_o)

With A = a / s, B = b / s and x = B - A:

    KL = A + n + log(t / s) = B - (x - log(1 + x))
    u  = gain (acc_r - A acc_p) / s = d KL / d h

The second form of KL has only terms of the size of KL, so it keeps its digits when teacher and student nearly agree. r
is 0 at the student's first choice, so a row that is almost certain keeps its digits, too.

Letters: N rows, R rows of a block, P rows of a block of pairs (first the students, then as many teachers), T columns
of a tile, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
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


HALF_SCALES = (2.0**15, 2.0**6)
"""Factors of exp(z - m) and exp(z - m) r in float16, which keep small values out of its subnormal range.

exp(z - m) |r| above 1023 is clipped to the largest float16.
"""


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


class Divergence(NamedTuple):
    """KL(student || teacher) per row, in nats. `u_NH` = d KL / d student, None if it was not requested."""

    kl_N: Tensor
    u_NH: Tensor | None


class RunningPair(NamedTuple):
    """Sums over the tiles so far; `c_R` is z_k - y_k. The first two start at -inf, the others at 0."""

    m_R: Tensor
    n_R: Tensor
    s_R: Tensor
    a_R: Tensor
    b_R: Tensor
    t_R: Tensor
    c_R: Tensor


class Steps(Protocol):
    """Elementwise work between the two products; implemented in torch and in Triton."""

    operand_dtype: torch.dtype
    """Dtype in which hidden, weight and p enter the products."""
    differences: bool
    """A pair's second row is student - teacher, not the teacher: exact where operands are not rounded to 16 bits."""

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

    def fold_pairs(self, z_PT: Tensor, bias_T: Tensor | None, run: RunningPair, acc_PH: Tensor | None) -> Tensor:
        """Add the products `z_PT` of the next tokens to `run`, and move `acc_PH` to the new m and k.

        Returns: exp(z - m) slope and exp(z - m) r slope, each times a constant of the implementation. They may
        overwrite `z_PT`, and are undefined if `acc_PH` is None.
        """
        ...

    def finish_pairs(self, run: RunningPair, kl_R: Tensor) -> tuple[Tensor, Tensor]:
        """Write the KL divergences of the block.

        Returns: (to_r_R, to_p_R) with u = to_r acc_r - to_p acc_p.
        """
        ...


class _Scratch:
    """Temporary buffers of the loop, reused by all blocks; `acc_dtype=None` if no accumulators are needed here."""

    def __init__(self, weight_VH: Tensor, steps: Steps, tiling: Tiling, rows: int, acc_dtype: torch.dtype | None):
        wide, device = accumulate_dtype(weight_VH.dtype), weight_VH.device
        self.columns = tiling.columns
        columns, width = min(tiling.columns, weight_VH.shape[0]), weight_VH.shape[1]
        rows = min(tiling.rows, rows)
        # Rows of whole cache lines keep the BLAS library on its fast kernels, even for an odd vocabulary size.
        self.tile_RT = torch.empty(rows, -(-columns // 64) * 64, dtype=wide, device=device)
        self.weight_TH: Tensor | None = None
        if weight_VH.dtype != steps.operand_dtype:
            self.weight_TH = torch.empty(columns, width, dtype=steps.operand_dtype, device=device)
        self.acc_RH: Tensor | None = None
        if acc_dtype is not None:
            self.acc_RH = torch.empty(rows, width, dtype=acc_dtype, device=device)
        self.running_SR = torch.empty(len(RunningPair._fields), rows, dtype=wide, device=device)

    def weight(self, weight_TH: Tensor) -> Tensor:
        return weight_TH if self.weight_TH is None else self.weight_TH[: len(weight_TH)].copy_(weight_TH)

    def running(self, rows: int) -> Running:
        self.running_SR.zero_()[0].fill_(-torch.inf)
        return Running(*self.running_SR[: len(Running._fields), :rows].unbind())

    def running_pair(self, rows: int) -> RunningPair:
        self.running_SR.zero_()[:2].fill_(-torch.inf)
        return RunningPair(*self.running_SR[:, :rows].unbind())

    def acc(self, rows: int, out_RH: Tensor | None = None) -> Tensor:
        acc_RH = out_RH if self.acc_RH is None else self.acc_RH[:rows]
        assert acc_RH is not None
        return acc_RH.zero_()


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
    scratch = _Scratch(weight_VH, steps, tiling, rows, None if u_dtype in (None, wide) else wide)
    for start in range(0, rows, tiling.rows):
        block = slice(start, start + tiling.rows)
        out = Scored(logp_N[block], entropy_N[block], lse_N[block], None if u_NH is None else u_NH[block])
        target_R, run = target_N[block], scratch.running(len(out.logp_N))
        acc_RH = None if out.u_NH is None else scratch.acc(len(out.u_NH), out.u_NH)
        for tile in _tiles(hidden_NH[block].to(steps.operand_dtype), weight_VH, bias_V, scratch):
            p_RT = steps.fold(tile.z_RT, target_R, tile.first, tile.bias_T, run, acc_RH)
            if acc_RH is not None:
                accumulate(acc_RH, p_RT, tile.weight_TH)
        to_target_R, to_others_R = steps.finish(run, out)
        if acc_RH is None or out.u_NH is None:
            continue
        steps.direction(to_target_R, to_others_R, acc_RH, target_R, weight_VH, out.u_NH)
    return Scored(logp_N, entropy_N, lse_N, u_NH)


def frozen_kl(
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    *,
    steps: Steps,
    tiling: Tiling,
    u_dtype: torch.dtype | None,
) -> Divergence:
    """Compute KL(student || teacher) of every row, and its gradient in the student in `u_dtype`.

    A block has half as many rows as in `frozen_head`, each with its teacher, so tile and accumulators have the same
    size. Without u the second product is skipped and no other operation changes.
    """
    rows, device, wide = len(student_NH), student_NH.device, accumulate_dtype(student_NH.dtype)
    kl_N = torch.empty(rows, dtype=wide, device=device)
    u_NH = None if u_dtype is None else torch.empty(student_NH.shape, dtype=u_dtype, device=device)
    pairs = max(1, tiling.rows // 2)
    scratch = _Scratch(weight_VH, steps, Tiling(2 * pairs, tiling.columns), 2 * rows, None if u_NH is None else wide)
    for start in range(0, rows, pairs):
        block = slice(start, start + pairs)
        kl_R, pair_PH = kl_N[block], _pair(student_NH[block], teacher_NH[block], steps)
        run, acc_PH = scratch.running_pair(len(kl_R)), None if u_NH is None else scratch.acc(len(pair_PH))
        for tile in _tiles(pair_PH, weight_VH, bias_V, scratch):
            p_PT = steps.fold_pairs(tile.z_RT, tile.bias_T, run, acc_PH)
            if acc_PH is not None:
                accumulate(acc_PH, p_PT, tile.weight_TH)
        to_r_R, to_p_R = steps.finish_pairs(run, kl_R)
        if acc_PH is None or u_NH is None:
            continue
        acc_p_RH, acc_r_RH = acc_PH.chunk(2)
        steps.direction(to_r_R, to_p_R, acc_p_RH, torch.arange(len(kl_R), device=device), acc_r_RH, u_NH[block])
    return Divergence(kl_N, u_NH)


def _pair(student_RH: Tensor, teacher_RH: Tensor, steps: Steps) -> Tensor:
    """Return the states of the students, followed by those of the teachers or by the differences."""
    student_RH, teacher_RH = student_RH.to(steps.operand_dtype), teacher_RH.to(steps.operand_dtype)
    return torch.cat([student_RH, student_RH - teacher_RH if steps.differences else teacher_RH])


class _Tile(NamedTuple):
    """Products of a block of rows with the tokens first, first + 1, ... and the weights and biases of these tokens."""

    z_RT: Tensor
    weight_TH: Tensor
    first: int
    bias_T: Tensor | None


def _tiles(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scratch: _Scratch) -> Iterator[_Tile]:
    """Yield one block of rows times the vocabulary, tile by tile, every tile in the same memory."""
    for first in range(0, len(weight_VH), scratch.columns):
        tokens = slice(first, first + scratch.columns)
        weight_TH = scratch.weight(weight_VH[tokens])
        z_RT = scratch.tile_RT[: len(hidden_RH), : len(weight_TH)]
        project(hidden_RH, weight_TH, z_RT)
        yield _Tile(z_RT, weight_TH, first, None if bias_V is None else bias_V[tokens])
