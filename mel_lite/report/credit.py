"""Token credit as readers see it: each token marked by how much likelier notes make it, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mel_lite.lessons.store import Effect, ExperienceRow, ExperienceStore, TokenCredit
from mel_lite.text import printable

LEVELS_NATS = (0.1, 0.3, 1.0, 3.0)
"""Least change of log pi, up or down, of the marks 1 to 4."""
MOST_TOKENS = 400
"""Tokens of a rollout that are shown."""
MOST_ROWS = 20
"""Tokens in the table of numbers: those of the largest change."""


@dataclass(frozen=True, slots=True)
class CreditToken:
    """One token of a strip."""

    number: int
    """Its place in the rollout, from 1."""
    text: str
    level: int
    """-4 (far less likely with the notes) to 4 (far likelier)."""
    shift: str
    """Change of log pi, such as `+1.20 nats`."""
    effect: str
    """Effect of the way on it, such as `advantage x 1.30`."""

    @property
    def mark(self) -> str:
        """Class of the page's style sheet; empty for a token that is hardly changed."""
        return f"{'up' if self.level > 0 else 'down'}{abs(self.level)}" if self.level else ""

    @property
    def title(self) -> str:
        """Both numbers."""
        return f"{self.shift}, {self.effect}"


@dataclass(frozen=True, slots=True)
class CreditStrip:
    """The credit of one rollout's tokens."""

    way: str
    verdict: str
    tokens: tuple[CreditToken, ...]
    strongest: tuple[CreditToken, ...]
    """The tokens of the largest change, largest first."""
    all_tokens: int

    @property
    def cut(self) -> str:
        """Says that tokens are left out, if any are."""
        shown = len(self.tokens)
        return f"the first {shown:,} of {self.all_tokens:,} tokens" if shown < self.all_tokens else ""


def strips(credits: Sequence[TokenCredit]) -> tuple[CreditStrip, ...]:
    """Return the strips of some rollouts, in their order."""
    return tuple(_strip(credit) for credit in credits)


def strips_of(row: ExperienceRow, store: ExperienceStore) -> tuple[CreditStrip, ...]:
    """Return the strips of a meta-experience's wrong and right solution. Raises: StoreError when they are damaged."""
    return strips(store.credit(row.rollouts_step, (row.wrong_index, row.right_index)))


def _strip(credit: TokenCredit) -> CreditStrip:
    values = zip(credit.tokens, credit.shift_nats, credit.effects, strict=True)
    tokens = tuple(
        CreditToken(number, printable(text), _level(shift), f"{shift:+.2f} nats", _effect(credit.effect, effect))
        for number, (text, shift, effect) in enumerate(values, start=1)
    )[:MOST_TOKENS]
    order = sorted(range(len(tokens)), key=lambda i: -abs(credit.shift_nats[i]))
    strongest = tuple(tokens[i] for i in order[:MOST_ROWS])
    return CreditStrip(printable(credit.way), credit.verdict.value, tokens, strongest, credit.all_tokens)


def _level(shift_nats: float) -> int:
    level = sum(abs(shift_nats) >= least for least in LEVELS_NATS)
    return level if shift_nats > 0 else -level


def _effect(unit: Effect, value: float) -> str:
    if unit is Effect.FACTOR:
        return f"advantage \N{MULTIPLICATION SIGN} {value:.2f}"
    if unit is Effect.ADDED:
        return f"advantage {value:+.2f}"
    return "taught" if value else "not taught"
