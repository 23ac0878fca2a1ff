"""Memory bounded by tokens: a micro-batch goes forward and backward in parts, and its gradient is that of the whole.

The loss is taken over all rows of the micro-batch each time, but only the rows of one part carry a gradient; the others
stand in with the numbers they have. So every normaliser of every loss type is that of the whole, nothing has to be
undone afterwards, and the last part's loss and metrics are the micro-batch's own.

B rollouts of a micro-batch, C padded completion width.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mel_lite import signals
from mel_lite.training.packing import Row, deal, pack, pad_rows, rows_of_batch
from mel_lite.training.scoring import score
from mel_lite.types import Lesson

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _MicroBatch:
    """Rows under way, rollouts first, then lessons."""

    rows: list[Row]
    logps: list[torch.Tensor]
    """Per row (scored_tokens,): its log-probs without gradient once it was scored, a stand-in before."""
    entropies: list[torch.Tensor]
    part: list[int]
    """Numbers of the rows that carry a gradient now."""

    def merged(self, logps: list[torch.Tensor], entropies: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
        """Values of all rows, those of this part with their graph; the part's numbers are kept for later ones."""
        whole = []
        for kept, new in ((self.logps, logps), (self.entropies, entropies)):
            values = list(kept)
            for i, value in zip(self.part, new, strict=True):
                values[i] = value
                kept[i] = value.detach()
            whole.append(values)
        return whole[0], whole[1]


class _Alone:
    """An accelerator that asks no other process: the metrics of a part, which are dropped, are not worth a meeting,
    and processes may have unlike many parts.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        return tensor

    def gather_for_metrics(self, tensor: Any) -> Any:
        return tensor

    def reduce(self, tensor: Any, reduction: str = "sum") -> Any:
        return tensor


class TokenBudget:
    """Mixin over a TRL trainer: no more than `max_micro_batch_tokens` go through the model with a gradient at once.

    Out of memory, a part is done again with half of the tokens, and so are the next ones; nothing is sampled anew. That
    is for adapters on one process: a copy of all gradients of a model is too much to keep, and several processes would
    have to run out of memory together. Under DDP gradients are averaged in the last part's backward pass. DeepSpeed and
    FSDP want one backward pass per micro-batch, and get it.

    A loss that depends on all rows at once (`_is_joint`) is taken in one part, whose blocks are computed again one by
    one in the backward pass.
    """

    accelerator: Any
    args: Any
    model: Any
    _tokenizer: Any
    _meter: Any
    _metrics: dict[str, Any]
    _micro_batches: list[dict[str, Any]] | None
    _trained: list[Any]
    _riding: tuple[Lesson, ...]
    _ridden_logps: list[torch.Tensor]
    _policy_temperature: float
    _under_way: _MicroBatch | None = None
    _lowered_tokens: int | None = None
    """What running out of memory has taught."""

    # ---- one loss, several backward passes ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As TRL's. In training, the gradients are there when it returns, and what it returns has none of its own."""
        splits = self.budget_tokens is not None or self._can_retry or self.args.skip_zero_advantage
        if return_outputs or not self.model.training or not splits or self.aux_loss_enabled or self._is_vlm:  # type: ignore[attr-defined]
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        noted = len(self._micro_batches or ()), len(self._trained)
        self._under_way = now = self._begin(inputs)
        wanted = self._wanted(inputs, now.rows)
        parts = self._parts(now.rows, wanted)
        try:
            while True:
                loss = self._try_part(model, inputs, parts, noted)
                if loss is None:
                    left = [i for part in parts for i in part]
                    parts = self._parts(now.rows, left)
                    continue
                del parts[0]
                if not parts:
                    if self.args.skip_zero_advantage:
                        self._log_forwarded(model, inputs, wanted)
                    # The Trainer calls backward on it: a leaf, so that this adds nothing.
                    return loss.detach().requires_grad_()
                signals.poll()
        finally:
            self._under_way = None

    def _begin(self, inputs: Any) -> _MicroBatch:
        ids_BP = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BP = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask_BC = inputs["completion_mask"].bool()
        rows = self._rows(ids_BP, mask_BP, mask_BC.shape[1], inputs.get("lessons", ()))
        zeros = [torch.zeros(row.scored_tokens, device=row.ids.device) for row in rows]
        logps = list(zeros)
        if (old_BC := inputs.get("old_per_token_logps")) is not None:
            # A ratio of 1 where the real one is not known yet: no overflow, wherever the loss takes its exponential.
            logps[: len(mask_BC)] = old_BC[mask_BC].float().split(mask_BC.sum(dim=1).tolist())
        return _MicroBatch(rows, logps, zeros, [])

    def _wanted(self, inputs: Any, rows: Sequence[Row]) -> list[int]:
        """Numbers of the rows that are to go through the model: all, or those with a gradient, one at least."""
        if not self.args.skip_zero_advantage:
            return list(range(len(rows)))
        moves = inputs["advantages"].reshape(len(inputs["advantages"]), -1).ne(0).any(dim=1).tolist()
        wanted = [i for i in range(len(rows)) if i >= len(moves) or moves[i]]
        return wanted or [min(range(len(rows)), key=lambda i: len(rows[i].ids))]

    def _log_forwarded(self, model: Any, inputs: Any, wanted: Sequence[int]) -> None:
        """Metrics over the rollouts that went through the model: the loss once more on the numbers there are.

        Metrics of whole sequences still count the others, at a ratio of 1: every process hands in as many rows.
        """
        assert self._under_way is not None
        now, mask_BC = self._under_way, inputs["completion_mask"].clone()
        left_out = sorted(set(range(len(mask_BC))) - set(wanted))
        mask_BC[left_out] = 0
        if not self.accelerator.reduce(mask_BC.sum(), reduction="sum").item():
            return  # lessons alone
        now.part = []
        for i in left_out:
            now.logps[i] = now.entropies[i] = now.logps[i][:0]
        noted = len(self._micro_batches or ()), len(self._trained)
        metrics, self._metrics = self._metrics, {mode: defaultdict(list) for mode in ("train", "eval")}
        try:
            with torch.no_grad():
                self._compute_loss(model, {**inputs, "completion_mask": mask_BC})  # type: ignore[attr-defined]
            for name, values in self._metrics["train"].items():
                if "loss" not in name:
                    metrics["train"][name] += values
        finally:
            self._metrics = metrics
            self._undo(noted)

    def _undo(self, noted: tuple[int, int]) -> None:
        """Forget what a pass noted beside its loss."""
        del self._trained[noted[1] :]
        if self._micro_batches is not None:
            del self._micro_batches[noted[0] :]

    def _parts(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[list[int]]:
        if self._is_joint:
            return [list(numbers)]
        return [[numbers[i] for i in part] for part in deal([rows[i] for i in numbers], self.budget_tokens)]

    def _try_part(self, model: Any, inputs: Any, parts: list[list[int]], noted: tuple[int, int]) -> Any:
        """Forward and backward of the first part; its loss, or None when it is to be done again with fewer tokens."""
        assert self._under_way is not None
        self._under_way.part = parts[0]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        # In the host's memory, where there is room; None before the first backward pass of a step.
        grads = [None if p.grad is None else p.grad.to("cpu", copy=True) for p in weights if self._can_retry]
        # What the loss notes beside its value holds for the micro-batch only when the last part has gone through.
        metrics, self._metrics = self._metrics, {mode: defaultdict(list) for mode in ("train", "eval")}
        self._undo(noted)
        try:
            loss = self._backward(model, inputs, is_last=len(parts) == 1)
            if len(parts) == 1:
                for name, values in self._metrics["train"].items():
                    if "loss" in name or not self.args.skip_zero_advantage:
                        metrics["train"][name] += values
            return loss
        except torch.OutOfMemoryError:
            if not self._can_retry or not self._lower(self._under_way.rows, parts[0]):
                raise
        finally:
            self._metrics = metrics
        # Outside of the handler, where the error no longer holds on to the tensors of its frames.
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = None if grad is None else grad.to(weight.device)
        self._meter.give_up()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def _backward(self, model: Any, inputs: Any, *, is_last: bool) -> torch.Tensor:
        together = self.accelerator
        with nullcontext() if is_last else together.no_sync(model):
            # With rows left out, the metrics are taken afterwards.
            self.accelerator = together if is_last and not self.args.skip_zero_advantage else _Alone(together)
            try:
                loss = self._compute_loss(model, inputs)  # type: ignore[attr-defined]
            finally:
                self.accelerator = together
            self.accelerator.backward(loss)
        return loss.detach()

    @property
    def budget_tokens(self) -> int | None:
        """Most tokens (padding included) of one part; None = no bound."""
        bounds = [tokens for tokens in (self.args.max_micro_batch_tokens, self._lowered_tokens) if tokens is not None]
        return min(bounds, default=None)

    def halve_budget(self, *, most: int, least: int) -> bool:
        """Take half as many tokens at once from now on, `most` being what an open budget amounts to.

        False when that would be fewer than `least`, the longest row.
        """
        before = self.budget_tokens or most
        after = max(before // 2, least)
        if after < before:
            self._lowered_tokens = after
        return after < before

    @property
    def _can_retry(self) -> bool:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # type: ignore[attr-defined]
        return self.accelerator.num_processes == 1 and hasattr(self.model, "peft_config") and not sharded

    @property
    def _is_joint(self) -> bool:
        """Whether the loss of a row depends on other rows (a quantile of entropies), or taking it counts something."""
        return self.top_entropy_quantile < 1.0 or self.use_adaptive_entropy  # type: ignore[attr-defined]

    def _lower(self, rows: Sequence[Row], part: Sequence[int]) -> bool:
        """Halve the tokens that go through at once; False when the part cannot be cut."""
        chosen = [rows[i] for i in part]
        areas = [block.input_ids_BT.numel() for block in self._packed(chosen).blocks]
        before = max(areas) if self._is_joint and self.budget_tokens else sum(areas)
        after = max(before // 2, max(len(row.ids) for row in chosen))
        if after >= before:
            return False
        self._lowered_tokens = after
        logger.warning(
            "Out of memory in a micro-batch of %s tokens: it is done again with at most %s at once, and so are the "
            "next ones. Slower, the same update. Set max_micro_batch_tokens=%s to begin with that.",
            before, after, after,
        )  # fmt: skip
        return True

    # ---- one forward ----

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probs and entropies (B, C) of the completions; lessons that ride along leave theirs on the trainer."""
        riding, self._riding = self._riding, ()
        if compute_aux_loss or any(v is not None for v in multimodal.values()):
            assert not riding, "lessons are text-only"
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **multimodal,
            )  # fmt: skip
        now = self._under_way
        rows = now.rows if now else self._rows(input_ids, attention_mask, logits_to_keep, riding)
        chosen = [rows[i] for i in now.part] if now else rows
        logps, entropies = self._score(model, chosen, batch_size) if chosen else ([], [])
        if now:
            logps, entropies = now.merged(logps, entropies)
        rollouts = len(input_ids)
        self._ridden_logps = logps[rollouts:]
        mask_BC = attention_mask[:, -logits_to_keep:]
        entropy_BC = pad_rows(entropies[:rollouts], mask_BC) if compute_entropy else None
        return pad_rows(logps[:rollouts], mask_BC), entropy_BC, None

    def _score(self, model: Any, rows: list[Row], batch_size: int | None) -> tuple[list[Any], list[Any]]:
        packed = self._packed(rows, batch_size)
        again = self._is_joint and self._under_way is not None and self.budget_tokens is not None
        with self.accelerator.autocast():
            entropy_grad = self._entropy_bonus_enabled and torch.is_grad_enabled()  # type: ignore[attr-defined]
            return score(model, packed, entropy_grad=entropy_grad, recompute=again and len(packed.blocks) > 1)

    def _packed(self, rows: Sequence[Row], batch_size: int | None = None) -> Any:
        """Blocks of `batch_size` rows of the longest at most, and within the budget."""
        longest = max(len(row.ids) for row in rows)
        bounds = [self.budget_tokens, None if batch_size is None else batch_size * longest]
        limit = min((tokens for tokens in bounds if tokens is not None), default=None)
        return pack(rows, pad_id=self._tokenizer.pad_token_id, max_tokens=limit)

    def _rows(
        self, ids_BP: torch.Tensor, mask_BP: torch.Tensor, completion_width: int, lessons: Sequence[Lesson]
    ) -> list[Row]:
        rows = rows_of_batch(ids_BP, mask_BP, completion_width, temperature=self._policy_temperature)
        return rows + [self._lesson_row(lesson) for lesson in lessons]

    def _lesson_row(self, lesson: Lesson) -> Row:
        ids = torch.tensor(lesson.context_ids + lesson.target_ids, device=self.accelerator.device)
        return Row(ids, len(lesson.target_ids))
