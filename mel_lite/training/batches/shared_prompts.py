"""Take rows as one flat sequence without padding, in which completions of one prompt share the prompt's tokens.

A prompt of P tokens with G completions of c tokens is P + G (c - 1) tokens, where padded rows are G (P + c). The model
computes the same values: attention (`models/attention.py`) keeps the completions apart, and position ids count from the
start of each row. The last token of a row predicts nothing that is scored, and is left out.

T tokens of the flat sequence, N scored positions in order, P tokens of a prompt, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mel_lite.models.attention import SharedPrompts, lay_out
from mel_lite.training.batches.packing import Packed, Row


@dataclass(frozen=True, slots=True)
class FlatBlock:
    """Rows of one temperature as a flat sequence, and where their scored ids are predicted."""

    input_ids_BT: torch.Tensor
    """(1, T)."""
    position_ids_BT: torch.Tensor
    layout: SharedPrompts
    source_N: torch.Tensor
    """Position whose hidden state predicts each scored id."""
    target_N: torch.Tensor
    temperature: float
    taught_N: torch.Tensor | None = None
    """True at scored ids whose divergence from a teacher is taken; None = nowhere."""
    teacher_KH: torch.Tensor | None = None

    def scored(self, hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (N, H) that predict a scored id, and those ids (N,)."""
        return hidden_BTH[0].index_select(0, self.source_N), self.target_N

    @property
    def teaches_N(self) -> torch.Tensor:
        """Which scored positions have a teacher."""
        return torch.zeros_like(self.target_N, dtype=torch.bool) if self.taught_N is None else self.taught_N


def pack_shared(rows: Sequence[Row], *, max_tokens: int | None = None) -> Packed:
    """Return the rows as flat blocks, one per part of `deal_shared` and temperature."""
    blocks, order = [], []
    for part in deal_shared(rows, max_tokens):
        for temperature in sorted({rows[i].temperature for i in part}):
            same = [i for i in part if rows[i].temperature == temperature]
            blocks.append(_block([rows[i] for i in same]))
            order += same
    return Packed(tuple(blocks), tuple(order), len(rows), tuple(rows[i].scored_tokens for i in order))


def deal_shared(rows: Sequence[Row], max_tokens: int | None) -> list[list[int]]:
    """Split rows into parts of at most `max_tokens` flat tokens; None = one part.

    Rows of one prompt stay together. Where they do not fit into one part, each part computes the prompt again. A longer
    row is a part of its own. Rows with nothing scored are in no part, except the shortest when there is no other.
    """
    wanted = [i for i, row in enumerate(rows) if row.scored_tokens]
    wanted = wanted or sorted(range(len(rows)), key=lambda i: len(rows[i].ids))[:1]
    families: dict[tuple[object, ...], list[int]] = {}
    for i in wanted:
        families.setdefault(_prompt(rows[i]), []).append(i)
    parts: list[list[int]] = []
    room = 0
    for family in sorted(families.values(), key=lambda family: -max(len(rows[i].ids) for i in family)):
        needs_prompt = True
        for i in sorted(family, key=lambda i: -len(rows[i].ids)):
            prompt = len(rows[i].ids) - rows[i].scored_tokens
            own = max(rows[i].scored_tokens - 1, 0)
            if not parts or (max_tokens is not None and own + needs_prompt * prompt > room):
                parts.append([])
                room, needs_prompt = max_tokens or 0, True
            parts[-1].append(i)
            room -= own + needs_prompt * prompt
            needs_prompt = False
    return parts


def _prompt(row: Row) -> tuple[object, ...]:
    """Return what rows that share a prompt have in common; rows with nothing scored are prompts without completion."""
    return (row.temperature, *row.ids[: len(row.ids) - row.scored_tokens].tolist())


def _block(rows: Sequence[Row]) -> FlatBlock:
    device = rows[0].ids.device
    families: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(rows):
        # The first id of a sequence has no context, so it cannot be scored.
        assert 0 <= row.scored_tokens < len(row.ids), (row.scored_tokens, len(row.ids))
        families.setdefault(_prompt(row), []).append(i)
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    roots: list[torch.Tensor] = []
    branches: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    sources: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    first = 0

    def place(part: torch.Tensor, offset: int) -> torch.Tensor:
        nonlocal first
        ids.append(part)
        positions.append(torch.arange(offset, offset + len(part), device=device))
        placed = torch.arange(first, first + len(part), device=device)
        first += len(part)
        return placed

    for family in families.values():
        prompt = len(rows[family[0]].ids) - rows[family[0]].scored_tokens
        if len(family) == 1:  # nothing to share: one causal sequence
            row = rows[family[0]]
            placed = place(row.ids[:-1] if row.scored_tokens else row.ids, 0)
            roots.append(placed)
            sources[family[0]] = placed[prompt - 1 :][: row.scored_tokens]
            continue
        prompt_P = place(rows[family[0]].ids[:prompt], 0)
        roots.append(prompt_P)
        own = [place(rows[i].ids[prompt:-1], prompt) for i in family]
        for i, placed in zip(family, own, strict=True):
            sources[i] = torch.cat([prompt_P[-1:], placed])[: rows[i].scored_tokens]
        branches.append((prompt_P, [placed for placed in own if len(placed)]))
    taught_N, teacher_KH = _teachers(rows)
    return FlatBlock(
        torch.cat(ids)[None],
        torch.cat(positions)[None],
        lay_out(roots, branches),
        torch.cat(sources),
        torch.cat([row.ids[len(row.ids) - row.scored_tokens :] for row in rows]),
        rows[0].temperature,
        taught_N,
        teacher_KH,
    )


def _teachers(rows: Sequence[Row]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    hidden = [row.teacher.hidden_KH for row in rows if row.teacher is not None]
    if not hidden:
        return None, None
    taught = []
    for row in rows:
        taught_T = torch.zeros(row.scored_tokens, dtype=torch.bool, device=row.ids.device)
        if row.teacher is not None:
            taught_T[row.teacher.position_K] = True
        taught.append(taught_T)
    return torch.cat(taught), torch.cat(hidden)
