"""Progress of a run: on a terminal a line per step above a live view of the current phase, in a file plain lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback

from mel_lite.engines.metered import PhaseClock, PhaseEnd
from mel_lite.report.figures import duration
from mel_lite.run.display import flowed, phase_text, progress_bar, sample_panel, step_parts
from mel_lite.run.outlook import Outlook
from mel_lite.training.metrics import peak_metrics

BRIEF_S = 0.5
"""A phase without parts that is shorter than this gets no line in a file."""


class LiveDisplay(TrainerCallback):
    """Shows steps, phases, remaining time, memory, and a meta-experience every few steps."""

    side_service = True
    """A failure, such as a closed terminal, does not stop training."""

    def __init__(self, console: Console, trainer: Any = None, *, evaluations: int = 0, sample_every: int = 10) -> None:
        """Show a trainer; None = only the lines of the steps.

        Args:
            evaluations: number of evaluations that the run makes.
        """
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        """False in a file, or on a terminal that cannot move its cursor."""
        self._trainer = trainer
        self._clock = PhaseClock() if trainer is None else trainer.clock
        self._evaluations_left = evaluations
        self._sample_every = sample_every
        self._last_sample = 0
        self._outlook = Outlook()
        self._live: Live | None = None
        self._state: Any = None
        """The trainer's state, while it trains."""
        self._step_began_s, self._tokens_before = 0.0, 0
        self._evaluated_s = 0.0
        """Seconds of evaluations within the current step."""
        self._memory = ""
        self._update_so_far = PhaseEnd("update", 0.0, 0, 0)
        """The passes of the current step's update so far: a step has one per micro-batch, and a file one line."""
        self._clock.on_end = self._phase_ended

    # ---- events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._state = state
        self._open()
        self._begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds_s = time.monotonic() - self._step_began_s - self._evaluated_s
        self._outlook.step_ended(seconds_s, self._generated() - self._tokens_before)
        self._say(self._update_so_far)
        self._update_so_far = PhaseEnd("update", 0.0, 0, 0)
        self._begin_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        parts = step_parts(state.global_step, self._last_step(state), logs)
        if self._console.is_terminal:
            lines = flowed(parts, self._console.width, " | ", indent=4)
            self._console.print("\n".join(lines), highlight=False, markup=False)
        else:  # in a file, a step is one line however long it is
            left_s = self._left_s(self._last_step(state) - state.global_step)
            parts += [] if left_s is None or self._trainer is None else [f"about {duration(left_s)} left"]
            self._console.print(" | ".join(parts), soft_wrap=True, highlight=False, markup=False)
        if self._trainer is None:
            return
        if self._trainer.collapse.first_batches.line:
            line = Text(self._trainer.collapse.first_batches.line, style="bold")
            self._console.print(line, soft_wrap=not self._console.is_terminal)
        if self._last_sample and state.global_step - self._last_sample < self._sample_every:
            return
        if (sample := self._trainer.latest_sample()) is not None:
            self._last_sample = state.global_step
            self._console.print(sample_panel(sample))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Show the block as the phase `evaluation`, which is no part of a step."""
        began_s, is_alone = time.monotonic(), self._live is None
        self._open()
        try:
            yield
        finally:
            seconds_s = time.monotonic() - began_s
            self._evaluated_s += seconds_s
            self._outlook.evaluated(seconds_s)
            self._evaluations_left = max(0, self._evaluations_left - 1)
            if is_alone:
                self.close()

    def close(self) -> None:
        """Remove the live view. Call it after an error, too, or the terminal keeps a stale line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        if self._live is None and self._is_live and not self._console.quiet:
            self._live = Live(get_renderable=self._view, console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def _begin_step(self) -> None:
        self._step_began_s, self._evaluated_s, self._tokens_before = time.monotonic(), 0.0, self._generated()

    def _generated(self) -> int:
        return 0 if self._trainer is None else int(self._trainer.engine.total_generated_tokens)

    def _phase_ended(self, phase: PhaseEnd) -> None:
        if self._state is None:
            return  # the worst step, before training
        self._outlook.phase_ended(phase.name, phase.seconds_s)
        memory_gib = peak_metrics().get("mel/peak_memory_gib")
        self._memory = "" if memory_gib is None else f"peak {memory_gib:.1f} GiB"
        if phase.name == self._update_so_far.name:
            sums = self._update_so_far.seconds_s + phase.seconds_s, self._update_so_far.parts + phase.parts
            self._update_so_far = PhaseEnd(phase.name, *sums, 0)
        else:
            self._say(phase)

    def _say(self, phase: PhaseEnd) -> None:
        """Print a line about a phase, if the output is a file and the phase is worth one."""
        if self._is_live or not (phase.parts > 1 or phase.seconds_s >= BRIEF_S):
            return
        tokens = f", {phase.tokens:,} tokens" if phase.tokens else ""
        line = f"{phase_text(phase.name, phase.parts)}{tokens}, {duration(phase.seconds_s)}"
        last = self._last_step(self._state)
        finished = phase.name in ("checkpoint", "update") or self._state.global_step >= last
        of = "" if self._is_open_ended(last) else f"/{last}"
        step = f"step {self._state.global_step + (not finished)}{of}"
        try:
            self._console.print(f"{step} {line}", soft_wrap=True, highlight=False, markup=False)
        except (OSError, ValueError):  # a closed file or terminal; the callbacks report it
            self._clock.on_end = None

    # ---- the live view ----

    def _budget(self) -> int | None:
        return None if self._trainer is None else self._trainer.args.max_generated_tokens

    def _last_step(self, state: Any) -> int:
        """Return the number of the last step; with a token budget, as the steps so far let expect, in whole batches."""
        budget = self._budget()
        more = None if budget is None else self._outlook.steps_for(budget - self._generated())
        if more is None:
            return int(state.max_steps)
        per_batch = self._trainer.args.steps_per_batch
        return int(min(state.max_steps, per_batch * math.ceil((state.global_step + more) / per_batch)))

    def _is_open_ended(self, last: int) -> bool:
        """Return True while only a bound on the steps is known: a token budget ends the run, and no step has ended."""
        return bool(self._budget() is not None and last == self._state.max_steps)

    def _left_s(self, steps_left: int) -> float | None:
        """Return the seconds until the run ends; None before the first step has ended."""
        phase = (self._clock.phase, time.monotonic() - self._clock.since_s) if self._clock.phase else ("", 0.0)
        return self._outlook.remaining_s(steps_left, evaluations_left=self._evaluations_left, open_phase=phase)

    def _view(self) -> Group:
        lines = [] if self._state is None else [self._progress_parts(self._state)]
        clock, now_s = self._clock, time.monotonic()
        if clock.phase:
            each = f"{clock.tokens_each:,} of {clock.most_tokens:,} tokens each" if clock.tokens_each else ""
            parts = [phase_text(clock.phase, clock.total, clock.done), each, duration(max(0.0, now_s - clock.since_s))]
            lines.append([*parts, "" if self._state is not None else "before training"])
        width = self._console.width
        texts = [Text(line, no_wrap=True) for parts in lines for line in flowed(parts, width, "  ", indent=2)]
        return Group(*texts)

    def _progress_parts(self, state: Any) -> list[str]:
        last, budget = self._last_step(state), self._budget()
        share, tokens = state.global_step / max(1, last), ""
        if budget is not None:
            share = max(share, min(1.0, self._generated() / budget)) if last < state.max_steps else 0.0
            tokens = f"{self._generated():,} of {budget:,} tokens"
        left_s = self._left_s(last - state.global_step)
        step = f"step {min(state.global_step + 1, last)} of {'about ' if budget is not None else ''}{last:,}"
        if self._is_open_ended(last):
            step = f"step {state.global_step + 1}"
        bar = progress_bar(share) if self._console.width >= 70 else ""
        left = "time left: known after a step" if left_s is None else f"about {duration(left_s)} left"
        return [step, bar, left, tokens, self._memory]
