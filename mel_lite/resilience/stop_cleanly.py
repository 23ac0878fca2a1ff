"""Stopping in the middle of a step without losing the steps before it.

Weights change only at the end of a step. What else changes on the way (random numbers, counters, rows of the store) is
noted at each boundary between two steps; when a signal asks to stop, it is taken back to that boundary and saved there.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from mel_lite import signals
from mel_lite.errors import EngineError
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.state_files import rng_state, set_rng_state
from mel_lite.training.assemble import add_callback_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Boundary:
    """Everything of a run that a step changes before its update."""

    step: int
    micro_step: int
    generated_tokens: int
    seen_tokens: int
    funnel_totals: Counter[str]
    last_experience_id: int | None
    rng: dict[str, Any]


class Interruptible:
    """Mixin over a TRL trainer with atomic checkpoints: a signal or a dead engine commits one, then ends `train`.

    `train` raises KeyboardInterrupt for SIGINT and SystemExit(143) for SIGTERM. A resumed run redoes the step that was
    cut short. Several processes stop together, at the next micro-batch.
    """

    args: Any
    accelerator: Any
    state: Any
    _step: int
    _engine: Any
    _store: Any
    funnel_totals: Counter[str]
    _boundary: _Boundary | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._boundary = None
        add_callback_once(self, _AfterUpdate(self))
        with signals.deferred(alone=self.accelerator.num_processes == 1):
            try:
                result = super().train(*args, **kwargs)  # type: ignore[misc]
                self._stop_together()  # a signal of the last moment ends the program, too
                return result
            except signals.Interrupted as interruption:
                raise interruption.as_exit(self._commit_boundary()) from None
            except EngineError as error:
                if self.accelerator.num_processes > 1:  # the others wait elsewhere
                    raise
                raise EngineError(f"{error} {self._commit_if_possible()}") from error

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._stop_together()
        # Weights change after this call, but under DeepSpeed, which updates in the backward pass.
        with nullcontext() if self.is_deepspeed_enabled else _polls_in_layers(self.model):  # type: ignore[attr-defined]
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        signals.poll()
        return loss

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self._stop_together()  # every process is here, with its rollouts sampled
        return super()._calculate_rewards(*args)  # type: ignore[misc]

    def _stop_together(self) -> None:
        """Raise Interrupted on every process when one of them got a signal."""
        if self.accelerator.num_processes == 1:
            signals.poll()
            return
        mine = torch.tensor(float(signals.pending() or 0), device=self.accelerator.device)
        signum = int(self.accelerator.gather(mine).max().item())
        if signum:
            raise signals.Interrupted(signum)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        self._note_boundary()  # again: an evaluation may have drawn random numbers
        signals.poll()

    def _note_boundary(self) -> None:
        self._boundary = _Boundary(
            step=self.state.global_step,
            micro_step=self._step,
            generated_tokens=self._engine.total_generated_tokens,
            seen_tokens=self.state.num_input_tokens_seen,
            funnel_totals=self.funnel_totals.copy(),
            last_experience_id=None if self._store is None else self._store.last_id(),
            rng=rng_state(all_gpus=self.args.world_size > 1),
        )

    def _commit_if_possible(self) -> str:
        """As `_commit_boundary`, but a device that is dead for copies, too, is told and not raised."""
        try:
            return self._commit_boundary()
        except RuntimeError as error:
            saved = checkpoint_files.committed(Path(self.args.output_dir))
            newest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
            return f"Stopped. The last steps could not be saved ({str(error).splitlines()[0]}); {newest}."

    def _commit_boundary(self) -> str:
        """Take the run back to the last boundary and save it there; returns what was done, for the user."""
        start_s = time.monotonic()
        boundary, run_dir = self._boundary, Path(self.args.output_dir)
        if boundary is None or boundary.step == 0:
            return "Stopped. No step was finished since the start, so there is nothing new to save."
        goes_on = "go on with --resume (train(resume_from_checkpoint=True))"
        if any(path.name == f"checkpoint-{boundary.step}" for path in checkpoint_files.committed(run_dir)):
            return f"Stopped. checkpoint-{boundary.step} had been saved; {goes_on}."
        self._step = boundary.micro_step
        self._engine.total_generated_tokens = boundary.generated_tokens
        self.state.num_input_tokens_seen = boundary.seen_tokens
        self.funnel_totals = boundary.funnel_totals.copy()
        if self.accelerator.is_main_process and boundary.last_experience_id is not None:
            self._store.truncate_after(boundary.last_experience_id)
        set_rng_state(boundary.rng)
        self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        message = f"Stopped. Saved checkpoint-{boundary.step} in {time.monotonic() - start_s:.1f} s; {goes_on}."
        if self.accelerator.is_main_process:
            logger.warning("%s", message)
        return message


@contextmanager
def _polls_in_layers(model: Any) -> Iterator[None]:
    """While open, a signal is heard at every decoder layer, forward and backward: micro-batches may take minutes."""

    def heard(grad: torch.Tensor) -> None:
        signals.poll()

    def before(layer: Any, args: Any) -> None:
        signals.poll()

    def after(layer: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(hidden) and hidden.requires_grad:
            hidden.register_hook(heard)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _AfterUpdate(TrainerCallback):
    """Notes the boundary as soon as the weights are those of a new step."""

    def __init__(self, trainer: Interruptible) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._note_boundary()
