"""The order of the training prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """TRL's RepeatSampler, with a permutation that depends on the seed and the epoch only.

    TRL draws each epoch's permutation from one generator, so a run that resumes in a later epoch would see the order
    of the first one.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Put the generator where an uninterrupted run has it at the start of `epoch` (0 is the first)."""
        if not self.sampler.shuffle:
            return
        self.sampler.generator.manual_seed(self.sampler.seed)
        for _ in range(epoch):
            torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
