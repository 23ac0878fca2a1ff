"""Out of memory in a micro-batch: the same update from smaller pieces, instead of a lost night."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from typing import Any

import torch

from mel_lite.packing import Row

logger = logging.getLogger(__name__)


class SplitsMicroBatches:
    """Mixin over a TRL trainer: a micro-batch that does not fit is done again in twice as many pieces.

    The pieces are blocks of rows of one forward, whose activations are computed again in the backward pass, so loss
    and gradient are those of the whole up to rounding; no group is split and nothing is sampled anew. Once needed, the
    pieces stay. For adapters on one process: keeping a copy of all gradients of a model would cost more than it gives,
    and several processes would have to run out of memory together.
    """

    accelerator: Any
    model: Any
    _micro_batches: list[dict[str, Any]] | None
    _trained: list[Any]
    _pieces: int = 1
    """Blocks the rows of one forward are dealt to, at least."""
    _prepared: Any = None
    """Inputs of the micro-batch under way, kept for the case that it is done again."""
    _again: bool = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.accelerator.num_processes > 1 or not hasattr(self.model, "peft_config"):
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        grads = [None if p.grad is None else p.grad.clone() for p in weights]
        seen, trained = len(self._micro_batches or ()), len(self._trained)
        try:
            while True:
                try:
                    return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
                except torch.OutOfMemoryError:
                    if not self._can_split():
                        raise
                # Outside of the handler, where the error no longer holds on to the tensors of its frames.
                for weight, grad in zip(weights, grads, strict=True):
                    weight.grad = None if grad is None else grad.clone()
                if self._micro_batches is not None:
                    del self._micro_batches[seen:]
                del self._trained[trained:]
                self._split()
        finally:
            self._prepared, self._again = None, False

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self._again:
            self._prepared = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        return self._prepared

    def _can_split(self) -> bool:
        """Whether sampling is over and a block has more than one row."""
        return self._prepared is not None and self._pieces < 2 * len(self._prepared["completion_ids"])

    def _split(self) -> None:
        self._again = True
        self._pieces *= 2
        self._meter.drain(lambda tensor: tensor)  # type: ignore[attr-defined]
        gc.collect()
        torch.cuda.empty_cache()
        logger.warning(
            "Out of memory in a micro-batch: it is done again in %s pieces, and so are the next ones. Slower, the same "
            "update. Lower per_device_train_batch_size, and raise gradient_accumulation_steps as much, to avoid it.",
            self._pieces,
        )

    def _block_tokens(self, rows: Sequence[Row], batch_size: int | None) -> int | None:
        """Most tokens of one block: `batch_size` rows of the longest, or what the pieces leave; None = no limit."""
        longest = max(len(row.ids) for row in rows)
        limit = None if batch_size is None else batch_size * longest
        if self._pieces == 1:
            return limit
        share = max(longest, sum(len(row.ids) for row in rows) // self._pieces)
        return share if limit is None else min(limit, share)
