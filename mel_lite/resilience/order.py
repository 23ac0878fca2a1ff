"""The order of prompts belongs to the epoch, not to how often the process was started."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from mel_lite.training.assemble import add_callback_once


class ExactOrder:
    """Mixin over a TRL trainer: a run resumed in its k-th epoch sees the prompts in that epoch's order.

    TRL's sampler draws each epoch's permutation from one generator, which a resumed run starts at the first epoch.
    """

    args: Any
    _sampler: Any = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        add_callback_once(self, _EpochBegins(self))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        return self._sampler

    def _begin_epoch(self, epoch: int) -> None:
        """Put the sampler where an uninterrupted run has it at the start of this epoch (0 is the first)."""
        generator = getattr(self._sampler, "generator", None)
        if generator is None:  # not shuffled, or streamed
            return
        generator.manual_seed(self.args.seed)
        for _ in range(epoch):
            torch.randperm(self._sampler.num_samples, generator=generator)


class _EpochBegins(TrainerCallback):
    """Called before an epoch's batches are drawn."""

    def __init__(self, trainer: ExactOrder) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._begin_epoch(int(state.epoch or 0))
