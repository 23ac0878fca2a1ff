"""Token credit: scale GRPO's advantage by what a lesson, rather than another question's, says of each token.

B rollouts, C padded completion width, T tokens of one rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mel_lite.lessons.internalise.notes import (
    LessonsPerPrompt,
    NoteSource,
    TaughtRows,
    notes_of,
    taught_notes,
    teacher_texts,
)
from mel_lite.lessons.internalise.options import check_flag, check_number, check_option
from mel_lite.lessons.internalise.protocol import DrawnBatch, Internalisation, RolloutBatch, TokenReading
from mel_lite.lessons.pairs import fork_token
from mel_lite.lessons.reading import Scorer
from mel_lite.lessons.store import Effect
from mel_lite.types import Verdict

if TYPE_CHECKING:
    from torch import Tensor

LEAST, MOST = 0.1, 2.0
"""Bounds of the factor. Both are above 0, so the sign of an advantage never flips."""


class Credit(Internalisation):
    """A_t = A clip(1 + lambda strength s tanh(e_t / tau), 0.1, 2), with s = 1 in a right rollout and -1 in a wrong one.

    e_t = log pi(y_t | x, c, y_<t) - log pi(y_t | x, c', y_<t), with c the lesson and c' the lesson of another question
    of the batch (no notes when there is no other). Tokens that the lesson argues against are blamed more in a wrong
    rollout, and tokens that it argues for are rewarded more in a right one. Strength 0 is GRPO bit for bit.

    Args: context: `own`, `bank` or `sibling`. rows: `wrong` or `all`. strength: in [-1, 1]; below 0 the factor is
        reversed. tau_nats: above 0. from_fork: leave tokens alone that come before the fork.

    Raises: ConfigError for an option outside its range. Source: docs/internalisation.md.
    """

    reads_tokens = True

    def __init__(
        self,
        *,
        context: str = "own",
        rows: str = "wrong",
        strength: float = 0.5,
        tau_nats: float = 1.0,
        from_fork: bool = True,
    ) -> None:
        check_option("context", context, (NoteSource.OWN, NoteSource.BANK, NoteSource.SIBLING))
        check_option("rows", rows, TaughtRows)
        check_number("strength", strength, least=-1, most=1)
        check_number("tau_nats", tau_nats, least=0, above=True)
        check_flag("from_fork", from_fork)
        self.context, self.rows, self.strength, self.tau_nats = context, rows, strength, tau_nats
        self.from_fork = from_fork
        self.needs_own_lessons = context == NoteSource.OWN
        self.uses_bank = context == NoteSource.BANK
        self.writes_lessons = context != NoteSource.SIBLING
        self._metrics: dict[str, float] = {}
        self._readings: list[TokenReading] = []

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def token_readings(self) -> list[TokenReading]:
        return self._readings

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        import torch

        lesson, control = (
            notes_of(drawn, batch, self.context, per_prompt=LessonsPerPrompt.ALL, shuffled=shuffled)
            for shuffled in (False, True)
        )
        wanted = taught_notes(batch, lesson, self.rows)
        texts = teacher_texts(drawn, batch, wanted)
        others = teacher_texts(drawn, batch, [note or "" for note in control])
        both = {i: (text, others[i]) for i, text in enumerate(texts)}
        pairs = {i: (text, other) for i, (text, other) in both.items() if text is not None and other is not None}
        logps = score.logps([text for pair in pairs.values() for text in pair])
        out_BC = batch.token_advantages()
        moved = []
        self._readings = []
        for n, i in enumerate(pairs):
            rollout = batch.rows[i][1]
            sign = 1.0 if rollout.verdict is Verdict.RIGHT else -1.0
            shift_T = logps[2 * n] - logps[2 * n + 1]
            evidence_T = torch.tanh(shift_T / self.tau_nats)
            factor_T = (1 + drawn.weight * self.strength * sign * evidence_T).clamp(LEAST, MOST)
            if self.from_fork:
                factor_T[: fork_token(drawn.group_of(rollout), rollout)] = 1.0
            out_BC[i, : len(factor_T)] *= factor_T
            self._readings.append(TokenReading(i, "credit", shift_T, Effect.FACTOR, factor_T))
            moved.append(float((factor_T - 1).abs().mean()))
        self._metrics = {
            "mel/credited_rows": len(pairs),
            "mel/credit_over_context": sum(note is not None for note in wanted) - len(pairs),
            **({"mel/credit_moved": sum(moved) / len(moved)} if moved else {}),
        }
        return {"advantages": out_BC}


__all__ = ["Credit"]
