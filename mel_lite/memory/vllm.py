"""Formulas for vLLM's share of a GPU when it samples from the trained weights. The share is fixed when vLLM starts.

    share = gpu_memory_utilization * card = weights + LoRA slots + one forward pass + CUDA graphs + key-value cache

vLLM (0.21 or newer) measures the first four at startup and allocates the rest as its cache. In sleep mode it frees the
cache and keeps slots and graphs; the weights belong to the trainer. `docs/memory.md` lists the source of each term.

Letters: e bytes per compute element, H hidden size, I MLP width, V vocabulary, r LoRA rank, S sequences, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mel_lite.engines.choice import VLLM_BATCHED_TOKENS, VLLM_RANKS
from mel_lite.memory.formulas import (
    GIB,
    MIB,
    Shape,
    kv_cache_bytes,
    largest_linear_bytes,
    linear_parameters,
    lora_sizes,
    other_parameters,
)

MAX_NUM_SEQS = 128
"""Maximum number of sequences in flight; Unsloth's own setting for an 80 GB card."""
LOGIT_BYTES = 38
"""Bytes per vocabulary entry and sequence during sampling, fitted to published measurements (docs/memory.md)."""
GRAPHS_BYTES = 512 * MIB
"""Estimate of the captured CUDA graphs. Published: 0.1 to 0.5 GiB for models of 0.6B to 20B weights."""
LIBRARY_BYTES = 133 * MIB
"""Memory that libraries allocate outside PyTorch's allocator when vLLM starts, as published for models on one GPU."""
BLOCK_TOKENS = 16
"""Tokens per block of the key-value cache."""
MAX_SHARE = ((40, 0.87), (25, 0.85), (20, 0.78), (14, 0.76), (10, 0.73), (0, 0.71))
"""(minimum GiB of a card, share of its free memory): the largest shares with which Unsloth found that vLLM still wakes
up at every step next to a trainer. A larger share can fail, because PyTorch does not return every block that training
left in its allocator."""
MARGIN_BYTES = 64 * MIB
"""Margin over the minimum share, because free memory changes and shares are rounded."""
GRANTED_SHARE = 0.95
"""Fraction of its cache estimate that Unsloth lets one sequence fill."""


@dataclass(frozen=True, slots=True)
class VLLMCard:
    """Memory of the card that vLLM shares."""

    total_bytes: int
    free_bytes: int
    """Free memory at the time of the query."""


@dataclass(frozen=True, slots=True)
class VLLMShare:
    """vLLM's share of a card, for sampling from the trained weights."""

    card: VLLMCard
    rank: int
    """Maximum LoRA rank that vLLM reserves a slot for."""
    sequences: int
    """Maximum number of sequences in flight."""
    utilization: float | None = None
    """Share of the card; None = not chosen yet, so the minimum is assumed."""


def slot_bytes(shape: Shape, rank: int, element_bytes: int = 2) -> int:
    """Return the bytes of vLLM's adapter slot: r (inputs + outputs) e for every linear module, adapted or not.

    r is rounded up to a rank that vLLM supports.
    """
    slot_rank = next((supported for supported in VLLM_RANKS if supported >= rank), rank)
    return element_bytes * sum(lora_sizes(shape, slot_rank, "all-linear"))


def resident_bytes(shape: Shape, rank: int, element_bytes: int = 2) -> int:
    """Return the bytes that vLLM keeps in sleep mode, without the weights: LoRA slots, CUDA graphs, libraries."""
    return slot_bytes(shape, rank, element_bytes) + GRAPHS_BYTES + LIBRARY_BYTES


def pass_bytes(
    shape: Shape, sequences: int, *, four_bit: bool, batched_tokens: int = VLLM_BATCHED_TOKENS, element_bytes: int = 2
) -> int:
    """Return the peak bytes of a forward pass: max(4 I e T + largest dequantized weight, 38 S V + 2 H e T).

    The first term is the MLP on a full chunk of prompts; the second is the sampler, plus hidden state and residual.
    """
    e = element_bytes
    dequantized = largest_linear_bytes(shape, e) if four_bit else 0
    prefill = 4 * shape.intermediate * e * batched_tokens + dequantized
    return max(prefill, LOGIT_BYTES * sequences * shape.vocab + 2 * shape.hidden * e * batched_tokens)


def overhead_bytes(shape: Shape, sequences: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """Return the bytes of the share without weights and cache: resident memory plus one forward pass."""
    one_pass = pass_bytes(shape, sequences, four_bit=four_bit, element_bytes=element_bytes)
    return resident_bytes(shape, rank, element_bytes) + one_pass


def cache_tokens(shape: Shape, cache_bytes: int, element_bytes: int = 2) -> int:
    """Return the number of tokens that fit into `cache_bytes`, in whole blocks, at least 0."""
    block_bytes = kv_cache_bytes(shape, BLOCK_TOKENS, element_bytes)
    return max(0, cache_bytes // block_bytes) * BLOCK_TOKENS


def granted_tokens(shape: Shape, share_bytes: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """Return the longest sequence, in tokens, that Unsloth starts vLLM for, by Unsloth's own conservative estimate.

    95 % of share - weights - LoRA slots - graphs, rounded down to 256 tokens, where a 4-bit weight counts as 5/8 byte
    and the graphs as 688 H L bytes, clipped to 0.15 to 1 GiB.
    """
    left = share_bytes - _unsloth_overhead_bytes(shape, rank, four_bit=four_bit)
    return max(0, int(GRANTED_SHARE * left / kv_cache_bytes(shape, 1, element_bytes))) // 256 * 256


def min_share_bytes(shape: Shape, tokens: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """Return the smallest share with which Unsloth starts vLLM for sequences of `tokens`. Inverts `granted_tokens`."""
    cache = kv_cache_bytes(shape, -(-tokens // 256) * 256, element_bytes) / GRANTED_SHARE
    return math.ceil(_unsloth_overhead_bytes(shape, rank, four_bit=four_bit) + cache) + MARGIN_BYTES


def _unsloth_overhead_bytes(shape: Shape, rank: int, *, four_bit: bool) -> float:
    """Return Unsloth's estimate of weights, LoRA slots and graphs."""
    weights = (5 / 8 if four_bit else 2) * linear_parameters(shape) + 2 * other_parameters(shape)
    graphs = min(max(688 * shape.hidden * shape.layers, 0.15 * GIB), GIB)
    return weights + slot_bytes(shape, rank) + graphs


def reserved_for_training_bytes(shape: Shape, tokens: int) -> int:
    """Return the bytes that Unsloth keeps out of vLLM's share for training on sequences of `tokens`.

    2.5 (2 T (H + 2 K + 2 I + 2) + I H) bytes, with K = kv_heads * (H / heads).
    """
    kv = shape.hidden // shape.heads * shape.kv_heads
    per_token = 2 * (shape.hidden + 2 * kv + 2 * shape.intermediate + 2)
    return int(2.5 * (tokens * per_token + shape.intermediate * shape.hidden))


def max_share(card_bytes: int, free_bytes: int) -> float:
    """Return the largest `gpu_memory_utilization` to choose for a card with this total and free memory."""
    share = next(share for min_gib, share in MAX_SHARE if card_bytes >= min_gib * GIB)
    return share * min(1.0, free_bytes / card_bytes)
