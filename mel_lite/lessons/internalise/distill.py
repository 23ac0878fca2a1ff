"""Distill the policy with notes in its prompt into the policy without them.

Teacher pi_T(. | x, notes, y_<t), without gradient; student pi(. | x, y_<t); both along the sampled rollout y.
B rollouts, C padded completion width, T tokens of one rollout, K of them taught, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise.notes import (
    LessonsPerPrompt,
    NoteSource,
    TaughtRows,
    notes_of,
    plain_text,
    taught_notes,
    teacher_texts,
)
from mel_lite.lessons.internalise.options import check_flag, check_number, check_option
from mel_lite.lessons.internalise.protocol import (
    DrawnBatch,
    Internalisation,
    RolloutBatch,
    ScoredMicroBatch,
    TokenReading,
)
from mel_lite.lessons.pairs import fork_token
from mel_lite.lessons.reading import Scorer
from mel_lite.lessons.store import Effect
from mel_lite.types import Choice, Lesson, Verdict

if TYPE_CHECKING:
    from torch import Tensor


class DistillForm(Choice):
    """Loss that distills."""

    KL = "kl", "Reverse KL over the whole vocabulary, lambda / N sum_t KL(pi || pi_T); needs a frozen head."
    SAMPLED = "sampled", "The sampled token's log ratio, added to its advantage: A_t + lambda clip(log pi_T - log pi)."


class TokenMask(Choice):
    """Tokens of a rollout that are taught."""

    ALL = "all", "All."
    FORK = "fork", "From where the rollout leaves its nearest rollout of the other verdict."
    SHIFT = "shift", "Those where the notes change the reader: KL(with notes || without) above `shift_nats`."


class TeacherReader(Choice):
    """Weights that read the notes."""

    MOVING = "moving", "The policy as it is."
    FROZEN = "frozen", "The policy as it was at the start of the run."


class Distill(Internalisation):
    """Pull the policy toward itself with notes in its prompt: lambda / N sum over taught tokens of KL(pi || pi_T).

    Args: those with named values are `NoteSource`, `DistillForm`, `LessonsPerPrompt`, `TeacherReader`, `TokenMask` and
        `TaughtRows`. sign: teach a token only where the teacher's opinion agrees with the verdict on the rollout:
        likelier than for the student if right, less likely if wrong. shuffled: read the notes of another question.
        shift_nats: threshold of `mask="shift"`, at least 0. clip_nats: bound of the log ratio of `form="sampled"`,
        above 0.

    Raises: ConfigError for an option outside its range. Source: docs/internalisation.md.
    """

    reads_tokens = True

    def __init__(
        self,
        *,
        context: str = "bank",
        form: str = "kl",
        per_prompt: str = "one",
        reader: str = "moving",
        mask: str = "all",
        rows: str = "all",
        sign: bool = True,
        shuffled: bool = False,
        shift_nats: float = 0.05,
        clip_nats: float = 5.0,
    ) -> None:
        for name, value, choices in (
            ("context", context, NoteSource),
            ("form", form, DistillForm),
            ("per_prompt", per_prompt, LessonsPerPrompt),
            ("reader", reader, TeacherReader),
            ("mask", mask, TokenMask),
            ("rows", rows, TaughtRows),
        ):
            check_option(name, value, choices)
        for name, flag in (("sign", sign), ("shuffled", shuffled)):
            check_flag(name, flag)
        check_number("shift_nats", shift_nats, least=0)
        check_number("clip_nats", clip_nats, least=0, above=True)
        if shuffled and context == NoteSource.NONE:
            raise ConfigError(
                "internalisation_options.shuffled=True with context='none': there are no notes to take from another "
                "question. Remove one of them."
            )
        self.context, self.form, self.per_prompt, self.mask, self.rows = context, form, per_prompt, mask, rows
        self.sign, self.shuffled, self.shift_nats, self.clip_nats = sign, shuffled, shift_nats, clip_nats
        self.frozen = reader == TeacherReader.FROZEN
        self.needs_own_lessons = context == NoteSource.OWN
        self.uses_bank = context in (NoteSource.BANK, NoteSource.SIBLING_BANK)
        self.writes_lessons = context not in (NoteSource.SIBLING, NoteSource.NONE)
        self.needs_frozen_head = form == DistillForm.KL or mask == TokenMask.SHIFT
        self.teacher_states = (form == DistillForm.KL) + (mask == TokenMask.SHIFT)
        self.needs_frozen_reader = self.frozen
        self._metrics: dict[str, float] = {}
        self._readings: list[TokenReading] = []

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def token_readings(self) -> list[TokenReading]:
        return self._readings

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        notes = notes_of(drawn, batch, self.context, per_prompt=self.per_prompt, shuffled=self.shuffled)
        wanted = taught_notes(batch, notes, self.rows)
        texts = teacher_texts(drawn, batch, wanted)
        rows = {i: text for i, text in enumerate(texts) if text is not None}
        taught = self._read(drawn, batch, rows, score)
        over_context = sum(note is not None for note in wanted) - len(rows)
        self._metrics = {
            "mel/without_notes": sum(note is None for note in notes),
            "mel/over_context": over_context,
            **_metrics(batch, taught),
        }
        if self.form == DistillForm.SAMPLED:
            return self._advantages(drawn, batch, taught)
        self._readings = [
            TokenReading(each.row, "distill", each.gain_T, Effect.TAUGHT, each.use_T.float()) for each in taught
        ]
        return _teachers(batch, taught)

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        if scored.kl_BC is None or self.form != DistillForm.KL:
            return None
        return scored.token_weight * scored.kl_BC.sum()

    def _read(self, drawn: DrawnBatch, batch: RolloutBatch, rows: Mapping[int, Lesson], score: Scorer) -> list[Taught]:
        """Read the rollouts with and without notes, and choose the tokens to teach."""
        import torch

        teacher_logps, teacher_hiddens = self._with_notes(list(rows.values()), score)
        student_logps, plain_hiddens = self._without_notes(drawn, batch, list(rows), score)
        taught = []
        for n, i in enumerate(rows):
            rollout = batch.rows[i][1]
            gain_T = teacher_logps[n] - student_logps[n]
            use_T = torch.ones_like(gain_T, dtype=torch.bool)
            if self.sign:
                use_T &= gain_T > 0 if rollout.verdict is Verdict.RIGHT else gain_T < 0
            if self.mask == TokenMask.FORK:
                use_T[: fork_token(drawn.group_of(rollout), rollout)] = False
            elif self.mask == TokenMask.SHIFT:
                use_T &= score.kl(teacher_hiddens[n], plain_hiddens[n]) > self.shift_nats
            taught.append(Taught(i, use_T, gain_T, teacher_hiddens[n] if self.form == DistillForm.KL else None))
        return taught

    def _with_notes(self, texts: Sequence[Lesson], score: Scorer) -> tuple[list[Tensor], list[Tensor]]:
        """Return the teacher's log-probs, and its hidden states where they are needed."""
        if not self.needs_frozen_head:
            return score.logps(texts, frozen=self.frozen), []
        readings = score.read(texts, frozen=self.frozen)
        return [each.logp_T for each in readings], [each.hidden_TH for each in readings]

    def _without_notes(
        self, drawn: DrawnBatch, batch: RolloutBatch, rows: Sequence[int], score: Scorer
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's log-probs, and the hidden states of the teacher's reader where the mask needs them."""
        plain = [plain_text(drawn, *batch.rows[i]) for i in rows]
        readings = score.read(plain, frozen=self.frozen) if self.mask == TokenMask.SHIFT else []
        hiddens = [each.hidden_TH for each in readings]
        known_BC = batch.entries.get("old_per_token_logps")
        if known_BC is not None:
            return [known_BC[i, : len(batch.rows[i][1].completion_ids)].float() for i in rows], hiddens
        if readings and not self.frozen:
            return [each.logp_T for each in readings], hiddens
        return score.logps(plain), hiddens

    def _advantages(self, drawn: DrawnBatch, batch: RolloutBatch, taught: Sequence[Taught]) -> dict[str, Tensor]:
        import torch

        out_BC = batch.token_advantages()
        self._readings = []
        for each in taught:
            extra_T = drawn.weight * torch.where(each.use_T, each.gain_T.clamp(-self.clip_nats, self.clip_nats), 0.0)
            out_BC[each.row, : len(extra_T)] += extra_T
            self._readings.append(TokenReading(each.row, "distill", each.gain_T, Effect.ADDED, extra_T))
        return {"advantages": out_BC}


@dataclass(frozen=True, slots=True)
class Taught:
    """One rollout with its teacher."""

    row: int
    use_T: Tensor
    """bool: the tokens that are taught."""
    gain_T: Tensor
    """log pi_T - log pi of the sampled tokens, in nats."""
    hidden_TH: Tensor | None
    """Hidden states of the teacher; None where the loss does not need them."""


def _teachers(batch: RolloutBatch, taught: Sequence[Taught]) -> dict[str, Tensor]:
    """Return `teacher_mask` (B, C) and `teacher_hidden` (B, K, H); nothing when no token is taught."""
    import torch

    hiddens = {each.row: each.hidden_TH[each.use_T] for each in taught if each.hidden_TH is not None}
    most = max((len(hidden_KH) for hidden_KH in hiddens.values()), default=0)
    if not most:
        return {}
    mask_BC = torch.zeros_like(batch.entries["completion_mask"], dtype=torch.bool)
    for each in taught:
        mask_BC[each.row, : len(each.use_T)] = each.use_T
    first = next(iter(hiddens.values()))
    hidden_BKH = first.new_zeros(len(mask_BC), most, first.shape[1])
    for row, hidden_KH in hiddens.items():
        hidden_BKH[row, : len(hidden_KH)] = hidden_KH
    return {"teacher_mask": mask_BC, "teacher_hidden": hidden_BKH}


def _metrics(batch: RolloutBatch, taught: Sequence[Taught]) -> dict[str, float]:
    """Return what was taught in this batch.

    `mel/taught_tokens` is the share of the tokens of rollouts with a teacher. `mel/teacher_shift` is the mean log ratio
    of teacher and student over right rollouts minus that over wrong ones, in nats; the notes help where it is above 0.
    """
    metrics: dict[str, float] = {"mel/taught_rows": len(taught)}
    tokens = sum(len(each.use_T) for each in taught)
    if tokens:
        metrics["mel/taught_tokens"] = sum(int(each.use_T.sum()) for each in taught) / tokens
    gains: dict[Verdict, list[float]] = {verdict: [] for verdict in Verdict}
    for each in taught:
        gains[batch.rows[each.row][1].verdict].append(float(each.gain_T.sum()))
    right, wrong = gains[Verdict.RIGHT], gains[Verdict.WRONG]
    if right and wrong:
        metrics["mel/teacher_shift"] = sum(right) / len(right) - sum(wrong) / len(wrong)
    return metrics


__all__ = ["Distill", "DistillForm", "TeacherReader", "TokenMask"]
