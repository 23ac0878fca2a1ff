"""Saving on a disk that is full: wait, try again, and stop with the last checkpoint whole."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from mel_lite import signals
from mel_lite.errors import DiskFullError
from mel_lite.resilience import checkpoint_files

logger = logging.getLogger(__name__)

WAITS_S = (5.0, 20.0, 60.0)
"""Pauses before each further try: time for a user, or a job that cleans up, to make room."""
BYTES_PER_WEIGHT = 12
"""Of a checkpoint: a float32 weight with both moments of Adam, the most that is usual."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or quota is full. safetensors and SQLite say so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(words in text for words in ("No space left on device", "os error 28", "disk is full", "Disk quota"))


class PatientSave:
    """Mixin over a TRL trainer with atomic checkpoints: a full disk pauses a save, and only then ends the run."""

    args: Any
    accelerator: Any
    model: Any
    state: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.save_strategy != "no" and self.accelerator.is_main_process:
            self._warn_of_little_space()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As without this mixin. Raises: DiskFullError when there is no room after the last pause.

        Several processes do not retry: those that wait for the writer would meet it in another step.
        """
        run_dir = Path(self.args.output_dir)
        for wait_s in (*(WAITS_S if self.accelerator.num_processes == 1 else ()), None):
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                return
            except Exception as error:
                if not is_full(error):
                    raise
                shutil.rmtree(run_dir / checkpoint_files.STAGING, ignore_errors=True)
                if wait_s is None:
                    raise DiskFullError(self._no_room(run_dir, error)) from error
                step = self.state.global_step
                logger.warning("No room for checkpoint-%s in %s; trying again in %g s.", step, run_dir, wait_s)
                _pause(wait_s)

    def _no_room(self, run_dir: Path, error: Exception) -> str:
        saved = checkpoint_files.committed(run_dir)
        kept = f"{saved[-1]} is whole" if saved else "none was saved before it"
        return (
            f"The disk of {run_dir} has no room for checkpoint-{self.state.global_step} ({error}); {kept}. Free space, "
            "or lower save_total_limit, then go on with --resume."
        )

    def _warn_of_little_space(self) -> None:
        """One checkpoint more than are kept stands on disk while it is written."""
        weights = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        kept = self.args.save_total_limit or 1
        needed_bytes = BYTES_PER_WEIGHT * weights * (kept + 1)
        folder = Path(self.args.output_dir)
        while not folder.exists():
            folder = folder.parent
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < needed_bytes:
            logger.warning(
                "The disk of %s has %.1f GB free, but %s checkpoints of %.1f GB may be on it. Free space, or lower "
                "save_total_limit.",
                self.args.output_dir,
                free_bytes / 1e9,
                kept + 1,
                BYTES_PER_WEIGHT * weights / 1e9,
            )


def _pause(seconds_s: float) -> None:
    """Sleep, unless a signal asks to stop: the run could not save again anyway."""
    end_s = time.monotonic() + seconds_s
    while (left_s := end_s - time.monotonic()) > 0 and signals.pending() is None:
        time.sleep(min(0.5, left_s))
