"""Run the trainer's own work around each optimizer step. T tokens of one lesson."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from mel_lite.training.assemble import check_rows
from mel_lite.training.metrics import peak_metrics

logger = logging.getLogger(__name__)


def tokens_are_spent(trainer: Any, step: int) -> bool:
    """Return True on every rank once all ranks together have generated `max_generated_tokens`.

    Not before the last update on the newest batch, whose tokens paid for all of them.
    """
    budget = trainer.args.max_generated_tokens
    if budget is None or step % trainer.args.steps_per_batch:
        return False
    return sum(gather_object([trainer.engine.total_generated_tokens])) >= budget


class AroundTheUpdate(TrainerCallback):
    """Calls the trainer's parts around each optimizer step, in this order."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._skips = False
        """The update of this step is skipped."""
        self._save_is_due = False
        """A checkpoint waits for the last update on its batch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.nonfinite.reset()
        if self._trainer.engine_probe is not None:
            self._trainer.engine_probe.reset()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate reaches the sampler by itself, but not on several ranks that resume within an epoch.
        if self._trainer.train_sampler is not None:  # streamed data has none
            self._trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._skips = self._trainer.nonfinite.before_update()
        if self._skips:
            # The update is skipped, and with it what would be logged about it.
            self._trainer.trained_lessons.clear()
            self._trainer.gradient_meter.drain(lambda tensor: tensor)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._log_update()
        if self._trainer.in_flight is not None and not self._skips:
            self._trainer.in_flight.version += 1
        self._trainer.record_boundary()
        self._trainer.collapse.after_update()
        if tokens_are_spent(self._trainer, state.global_step):
            control.should_training_stop = control.should_log = True
            control.should_save = args.save_strategy != "no"
        # A checkpoint holds no rollouts. Between two updates on a batch, a resumed run would need them.
        self._save_is_due |= control.should_save
        ends = control.should_training_stop or state.global_step >= state.max_steps
        control.should_save = self._save_is_due and (ends or state.global_step % args.steps_per_batch == 0)
        self._save_is_due &= not control.should_save

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 < state.max_steps and not hasattr(self._trainer.train_dataset, "__len__"):
            check_rows(args, None)
        if self._trainer.in_flight is not None and (left := len(self._trainer.in_flight.waiting)):
            logger.info(
                "Training ended with %s lessons in flight. They are dropped; a run that is continued completes them.",
                left,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self._trainer.collapse.on_log(logs or {})

    def _log_update(self) -> None:
        """Log the gradient norms, and the NLL of the step's lessons before and after the update."""
        trainer = self._trainer
        trainer.add_metrics(trainer.gradient_meter.drain(lambda t: trainer.accelerator.reduce(t, "mean")))
        trained, trainer.trained_lessons = trainer.trained_lessons, []
        rescoring = trainer.clock("rescore") if trained else nullcontext()
        with rescoring, trainer.sharding.whole(wanted=bool(trained)):
            after = trainer.scorer([lesson for lesson, _ in trained])
        overhead = trainer.clock.overhead() if trainer.args.with_meta_experience else {}
        trainer.add_metrics(trainer.clock.drain() | overhead | peak_metrics())
        rows = gather_object(
            [
                (lesson.experience_id, before.item(), -logp_T.mean().item(), len(lesson.target_ids))
                for (lesson, before), logp_T in zip(trained, after, strict=True)
            ]
        )
        if not rows:
            return
        ids, before_nats, after_nats, tokens = (list(column) for column in zip(*rows, strict=True))
        if trainer.is_world_process_zero():
            trainer.store.set_nll(ids, before=before_nats, after=after_nats)
            trainer.store.set_trained(ids, tokens)
        trainer.add_metrics({"mel/nll": sum(before_nats) / len(ids), "mel/nll_after": sum(after_nats) / len(ids)})
