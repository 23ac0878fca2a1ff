"""The two matrix products around a tile of logits, accumulated in float32 for every operand dtype.

R rows of a block, T columns of a tile, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and accumulators: float32, or float64 for float64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_half_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if BLAS multiplies this 16-bit dtype into float32 here: fp16 from sm_70, bf16 from sm_80."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.version.hip is not None:
        return False  # ROCm has no products with out_dtype
    return torch.cuda.get_device_capability(device) >= ((7, 0) if dtype == torch.float16 else (8, 0))


def project(hidden_RH: Tensor, weight_TH: Tensor, out_RT: Tensor) -> None:
    """Compute out = hidden @ weight.T. Operands narrower than `out` are multiplied exactly and summed in its dtype."""
    if hidden_RH.dtype == out_RT.dtype:
        torch.mm(hidden_RH, weight_TH.t(), out=out_RT)
    elif hidden_RH.is_cuda:
        torch.mm(hidden_RH, weight_TH.t(), out_dtype=out_RT.dtype, out=out_RT)
    else:
        torch.mm(hidden_RH.to(out_RT.dtype), weight_TH.to(out_RT.dtype).t(), out=out_RT)


def accumulate(acc_RH: Tensor, p_RT: Tensor, weight_TH: Tensor) -> None:
    """Compute acc += p @ weight, summed in the dtype of acc."""
    if p_RT.dtype == acc_RH.dtype:
        torch.addmm(acc_RH, p_RT, weight_TH, out=acc_RH)
    elif p_RT.is_cuda:
        torch.addmm(acc_RH, p_RT, weight_TH, out_dtype=acc_RH.dtype, out=acc_RH)
    else:
        torch.addmm(acc_RH, p_RT.to(acc_RH.dtype), weight_TH.to(acc_RH.dtype), out=acc_RH)
