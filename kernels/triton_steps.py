"""Elementwise part of the tile loop in Triton: each tile is read once and written once between the two products.

R rows of a block, P rows of a block of pairs, T columns of a tile, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from .gemm import has_half_products
from .tiles import HALF_SCALES, Running, RunningPair, Scored, Tiling
from .transform import LogitTransform
from .triton_kernels import direction_kernel, finish_kernel, finish_pairs_kernel, fold_kernel, fold_pairs_kernel

MAX_BLOCK = 16384
"""Widest tile; one row of it still fits in the registers of one program."""
MAX_PAIR_BLOCK = 8192
"""Widest tile of pairs; two rows of it fit."""
BLOCK_H = 1024
"""Hidden features per step of the loops over H."""
FINISH_ROWS = 128
"""Rows per program of `finish_kernel`."""
TILE_BYTES = 160 * 2**20
"""Largest tile of float32 logits."""


def interpreted() -> bool:
    """Return True if TRITON_INTERPRET=1 is set: the kernels then run on CPU tensors, slowly, for tests."""
    return bool(triton.knobs.runtime.interpret)


class TritonSteps:
    """`tiles.Steps` in Triton, for float32, float16 and bfloat16."""

    def __init__(self, dtype: torch.dtype, device: torch.device, transform: LogitTransform):
        self.transform = transform
        half_here = has_half_products(dtype, device) or (interpreted() and dtype == torch.float16)
        self.operand_dtype = dtype if half_here else torch.float32
        self.differences = not half_here
        self.p_scale, self.r_scale = HALF_SCALES if self.operand_dtype == torch.float16 else (1.0, 1.0)
        self._has_cap = transform.softcap is not None
        self._inner = 0.0 if transform.softcap is None else transform.logit_scale / transform.softcap

    def fold(
        self,
        z_RT: Tensor,
        target_R: Tensor,
        first: int,
        bias_T: Tensor | None,
        run: Running,
        acc_RH: Tensor | None,
    ) -> Tensor:
        """See `tiles.Steps.fold`; p overwrites the first bytes of each row of `z_RT`."""
        rows, columns = z_RT.shape
        p_RT = z_RT.view(self.operand_dtype)[:, :columns]
        block = triton.next_power_of_2(columns)
        fold_kernel[(rows,)](
            z_RT, p_RT, target_R, z_RT if bias_T is None else bias_T, *run, z_RT if acc_RH is None else acc_RH,
            first, columns, z_RT.stride(0), p_RT.stride(0), 0 if acc_RH is None else acc_RH.shape[1],
            self.transform.gain, self._inner, self.transform.cap,
            BLOCK=block, BLOCK_H=BLOCK_H, HAS_BIAS=bias_T is not None, HAS_CAP=self._has_cap,
            WANT_P=acc_RH is not None, P_SCALE=self.p_scale, **fold_options(block),
        )  # fmt: skip
        return p_RT

    def finish(self, run: Running, out: Scored) -> tuple[Tensor, Tensor]:
        """See `tiles.Steps.finish`."""
        rows = len(out.logp_N)
        to_target_R, to_others_R = torch.empty_like(run.s_R), torch.empty_like(run.s_R)
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            *run, out.logp_N, out.entropy_N, out.lse_N, to_target_R, to_others_R, rows,
            self.transform.gain, self.transform.cap,
            BLOCK=FINISH_ROWS, HAS_CAP=self._has_cap, P_SCALE=self.p_scale, **FINISH_OPTIONS,
        )  # fmt: skip
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
        direction_kernel[(len(target_R),)](
            acc_RH, weight_VH, target_R, to_target_R, to_others_R, u_RH, acc_RH.shape[1], *weight_VH.stride(),
            BLOCK_H=BLOCK_H, **DIRECTION_OPTIONS,
        )  # fmt: skip

    def fold_pairs(self, z_PT: Tensor, bias_T: Tensor | None, run: RunningPair, acc_PH: Tensor | None) -> Tensor:
        """See `tiles.Steps.fold_pairs`; the results overwrite the first bytes of each row of `z_PT`."""
        pairs, columns = len(z_PT) // 2, z_PT.shape[1]
        p_PT = z_PT.view(self.operand_dtype)[:, :columns]
        block = triton.next_power_of_2(columns)
        fold_pairs_kernel[(pairs,)](
            z_PT, p_PT, z_PT if bias_T is None else bias_T, *run, z_PT if acc_PH is None else acc_PH,
            pairs, columns, z_PT.stride(0), p_PT.stride(0), 0 if acc_PH is None else acc_PH.shape[1],
            self.transform.gain, self._inner, self.transform.cap,
            BLOCK=block, BLOCK_H=BLOCK_H, HAS_BIAS=bias_T is not None, HAS_CAP=self._has_cap,
            DIFFERENCES=self.differences, WANT_P=acc_PH is not None, P_SCALE=self.p_scale, R_SCALE=self.r_scale,
            **fold_pairs_options(block),
        )  # fmt: skip
        return p_PT

    def finish_pairs(self, run: RunningPair, kl_R: Tensor) -> tuple[Tensor, Tensor]:
        """See `tiles.Steps.finish_pairs`."""
        rows = len(kl_R)
        to_r_R, to_p_R = torch.empty_like(kl_R), torch.empty_like(kl_R)
        finish_pairs_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            run.n_R, run.s_R, run.a_R, run.b_R, run.t_R, kl_R, to_r_R, to_p_R, rows, self.transform.gain,
            BLOCK=FINISH_ROWS, P_SCALE=self.p_scale, R_SCALE=self.r_scale, **FINISH_OPTIONS,
        )  # fmt: skip
        return to_r_R, to_p_R


def fold_options(block: int) -> dict[str, Any]:
    """Return the launch options of `fold_kernel`: one warp per 1024 columns holds a row in registers, no spills."""
    return {"num_warps": min(16, max(1, block // 1024)), "num_stages": 1, "enable_fp_fusion": True}


def fold_pairs_options(block: int) -> dict[str, Any]:
    """Return the launch options of `fold_pairs_kernel`: two rows in registers need twice the warps."""
    return fold_options(2 * block)


FINISH_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
DIRECTION_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@functools.cache
def gpu_tiling(device: torch.device, width: int, widest: int) -> Tiling:
    """Return the tile size for a GPU, of at most `widest` columns.

    Rows: about one output tile (128 x 256) of the second product per multiprocessor. Columns: wide tiles if the cache
    is too small to hold the accumulators between tiles. Never more than TILE_BYTES.
    """
    properties = torch.cuda.get_device_properties(device)
    rows = 128 * min(64, max(8, properties.multi_processor_count // -(-width // 256)))
    columns = min(widest, 8192 if properties.L2_cache_size >= 32 * 2**20 else MAX_BLOCK)
    while rows * columns * 4 > TILE_BYTES:
        columns //= 2
    return Tiling(rows, columns)
