"""Attention for GPUs without flash kernels (before compute capability 8.0: T4, V100).

There, SDPA with fewer key heads than query heads falls back to the kernel that holds all scores: gigabytes for a long
sequence. With keys and values repeated for every head, the memory-efficient kernel runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "sdpa_repeated_heads"
FLASH_CAPABILITY = (8, 0)


def attention_for(requested: str | None) -> str | None:
    """What to load a model with: `requested`, else the attention below where the GPU needs it, else None.

    Registers it with transformers when it is chosen.
    """
    import torch

    if requested is not None or not torch.cuda.is_available():
        return requested
    if torch.cuda.get_device_capability() >= FLASH_CAPABILITY:
        return None
    register()
    return NAME


def register() -> None:
    """Make `attn_implementation="sdpa_repeated_heads"` known to transformers, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, repeated_heads)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def repeated_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T scale + mask) v for (B, heads, T, head_dim) queries; keys and values may have fewer heads.

    Returns: (B, T, heads, head_dim), and None for the weights, which do not exist.
    """
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    attended = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(causal and attention_mask is None and query.shape[2] > 1),
    )
    return attended.transpose(1, 2).contiguous(), None
