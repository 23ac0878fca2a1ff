"""Run the trainer's own work around each optimizer step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from mel_lite.training.assemble import check_rows


class AroundTheUpdate(TrainerCallback):
    """Calls the trainer's parts around each optimizer step, in this order."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.nonfinite.reset()
        if self._trainer.engine_probe is not None:
            self._trainer.engine_probe.reset()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate reaches the sampler by itself, but not on several ranks that resume within an epoch.
        if self._trainer.train_sampler is not None:  # streamed data has none
            self._trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.nonfinite.before_update():
            self._trainer.forget_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.after_update()
        self._trainer.record_boundary()
        self._trainer.collapse.after_update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 < state.max_steps and not hasattr(self._trainer.train_dataset, "__len__"):
            check_rows(args, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self._trainer.collapse.on_log(logs or {})
