"""Token credit: scale GRPO's advantage by what a lesson, rather than another question's, says of each token.

B rollouts, C padded completion width, T tokens of one rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mel_lite.errors import ConfigError, check_choice
from mel_lite.lessons.internalise.distill import TaughtRows, fork_token
from mel_lite.lessons.internalise.notes import LessonsPerPrompt, NoteSource, notes_of, teacher_texts
from mel_lite.lessons.internalise.protocol import DrawnBatch, Internalisation, RolloutBatch
from mel_lite.lessons.reading import Scorer
from mel_lite.types import Verdict

if TYPE_CHECKING:
    from torch import Tensor

LEAST, MOST = 0.1, 2.0
"""Bounds of the factor. Both are above 0, so the sign of an advantage never flips."""


class Credit(Internalisation):
    """A_t = A clip(1 + strength s tanh(e_t / tau), 0.1, 2), with s = 1 in a right rollout and -1 in a wrong one.

    e_t = log pi(y_t | x, c, y_<t) - log pi(y_t | x, c', y_<t), with c the lesson and c' the lesson of another question
    of the batch (no notes when there is no other). Tokens that the lesson argues against are blamed more in a wrong
    rollout, and tokens that it argues for are rewarded more in a right one. Strength 0 is GRPO bit for bit.

    Args: context: `own`, `bank` or `sibling`. rows: `wrong` or `all`. strength: in [-1, 1]; below 0 the factor is
        reversed. tau_nats: above 0. from_fork: leave tokens alone that come before the fork.

    Raises: ConfigError for an option outside its range. Source: docs/internalisation.md.
    """

    def __init__(
        self,
        *,
        context: str = "own",
        rows: str = "wrong",
        strength: float = 0.5,
        tau_nats: float = 1.0,
        from_fork: bool = True,
    ) -> None:
        field = "internalisation_options: "
        check_choice(f"{field}context", context, (NoteSource.OWN, NoteSource.BANK, NoteSource.SIBLING))
        check_choice(f"{field}rows", rows, TaughtRows)
        if not -1 <= strength <= 1:
            raise ConfigError(f"{field}strength={strength} must be in [-1, 1].")
        if not tau_nats > 0:
            raise ConfigError(f"{field}tau_nats={tau_nats} must be above 0.")
        self.context, self.rows, self.strength, self.tau_nats = context, rows, strength, tau_nats
        self.from_fork = from_fork
        self.uses_bank = context == NoteSource.BANK
        self.writes_lessons = context != NoteSource.SIBLING
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        import torch

        lesson, control = (
            notes_of(drawn, batch, self.context, per_prompt=LessonsPerPrompt.ALL, shuffled=shuffled)
            for shuffled in (False, True)
        )
        wanted = [
            note if rollout.verdict is Verdict.WRONG or self.rows == TaughtRows.ALL else None
            for note, (_, rollout) in zip(lesson, batch.rows, strict=True)
        ]
        texts = teacher_texts(drawn, batch, wanted)
        others = teacher_texts(drawn, batch, [note or "" for note in control])
        rows = [i for i, text in enumerate(texts) if text is not None and others[i] is not None]
        with_lesson = score.read([text for i in rows if (text := texts[i]) is not None])
        with_other = score.read([text for i in rows if (text := others[i]) is not None])
        advantages = batch.entries["advantages"]
        width = batch.entries["completion_ids"].shape[1]
        out_BC = (advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, width)).clone()
        moved = 0.0
        for i, here, there in zip(rows, with_lesson, with_other, strict=True):
            rollout = batch.rows[i][1]
            sign = 1.0 if rollout.verdict is Verdict.RIGHT else -1.0
            evidence_T = torch.tanh((here.logp_T - there.logp_T) / self.tau_nats)
            factor_T = (1 + self.strength * sign * evidence_T).clamp(LEAST, MOST)
            if self.from_fork:
                group = drawn.groups[rollout.index // len(drawn.groups[0].rollouts)]
                factor_T[: fork_token(group, rollout)] = 1.0
            out_BC[i, : len(factor_T)] *= factor_T
            moved += float((factor_T - 1).abs().mean())
        self._metrics = {"mel/credited_rows": len(rows)} | ({"mel/credit_moved": moved / len(rows)} if rows else {})
        return {"advantages": out_BC}


__all__ = ["Credit"]
