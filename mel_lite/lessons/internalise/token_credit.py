"""Token credit for people: what notes make of each token of a rollout, as text and numbers. T tokens of one rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mel_lite.lessons.internalise.protocol import DrawnBatch, Internalisation, RolloutBatch, TokenReading
from mel_lite.lessons.store import TokenCredit

MOST_TOKENS = 1024
"""Tokens of a rollout that are stored."""
MOST_PARTS = 8
"""Tokens that are taken for parts of one character: more than any has."""


def token_credit(
    way: Internalisation,
    drawn: DrawnBatch,
    batch: RolloutBatch,
    *,
    step: int,
    most: int,
    gather: Callable[[list[Any]], list[Any]],
) -> list[TokenCredit]:
    """Return the credit of at most `most` rollouts of the batch, the same on every rank.

    Rollouts of kept lessons come first, then those of dropped ones, then the others, each in row order. A rollout with
    a value that is not finite is left out. `step`: number of optimizer steps before the batch.
    """
    if not (most and way.reads_tokens):
        return []
    places = _places(drawn)
    mine: list[tuple[int, TokenReading]] = []
    for reading in way.token_readings():
        index = batch.rows[reading.row][1].index
        if bool(reading.shift_T.isfinite().all() and reading.effect_T.isfinite().all()):
            mine.append((places.get(index, len(places) + index), reading))
    mine = sorted(mine, key=lambda each: each[0])[:most]
    tokenizer = drawn.context.tokenizer
    local = [(place, _row(reading, batch, step=step, tokenizer=tokenizer)) for place, reading in mine]
    found = sorted(gather(local), key=lambda each: (each[0], each[1].way))
    return [row for _, row in found[:most]]


def _places(drawn: DrawnBatch) -> dict[int, int]:
    """Return the place of each rollout of the batch's pairs: kept lessons first, a wrong one before its right one."""
    kept = {row_id for row_id, _ in drawn.kept}
    ordered = sorted(drawn.experiences, key=lambda each: each[0] not in kept)
    pairs = [each.analysis.pair for _, each in ordered if not each.staleness_steps]
    indices = dict.fromkeys(rollout.index for pair in pairs for rollout in (pair.wrong, pair.right))
    return {index: place for place, index in enumerate(indices)}


def _row(reading: TokenReading, batch: RolloutBatch, *, step: int, tokenizer: Any) -> TokenCredit:
    rollout = batch.rows[reading.row][1]
    ids = rollout.completion_ids[:MOST_TOKENS]
    return TokenCredit(
        step + 1,
        rollout.index,
        reading.way,
        rollout.verdict,
        reading.effect,
        tuple(token_texts(ids, tokenizer)),
        _rounded(reading.shift_T[: len(ids)].tolist()),
        _rounded(reading.effect_T[: len(ids)].tolist()),
        len(rollout.completion_ids),
    )


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.4g}") for value in values)


def token_texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text that each token adds. All together are the decoded text, up to characters cut at its ends.

    A character of several tokens belongs to the last of them; the others are empty. Special tokens are by name.
    """
    special = set(tokenizer.all_special_ids)
    start = done = 0  # the texts of ids[:done] are out; decoding begins at the piece before, which keeps a blank
    for end, id_ in enumerate(ids):
        if id_ in special:
            yield str(tokenizer.convert_ids_to_tokens(int(id_)))
            start = done = end + 1
            continue
        before, after = tokenizer.decode(list(ids[start:done])), tokenizer.decode(list(ids[start : end + 1]))
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end - done < MOST_PARTS:
            yield ""
            continue
        yield after[len(before) :]
        start, done = done, end + 1


__all__ = ["token_credit", "token_texts"]
