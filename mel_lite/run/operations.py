"""Count floating-point operations with PyTorch's counter, which knows no CPU attention and no packed weights."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def flop_counter() -> FlopCounterMode:
    """Return a counter of the products in matrix multiplications and attention, forward and backward.

    Elementwise work, 4-bit products and Triton kernels are not counted.
    """
    aten = torch.ops.aten

    # The counter passes shapes in place of tensors.
    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))

    def packed(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(rows) * int(weight[0])

    mapping: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # of `engines.merged`
        mapping[torch.ops.mkldnn._linear_pointwise] = packed
    return FlopCounterMode(display=False, custom_mapping=mapping)
