"""Distill the policy with notes in its prompt into the policy without them.

Teacher pi_T(. | x, notes, y_<t), without gradient; student pi(. | x, y_<t); both along the sampled rollout y.
B rollouts, C padded completion width, T tokens of one rollout, K of them taught, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mel_lite.errors import ConfigError, check_choice
from mel_lite.lessons.internalise.notes import LessonsPerPrompt, NoteSource, notes_of, plain_text, teacher_texts
from mel_lite.lessons.internalise.protocol import (
    DrawnBatch,
    Internalisation,
    RolloutBatch,
    ScoredMicroBatch,
)
from mel_lite.lessons.pairs import common_prefix_tokens
from mel_lite.lessons.reading import Reading, Scorer
from mel_lite.types import Choice, Group, Lesson, Rollout, Verdict

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


class TaughtRows(Choice):
    """Rollouts that are taught."""

    ALL = "all", "All with notes, also in groups where every rollout is wrong."
    WRONG = "wrong", "Wrong ones."


class TeacherReader(Choice):
    """Weights that read the notes."""

    MOVING = "moving", "The policy as it is."
    FROZEN = "frozen", "The policy as it was at the start of the run."


class Distill(Internalisation):
    """Pull the policy toward what it would say with notes in its prompt (docs/internalisation.md).

    Args: see `NoteSource`, `DistillForm`, `LessonsPerPrompt`, `TeacherReader`, `TokenMask`, `TaughtRows`.
        sign: teach a token only where the teacher's opinion of it agrees with the verdict on its rollout: likelier
            than the student has it in a right rollout, less likely in a wrong one.
        shuffled: read the notes of another question; a control.
        shift_nats: threshold of `mask="shift"`, at least 0.
        clip_nats: bound of the log ratio of `form="sampled"`, above 0.

    Raises: ConfigError for an option outside its range.
    """

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
            check_choice(f"internalisation_options: {name}", value, choices)
        for name, number, least in (("shift_nats", shift_nats, 0.0), ("clip_nats", clip_nats, 1e-6)):
            if not number >= least:
                raise ConfigError(f"internalisation_options: {name}={number} must be at least {least} nats.")
        if shuffled and context in (NoteSource.NONE,):
            raise ConfigError("internalisation_options: shuffled=True with context='none': there are no notes.")
        self.context, self.form, self.per_prompt, self.mask, self.rows = context, form, per_prompt, mask, rows
        self.sign, self.shuffled, self.shift_nats, self.clip_nats = sign, shuffled, shift_nats, clip_nats
        self.frozen = reader == TeacherReader.FROZEN
        self.uses_bank = context in (NoteSource.BANK, NoteSource.SIBLING_BANK)
        self.writes_lessons = context not in (NoteSource.SIBLING, NoteSource.NONE)
        self.needs_frozen_head = form == DistillForm.KL or mask == TokenMask.SHIFT
        self.needs_frozen_reader = self.frozen
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        notes = notes_of(drawn, batch, self.context, per_prompt=self.per_prompt, shuffled=self.shuffled)
        if self.rows == TaughtRows.WRONG:
            notes = [
                note if rollout.verdict is Verdict.WRONG else None
                for note, (_, rollout) in zip(notes, batch.rows, strict=True)
            ]
        texts = teacher_texts(drawn, batch, notes)
        taught = self._read(drawn, batch, texts, score)
        self._metrics = _metrics(batch, notes, texts, taught)
        return self._advantages(drawn, batch, taught) if self.form == DistillForm.SAMPLED else _entries(batch, taught)

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        return None if scored.kl_BC is None else scored.token_weight * scored.kl_BC.sum()

    def _read(
        self, drawn: DrawnBatch, batch: RolloutBatch, texts: Sequence[Lesson | None], score: Scorer
    ) -> list[Taught]:
        """Read the rollouts with and without notes, and choose the tokens to teach."""
        rows = [(i, text) for i, text in enumerate(texts) if text is not None]
        teacher = score.read([text for _, text in rows], frozen=self.frozen)
        plain = [plain_text(drawn, *batch.rows[i]) for i, _ in rows]
        student = score.read(plain)
        without = score.read(plain, frozen=True) if self.frozen and self.mask == TokenMask.SHIFT else student
        taught = []
        for (i, _), with_notes, now, start in zip(rows, teacher, student, without, strict=True):
            group, rollout = drawn.groups[_group_number(drawn, batch, i)], batch.rows[i][1]
            gain_T = with_notes.logp_T - now.logp_T
            use_T = gain_T == gain_T
            if self.sign:
                use_T &= gain_T > 0 if rollout.verdict is Verdict.RIGHT else gain_T < 0
            if rollout.verdict is Verdict.ABSTAIN:
                use_T[:] = False
            if self.mask == TokenMask.FORK:
                use_T[: fork_token(group, rollout)] = False
            elif self.mask == TokenMask.SHIFT:
                use_T &= score.kl(with_notes.hidden_TH, start.hidden_TH) > self.shift_nats
            taught.append(Taught(i, use_T, gain_T, with_notes))
        return taught

    def _advantages(self, drawn: DrawnBatch, batch: RolloutBatch, taught: Sequence[Taught]) -> dict[str, Tensor]:
        import torch

        advantages = batch.entries["advantages"]
        width = batch.entries["completion_ids"].shape[1]
        out_BC = (advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, width)).clone()
        for each in taught:
            extra_T = torch.where(each.use_T, each.gain_T.clamp(-self.clip_nats, self.clip_nats), 0.0)
            out_BC[each.row, : len(extra_T)] += drawn.weight * extra_T
        return {"advantages": out_BC}


@dataclass(frozen=True, slots=True)
class Taught:
    """One rollout with its teacher."""

    row: int
    use_T: Tensor
    """bool: the tokens that are taught."""
    gain_T: Tensor
    """log pi_T - log pi of the sampled tokens, in nats."""
    teacher: Reading


def fork_token(group: Group, rollout: Rollout) -> int:
    """Return where a rollout leaves its nearest rollout of the other verdict; 0 when there is none."""
    others = group.wrong if rollout.verdict is Verdict.RIGHT else group.right
    return max((common_prefix_tokens(rollout.completion_ids, each.completion_ids) for each in others), default=0)


def _group_number(drawn: DrawnBatch, batch: RolloutBatch, row: int) -> int:
    return batch.rows[row][1].index // len(drawn.groups[0].rollouts)


def _entries(batch: RolloutBatch, taught: Sequence[Taught]) -> dict[str, Tensor]:
    """Return `teacher_mask` (B, C) and `teacher_hidden` (B, K, H); nothing when no token is taught."""
    import torch

    most = max((int(each.use_T.sum()) for each in taught), default=0)
    if not most:
        return {}
    mask_BC = torch.zeros_like(batch.entries["completion_mask"], dtype=torch.bool)
    hidden = taught[0].teacher.hidden_TH
    hidden_BKH = hidden.new_zeros(len(mask_BC), most, hidden.shape[1])
    for each in taught:
        mask_BC[each.row, : len(each.use_T)] = each.use_T
        hidden_BKH[each.row, : int(each.use_T.sum())] = each.teacher.hidden_TH[each.use_T]
    return {"teacher_mask": mask_BC, "teacher_hidden": hidden_BKH}


def _metrics(
    batch: RolloutBatch, notes: Sequence[str | None], texts: Sequence[Lesson | None], taught: Sequence[Taught]
) -> dict[str, float]:
    """Return what was taught in this batch; `mel/teacher_shift` above 0 means that the notes favor right rollouts."""
    tokens = sum(len(each.use_T) for each in taught)
    metrics = {
        "mel/taught_rows": len(taught),
        "mel/without_notes": sum(note is None for note in notes),
        "mel/over_context": sum(n is not None for n in notes) - sum(t is not None for t in texts),
    }
    if tokens:
        metrics["mel/taught_tokens"] = sum(float(each.use_T.sum()) for each in taught) / tokens
    gains = {verdict: [] for verdict in (Verdict.RIGHT, Verdict.WRONG)}  # type: dict[Verdict, list[float]]
    for each in taught:
        verdict = batch.rows[each.row][1].verdict
        if verdict in gains:
            gains[verdict].append(float(each.gain_T.sum()))
    right, wrong = gains[Verdict.RIGHT], gains[Verdict.WRONG]
    if right and wrong:
        metrics["mel/teacher_shift"] = sum(right) / len(right) - sum(wrong) / len(wrong)
    return metrics


__all__ = ["Distill", "DistillForm", "TaughtRows", "TeacherReader", "TokenMask", "fork_token"]
