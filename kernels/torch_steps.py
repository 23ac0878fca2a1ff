"""Elementwise part of the tile loop in plain torch: the production path on a CPU, the fallback elsewhere.

R rows of a block, P rows of a block of pairs, T columns of a tile, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemm import accumulate_dtype, has_half_products
from .tiles import HALF_SCALES, Running, RunningPair, Scored, Tiling
from .transform import LogitTransform

# 8 MiB of float32 logits and the same for p stay in the last-level cache of a CPU between the two products. From 1024
# rows and 2048 columns on, the products reach full speed.
CPU_TILING = Tiling(rows=1024, columns=2048)
GPU_TILING = Tiling(rows=1024, columns=8192)

NEAR = 0.25
"""Up to this size, exp(-r) - 1 + r and x - log(1 + x) are computed as series, in which nothing cancels."""
KL_NEAR = 0.25
"""Largest b / s for which KL is taken from b."""
HALF_MAX = 65504.0
"""Largest float16."""


class TorchSteps:
    """`tiles.Steps` in torch operations, on any device and in float32, float16, bfloat16 or float64."""

    def __init__(self, dtype: torch.dtype, device: torch.device, transform: LogitTransform):
        self.transform = transform
        self.operand_dtype = dtype if has_half_products(dtype, device) else accumulate_dtype(dtype)
        self.differences = self.operand_dtype == accumulate_dtype(dtype)
        self.p_scale, self.r_scale = HALF_SCALES if self.operand_dtype == torch.float16 else (1.0, 1.0)
        self._p: Tensor | None = None

    def fold(
        self,
        z_RT: Tensor,
        target_R: Tensor,
        first: int,
        bias_T: Tensor | None,
        run: Running,
        acc_RH: Tensor | None,
    ) -> Tensor:
        """See `tiles.Steps.fold`."""
        slope_RT = self._to_logits(z_RT, bias_T, want_slope=acc_RH is not None)
        self._take_out_target(z_RT, target_R, first, run)
        m_R = torch.maximum(run.m_R, z_RT.amax(1))
        # If all logits so far are -inf, subtract a finite number instead; exp still gives 0.
        floor = torch.finfo(z_RT.dtype).min
        shift_R = run.m_R.clamp(min=floor) - m_R.clamp(min=floor)
        alpha_R = shift_R.exp()
        z_RT.sub_(m_R.clamp(min=floor)[:, None])
        p_RT = torch.exp(z_RT, out=self._p_buffer(z_RT))
        run.a_R.addcmul_(run.s_R, shift_R.clamp(min=-1e30)).mul_(alpha_R)
        run.s_R.mul_(alpha_R).add_(p_RT.sum(1))
        run.a_R.add_(z_RT.clamp_(min=-1e30).mul_(p_RT).sum(1))  # 0 * -inf would be NaN
        run.m_R.copy_(m_R)
        if acc_RH is None:
            return p_RT
        acc_RH.mul_(alpha_R[:, None])
        if slope_RT is not None:
            p_RT.mul_(slope_RT)
        return p_RT if self.operand_dtype == p_RT.dtype else (p_RT * self.p_scale).to(self.operand_dtype)

    def finish(self, run: Running, out: Scored) -> tuple[Tensor, Tensor]:
        """See `tiles.Steps.finish`."""
        log_s_R = run.s_R.log()
        odds_R = (run.z_t_R - run.m_R) - log_s_R
        logp_R, logq_R = F.logsigmoid(odds_R), F.logsigmoid(-odds_R)
        p_R, q_R = torch.sigmoid(odds_R), torch.sigmoid(-odds_R)
        others_R = torch.where(run.s_R == 0, 0.0, log_s_R - run.a_R / run.s_R)
        out.logp_N.copy_(logp_R)
        out.entropy_N.copy_(_times(p_R, -logp_R) + _times(q_R, others_R - logq_R))
        # Two forms of the same number; neither computes inf - inf where it is used.
        out.lse_N.copy_(torch.where(odds_R >= 0, run.z_t_R - logp_R, run.m_R + log_s_R - logq_R))
        to_target_R = q_R * self.transform.gain
        to_others_R = to_target_R / (torch.where(run.s_R == 0, 1.0, run.s_R) * self.p_scale)
        if self.transform.softcap is not None:
            to_target_R = to_target_R * (1.0 - (run.z_t_R / self.transform.cap).square())
        return to_target_R, to_others_R

    def direction(
        self,
        to_target_R: Tensor,
        to_others_R: Tensor,
        acc_RH: Tensor,
        target_R: Tensor,
        weight_VH: Tensor,
        u_RH: Tensor,
    ) -> None:
        """See `tiles.Steps.direction`."""
        weight_t_RH = weight_VH.index_select(0, target_R).to(acc_RH.dtype)
        acc_RH.mul_(-to_others_R[:, None]).addcmul_(weight_t_RH, to_target_R[:, None])
        if u_RH.data_ptr() != acc_RH.data_ptr():
            u_RH.copy_(acc_RH)

    def fold_pairs(self, z_PT: Tensor, bias_T: Tensor | None, run: RunningPair, acc_PH: Tensor | None) -> Tensor:
        """See `tiles.Steps.fold_pairs`."""
        z_RT, d_RT = z_PT.chunk(2)
        p_PT = self._p_buffer(z_PT)
        w_RT, f_RT = p_PT.chunk(2)
        slope_RT = self._to_pair(z_RT, d_RT, bias_T, want_slope=acc_PH is not None)
        floor = torch.finfo(z_RT.dtype).min
        top_R, k_R = z_RT.max(1)
        m_R = torch.maximum(run.m_R, top_R)
        c_R = torch.where(m_R > run.m_R, d_RT.gather(1, k_R[:, None])[:, 0], run.c_R)
        shift_R = run.m_R.clamp(min=floor) - m_R.clamp(min=floor)
        move_R = torch.where(run.s_R > 0, c_R - run.c_R, 0.0)
        z_RT.sub_(m_R.clamp(min=floor)[:, None])
        d_RT.sub_(c_R[:, None])
        torch.sub(z_RT, d_RT, out=w_RT)  # y - y_k
        n_old_R = run.n_R + shift_R + move_R
        n_R = torch.maximum(n_old_R, w_RT.amax(1))
        w_RT.sub_(n_R.clamp(min=floor)[:, None]).exp_()
        run.t_R.mul_((n_old_R.clamp(min=floor) - n_R.clamp(min=floor)).exp()).add_(w_RT.sum(1))
        e_RT = z_RT.exp_()
        # exp(z - m) (exp(-r) - 1 + r); infinite or NaN where the teacher is far away, and then not used.
        far_RT = w_RT.mul_(n_R.exp()[:, None]).sub_(e_RT).addcmul_(e_RT, d_RT)
        _excess_series(d_RT, out=f_RT).mul_(e_RT)
        tile_R = torch.where(d_RT.abs() < NEAR, f_RT, far_RT).sum(1)
        alpha_R, growth_R = shift_R.exp(), move_R.expm1()
        run.b_R.mul_(1.0 + growth_R).addcmul_(run.s_R, _excess(-move_R)).addcmul_(run.a_R, growth_R, value=-1.0)
        run.b_R.mul_(alpha_R).add_(tile_R)
        torch.mul(e_RT, d_RT, out=f_RT)
        run.a_R.addcmul_(run.s_R, move_R, value=-1.0).mul_(alpha_R).add_(f_RT.sum(1))
        run.s_R.mul_(alpha_R).add_(e_RT.sum(1))
        for old_R, new_R in ((run.m_R, m_R), (run.n_R, n_R), (run.c_R, c_R)):
            old_R.copy_(new_R)
        if acc_PH is None:
            return p_PT
        acc_p_RH, acc_r_RH = acc_PH.chunk(2)
        acc_r_RH.addcmul_(acc_p_RH, move_R[:, None] * (-self.r_scale / self.p_scale)).mul_(alpha_R[:, None])
        acc_p_RH.mul_(alpha_R[:, None])
        w_RT.copy_(e_RT)
        if slope_RT is not None:
            w_RT.mul_(slope_RT)
            f_RT.mul_(slope_RT)
        if self.operand_dtype == p_PT.dtype:
            return p_PT
        w_RT.mul_(self.p_scale)
        f_RT.mul_(self.r_scale)
        if self.operand_dtype == torch.float16:
            f_RT.clamp_(-HALF_MAX, HALF_MAX)
        return p_PT.to(self.operand_dtype)

    def finish_pairs(self, run: RunningPair, kl_R: Tensor) -> tuple[Tensor, Tensor]:
        """See `tiles.Steps.finish_pairs`."""
        a_R, b_R = run.a_R / run.s_R, run.b_R / run.s_R
        x_R = b_R - a_R
        near_R = (b_R < KL_NEAR) & (x_R.abs() < NEAR)
        far_R = a_R + run.n_R + (run.t_R / run.s_R).log()
        found_R = torch.where(near_R, b_R - _lag(x_R), far_R)
        kl_R.copy_(torch.where(found_R < 0, 0.0, found_R))  # rounding only
        to_r_R = self.transform.gain / (run.s_R * self.r_scale)
        return to_r_R, to_r_R * a_R * (self.r_scale / self.p_scale)

    def _to_pair(self, z_RT: Tensor, d_RT: Tensor, bias_T: Tensor | None, *, want_slope: bool) -> Tensor | None:
        """Turn the products of a pair into the student's logits and the differences to the teacher's, in place."""
        transform = self.transform
        if not self.differences:
            torch.sub(z_RT, d_RT, out=d_RT)
        if transform.softcap is None:
            d_RT.mul_(transform.gain)
            return self._to_logits(z_RT, bias_T, want_slope=want_slope)
        inner = transform.logit_scale / transform.softcap
        d_RT.mul_(inner)
        teacher_RT = z_RT if bias_T is None else z_RT + bias_T.to(z_RT.dtype)
        teacher_RT = (teacher_RT * inner).sub_(d_RT).tanh_()
        slope_RT = self._to_logits(z_RT, bias_T, want_slope=want_slope)
        # tanh a - tanh b = tanh(a - b) (1 - tanh a tanh b) does not cancel.
        d_RT.tanh_().mul_(teacher_RT.mul_(z_RT).mul_(-1.0 / transform.cap).add_(1.0)).mul_(transform.cap)
        return slope_RT

    def _to_logits(self, z_RT: Tensor, bias_T: Tensor | None, *, want_slope: bool) -> Tensor | None:
        """Turn products into logits in place, and return the slope cap'(.) if there is a softcap."""
        transform = self.transform
        if bias_T is not None:
            z_RT.add_(bias_T.to(z_RT.dtype))
        if transform.softcap is None:
            if transform.gain != 1.0:
                z_RT.mul_(transform.gain)
            return None
        z_RT.mul_(transform.logit_scale / transform.softcap).tanh_()
        slope_RT = (1.0 - z_RT.square()) if want_slope else None
        z_RT.mul_(transform.cap)
        return slope_RT

    @staticmethod
    def _take_out_target(z_RT: Tensor, target_R: Tensor, first: int, run: Running) -> None:
        """Move the target's logit to `run` if it is in this tile, and replace it with -inf."""
        local_R = target_R - first
        inside_R = (local_R >= 0) & (local_R < z_RT.shape[1])
        column_R1 = local_R.clamp(0, z_RT.shape[1] - 1).to(torch.int64)[:, None]
        found_R = z_RT.gather(1, column_R1)[:, 0]
        run.z_t_R.copy_(torch.where(inside_R, found_R, run.z_t_R))
        z_RT.scatter_(1, column_R1, torch.where(inside_R, -torch.inf, found_R)[:, None])

    def _p_buffer(self, z_RT: Tensor) -> Tensor:
        if self._p is None or self._p.numel() < z_RT.numel():
            self._p = torch.empty(z_RT.numel(), dtype=z_RT.dtype, device=z_RT.device)
        return self._p[: z_RT.numel()].view(z_RT.shape)


def _times(p_R: Tensor, value_R: Tensor) -> Tensor:
    """Return p * value with 0 * inf = 0, the limit in an entropy."""
    return torch.where(p_R == 0, 0.0, p_R * value_R)


def _excess_series(r: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return exp(-r) - 1 + r for |r| < NEAR as a series in r: 6 terms in float32, 14 in float64."""
    terms = 14 if r.dtype == torch.float64 else 6
    out = torch.mul(r, 0.0, out=out)
    for power in range(terms + 1, 1, -1):
        out.mul_(r).add_((-1) ** power / math.factorial(power))
    return out.mul_(r).mul_(r)


def _excess(r_R: Tensor) -> Tensor:
    """Return exp(-r) - 1 + r."""
    return torch.where(r_R.abs() < NEAR, _excess_series(r_R), torch.expm1(-r_R) + r_R)


def _lag(x_R: Tensor) -> Tensor:
    """Return x - log(1 + x) for |x| < NEAR, as a series in v = x / (2 + x): log(1 + x) = 2 (v + v^3 / 3 + ...)."""
    v_R = x_R / (2.0 + x_R)
    square_R, sum_R = v_R.square(), torch.zeros_like(v_R)
    for power in range(21 if x_R.dtype == torch.float64 else 11, 1, -2):
        sum_R = sum_R * square_R + 2.0 / power
    return v_R * (x_R - square_R * sum_R)
