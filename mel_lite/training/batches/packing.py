"""Pack token rows of many lengths into a few padded blocks, and unpack values.

Rollouts (short) and meta-experiences (long: two solutions in the prompt) share one forward. Padding all of them to the
longest would multiply its cost, so rows are grouped by length and each group is padded to its own longest row.

B rows of a block, T tokens of its longest row, N scored positions of all blocks in order, P width of a padded batch,
C width of its completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mel_lite.models.blocks import group_lengths
from mel_lite.types import Lesson

IGNORE = -100
"""Target of a position that is not scored."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Distributions that a row's divergence is taken to, as hidden states under the model's own head."""

    position_K: torch.Tensor
    """(K,) int64, ascending: positions among the row's scored ids."""
    hidden_KH: torch.Tensor
    """Last hidden state that predicts each of them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence whose last `scored_tokens` ids are scored given all ids before them."""

    ids: torch.Tensor
    """(tokens,) int64."""
    scored_tokens: int
    temperature: float = 1.0
    """Temperature of the distribution that scores the ids."""
    balances: bool = False
    """True when its tokens count in the load-balancing loss of a mixture of experts."""
    teacher: Teacher | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Right-padded rows of similar length and one temperature. `target_BT[b, t]` is the id scored at t, or IGNORE."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    target_BT: torch.Tensor
    temperature: float
    balances: tuple[bool, ...] = ()
    """Per row, True when its tokens count in the load-balancing loss; () = none do."""
    taught_BT: torch.Tensor | None = None
    """True at targets whose divergence from a teacher is taken; None = nowhere."""
    teacher_KH: torch.Tensor | None = None
    """The teachers' hidden states at those targets, row by row."""

    def scored(self, hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (N, H) that predict a scored id, and those ids (N,): h_{t-1} predicts id t."""
        target_BT = self.target_BT[:, 1:]
        wanted_BT = target_BT != IGNORE
        return hidden_BTH[:, :-1][wanted_BT], target_BT[wanted_BT]

    @property
    def teaches_N(self) -> torch.Tensor:
        """Which scored positions have a teacher."""
        wanted_BT = self.target_BT[:, 1:] != IGNORE
        return torch.zeros_like(wanted_BT)[wanted_BT] if self.taught_BT is None else self.taught_BT[:, 1:][wanted_BT]


@dataclass(frozen=True, slots=True)
class Packed:
    """Blocks, and the order of their rows."""

    blocks: tuple[Any, ...]
    """`Block`s, or `FlatBlock`s of `shared_prompts.py`."""
    order: tuple[int, ...]
    """Row number of each row, in block order; rows with nothing scored may be missing."""
    rows: int
    """Number of rows packed."""
    scored_tokens: tuple[int, ...]
    """Scored positions of each row, in block order; they sum to N."""

    def unpack(self, values_N: torch.Tensor) -> list[torch.Tensor]:
        """Split values of the scored positions by row, in the rows' original order: shapes (scored_tokens,)."""
        parts = values_N.split(list(self.scored_tokens))
        rows: list[torch.Tensor] = [values_N[:0]] * self.rows
        for row, part in zip(self.order, parts, strict=True):
            rows[row] = part
        return rows


def pack(rows: Sequence[Row], *, pad_id: int, max_tokens: int | None = None) -> Packed:
    """Group rows by length into right-padded blocks.

    Longest first within a temperature, by the rule of `group_lengths`. Rows with nothing scored are left out,
    except the shortest when there is no other: every rank needs a forward so that gradients can be averaged.
    """
    groups = _groups(rows, max_tokens)
    blocks = tuple(_block([rows[i] for i in group], pad_id) for group in groups)
    flat = tuple(i for group in groups for i in group)
    return Packed(blocks, flat, len(rows), tuple(rows[i].scored_tokens for i in flat))


def deal(rows: Sequence[Row], max_tokens: int | None, *, one_block: bool = False) -> list[list[int]]:
    """Split rows into parts of at most `max_tokens` padded tokens; packing a part alone gives the same blocks.

    The sum of B*T over the blocks of a part is at most `max_tokens`, but for a part of one longer row; None = one part.
    Rows with nothing scored are in no part, as they are in no block. `one_block`: each block is a part.
    """
    parts: list[list[int]] = []
    room = 0
    for group in _groups(rows, max_tokens):
        area = area_tokens(rows, group)
        if parts and not one_block and (max_tokens is None or area <= room):
            parts[-1] += group
        else:
            parts.append(list(group))
            room = max_tokens or 0
        room -= area
    return parts


def area_tokens(rows: Sequence[Row], group: Sequence[int]) -> int:
    """Return B*T of one block of these rows, padding included."""
    return len(group) * max(len(rows[i].ids) for i in group)


def _groups(rows: Sequence[Row], max_tokens: int | None) -> list[list[int]]:
    wanted = [i for i, row in enumerate(rows) if row.scored_tokens]
    wanted = wanted or sorted(range(len(rows)), key=lambda i: len(rows[i].ids))[:1]
    groups: list[list[int]] = []
    for temperature in sorted({rows[i].temperature for i in wanted}):
        same = [i for i in wanted if rows[i].temperature == temperature]
        groups += [[same[j] for j in group] for group in group_lengths([len(rows[i].ids) for i in same], max_tokens)]
    return groups


def _block(rows: Sequence[Row], pad_id: int) -> Block:
    width = len(rows[0].ids)
    device = rows[0].ids.device
    input_ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long, device=device)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    target_BT = torch.full_like(input_ids_BT, IGNORE)
    for b, row in enumerate(rows):
        tokens = len(row.ids)
        # The first id of a sequence has no context, so it cannot be scored.
        assert 0 <= row.scored_tokens < tokens, (row.scored_tokens, tokens)
        input_ids_BT[b, :tokens] = row.ids
        attention_mask_BT[b, :tokens] = 1
        start = tokens - row.scored_tokens
        target_BT[b, start:tokens] = row.ids[start:]
    balances = tuple(row.balances for row in rows)
    taught_BT, teacher_KH = _teachers(rows, target_BT)
    return Block(input_ids_BT, attention_mask_BT, target_BT, rows[0].temperature, balances, taught_BT, teacher_KH)


def _teachers(rows: Sequence[Row], target_BT: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return where a block's rows have a teacher, and the teachers' hidden states in that order."""
    hidden = [row.teacher.hidden_KH for row in rows if row.teacher is not None]
    if not hidden:
        return None, None
    taught_BT = torch.zeros_like(target_BT, dtype=torch.bool)
    for b, row in enumerate(rows):
        if row.teacher is not None:
            taught_BT[b, len(row.ids) - row.scored_tokens + row.teacher.position_K] = True
    return taught_BT, torch.cat(hidden)


def rows_of_batch(
    input_ids_BP: torch.Tensor, attention_mask_BP: torch.Tensor, completion_width: int, *, temperature: float = 1.0
) -> list[Row]:
    """Take the padding off a TRL batch: left-padded prompt, right-padded completion in the last `completion_width`.

    A completion that is masked as a whole (dropped because it was cut off) gives a row with nothing scored.
    """
    valid_BP = attention_mask_BP.bool()
    scored_B = valid_BP[:, input_ids_BP.shape[1] - completion_width :].sum(dim=1).tolist()
    parts = zip(input_ids_BP, valid_BP, scored_B, strict=True)
    return [Row(ids[valid], scored, temperature, balances=True) for ids, valid, scored in parts]


def lesson_row(lesson: Lesson, device: torch.device, *, temperature: float = 1.0) -> Row:
    """Return the row that scores a lesson's target ids."""
    ids = torch.tensor(lesson.context_ids + lesson.target_ids, device=device)
    return Row(ids, len(lesson.target_ids), temperature)


def with_teachers(rows: Sequence[Row], mask_BC: torch.Tensor, hidden_BKH: torch.Tensor) -> list[Row]:
    """Attach a teacher to each row of a TRL batch where `mask_BC` is true.

    `hidden_BKH[b]` holds the teacher's hidden states of row b's true positions in order, padded to the longest row.
    """
    taught = []
    for row, mask_C, hidden_KH in zip(rows, mask_BC, hidden_BKH, strict=True):
        position_K = mask_C.nonzero()[:, 0]
        teacher = Teacher(position_K, hidden_KH[: len(position_K)]) if len(position_K) else None
        taught.append(replace(row, teacher=teacher))
    return taught


def pad_rows(values: Sequence[torch.Tensor], mask_BC: torch.Tensor) -> torch.Tensor:
    """Put per-row values back where `mask_BC` is true, zeros elsewhere: the inverse of `rows_of_batch`. (B, C)."""
    flat = torch.cat(list(values)) if values else mask_BC.new_zeros(0, dtype=torch.float32)
    # masked_scatter keeps the result connected to the graph even when no position is valid.
    return flat.new_zeros(mask_BC.shape).masked_scatter(mask_BC.bool(), flat)
