"""Attention for CPUs and for GPUs without flash kernels (before compute capability 8.0: T4, V100).

On such GPUs, SDPA with fewer key heads than query heads falls back to the kernel that stores all scores, gigabytes for
a long sequence. With keys and values repeated for every query head, the memory-efficient kernel runs. For a single
sampled token, the repetition would copy the whole cache. There, the query heads of a key head become its queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "sdpa_grouped_heads"
FLASH_CAPABILITY = (8, 0)


def attention_for(requested: str | None) -> str | None:
    """Return the `attn_implementation` for loading: `requested`, else `NAME` if the device needs it, else None.

    Registers `NAME` with transformers when it is chosen.
    """
    import torch

    if requested is not None:
        return requested
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLASH_CAPABILITY:
        return None
    register()
    return NAME


def register() -> None:
    """Register `attn_implementation="sdpa_grouped_heads"` with transformers, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, grouped_heads)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def grouped_heads(
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
    """Compute softmax(q k^T scale + mask) v for (B, heads, T, head_dim) queries. Keys and values may have fewer heads.

    Returns: (B, T, heads, head_dim), and None for the weights, which are never computed.
    """
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import repeat_kv

    batch, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]
    if tokens == 1 and groups > 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        attended = F.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], groups, head_dim),
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scaling,
        )
        return attended.reshape(batch, 1, heads, head_dim), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    attended = F.scaled_dot_product_attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(causal and attention_mask is None and tokens > 1),
    )
    return attended.transpose(1, 2).contiguous(), None
