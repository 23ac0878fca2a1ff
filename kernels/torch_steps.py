"""Elementwise part of the tile loop in plain torch: the production path on a CPU, the fallback elsewhere.

R rows of a block, T columns of a tile, V vocabulary, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemm import accumulate_dtype, has_half_products
from .tiles import Running, Scored, Tiling
from .transform import LogitTransform

# 8 MiB of float32 logits and the same for p stay in the last-level cache of a CPU between the two products. From 1024
# rows and 2048 columns on, the products reach full speed.
CPU_TILING = Tiling(rows=1024, columns=2048)
GPU_TILING = Tiling(rows=1024, columns=8192)


class TorchSteps:
    """`tiles.Steps` in torch operations, on any device and in float32, float16, bfloat16 or float64."""

    def __init__(self, dtype: torch.dtype, device: torch.device, transform: LogitTransform):
        self.transform = transform
        self.operand_dtype = dtype if has_half_products(dtype, device) else accumulate_dtype(dtype)
        # Keeps p, which is relative to the largest probability, out of the subnormal range of float16.
        self.p_scale = 2.0**15 if self.operand_dtype == torch.float16 else 1.0
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
