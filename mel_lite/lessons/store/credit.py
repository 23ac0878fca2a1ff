"""Token credit in the store: the table, and its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mel_lite.lessons.store.rows import clean
from mel_lite.types import Verdict

# The key makes a repeated step replace its rows.
SCHEMA = """
CREATE TABLE IF NOT EXISTS token_credit (
    step INTEGER NOT NULL, rollout_index INTEGER NOT NULL, way TEXT NOT NULL, verdict TEXT NOT NULL,
    effect TEXT NOT NULL, tokens TEXT NOT NULL, shift_nats TEXT NOT NULL, effects TEXT NOT NULL,
    all_tokens INTEGER NOT NULL, PRIMARY KEY (step, rollout_index, way)
)
"""
COLUMNS = ("step", "rollout_index", "way", "verdict", "effect", "tokens", "shift_nats", "effects", "all_tokens")


class Effect(StrEnum):
    """Unit of a token's effect: what the way does with it."""

    FACTOR = "factor"
    """Factor of the token's advantage."""
    ADDED = "added"
    """Added to the token's advantage."""
    TAUGHT = "taught"
    """1 where the token is taught, 0 where it is not."""


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """Change of each token of a rollout by notes in the prompt, up to a bound on its length."""

    step: int
    """Optimizer step, from 1. The file's column holds the number of steps before."""
    rollout_index: int
    """The rollout's index in its generation batch."""
    way: str
    """Name of the internalization that read it."""
    verdict: Verdict
    effect: Effect
    """Unit of `effects`."""
    tokens: tuple[str, ...]
    """Text of each token."""
    shift_nats: tuple[float, ...]
    """log pi of each token with the notes minus without them, or with those of another question for `credit`."""
    effects: tuple[float, ...]
    all_tokens: int
    """Tokens of the whole rollout."""


def to_values(credit: TokenCredit) -> tuple[Any, ...]:
    """Return the SQLite values of `COLUMNS`."""
    texts = json.dumps(clean(credit.tokens), ensure_ascii=False)
    numbers = (json.dumps(values) for values in (credit.shift_nats, credit.effects))
    key = (credit.step - 1, credit.rollout_index, credit.way, credit.verdict.value, credit.effect.value)
    return (*key, texts, *numbers, credit.all_tokens)


def to_credit(values: Sequence[Any]) -> TokenCredit:
    """Convert the values of `COLUMNS` back; the inverse of `to_values`. Raises: ValueError for damaged ones."""
    step, rollout_index, way, verdict, effect, tokens, shift_nats, effects, all_tokens = values
    lists = (json.loads(tokens), json.loads(shift_nats), json.loads(effects))
    if len({len(each) for each in lists}) != 1:
        raise ValueError("lists of different lengths")
    texts, shifts, sizes = lists
    return TokenCredit(
        step + 1, rollout_index, way, Verdict(verdict), Effect(effect), tuple(map(str, texts)),
        tuple(map(float, shifts)), tuple(map(float, sizes)), all_tokens,
    )  # fmt: skip
