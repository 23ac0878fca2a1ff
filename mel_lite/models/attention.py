"""Attention for CPUs and for GPUs without flash kernels (before compute capability 8.0: T4, V100).

On such GPUs, SDPA with fewer key heads than query heads falls back to the kernel that stores all scores, gigabytes for
a long sequence. With keys and values repeated for every query head, the memory-efficient kernel runs. For a single
sampled token, the repetition would copy the whole cache. There, the query heads of a key head become its queries.

Both of our attentions also take several sequences as one flat sequence of T tokens, in which completions share the
tokens of their prompt (`SharedPrompts`), and one token of each sequence of a batch with keys and values that are kept
elsewhere (`bucketed_cache`, see `engines/buckets.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mel_lite.models.blocks import group_lengths

if TYPE_CHECKING:
    import torch

NAME = "sdpa_grouped_heads"
SHARING_NAME = "sdpa_shared_prompts"
"""transformers' SDPA, which also takes `SharedPrompts`."""
FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Branches:
    """B continuations of one prompt, each padded to the longest, C. Padding repeats any position of the sequence."""

    prompt_P: torch.Tensor
    """Positions of the prompt in the flat sequence."""
    index_BC: torch.Tensor
    """Positions of the continuations; the padding comes last."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Which positions of a flat sequence attend to which. Every token also attends to itself."""

    roots: tuple[torch.Tensor, ...]
    """(B, C) positions of sequences without a prompt before them, padded like `Branches`."""
    branches: tuple[Branches, ...]
    order_T: torch.Tensor
    """Where each position is among all roots and branches, flattened in this order."""


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
    """Register both attentions of this module with transformers, with SDPA's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, attention in ((NAME, grouped_heads), (SHARING_NAME, sdpa_or_shared)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, sdpa_mask)


def lay_out(
    roots: Sequence[torch.Tensor], branches: Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]]
) -> SharedPrompts:
    """Return the `SharedPrompts` of sequences without a prompt, and of prompts with their continuations.

    Args: the positions of each in the flat sequence, which together are all of its positions, once each.
    """
    import torch

    root_parts = [_padded([roots[i] for i in group]) for group in group_lengths([len(each) for each in roots])]
    branch_parts = [
        Branches(prompt_P, _padded([spans[i] for i in group]))
        for prompt_P, spans in branches
        for group in group_lengths([len(each) for each in spans])
    ]
    index = torch.cat([each.flatten() for each in [*root_parts, *(part.index_BC for part in branch_parts)]])
    placed = (index >= 0).nonzero()[:, 0]
    order_T = torch.empty_like(placed)
    order_T[index[placed]] = placed
    return SharedPrompts(
        tuple(each.clamp(min=0) for each in root_parts),
        tuple(Branches(part.prompt_P, part.index_BC.clamp(min=0)) for part in branch_parts),
        order_T,
    )


def _padded(spans: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return spans as (B, C), padded to the longest with -1."""
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(spans), batch_first=True, padding_value=-1)


def takes_shared_prompts(model: Any) -> bool:
    """Return True when a model's attention is ours, or one that ours can replace."""
    return model.config._attn_implementation in ("sdpa", NAME, SHARING_NAME)


def let_prompts_be_shared(model: Any) -> bool:
    """Let a model's attention take `SharedPrompts`; return False when it is another one than SDPA or ours."""
    if model.config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(SHARING_NAME)
    return takes_shared_prompts(model)


@contextmanager
def sharing_prompts(model: Any) -> Iterator[None]:
    """Let a model's attention take `SharedPrompts` inside the block. `takes_shared_prompts` must be true."""
    before = model.config._attn_implementation
    let_prompts_be_shared(model)
    try:
        yield
    finally:
        if before == "sdpa":
            model.set_attn_implementation(before)


def rounding_nats(model: Any) -> float:
    """Return the largest difference of a log-prob that rounding explains."""
    import torch

    plain = {weight.dtype for weight in model.parameters()} == {torch.float32}
    return 1e-3 if plain and not torch.is_autocast_enabled(model.device.type) else 0.25


def why_not_full(config: Any) -> str | None:
    """Return what in a model's config is not plain causal attention over all tokens, or None."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds == {"full_attention"} and (window is None or getattr(config, "layer_types", None)):
        return None
    other = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window} tokens"
    return f"{config.model_type}, whose layers have {other}: only full attention can keep completions apart"


def grouped_heads(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    shared_prompts: SharedPrompts | None = None,
    bucketed_cache: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute softmax(q k^T scale + mask) v for (B, heads, T, head_dim) queries. Keys and values may have fewer heads.

    Returns: (B, T, heads, head_dim), and None for the weights, which are never computed.
    """
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import repeat_kv

    if shared_prompts is not None:
        return _shared(query, key, value, shared_prompts, dropout, scaling), None
    if bucketed_cache is not None:
        return bucketed_cache.attend(module.layer_idx, query, key, value, scaling), None

    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    if _is_one_token(query, key, attention_mask):
        return one_token(query, key, value, attention_mask, dropout, scaling), None
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


def _is_one_token(query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    heads_apart = attention_mask is not None and attention_mask.shape[1] > 1
    return query.shape[2] == 1 and query.shape[1] > key.shape[1] and not heads_apart


def one_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Compute the attention of one token per sequence, with the query heads of a key head as its queries."""
    import torch.nn.functional as F

    batch, heads, _, head_dim = query.shape
    attended = F.scaled_dot_product_attention(
        query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return attended.reshape(batch, 1, heads, head_dim)


def sdpa_or_shared(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    shared_prompts: SharedPrompts | None = None,
    bucketed_cache: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' SDPA; with `shared_prompts`, attention within a flat sequence (batch size 1)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if shared_prompts is not None:
        return _shared(query, key, value, shared_prompts, dropout, scaling), None
    if bucketed_cache is not None:
        return bucketed_cache.attend(module.layer_idx, query, key, value, scaling), None
    if query.device.type == "cpu" and _is_one_token(query, key, attention_mask):
        return one_token(query, key, value, attention_mask, dropout, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )  # fmt: skip


def _shared(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SharedPrompts,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Compute causal attention of each root, and of each branch after its prompt. Returns: (1, T, heads, head_dim)."""
    import torch
    import torch.nn.functional as F
    from transformers.integrations.sdpa_attention import repeat_kv

    query_TAD, key_TKD, value_TKD = (each[0].transpose(0, 1) for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]

    def take(each_TAD: torch.Tensor, index_BC: torch.Tensor) -> torch.Tensor:
        # index_select has a faster backward than indexing.
        return each_TAD.index_select(0, index_BC.flatten()).unflatten(0, index_BC.shape)

    def attend(index_BC: torch.Tensor, prompt_P: torch.Tensor | None) -> torch.Tensor:
        query_BCAD, *pair = (take(each, index_BC) for each in (query_TAD, key_TKD, value_TKD))
        mask_CS = None
        if prompt_P is not None:
            before = (take(each, prompt_P).expand(len(index_BC), -1, -1, -1) for each in (key_TKD, value_TKD))
            pair = [torch.cat(both, dim=1) for both in zip(before, pair, strict=True)]
            tokens, prompt = index_BC.shape[1], len(prompt_P)
            mask_CS = torch.ones(tokens, prompt + tokens, dtype=torch.bool, device=query.device).tril(prompt)
        key_BASD, value_BASD = (repeat_kv(each.transpose(1, 2), groups) for each in pair)
        attended = F.scaled_dot_product_attention(
            query_BCAD.transpose(1, 2),
            key_BASD,
            value_BASD,
            attn_mask=mask_CS,
            dropout_p=dropout,
            scale=scaling,
            is_causal=mask_CS is None,
        )
        return attended.transpose(1, 2).flatten(0, 1)

    parts = [attend(index_BC, None) for index_BC in layout.roots]
    parts += [attend(each.index_BC, each.prompt_P) for each in layout.branches]
    return torch.cat(parts).index_select(0, layout.order_T)[None]
