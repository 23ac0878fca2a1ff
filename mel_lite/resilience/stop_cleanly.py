"""Stop in the middle of a step without losing the steps before it.

Weights change only at the end of a step. Everything else that a step changes (random numbers, counters, rows of the
store) is recorded at each boundary between two steps. When a signal asks to stop, the run is rolled back to that
boundary and saved there.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from mel_lite import signals
from mel_lite.errors import EngineError
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.state_files import rng_state, set_rng_state
from mel_lite.text import first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Boundary:
    """Run state a step changes before the update, except weights and optimizer."""

    step: int
    micro_step: int
    seen_tokens: int
    parts: tuple[dict[str, Any], ...]
    """`state_dict` of each of the trainer's stateful parts."""
    last_experience_id: int | None
    rng: dict[str, Any]


class CleanStop:
    """Mixin over a TRL trainer with atomic checkpoints: a signal or a dead engine saves one, then ends `train`.

    `train` raises KeyboardInterrupt for SIGINT and SystemExit(143) for SIGTERM. A resumed run repeats the step that was
    cut short. All ranks stop together, at the next micro-batch.
    """

    args: Any
    accelerator: Any
    model: Any
    state: Any
    stateful: tuple[Any, ...]
    """Parts of the run with `state_dict()` and `load_state_dict(state)`."""
    _step: int
    _boundary: Boundary | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._boundary = None
        with signals.deferred(alone=self.accelerator.num_processes == 1):
            try:
                result = super().train(*args, **kwargs)  # type: ignore[misc]
                self.stop_together()  # a signal during the last step ends the program, too
                return result
            except signals.Interrupted as interruption:
                raise interruption.as_exit(self._commit_boundary()) from None
            except EngineError as error:
                if self.accelerator.num_processes > 1:  # the other ranks wait in a collective
                    raise
                raise EngineError(f"{error} {self._commit_if_possible()}") from error

    def stop_together(self) -> None:
        """Raise Interrupted on every rank when one of them received a signal."""
        if self.accelerator.num_processes == 1:
            signals.poll()
            return
        local = torch.tensor(float(signals.pending() or 0), device=self.accelerator.device)
        signum = int(self.accelerator.gather(local).max().item())
        if signum:
            raise signals.Interrupted(signum)

    @contextmanager
    def polling_in_layers(self) -> Iterator[None]:
        """While open, check for a signal at every decoder layer; not under DeepSpeed, whose backward also updates."""
        with nullcontext() if self.is_deepspeed_enabled else _polls_in_layers(self.model):  # type: ignore[attr-defined]
            yield

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        self.record_boundary()  # again: an evaluation may have drawn random numbers
        signals.poll()

    def record_boundary(self) -> None:
        """Record the state between two steps. Called once the weights are those of a new step."""
        self._boundary = Boundary(
            step=self.state.global_step,
            micro_step=self._step,
            seen_tokens=self.state.num_input_tokens_seen,
            parts=tuple(copy.deepcopy(part.state_dict()) for part in self.stateful),
            last_experience_id=self.last_experience_id,  # type: ignore[attr-defined]
            rng=rng_state(all_gpus=self.args.world_size > 1),
        )

    def _commit_if_possible(self) -> str:
        """Like `_commit_boundary`, but if the device is too broken even to copy tensors, return a message instead."""
        try:
            return self._commit_boundary()
        except RuntimeError as error:
            saved = checkpoint_files.committed(Path(self.args.output_dir))
            newest = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
            return f"Stopped. The last steps could not be saved ({first_line(error)}); {newest}."

    def _commit_boundary(self) -> str:
        """Roll back to the last boundary and save it there; return a message for the user."""
        start_s = time.monotonic()
        boundary, run_dir = self._boundary, Path(self.args.output_dir)
        if boundary is None or boundary.step == 0:
            return "Stopped. No step was finished since the start, so there is nothing new to save."
        resume = "resume with --resume (train(resume_from_checkpoint=True))"
        if any(path.name == f"checkpoint-{boundary.step}" for path in checkpoint_files.committed(run_dir)):
            return f"Stopped. checkpoint-{boundary.step} had been saved; {resume}."
        self._step = boundary.micro_step
        self.state.num_input_tokens_seen = boundary.seen_tokens
        for part, state in zip(self.stateful, boundary.parts, strict=True):
            part.load_state_dict(state)
        if self.accelerator.is_main_process and boundary.last_experience_id is not None:
            self.store.truncate_after(boundary.last_experience_id, steps=boundary.step)  # type: ignore[attr-defined]
        set_rng_state(boundary.rng)
        self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        message = f"Stopped. Saved checkpoint-{boundary.step} in {time.monotonic() - start_s:.1f} s; {resume}."
        if left := -boundary.step % self.args.steps_per_batch:
            message += f" Its batch had {left:g} more updates to come: a new batch takes their place."
        if self.accelerator.is_main_process:
            logger.warning("%s", message)
        return message


@contextmanager
def _polls_in_layers(model: Any) -> Iterator[None]:
    """Poll for signals in the forward and backward of every decoder layer: a micro-batch may take minutes."""

    def on_gradient(grad: torch.Tensor) -> None:
        signals.poll()

    def before(layer: Any, args: Any) -> None:
        signals.poll()

    def after(layer: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(hidden) and hidden.requires_grad:
            hidden.register_hook(on_gradient)

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
