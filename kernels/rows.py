"""Selection of the computed rows, and their return to the batch. N rows, K rows computed, H hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_like, check_tensor

IGNORE = -100
"""Target of a row that is not scored, as in torch's cross entropy."""


def live_rows(target_N: Tensor, vocab: int, keep_N: Tensor | None) -> Tensor | None:
    """Return the indices of the rows to compute, ascending, or None for all rows.

    A row is computed if its target is not -100 and `keep_N`, where given, is true. Reads two counters from the device
    per call, for any number of rows.

    Raises: ValueError for a target outside [0, vocab) in a row to compute.
    """
    live_N = target_N != IGNORE
    if keep_N is not None:
        check_tensor("keep_N", keep_N, "N", (torch.bool,))
        check_like("keep_N", keep_N, len(target_N), "target_N", target_N.device)
        live_N = live_N & keep_N
    wrong_N = live_N & ((target_N < 0) | (target_N >= vocab))
    live, wrong = torch.stack([live_N.sum(), wrong_N.sum()]).tolist()
    if wrong:
        row = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"target_N[{row}] is {int(target_N[row])}: expected a token id in [0, {vocab}) or {IGNORE} "
            f"({wrong} of {len(target_N)} rows are wrong)"
        )
    return _indices(live_N, live)


def kept_rows(keep_N: Tensor | None, like_NH: Tensor, name: str) -> Tensor | None:
    """Return the indices of the rows where `keep_N` is true, ascending, or None for all rows.

    Reads one counter from the device. `like_NH`, called `name` in messages, has as many rows as the batch.
    """
    if keep_N is None:
        return None
    check_tensor("keep_N", keep_N, "N", (torch.bool,))
    check_like("keep_N", keep_N, len(like_NH), f"{name} has rows", like_NH.device, name)
    return _indices(keep_N, int(keep_N.sum()))


def _indices(live_N: Tensor, live: int) -> Tensor | None:
    if live == len(live_N):
        return None
    return torch.argsort(live_N, descending=True, stable=True)[:live]


def take(value_N: Tensor, index_K: Tensor | None) -> Tensor:
    """Return the computed rows of a tensor; the tensor itself if that is all of them."""
    return value_N if index_K is None else value_N.index_select(0, index_K)


def spread(value_K: Tensor, index_K: Tensor | None, rows: int) -> Tensor:
    """Return the computed rows at their positions in the batch, and zeros in the other rows."""
    if index_K is None:
        return value_K
    return value_K.new_zeros(rows, *value_K.shape[1:]).index_copy(0, index_K, value_K)


def scale_rows(u_KH: Tensor, grad_N: Tensor, index_K: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute grad_i u_i in float32, rounded once to `dtype`, with zeros in rows that were not computed.

    u is not modified: a retained graph may need it again.
    """
    grad_K = take(grad_N, index_K)
    grad_KH = torch.mul(u_KH, grad_K[:, None], out=torch.empty_like(u_KH, dtype=dtype))
    return spread(grad_KH, index_K, len(grad_N))
