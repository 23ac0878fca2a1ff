"""Sum up a run's first batches in one line, and warn when lessons do not help: `mel-lite probe` in short.

Each warning is given at most once per run.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

FIRST = 5
"""Logs that the line sums up; fewer when the run ends before."""
TREND = 10
"""Logs of a metric over which a teacher, or the uplift, is judged."""
FEW = 4
"""Analyses after which none that can be read is no accident."""
MEASURED = 3
"""Measurements over which the two gradients are compared."""
COUNTS = ("mel/groups", "mel/mixed_groups", "mel/written", "mel/parsed", "mel/quoted")
MEANS = ("mel/pass_rate", "mel/replay_uplift", "mel/score_shift", "mel/teacher_shift")
NORMS = ("mel/grad_norm_policy", "mel/grad_norm_nll")


class FirstBatches:
    """Reads a trainer's logs. The whole state is plain JSON."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._logs: Counter[str] = Counter()
        """Logs that had each metric."""
        self._done: list[str] = []
        """The line and the checks that were dealt with."""
        self.line: str | None = None
        """The summary, while the log it is due with is handled; else None."""

    def state_dict(self) -> dict[str, Any]:
        return {"first_batches": {"sums": dict(self._sums), "logs": dict(self._logs), "done": list(self._done)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; a checkpoint of an older version has none, so its sums begin at 0."""
        saved = state.get("first_batches") or {"sums": {}, "logs": {}, "done": []}
        self._sums, self._logs = defaultdict(float, saved["sums"]), Counter(saved["logs"])
        self._done = list(saved["done"])

    def on_log(self, logs: Mapping[str, Any]) -> None:
        """Add one log of a training step, and say what is due."""
        self.line = None
        if "mel/groups" not in logs:
            return
        for name in (*COUNTS, *MEANS):
            self._add(name, logs.get(name))
        if "mel/grad_norm_nll" in logs:  # a policy gradient of 0 is not logged
            for name in NORMS:
                self._add(name, logs.get(name, 0.0))
        state = self._trainer.state
        if self._is_due("line", self._logs["mel/groups"], FIRST, last=state.global_step >= state.max_steps):
            self.line = self._summary()
            logger.info("%s", self.line)
            if (warning := self._none_parsed()) and self._trainer.accelerator.is_main_process:
                logger.warning("%s", warning)
        checks: tuple[tuple[str, str, int, Callable[[], str | None]], ...] = (
            ("teacher", "mel/teacher_shift", TREND, self._weak_teacher),
            ("uplift", "mel/replay_uplift", TREND, self._no_uplift),
            ("gradient", "mel/grad_norm_nll", MEASURED, self._loud_lessons),
        )
        for name, metric, least, check in checks:
            if self._is_due(name, self._logs[metric], least):
                warning = check()
                if warning and self._trainer.accelerator.is_main_process:
                    logger.warning("Step %s: %s", state.global_step, warning)

    def _add(self, name: str, value: Any) -> None:
        if isinstance(value, (int, float)) and value == value:
            self._sums[name] += value
            self._logs[name] += 1

    def _is_due(self, name: str, seen: int, least: int, *, last: bool = False) -> bool:
        """Return True once, when a metric was seen often enough."""
        if name in self._done or not (seen >= least or last):
            return False
        self._done.append(name)
        return True

    def _mean(self, name: str) -> float | None:
        return self._sums[name] / self._logs[name] if self._logs[name] else None

    def _summary(self) -> str:
        sums = self._sums
        shares = (
            ("of groups mixed", sums["mel/mixed_groups"], sums["mel/groups"]),
            ("of analyses parsed", sums["mel/parsed"], sums["mel/written"]),
            ("quote the wrong step", sums["mel/quoted"], sums["mel/parsed"]),
        )
        rate = self._mean("mel/pass_rate")
        parts = [] if rate is None else [f"pass rate {rate:.0%}"]
        parts += [f"{part / whole:.0%} {what}" for what, part, whole in shares if whole]
        for name, label, scale, unit in (
            ("mel/replay_uplift", "replay uplift", 100, "points"),
            ("mel/score_shift", "scored shift", 1, "nats"),
            ("mel/teacher_shift", "teacher shift", 1, "nats"),
        ):
            mean = self._mean(name)
            if mean is not None:
                parts.append(f"{label} {scale * mean:+.{0 if scale == 100 else 2}f} {unit}")
        if sums["mel/grad_norm_policy"]:
            parts.append(f"lesson / policy gradient {sums['mel/grad_norm_nll'] / sums['mel/grad_norm_policy']:.2f}")
        return f"first {self._logs['mel/groups']} logs: {', '.join(parts)}"

    # ---- the checks ----

    def _none_parsed(self) -> str | None:
        written = int(self._sums["mel/written"])
        if written < FEW or self._sums["mel/parsed"]:
            return None
        return (
            f"None of {written} analyses could be read, so there are no lessons: the model does not follow their "
            "format. Read one with `mel-lite experiences show`, warm the model up (`mel-lite warmup`), take a larger "
            "or instruction-tuned one, or train without lessons (algorithm='grpo')."
        )

    def _weak_teacher(self) -> str | None:
        mean = self._mean("mel/teacher_shift")
        if mean is None or mean > 0:
            return None
        return (
            f"The teacher of internalisation={self._trainer.args.internalisation!r} is no better than the student: its "
            f"notes lift right rollouts by {mean:+.2f} nats over wrong ones (mel/teacher_shift, mean of {TREND} logs). "
            "Set another context in internalisation_options, or train without lessons (algorithm='grpo')."
        )

    def _no_uplift(self) -> str | None:
        mean = self._mean("mel/replay_uplift")
        if mean is None or mean > 0:
            return None
        return (
            f"Lessons do not lift replays over plain resampling: {100 * mean:+.0f} points (mel/replay_uplift, mean of "
            f"{TREND} logs). Set replay_criterion='uplift' to keep only those that do, warm the model up with better "
            "analyses, or train without lessons (algorithm='grpo'). `mel-lite probe` measures it with an interval."
        )

    def _loud_lessons(self) -> str | None:
        policy, lessons = (self._sums[name] / self._logs[name] for name in NORMS)
        if lessons <= policy:
            return None
        weight = self._trainer.args.mel_weight
        fix = f"Lower mel_weight from {weight:g} to {weight * policy / lessons:.2g} or less"
        if not policy:
            fix = (
                "No group had an advantage, so lessons alone move the weights. Choose other tasks, or lower mel_weight"
            )
        return (
            f"The gradient of the lessons exceeds the policy's: norm {lessons:.3g} against {policy:.3g} (mean of "
            f"{MEASURED} measurements). {fix}."
        )


__all__ = ["FirstBatches"]
