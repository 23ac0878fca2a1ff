"""What vLLM takes of a GPU when it samples from the trained weights: a share, fixed when it starts.

    share = gpu_memory_utilization * card = weights + LoRA slots + one forward pass + CUDA graphs + key-value cache

vLLM (0.21 or newer) measures the first four as it starts and makes its cache of the rest. Asleep it gives the cache
back and keeps slots and graphs; the weights are the trainer's. `docs/memory.md` says what was checked against what.

Letters: e bytes of a compute element, H hidden size, I width of the MLP, V vocabulary, r LoRA rank, S sequences.
"""

from __future__ import annotations

import math

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

MOST_SEQUENCES = 128
"""Most sequences at once; what Unsloth asks for on a card of 80 GB."""
LOGIT_BYTES = 38
"""Per vocabulary entry and sequence while sampling, fitted to published measurements (docs/memory.md)."""
GRAPHS_BYTES = 512 * MIB
"""Estimate: captured CUDA graphs. Published: 0.1 to 0.5 GiB for models of 0.6B to 20B weights."""
LIBRARY_BYTES = 133 * MIB
"""What libraries take beside PyTorch's allocator as vLLM starts, as published for models on one GPU."""
BLOCK_TOKENS = 16
"""The cache comes in blocks of this many tokens."""
MOST_SHARE = ((40, 0.87), (25, 0.85), (20, 0.78), (14, 0.76), (10, 0.73), (0, 0.71))
"""(least GiB of a card, share of what is free on it): what Unsloth found vLLM to wake up with, step after step, beside
a trainer. More can fail: PyTorch does not give back every piece that training has left it with."""
MARGIN_BYTES = 64 * MIB
"""More than the least share, since what is free changes and shares are rounded."""
GRANTED_SHARE = 0.95
"""Of what it takes to be left for the cache, what Unsloth lets one sequence fill."""


def slot_bytes(shape: Shape, rank: int, element_bytes: int = 2) -> int:
    """The adapter as vLLM holds it: r (inputs + outputs) e for every linear layer, adapted or not, r rounded up."""
    slot_rank = next((supported for supported in VLLM_RANKS if supported >= rank), rank)
    return element_bytes * sum(lora_sizes(shape, slot_rank, "all-linear"))


def resident_bytes(shape: Shape, rank: int, element_bytes: int = 2) -> int:
    """What stays beside the weights while vLLM sleeps: LoRA slots, CUDA graphs, libraries."""
    return slot_bytes(shape, rank, element_bytes) + GRAPHS_BYTES + LIBRARY_BYTES


def pass_bytes(
    shape: Shape, sequences: int, *, four_bit: bool, batched_tokens: int = VLLM_BATCHED_TOKENS, element_bytes: int = 2
) -> int:
    """Most a forward pass holds: max(4 I e T + the largest 4-bit weight written out, 38 S V + 2 H e T).

    The MLP of a full chunk of prompts, or the sampler beside hidden state and residual.
    """
    e = element_bytes
    written_out = largest_linear_bytes(shape, e) if four_bit else 0
    reading = 4 * shape.intermediate * e * batched_tokens + written_out
    return max(reading, LOGIT_BYTES * sequences * shape.vocab + 2 * shape.hidden * e * batched_tokens)


def overhead_bytes(shape: Shape, sequences: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """The share without weights and cache: what stays, and one forward pass."""
    one_pass = pass_bytes(shape, sequences, four_bit=four_bit, element_bytes=element_bytes)
    return resident_bytes(shape, rank, element_bytes) + one_pass


def cache_tokens(shape: Shape, cache_bytes: int, element_bytes: int = 2) -> int:
    """Tokens that fit a cache of this many bytes, in whole blocks; 0 for none."""
    block_bytes = kv_cache_bytes(shape, BLOCK_TOKENS, element_bytes)
    return max(0, cache_bytes // block_bytes) * BLOCK_TOKENS


def granted_tokens(shape: Shape, share_bytes: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """Longest sequence that Unsloth has vLLM make room for, whatever was asked for: its own, more careful estimate.

    95 % of share - weights - LoRA slots - graphs, in whole 256 tokens, where a 4-bit weight counts as 5/8 byte and the
    graphs as 688 H L bytes, but 0.15 to 1 GiB.
    """
    left = share_bytes - _taken_for_granted_bytes(shape, rank, four_bit=four_bit)
    return max(0, int(GRANTED_SHARE * left / kv_cache_bytes(shape, 1, element_bytes))) // 256 * 256


def share_to_be_granted_bytes(shape: Shape, tokens: int, rank: int, *, four_bit: bool, element_bytes: int = 2) -> int:
    """The least share with which Unsloth grants sequences of this length."""
    cache = kv_cache_bytes(shape, -(-tokens // 256) * 256, element_bytes) / GRANTED_SHARE
    return math.ceil(_taken_for_granted_bytes(shape, rank, four_bit=four_bit) + cache) + MARGIN_BYTES


def _taken_for_granted_bytes(shape: Shape, rank: int, *, four_bit: bool) -> float:
    weights = (5 / 8 if four_bit else 2) * linear_parameters(shape) + 2 * other_parameters(shape)
    graphs = min(max(688 * shape.hidden * shape.layers, 0.15 * GIB), GIB)
    return weights + slot_bytes(shape, rank) + graphs


def left_to_training_bytes(shape: Shape, tokens: int) -> int:
    """What Unsloth keeps out of vLLM's share for training on sequences of this length.

    2.5 (2 T (H + 2 K + 2 I + 2) + I H) bytes, with K = kv_heads * (H / heads).
    """
    kv = shape.hidden // shape.heads * shape.kv_heads
    per_token = 2 * (shape.hidden + 2 * kv + 2 * shape.intermediate + 2)
    return int(2.5 * (tokens * per_token + shape.intermediate * shape.hidden))


def most_share(card_bytes: int, free_bytes: int) -> float:
    """Largest `gpu_memory_utilization` that is chosen for a card of this memory, of which so much is free."""
    share = next(share for least_gib, share in MOST_SHARE if card_bytes >= least_gib * GIB)
    return share * min(1.0, free_bytes / card_bytes)
