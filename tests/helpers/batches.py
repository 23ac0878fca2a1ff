"""TRL micro-batches of random tokens."""

from __future__ import annotations

from typing import Any

import torch

from mel_lite.lessons.internalise import LessonShare
from mel_lite.types import Lesson

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def micro_batch(seed: int = 0) -> dict[str, Any]:
    """Return a TRL micro-batch of 4 rows: left-padded prompts, right-padded completions, stale old log-probs."""
    generator = torch.Generator().manual_seed(seed)

    def ids(rows: int, width: int) -> torch.Tensor:
        return torch.randint(4, 320, (rows, width), generator=generator)

    prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    completion_mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6, [1, 1, 1, 1, 1, 0]])
    return {
        "prompt_ids": ids(4, 5) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids(4, 6) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": -5.5 + torch.randn(4, 6, generator=generator),
        "ref_per_token_logps": -5.5 + torch.randn(4, 6, generator=generator),
    }


def with_lessons(inputs: dict[str, Any], lessons: tuple[Lesson, ...], weight: float = 0.5) -> dict[str, Any]:
    """The micro-batch with its share of the lessons."""
    return inputs | {"lessons": LessonShare(lessons, weight)}
