"""Two internalizations that are not an NLL of text, as a user would write them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from mel_lite.lessons.internalise import DrawnBatch, Internalisation, RolloutBatch, ScoredMicroBatch, Scorer
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.types import Lesson

HINT = "Name the operation before computing."


def hinted(drawn: DrawnBatch, batch: RolloutBatch, *, hint: bool) -> list[Lesson]:
    """The rollouts as answers to their question, with or without a hint in the prompt."""
    context = drawn.context
    texts = []
    for group, rollout in batch.rows:
        if hint:
            ids = replay_prompt(group, HINT, context.tokenizer, context.templates)
        else:
            ids = question_prompt(group, context.tokenizer)
        texts.append(Lesson(0, ids, rollout.completion_ids))
    return texts


def padded(rows: list[torch.Tensor], like_BC: torch.Tensor) -> torch.Tensor:
    out_BC = torch.zeros(like_BC.shape)
    for row, values_T in zip(out_BC, rows, strict=True):
        row[: len(values_T)] = values_T
    return out_BC


class Credit(Internalisation):
    """Token advantages: A * (1 + strength * tanh(log pi(y_t | x, hint) - log pi(y_t | x)))."""

    strength: ClassVar[float] = 0.5

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Any]:
        mask_BC = batch.entries["completion_mask"]
        with_BC = padded(score(hinted(drawn, batch, hint=True)), mask_BC)
        without_BC = padded(score(hinted(drawn, batch, hint=False)), mask_BC)
        factor_BC = 1 + self.strength * torch.tanh(with_BC - without_BC)
        return {"advantages": batch.entries["advantages"][:, None] * factor_BC}


class NoCredit(Credit):
    """Strength 0: GRPO's advantages, spelled out per token."""

    strength = 0.0


class Strengthened(Credit):
    """Needs an argument, which an option cannot give."""

    def __init__(self, strength: float) -> None:
        self.given = strength


class Misshapen(Internalisation):
    """Advantages of too few rows."""

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Any]:
        return {"advantages": batch.entries["advantages"][:-1]}


class HintDivergence(Internalisation):
    """Reverse KL to the hinted policy on the sampled tokens: mean of sg(log pi - log pi_hint) * log pi."""

    needs_every_rollout = True

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Any]:
        mask_BC = batch.entries["completion_mask"]
        return {"teacher_logp_BC": padded(score(hinted(drawn, batch, hint=True)), mask_BC)}

    def loss(self, scored: ScoredMicroBatch) -> torch.Tensor:
        mask_BC = scored.entries["completion_mask"]
        ratio_BC = scored.logp_BC.detach() - scored.entries["teacher_logp_BC"]
        return scored.weight * (ratio_BC * scored.logp_BC * mask_BC).sum() / mask_BC.sum()
