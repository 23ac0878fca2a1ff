"""REINFORCE++ and RFT, as changes to the batch that TRL's loss is computed on.

REINFORCE++ normalizes advantages over the whole batch, without a baseline per question. RFT trains on right completions
alone: TRL's `cispo` loss with ratio 1 is -advantage * log pi per token, so advantage 1 on right rows is their NLL.

B completions of this rank, W of all ranks, C padded completion width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from trl.trainer.utils import nanstd

EPSILON = 1e-4
"""Added to the standard deviation, like in TRL."""


def batch_advantages(reward_W: Tensor) -> Tensor:
    """Return A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the completions of all ranks, (W,); 0 for NaN rewards.

    Equal rewards give zeros. Source: REINFORCE++, arXiv 2501.03262, without its KL in the reward (TRL's `beta` is a
    term of the loss).
    """
    return ((reward_W - reward_W.nanmean()) / (nanstd(reward_W) + EPSILON)).nan_to_num(nan=0.0)


def only_right(batch: dict[str, Any], is_right_B: Tensor, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the batch whose `cispo` loss is the NLL of right completions, averaged over their tokens on all ranks.

    Wrong rows are masked as a whole, so that they are neither scored nor counted. Old log-probs are left out: the ratio
    is 1 however often the batch is used.
    """
    mask_BC = batch["completion_mask"] * is_right_B[:, None].to(batch["completion_mask"])
    own_BC = mask_BC * batch["tool_mask"] if "tool_mask" in batch else mask_BC  # tool output is not trained on
    tokens = gather(own_BC.sum().reshape(1)).sum()
    kept = {name: value for name, value in batch.items() if name != "old_per_token_logps"}
    return kept | {
        "completion_mask": mask_BC,
        "advantages": is_right_B.to(batch["advantages"]),
        "num_items_in_batch": tokens.to(batch["num_items_in_batch"]),
    }
