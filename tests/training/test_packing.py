"""Rows of many lengths into blocks and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mel_lite.models.blocks import MAX_PADDING_SHARE
from mel_lite.training.batches.packing import IGNORE, Row, pack, pad_rows, rows_of_batch, with_teachers

ROWS = st.lists(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), max_size=12)


def _rows(shapes: list[tuple[int, int]]) -> list[Row]:
    return [Row(torch.arange(n) + 100 * i, scored) for i, (n, scored) in enumerate(shapes)]


@given(ROWS, st.one_of(st.none(), st.integers(1, 200)))
def test_every_scored_id_comes_back_to_its_row(shapes: list[tuple[int, int]], max_tokens: int | None) -> None:
    rows = _rows(shapes)
    packed = pack(rows, pad_id=0, max_tokens=max_tokens)
    # What the scoring head does, with the id itself as the value.
    flat = torch.cat([b.target_BT[:, 1:][b.target_BT[:, 1:] != IGNORE] for b in packed.blocks] or [torch.zeros(0)])
    for row, values in zip(rows, packed.unpack(flat), strict=True):
        assert values.tolist() == row.ids[len(row.ids) - row.scored_tokens :].tolist()


@given(ROWS, st.integers(1, 200))
def test_blocks_keep_to_the_token_budget_and_the_padding_share(shapes: list[tuple[int, int]], max_tokens: int) -> None:
    for block in pack(_rows(shapes), pad_id=0, max_tokens=max_tokens).blocks:
        rows, width = block.input_ids_BT.shape
        assert rows == 1 or rows * width <= max_tokens
        assert block.attention_mask_BT.sum() >= (1 - MAX_PADDING_SHARE) * rows * width


def test_one_long_row_does_not_pad_the_short_ones() -> None:
    packed = pack(_rows([(10, 3), (10, 4), (600, 100), (9, 2)]), pad_id=0)
    assert [tuple(b.input_ids_BT.shape) for b in packed.blocks] == [(1, 600), (3, 10)]
    assert packed.order == (2, 0, 1, 3)


def test_a_trl_batch_goes_to_rows_and_back() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 0], [1, 2, 3, 4, 9, 0, 0], [0, 1, 2, 3, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0]])
    rows = rows_of_batch(ids, mask, completion_width=3)
    assert [row.ids.tolist() for row in rows] == [[5, 6, 7, 8], [1, 2, 3, 4, 9], [1, 2, 3]]
    assert [row.scored_tokens for row in rows] == [2, 1, 0]
    back = pad_rows([torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.zeros(0)], mask[:, -3:])
    assert back.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@given(ROWS, st.data(), st.one_of(st.none(), st.integers(1, 200)))
def test_teachers_stay_with_the_tokens_they_teach(
    shapes: list[tuple[int, int]], data: st.DataObject, max_tokens: int | None
) -> None:
    """A hidden state here is (row, position among the scored ids), so that blocks can be read back."""
    width = max((scored for _, scored in shapes), default=0)
    mask_BC = torch.zeros(len(shapes), width, dtype=torch.bool)
    for mask_C, (_, scored) in zip(mask_BC, shapes, strict=True):
        mask_C[:scored] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=scored, max_size=scored)))
    most = int(mask_BC.sum(dim=1).max()) if len(shapes) else 0
    hidden_BKH = torch.full((len(shapes), most, 2), -1.0)
    for i, mask_C in enumerate(mask_BC):
        for k, position in enumerate(mask_C.nonzero()[:, 0].tolist()):
            hidden_BKH[i, k] = torch.tensor([i, position])
    rows = with_teachers(_rows(shapes), mask_BC, hidden_BKH)
    packed = pack(rows, pad_id=0, max_tokens=max_tokens)
    taught, order = [], iter(packed.order)
    for block in packed.blocks:
        states = [] if block.teacher_KH is None else block.teacher_KH.tolist()
        for b in range(len(block.target_BT)):
            row = next(order)
            start = len(rows[row].ids) - rows[row].scored_tokens
            where_T = [] if block.taught_BT is None else block.taught_BT[b].nonzero()[:, 0].tolist()
            for place in where_T:
                assert states.pop(0) == [row, place - start]
                taught.append((row, place - start))
        assert not states
    assert sorted(taught) == [tuple(each) for each in mask_BC.nonzero().tolist()]


def test_a_batch_with_nothing_to_score_stays_on_the_graph() -> None:
    empty = torch.zeros(0, requires_grad=True)
    out = pad_rows([empty], torch.zeros(1, 3, dtype=torch.long))
    out.sum().backward()
    assert empty.grad is not None and out.tolist() == [[0.0, 0.0, 0.0]]


def test_a_sequence_that_is_all_completion_is_refused() -> None:
    with pytest.raises(AssertionError):
        pack([Row(torch.tensor([4, 5]), 2)], pad_id=0)
