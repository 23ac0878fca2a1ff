"""An update that is not finite never reaches the weights.

One NaN or Inf in a log-prob, a loss or a gradient makes every weight NaN in one optimiser step. Each step is therefore
looked at between backward and update. A bad one is skipped whole: weights, moments and learning rate stay as they are,
its batch is written to `bad_steps/`, and the third in a row stops the run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from mel_lite.errors import DivergedError
from mel_lite.resilience import checkpoint_files
from mel_lite.training.assemble import add_callback_once

logger = logging.getLogger(__name__)

IN_A_ROW = 3
"""Skipped steps in a row that stop the run."""
MOST_DUMPS = 20
"""Bad steps written out in one run folder; each is as large as its batch."""
BAD_STEPS = "bad_steps"


class NonFiniteGuard:
    """Mixin over a TRL trainer: skips the optimiser steps whose loss or gradient is not finite.

    Every process takes the same decision. Under float16 the gradient scaler skips overflows by itself, as it must to
    find its scale; there only a loss that is not finite counts. DeepSpeed updates inside the backward pass, where
    nothing can be skipped: a bad loss stops the run at once, before the next checkpoint.
    """

    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    state: Any
    skipped_steps: int = 0
    """Optimiser steps skipped so far in this process's life."""
    _skipped_in_row: int = 0
    _micro_batches: list[dict[str, Any]] | None = None
    """Inputs and losses of the step under way; None outside of `train`."""
    _losses: list[torch.Tensor]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_batches, self._losses = [], []
        add_callback_once(self, _BeforeUpdate(self))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self._micro_batches is not None:
            self._losses.append(loss)
        return loss

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        if self._micro_batches is not None and self.model.training:
            self._micro_batches.append(inputs)  # references only, until the step is over
        return super()._compute_loss(model, inputs)  # type: ignore[misc]

    def _before_update(self) -> None:
        losses, self._losses = torch.stack(self._losses).float(), []
        batches, self._micro_batches = self._micro_batches or [], []
        norm = self._gradient_norm()
        scaled = getattr(self.accelerator, "scaler", None) is not None
        is_bad = ~losses.isfinite().all() | (~norm.isfinite() & (not scaled))
        # NaN may be on one process alone; a sum tells all of them.
        skip = bool(self.accelerator.reduce(is_bad.float(), "sum").item() > 0)
        if not scaled:
            # As after an overflow of float16: the Trainer then leaves the learning rate alone, too.
            self.optimizer._is_overflow = skip
        if not skip:
            self._skipped_in_row = 0
            return
        self.skipped_steps += 1
        self._skipped_in_row += 1
        if not scaled:  # a gradient scaler skips the update by itself, and wants to see why
            for parameter in self.model.parameters():
                parameter.grad = None  # optimisers leave a weight without gradient alone, with its moments and decay
        elif norm.isfinite():  # a loss that is not finite on another process
            self._spoil_gradients()
        self._forget_step()
        self._log_metrics({"mel/skipped": self.skipped_steps})  # type: ignore[attr-defined]
        where = self._dump(batches, losses.tolist(), float(norm)) if self._has_bad_batch(losses) else None
        what = f"loss {', '.join(f'{loss:g}' for loss in losses.tolist())}, gradient norm {float(norm):g}"
        if self._skipped_in_row >= IN_A_ROW or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise DivergedError(self._farewell(what))
        logger.warning(
            "Step %s was skipped: %s. Weights, optimiser and learning rate are as before it. %s",
            self.state.global_step + 1, what, f"Its batch is in {where}." if where else "",
        )  # fmt: skip

    def _has_bad_batch(self, losses: torch.Tensor) -> bool:
        """Whether this process has the batch to look at: its loss is bad, or nobody's is and it is the first."""
        mine = ~losses.isfinite().all()
        if self.accelerator.reduce(mine.float(), "sum").item() > 0:
            return bool(mine)
        return bool(self.accelerator.is_main_process)

    def _spoil_gradients(self) -> None:
        """Make the gradient scaler skip this update, on this process as on the one whose loss was bad."""
        first = next(p for p in self.model.parameters() if p.grad is not None)
        first.grad.fill_(torch.inf)

    def _gradient_norm(self) -> torch.Tensor:
        """L2 norm of the whole gradient, () float32; NaN or Inf when one element is."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return norm.float().to(self.accelerator.device)

    def _forget_step(self) -> None:
        """Drop what the step measured for after the update that does not happen."""
        self._trained: list[Any] = []
        self._meter.drain(lambda tensor: tensor)  # type: ignore[attr-defined]

    def _dump(self, batches: list[dict[str, Any]], losses: list[float], norm: float) -> Path | None:
        """Write a bad step's micro-batches; None when enough are there, or the disk does not take them."""
        folder = Path(self.args.output_dir) / BAD_STEPS / f"step-{self.state.global_step + 1}"
        if self.accelerator.num_processes > 1:
            folder = folder.with_name(f"{folder.name}-process-{self.accelerator.process_index}")
        if folder.parent.is_dir() and len(list(folder.parent.iterdir())) >= MOST_DUMPS:
            return None
        tensors = {
            f"{i}.{name}": value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for i, batch in enumerate(batches)
            for name, value in batch.items()
            if torch.is_tensor(value)
        }
        record = {
            "step": self.state.global_step + 1,
            "losses": [repr(loss) for loss in losses],
            "gradient_norm": repr(norm),
            "not_finite": sorted(name for name, value in tensors.items() if not value.isfinite().all()),
            "lessons": [[lesson.experience_id for lesson in batch.get("lessons", ())] for batch in batches],
            "process": self.accelerator.process_index,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "batch.safetensors")
            (folder / "batch.json").write_text(json.dumps(record, indent=1) + "\n")
        except Exception as error:  # a full disk, in whichever library's words: the run is worth more than the record
            logger.warning("The batch of the skipped step could not be written to %s: %s", folder, error)
            return None
        return folder

    def _farewell(self, what: str) -> str:
        run_dir = Path(self.args.output_dir)
        whole = [path for path in checkpoint_files.committed(run_dir) if checkpoint_files.problem(path) is None]
        last = f"The last good checkpoint is {whole[-1]}" if whole else "No checkpoint had been saved yet"
        in_row = f"{self._skipped_in_row} steps in a row were" if self._skipped_in_row > 1 else "A step was"
        return (
            f"{in_row} not finite at step {self.state.global_step + 1} ({what}). {last}. The batches are in "
            f"{run_dir / BAD_STEPS}. Go on from that checkpoint in a new run (--adapter CHECKPOINT --output-dir NEW) "
            "with a lower learning_rate or max_grad_norm; under float16, use bf16 where the GPU has it."
        )


class _BeforeUpdate(TrainerCallback):
    """Called by the Trainer after backward and clipping, before the update."""

    def __init__(self, guard: NonFiniteGuard) -> None:
        self._guard = guard

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._guard._before_update()
