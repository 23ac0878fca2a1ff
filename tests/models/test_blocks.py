"""The one rule by which rows share padded blocks, in numbers; and training's blocks are the ones the plan counts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mel_lite.models.blocks import MAX_PADDING_SHARE, blocks_of, group_lengths, max_padding
from mel_lite.training.batches.packing import Row, pack

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "groups"),
    [
        ([], None, []),
        ([7], 3, [[0]]),  # a longer row gets a block of its own
        ([10, 10, 10], None, [[0, 1, 2]]),
        ([10, 10, 10], 20, [[0, 1], [2]]),
        ([10, 10, 10], 19, [[0], [1], [2]]),
        ([4, 10, 6, 10], None, [[1, 3, 2], [0]]),  # padding 4 of 30; with the next row 10 of 40
        ([10, 600, 9, 10], None, [[1], [0, 3, 2]]),
        ([5, 3], None, [[0, 1]]),  # padding 2 of 10 is exactly the share
        ([10, 5], None, [[0], [1]]),  # 5 of 20 is more
    ],
)
def test_rows_are_grouped_longest_first(lengths: list[int], max_tokens: int | None, groups: list[list[int]]) -> None:
    assert group_lengths(lengths, max_tokens) == groups


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 300)))
def test_every_row_is_in_one_block_within_both_bounds(lengths: list[int], max_tokens: int | None) -> None:
    groups = group_lengths(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        area = len(group) * max(lengths[i] for i in group)
        assert len(group) == 1 or area <= (max_tokens or area)
        assert area - sum(lengths[i] for i in group) <= MAX_PADDING_SHARE * area
    shown = [lengths[i] for group in groups for i in group]
    assert shown == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("area", "padding"), [(100, 20), (640, 128), (2000, 128), (2560, 128), (10_000, 500)])
def test_a_large_block_pads_a_twentieth(area: int, padding: int) -> None:
    assert max_padding(area) == pytest.approx(padding)


@pytest.mark.parametrize("budget_tokens", [4096, 16384])
def test_blocks_of_ragged_rollouts_pad_less_than_five_percent(budget_tokens: int) -> None:
    """64 rollouts with a prompt of 150 tokens and completions of log-normal length, sorted into parts and blocks."""
    draw = random.Random(0)
    padded = taken = 0
    for _ in range(50):
        lengths = [150 + min(2048, int(draw.lognormvariate(6, 0.8))) for _ in range(64)]
        taken += sum(lengths)
        groups = group_lengths(lengths, budget_tokens)
        padded += sum(len(group) * lengths[group[0]] for group in groups) - sum(lengths)
        assert len(groups) < 24
    assert 0.01 < padded / (padded + taken) < 0.05


@given(LENGTHS)
def test_the_plan_counts_the_blocks_that_training_packs(lengths: list[int]) -> None:
    blocks = pack([Row(torch.ones(n, dtype=torch.long), 1) for n in lengths], pad_id=0).blocks
    assert blocks_of(lengths) == [tuple(block.input_ids_BT.shape) for block in blocks]
