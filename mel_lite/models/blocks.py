"""The rule that packs rows of different lengths into padded blocks, shared by training and the memory plan."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING_SHARE = 0.2
"""Maximum fraction of padding in a small block. Beyond it, another kernel launch is cheaper than the padding."""
PADDING_SHARE, PADDING_TOKENS = 0.05, 128
"""Maximum fraction of padding in a block, as soon as that is more than this many tokens."""


def max_padding(area: int) -> float:
    """Return the padding in tokens that a block of so many tokens may have: 5 %, or 128 tokens if 20 % are more."""
    return max(PADDING_SHARE * area, min(MAX_PADDING_SHARE * area, PADDING_TOKENS))


def group_lengths(lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
    """Return the row numbers of each block, longest row first; rows of equal length keep their order.

    A block is as wide as its longest row. It takes rows until padding would exceed `max_padding`, or rows times width
    would exceed `max_tokens`; a single longer row still gets a block of its own.
    """
    groups: list[list[int]] = []
    filled_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        area = lengths[groups[-1][0]] * (len(groups[-1]) + 1) if groups else 0
        padding = area - filled_tokens - lengths[i]
        if groups and (max_tokens is None or area <= max_tokens) and padding <= max_padding(area):
            groups[-1].append(i)
            filled_tokens += lengths[i]
        else:
            groups.append([i])
            filled_tokens = lengths[i]
    return groups


def blocks_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (rows, width in tokens) of the blocks that rows of these lengths are packed into."""
    return [(len(group), lengths[group[0]]) for group in group_lengths(lengths)]
