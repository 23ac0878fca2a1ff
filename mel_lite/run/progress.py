"""Live training progress in a terminal: one line per step, a bar with the current phase, and a sample now and then."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback

from mel_lite.run.display import sample_panel, step_line


class LiveDisplay(TrainerCallback):
    """Print one line per logged step above a progress bar with the remaining time, and a sample every few steps."""

    side_service = True
    """A failure, such as a closed terminal, does not stop training."""

    def __init__(self, console: Console, trainer: Any = None, *, sample_every: int = 10) -> None:
        self._console = console
        self._sample_every = sample_every
        self._last_sample = 0
        self._progress: Progress | None = None
        self._task: Any = None
        self.trainer = trainer
        """Source of the samples; None = show no samples."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        clock = None if self.trainer is None else self.trainer.clock
        self._progress = Progress(
            _PhaseColumn(clock), BarColumn(), TextColumn("step"), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        # In a file, a step is one line however long it is.
        soft_wrap = not self._console.is_terminal
        self._console.print(step_line(state.global_step, state.max_steps, logs), soft_wrap=soft_wrap)
        if self.trainer is not None and self.trainer.collapse.first_batches.line:
            self._console.print(Text(self.trainer.collapse.first_batches.line, style="bold"), soft_wrap=soft_wrap)
        if self.trainer is None or (self._last_sample and state.global_step - self._last_sample < self._sample_every):
            return
        if (sample := self.trainer.latest_sample()) is not None:
            self._last_sample = state.global_step
            self._console.print(sample_panel(sample))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar. Call it after an error, too, or the terminal keeps a stale line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _PhaseColumn(ProgressColumn):
    """The phase that the trainer is in, such as `rollout` or `update`."""

    def __init__(self, clock: Any) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        """Return the phase's name at a fixed width, so that the bar does not jump."""
        phase = getattr(self._clock, "phase", "") or "training"
        return Text(f"{phase:<9}")
