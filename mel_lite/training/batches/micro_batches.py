"""Bound memory by tokens: a micro-batch goes forward and backward in parts, with the gradient of the whole.

Each part takes TRL's loss over all rows of the micro-batch, but only the rows of the part carry a gradient. The other
rows contribute their values. So every normalizer of every loss type is that of the whole micro-batch, and the last
part's loss and metrics are the micro-batch's own.

B rollouts of a micro-batch, C padded completion width, P padded prompt + completion width.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from mel_lite import signals
from mel_lite.engines.metered import PhaseClock
from mel_lite.lessons.internalise import Internalisation, LessonShare
from mel_lite.memory.host import return_freed_memory
from mel_lite.training.batches.forward import MicroBatchForward
from mel_lite.training.batches.packing import Row, deal, lesson_row, pack, pad_rows, rows_of_batch, with_teachers
from mel_lite.training.batches.shared_prompts import deal_shared, pack_shared
from mel_lite.training.metrics import GradientMeter
from mel_lite.training.savings import Savings
from mel_lite.training.scoring import RowScores, score
from mel_lite.training.sharding.weights import Sharding
from mel_lite.types import Lesson

logger = logging.getLogger(__name__)


class LocalAccelerator:
    """Accelerator proxy whose collectives are no-ops.

    Metrics of intermediate parts are discarded, and ranks may have different numbers of parts, so a real collective
    would deadlock.
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


class MicroBatches:
    """Mixin over a TRL trainer: at most `max_micro_batch_tokens` go through the model with a gradient at once.

    After running out of memory a part is repeated with half the tokens, and later parts keep that limit; nothing is
    sampled again. Retrying needs adapters and one process: a copy of all gradients of a full model is too large, and
    several ranks would have to run out of memory together. Under DDP gradients are averaged in the last part's
    backward. Under DeepSpeed and FSDP2 each block is a part, and all ranks have equally many: one that has fewer takes
    passes of a single row that scores nothing.

    A loss that depends on all rows at once (`_is_joint`) is taken in one part, whose blocks are recomputed one by one
    in the backward.
    """

    accelerator: Any
    args: Any
    model: Any
    internalisation: Internalisation
    clock: PhaseClock
    gradient_meter: GradientMeter
    savings: Savings
    trained_lessons: list[tuple[Lesson, torch.Tensor]]
    """Lessons of the current optimizer step and their NLL () before the update, without gradient."""
    policy_temperature: float
    _tokenizer: Any
    _metrics: dict[str, Any]
    _lowered_tokens: int | None = None
    """Limit learned from running out of memory."""

    # ---- one loss, several backward passes ----

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute TRL's loss. Taken in parts, the backward is already done and the result is a detached leaf.

        Under DeepSpeed the backward of the last part is left to the Trainer, since it also updates the weights.
        """
        if return_outputs or not self.scores_in_one_forward:
            with nullcontext() if self.model.training else self.sharding.whole():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        steps = self.args.gradient_accumulation_steps
        self.clock.expect(steps)
        self.clock.saw(self._step % steps)  # type: ignore[attr-defined]
        forward = self.forward_of(model, inputs)
        in_parts = self.budget_tokens is not None or self._can_retry or self.savings.skips_zero_advantage
        if in_parts or (self.sharding.in_lockstep and not self._is_joint):
            loss = self._in_parts(forward, inputs)
        else:
            loss = super().compute_loss(forward, inputs)  # type: ignore[misc]
        lessons = inputs.get("lessons", LessonShare()).lessons
        nlls = [-logp_T.detach().mean() for logp_T in forward.lesson_logps]
        self.trained_lessons += zip(lessons, nlls, strict=True)
        return loss

    @cached_property
    def sharding(self) -> Sharding:
        """How the weights are spread over processes."""
        return Sharding(self)

    @property
    def scores_in_one_forward(self) -> bool:
        """True when rollouts and lessons share one forward: training on text."""
        return bool(self.model.training and not self._is_vlm)  # type: ignore[attr-defined]

    def forward_of(self, model: Any, inputs: Any) -> MicroBatchForward:
        """Return the forward of a micro-batch, rollouts and lessons together, before any pass."""
        ids_BP = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask_BP = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask_BC = inputs["completion_mask"].bool()
        rows = rows_of_batch(ids_BP, mask_BP, mask_BC.shape[1], temperature=self.policy_temperature)
        if "teacher_mask" in inputs:
            rows = with_teachers(rows, inputs["teacher_mask"], inputs["teacher_hidden"])
        rows += [lesson_row(lesson, self.accelerator.device) for lesson in inputs.get("lessons", LessonShare()).lessons]
        logps = [torch.zeros(row.scored_tokens, device=row.ids.device) for row in rows]
        if (old_BC := inputs.get("old_per_token_logps")) is not None:
            # A ratio of 1 where the real one is not known yet, so that no loss overflows in its exponential.
            logps[: len(mask_BC)] = old_BC[mask_BC].float().split(mask_BC.sum(dim=1).tolist())
        return MicroBatchForward(model, rows, len(mask_BC), logps)

    def _in_parts(self, forward: MicroBatchForward, inputs: Any) -> torch.Tensor:
        wanted = self._wanted(inputs, forward.rows)
        # Ranks take the same number of collectives, also those that leave nothing out.
        several = self.savings.skips_zero_advantage and self.accelerator.num_processes > 1
        forward.leaves_out = several or len(wanted) < len(forward.rows)
        parts, done = self._parts(forward.rows, wanted), 0
        if self.sharding.in_lockstep:
            parts += [[] for _ in range(self.sharding.most(len(parts)) - len(parts))]
        while True:
            loss = self._try_part(forward, inputs, parts)
            if loss is None:
                parts = self._parts(forward.rows, [i for part in parts for i in part])
                continue
            del parts[0]
            done += 1
            if self.accelerator.device.type == "cpu":
                return_freed_memory()
            if self.args.gradient_accumulation_steps == 1:
                self.clock.expect(done + len(parts))
                self.clock.saw(done)
            if not parts:
                if forward.leaves_out:
                    self._log_forwarded(forward, inputs, wanted)
                # The Trainer calls backward on the result; a fresh leaf makes that a no-op.
                return loss if self.sharding.deepspeed else loss.detach().requires_grad_()
            signals.poll()

    def _wanted(self, inputs: Any, rows: Sequence[Row]) -> list[int]:
        """Return the numbers of the rows that need a forward: all, or those with a gradient, at least one."""
        if not self.savings.skips_zero_advantage or self.needs_every_rollout:
            return list(range(len(rows)))
        moves_B = inputs["advantages"].reshape(len(inputs["advantages"]), -1).ne(0).any(dim=1)
        if "teacher_mask" in inputs:
            moves_B |= inputs["teacher_mask"].any(dim=1)
        moves = moves_B.tolist()
        wanted = [i for i in range(len(rows)) if i >= len(moves) or moves[i]]
        return wanted or [min(range(len(rows)), key=lambda i: len(rows[i].ids))]

    @property
    def needs_every_rollout(self) -> bool:
        """True when rollouts without advantage need a forward, too."""
        return self.args.with_meta_experience and self.internalisation.needs_every_rollout

    def _log_forwarded(self, forward: MicroBatchForward, inputs: Any, wanted: Sequence[int]) -> None:
        """Log TRL's metrics over the rollouts that went through the model, from one more pass of the loss alone.

        Metrics of whole sequences still count the other rollouts, at a ratio of 1, so every rank reports equally many.
        """
        mask_BC = inputs["completion_mask"].clone()
        left_out = sorted(set(range(len(mask_BC))) - set(wanted))
        mask_BC[left_out] = 0
        if not self.accelerator.reduce(mask_BC.sum(), reduction="sum").item():
            return  # lessons only
        forward.part = []
        forward.blank(left_out)
        lesson_logps = forward.lesson_logps
        with self._separate_metrics() as (metrics, own), torch.no_grad():
            self._compute_loss(forward, {**inputs, "completion_mask": mask_BC})  # type: ignore[attr-defined]
            for name, values in own.items():
                if "loss" not in name:
                    metrics[name] += values
        forward.lesson_logps = lesson_logps

    @contextmanager
    def _separate_metrics(self) -> Iterator[tuple[Any, Any]]:
        """While open, TRL logs to other lists; yields the step's own training metrics and those lists."""
        metrics = self._metrics
        self._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
        try:
            yield metrics["train"], self._metrics["train"]
        finally:
            self._metrics = metrics

    def _parts(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[list[int]]:
        if self._is_joint:
            return [list(numbers)]
        split = deal_shared if self.savings.shares_prompts else partial(deal, one_block=self.sharding.in_lockstep)
        return [[numbers[i] for i in part] for part in split([rows[i] for i in numbers], self.budget_tokens)]

    def _try_part(self, forward: MicroBatchForward, inputs: Any, parts: list[list[int]]) -> torch.Tensor | None:
        """Run forward and backward of the first part; return its loss, or None when it must be cut smaller."""
        forward.part = parts[0]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        # Kept in host memory; None before the first backward of a step.
        grads = [None if p.grad is None else p.grad.to("cpu", copy=True) for p in weights if self._can_retry]
        is_last = len(parts) == 1
        try:
            with self._separate_metrics() as (metrics, own):
                loss = self._backward(forward, inputs, is_last=is_last)
                if is_last:  # only then does the loss hold for the whole micro-batch
                    for name, values in own.items():
                        if "loss" in name or not forward.leaves_out:
                            metrics[name] += values
            return loss
        except torch.OutOfMemoryError:
            if not self._can_retry or not self._lower(forward.rows, parts[0]):
                raise
        # Outside of the handler, where the error no longer holds on to the tensors of its frames.
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = None if grad is None else grad.to(weight.device)
        self.gradient_meter.give_up()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def _backward(self, forward: MicroBatchForward, inputs: Any, *, is_last: bool) -> torch.Tensor:
        accelerator, forward.idle = self.accelerator, None
        with self.sharding.part(forward.model, is_last=is_last):
            if not is_last or forward.leaves_out:  # with rows left out, metrics are taken afterwards
                self.accelerator = LocalAccelerator(accelerator)
            try:
                loss = self._compute_loss(forward, inputs)  # type: ignore[attr-defined]
            finally:
                self.accelerator = accelerator
            if forward.idle is not None:
                loss = loss + forward.idle
            if self.sharding.deepspeed:
                if is_last:
                    return loss
                self.accelerator.backward(loss, scale_wrt_gas=False)
            else:
                self.accelerator.backward(loss)
        return loss.detach()

    def tokens_per_micro_batch(self, inputs: Any) -> float:
        """Return the divisor of a sum over a micro-batch's tokens that averages the step over all tokens, like TRL."""
        trainer: Any = self
        tokens = float(inputs["num_items_in_batch"]) / self.accelerator.num_processes
        return max(1.0, tokens) * trainer.current_gradient_accumulation_steps / self.args.steps_per_generation

    @property
    def budget_tokens(self) -> int | None:
        """Most tokens (padding included) of one part; None = no bound."""
        bounds = [tokens for tokens in (self.args.max_micro_batch_tokens, self._lowered_tokens) if tokens is not None]
        return min(bounds, default=None)

    def halve_budget(self, *, most: int, least: int) -> bool:
        """Halve the tokens of a part from now on; `most` is the size of a part without a bound.

        Returns False when half would be fewer than `least`, the longest row.
        """
        before = self.budget_tokens or most
        after = max(before // 2, least)
        if after < before:
            self._lowered_tokens = after
        return after < before

    @property
    def _can_retry(self) -> bool:
        alone = self.accelerator.num_processes == 1 and not self.sharding.in_lockstep
        return alone and hasattr(self.model, "peft_config")

    @property
    def _is_joint(self) -> bool:
        """True when a row's loss depends on other rows (entropy quantile, load balance) or has side effects."""
        joint = self.top_entropy_quantile < 1.0 or self.aux_loss_enabled  # type: ignore[attr-defined]
        return joint or self.use_adaptive_entropy  # type: ignore[attr-defined]

    def _lower(self, rows: Sequence[Row], part: Sequence[int]) -> bool:
        """Halve the tokens of a part; return False when the part cannot be cut."""

        def areas(some: Sequence[Row]) -> list[int]:
            return [block.input_ids_BT.numel() for block in self._in_blocks(self.model, some).blocks]

        chosen = [rows[i] for i in part]
        before = max(areas(chosen)) if self._is_joint and self.budget_tokens else sum(areas(chosen))
        after = max(before // 2, max(sum(areas([row])) for row in chosen))
        if after >= before:
            return False
        self._lowered_tokens = after
        logger.warning(
            "Out of memory in a micro-batch of %s tokens. It is repeated with at most %s tokens at once, and later "
            "micro-batches keep that limit. The update is the same, but slower. Set max_micro_batch_tokens=%s to start "
            "with it.",
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
        """Return log-probs and entropies (B, C) of the completions, and the load-balancing loss () on request.

        A MicroBatchForward also scores its lessons, which do not count in the load-balancing loss.
        """
        if any(v is not None for v in multimodal.values()):
            assert not isinstance(model, MicroBatchForward), "lessons are text-only"
            return super()._get_per_token_logps_and_entropies(  # type: ignore[misc]
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss,
                **multimodal,
            )  # fmt: skip
        mask_BC = attention_mask[:, -logits_to_keep:]
        if isinstance(model, MicroBatchForward):
            scores = self._training_pass(model, compute_aux_loss)
            rollouts = slice(model.rollouts)
            model.logp_BC = pad_rows(scores.logps[rollouts], mask_BC)
            model.kl_BC = pad_rows((scores.kls or [])[rollouts], mask_BC) if model.has_teachers else None
            model.lesson_logps = tuple(scores.logps[model.rollouts :])
            entropy_BC = pad_rows(scores.entropies[rollouts], mask_BC) if compute_entropy else None
            return model.logp_BC, entropy_BC, scores.aux_loss
        rows = rows_of_batch(input_ids, attention_mask, logits_to_keep, temperature=self.policy_temperature)
        # Old log-probs and those of a reference; other phases, such as the engine's probe, count their own passes.
        timed = not torch.is_grad_enabled() and self.clock.phase == "update"
        with self.clock("scoring") if timed else nullcontext():
            scores = self._score(model, rows, batch_size, load_balancing=compute_aux_loss)
        entropy_BC = pad_rows(scores.entropies, mask_BC) if compute_entropy else None
        return pad_rows(scores.logps, mask_BC), entropy_BC, scores.aux_loss

    def _training_pass(self, forward: MicroBatchForward, load_balancing: bool) -> RowScores:
        """Score the rows of the current part; return the values of all rows."""
        chosen = [forward.rows[i] for i in forward.part]
        if not chosen:
            if self.sharding.in_lockstep and torch.is_grad_enabled():
                row = replace(min(forward.rows, key=lambda row: len(row.ids)), scored_tokens=0, teacher=None)
                forward.idle = self._score(forward.model, [row]).logps[0].sum()
            return forward.merged(RowScores([], []))
        recompute = self._is_joint and self.budget_tokens is not None
        return forward.merged(self._score(forward.model, chosen, recompute=recompute, load_balancing=load_balancing))

    def _score(
        self,
        model: Any,
        rows: Sequence[Row],
        batch_size: int | None = None,
        *,
        recompute: bool = False,
        load_balancing: bool = False,
    ) -> RowScores:
        packed = self._in_blocks(model, rows, batch_size)
        with self.accelerator.autocast():
            return score(
                model,
                packed,
                entropy_grad=self._entropy_bonus_enabled and torch.is_grad_enabled(),  # type: ignore[attr-defined]
                recompute=recompute and len(packed.blocks) > 1,
                load_balancing=load_balancing,
            )

    def _in_blocks(self, model: Any, rows: Sequence[Row], batch_size: int | None = None) -> Any:
        """Pack rows into blocks of at most `batch_size` rows of the longest row's length, within the budget."""
        longest = max(len(row.ids) for row in rows)
        bounds = [self.budget_tokens, None if batch_size is None else batch_size * longest]
        limit = min((tokens for tokens in bounds if tokens is not None), default=None)
        if self.savings.shares_prompts and model is not self.ref_model:  # type: ignore[attr-defined]
            return pack_shared(rows, max_tokens=limit)
        return pack(rows, pad_id=self._tokenizer.pad_token_id, max_tokens=limit)
