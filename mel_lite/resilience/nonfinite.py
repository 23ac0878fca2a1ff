"""Keep non-finite updates away from the weights.

One NaN or Inf in a log-prob, a loss or a gradient makes every weight NaN in one optimizer step. Each step is therefore
checked between backward and update. A bad step is skipped as a whole: weights, moments and learning rate stay as they
are, its batch is written to `bad_steps/`, and the third in a row stops the run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mel_lite.errors import DivergedError
from mel_lite.lessons.internalise import LessonShare
from mel_lite.resilience import checkpoint_files

logger = logging.getLogger(__name__)

IN_A_ROW = 3
"""Consecutive skipped steps that stop the run."""
MAX_DUMPS = 20
"""Bad steps written per run folder; each is as large as its batch."""
BAD_STEPS = "bad_steps"


class NonFiniteGuard:
    """Skip the optimizer steps whose loss or gradient is not finite; every rank takes the same decision.

    Under float16 the scaler already skips overflows while it searches for a scale, so only a non-finite loss counts.
    DeepSpeed updates inside the backward, where nothing can be skipped: a bad loss stops the run at once,
    before the next checkpoint.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.skipped_steps = 0
        """Optimizer steps skipped by this process."""
        self._skipped_in_row = 0
        self._batches: list[Any] = []
        """Micro-batches of the current step, by reference."""
        self._losses: list[torch.Tensor] = []

    def reset(self) -> None:
        """Forget a step that was cut short, at the beginning of `train`."""
        self._batches, self._losses = [], []

    def saw_batch(self, batch: Any) -> None:
        """Record a micro-batch of the current step."""
        self._batches.append(batch)

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Record the loss () of a micro-batch of the current step."""
        self._losses.append(loss)

    def before_update(self) -> bool:
        """Check the step, skip it if it is bad, and return whether it was.

        Raises: DivergedError after IN_A_ROW bad steps in a row.
        """
        trainer = self._trainer
        losses, batches = torch.stack(self._losses).float(), self._batches
        self.reset()
        norm = self._gradient_norm()
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        is_bad = ~losses.isfinite().all() | (~norm.isfinite() & (not scaled))
        # Only one rank may have the NaN; the sum reaches all of them.
        skip = bool(trainer.accelerator.reduce(is_bad.float(), "sum").item() > 0)
        if not scaled:
            # The flag of a float16 overflow: it makes the Trainer leave the learning rate alone, too.
            trainer.optimizer._is_overflow = skip
        if not skip:
            self._skipped_in_row = 0
            return False
        self.skipped_steps += 1
        self._skipped_in_row += 1
        if not scaled:  # a gradient scaler skips the update by itself, and needs to see why
            for parameter in trainer.model.parameters():
                parameter.grad = None  # optimizers skip weights without gradient, with their moments and decay
        elif norm.isfinite():  # a loss that is not finite on another rank
            self._spoil_gradients()
        trainer.add_metrics({"mel/skipped": self.skipped_steps})
        where = self._dump(batches, losses.tolist(), float(norm)) if self._has_bad_batch(losses) else None
        what = f"loss {', '.join(f'{loss:g}' for loss in losses.tolist())}, gradient norm {float(norm):g}"
        if self._skipped_in_row >= IN_A_ROW or trainer.is_deepspeed_enabled:
            raise DivergedError(self._stop_message(what))
        logger.warning(
            "Step %s was skipped: %s. Weights, optimizer and learning rate are unchanged. %s",
            trainer.state.global_step + 1, what, f"Its batch is in {where}." if where else "",
        )  # fmt: skip
        return True

    def _has_bad_batch(self, losses: torch.Tensor) -> bool:
        """Return True when this rank has the batch to inspect: its loss is bad, or no loss is and it is rank 0."""
        accelerator = self._trainer.accelerator
        local = ~losses.isfinite().all()
        if accelerator.reduce(local.float(), "sum").item() > 0:
            return bool(local)
        return bool(accelerator.is_main_process)

    def _spoil_gradients(self) -> None:
        """Make the gradient scaler skip this update on this rank, as on the one whose loss was bad."""
        first = next(p for p in self._trainer.model.parameters() if p.grad is not None)
        first.grad.fill_(torch.inf)

    def _gradient_norm(self) -> torch.Tensor:
        """Return the L2 norm of the whole gradient, () float32; NaN or Inf when one element is."""
        grads = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return norm.float().to(self._trainer.accelerator.device)

    def _dump(self, batches: list[Any], losses: list[float], norm: float) -> Path | None:
        """Write a bad step's micro-batches; return None when there are enough, or they cannot be written."""
        trainer = self._trainer
        rank = trainer.accelerator.process_index
        folder = Path(trainer.args.output_dir) / BAD_STEPS / f"step-{trainer.state.global_step + 1}"
        if trainer.accelerator.num_processes > 1:
            folder = folder.with_name(f"{folder.name}-process-{rank}")
        if folder.parent.is_dir() and len(list(folder.parent.iterdir())) >= MAX_DUMPS:
            return None
        tensors = {
            f"{i}.{name}": value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for i, batch in enumerate(batches)
            for name, value in batch.items()
            if torch.is_tensor(value)
        }
        shares = [batch.get("lessons", LessonShare()) for batch in batches]
        record = {
            "step": trainer.state.global_step + 1,
            "losses": [repr(loss) for loss in losses],
            "gradient_norm": repr(norm),
            "not_finite": sorted(name for name, value in tensors.items() if not value.isfinite().all()),
            "lessons": [[lesson.experience_id for lesson in share.lessons] for share in shares],
            "process": rank,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / "batch.safetensors")
            (folder / "batch.json").write_text(json.dumps(record, indent=1) + "\n")
        except Exception as error:  # a failed dump must not stop the run
            logger.warning("The batch of the skipped step could not be written to %s: %s", folder, error)
            return None
        return folder

    def _stop_message(self, what: str) -> str:
        trainer = self._trainer
        run_dir = Path(trainer.args.output_dir)
        whole = [path for path in checkpoint_files.committed(run_dir) if checkpoint_files.problem(path) is None]
        last = f"The last good checkpoint is {whole[-1]}" if whole else "No checkpoint had been saved yet"
        in_row = f"{self._skipped_in_row} steps in a row were" if self._skipped_in_row > 1 else "A step was"
        return (
            f"{in_row} not finite at step {trainer.state.global_step + 1} ({what}). {last}. The batches are in "
            f"{run_dir / BAD_STEPS}. Continue from that checkpoint in a new run (--adapter CHECKPOINT --output-dir "
            "NEW) with a lower learning_rate or max_grad_norm; under float16, use bf16 if the GPU supports it."
        )
