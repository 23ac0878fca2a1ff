"""Models whose weights are not, or not all, on this process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_placeholders() -> bool:
    """Return True on a process that FSDP's RAM-efficient loading leaves without weights until training begins."""
    from transformers.integrations import is_fsdp_enabled

    return bool(is_fsdp_enabled()) and os.environ.get("LOCAL_RANK", "0") != "0"


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight; a whole copy of one that ZeRO-3 has spread over processes, which call this together."""
    if not hasattr(weight, "ds_id"):
        return weight
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()
