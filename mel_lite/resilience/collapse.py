"""Figures that show a run going wrong while its loss still looks fine, and what to do then (`on_collapse`).

Each wire looks at means over the last WINDOW logs of a metric. It warns when it trips and every AGAIN logs while it
stays tripped, with the figures and the likely cure.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from mel_lite.errors import DivergedError
from mel_lite.resilience import checkpoint_files
from mel_lite.training.assemble import add_callback_once

logger = logging.getLogger(__name__)

WINDOW = 10
"""Logs a mean is taken over; nothing trips before there are so many."""
AGAIN = 25
"""Logs between repeated warnings of one wire."""
EVALUATIONS = 2
"""Evaluations a mean is taken over: they are rare, and each is a mean over many tasks."""
FALLEN_REWARD, FALLEN_EVALUATION = 0.5, 0.8
"""Share of the best mean so far below which the reward, or the evaluation, has collapsed."""
LEAST_BEST = 0.05
"""A best mean below this is noise to fall from."""
SHRUNK_LENGTH = 0.3
"""Share of the longest mean completion below which completions have collapsed, unless the reward rose meanwhile."""
MEMORISED_NATS = 0.05
"""NLL per token of fresh meta-experiences below which the model recites them."""
FULL_RETENTION, MORE_LEAKS = 0.95, 0.2
"""Share of the leak-free kept, and rise of the leak rate over its lowest mean, that are suspicious together."""
SPIKE = 10.0
"""A gradient norm so many times the median of the last WINDOW is an outlier. It was clipped; it is told."""
LEAST_WRITTEN = 20
"""Meta-experiences in the window, at least, before keeping none of them means something."""


class Means:
    """Running means of one metric over a window; the whole state is plain JSON."""

    def __init__(self, size: int = WINDOW) -> None:
        self.size = size
        self.last: list[float] = []
        self.best: float | None = None
        self.lowest: float | None = None

    def add(self, value: float) -> None:
        self.last = [*self.last, value][-self.size :]
        if (mean := self.mean()) is not None:
            self.best = mean if self.best is None else max(self.best, mean)
            self.lowest = mean if self.lowest is None else min(self.lowest, mean)

    def mean(self) -> float | None:
        """Mean of the last `size` values; None until there are so many."""
        return sum(self.last) / self.size if len(self.last) == self.size else None


class Tripwires:
    """Reads the logs of a run; `look` returns what has tripped, in words."""

    METRICS = ("reward", "eval_reward", "completions/mean_length", "mel/nll", "mel/retention_ratio", "mel/leak_rate",
               "mel/written", "mel/replay_valid")  # fmt: skip

    def __init__(self) -> None:
        self._means = {name: Means(EVALUATIONS if name.startswith("eval") else WINDOW) for name in self.METRICS}
        self._norms: list[float] = []
        self._reward_when_longest: float | None = None
        self.lambda_may_help = False
        """Whether the last warnings were of a kind that a smaller weight of the lessons can cure."""
        self._tripped: dict[str, int] = {}
        """Logs for which each tripped wire has been so."""
        self.mel_weight: float | None = None
        """Lambda after it was lowered; None while it is the configured one."""
        self.lowered_from: float | None = None
        """The configured one, once it was lowered."""
        self.idle_steps = 0
        """Optimiser steps in a row that had nothing to learn from."""

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "means": {name: [m.last, m.best, m.lowest] for name, m in self._means.items()},
            "norms": self._norms,
            "reward_when_longest": self._reward_when_longest,
            "tripped": self._tripped,
            "mel_weight": self.mel_weight,
            "lowered_from": self.lowered_from,
            "idle_steps": self.idle_steps,
        }

    def restore(self, state: dict[str, Any] | None, args: Any) -> None:
        """Take back a state; a lowered lambda goes back into `args`."""
        if state is None:
            return
        for name, (last, best, lowest) in state["means"].items():
            if name in self._means:
                self._means[name].last, self._means[name].best, self._means[name].lowest = last, best, lowest
        self._norms = list(state["norms"])
        self._reward_when_longest = state["reward_when_longest"]
        self._tripped = dict(state["tripped"])
        self.mel_weight, self.lowered_from = state["mel_weight"], state.get("lowered_from")
        self.idle_steps = state.get("idle_steps", 0)
        if self.lowered_from not in (None, args.mel_weight):  # the resumed run was allowed another
            self.mel_weight = self.lowered_from = None
        if self.mel_weight is not None:
            args.mel_weight = self.mel_weight

    def look(self, logs: dict[str, Any], *, untrained: bool = False) -> list[str]:
        """Take in one log; the warnings that are due. `untrained`: LoRA-B is still zero after this step."""
        longest = self._means["completions/mean_length"].best
        for name, means in self._means.items():
            value = logs.get(name)
            if isinstance(value, (int, float)) and value == value:
                means.add(float(value))
        if self._means["completions/mean_length"].best != longest:
            self._reward_when_longest = self._means["reward"].mean()
        due = []
        self.lambda_may_help = False
        wires: dict[str, Callable[[], str | None]] = {
            "reward": self._fallen_reward,
            "evaluation": self._fallen_evaluation,
            "length": self._shrunk,
            "memorised": self._memorised,
            "leaks": self._leaking,
            "nothing kept": self._nothing_kept,
            "untrained": lambda: self._still_zero(untrained),
        }
        for name, wire in wires.items():
            warning = wire()
            if warning is None:
                self._tripped.pop(name, None)
                continue
            self._tripped[name] = self._tripped.get(name, -1) + 1
            if self._tripped[name] % AGAIN == 0:
                due.append(warning)
                self.lambda_may_help |= name not in ("nothing kept", "untrained")
        return due

    @property
    def logs_seen(self) -> int:
        """Logs of rewards taken in, at most WINDOW."""
        return len(self._means["reward"].last)

    def spike(self, logs: dict[str, Any]) -> str | None:
        """What to say of this log's gradient norm, when it is an outlier. One alone is no collapse."""
        norm = logs.get("grad_norm")
        if not isinstance(norm, (int, float)) or not math.isfinite(norm):
            return None
        before, self._norms = self._norms, [*self._norms, float(norm)][-WINDOW:]
        if len(before) < WINDOW or norm <= SPIKE * statistics.median(before) or not statistics.median(before):
            return None
        return (
            f"The gradient norm is {norm:.3g}, {norm / statistics.median(before):.0f} times its median of the last "
            f"{WINDOW} logs (before clipping to max_grad_norm)."
        )

    # ---- the wires ----

    def _fallen_reward(self) -> str | None:
        mean, best = self._means["reward"].mean(), self._means["reward"].best
        if mean is None or best is None or best < LEAST_BEST or mean >= FALLEN_REWARD * best:
            return None
        return (
            f"The reward fell to {mean:.3g} (mean of the last {WINDOW} logs) from {best:.3g} at its best. Lower "
            "learning_rate or mel_weight, set beta above 0, or go back to an earlier checkpoint."
        )

    def _fallen_evaluation(self) -> str | None:
        mean, best = self._means["eval_reward"].mean(), self._means["eval_reward"].best
        if mean is None or best is None or best < LEAST_BEST or mean >= FALLEN_EVALUATION * best:
            return None
        return (
            f"The evaluation fell to {mean:.3g} (mean of the last {EVALUATIONS}) from {best:.3g} at its best: what is "
            "learnt does not carry over to held-out tasks. Stop, and use the best checkpoint."
        )

    def _shrunk(self) -> str | None:
        length, reward = self._means["completions/mean_length"], self._means["reward"].mean()
        mean, best = length.mean(), length.best
        if mean is None or best is None or mean >= SHRUNK_LENGTH * best:
            return None
        if reward is not None and self._reward_when_longest is not None and reward > self._reward_when_longest:
            return None  # shorter and better: what one hopes for
        return (
            f"Completions shrank to {mean:.0f} tokens (mean of the last {WINDOW} logs) from {best:.0f}, and the reward "
            "did not rise. Look at completions/; lower mel_weight, or set loss_type to one that ignores length."
        )

    def _memorised(self) -> str | None:
        mean = self._means["mel/nll"].mean()
        if mean is None or mean >= MEMORISED_NATS:
            return None
        return (
            f"Fresh meta-experiences have an NLL of {mean:.3g} nats per token (mean of the last {WINDOW} logs) before "
            "they are trained on: the model recites one text. Lower mel_weight, or raise analysis_temperature."
        )

    def _leaking(self) -> str | None:
        kept, leaks = self._means["mel/retention_ratio"].mean(), self._means["mel/leak_rate"]
        mean, lowest = leaks.mean(), leaks.lowest
        if kept is None or mean is None or lowest is None:
            return None
        if kept < FULL_RETENTION * (1 - mean) or mean < lowest + MORE_LEAKS:
            return None
        return (
            f"{kept:.0%} of the meta-experiences were kept over the last {WINDOW} logs while the share of leaking ones "
            f"rose to {mean:.0%} from {lowest:.0%}: replays may be solved by answers that the leak guard misses. Read "
            "`mel-lite experiences list --status kept`; set leak_policy='reject'."
        )

    def _nothing_kept(self) -> str | None:
        written, kept = self._means["mel/written"], self._means["mel/replay_valid"]
        if written.mean() is None or sum(written.last) < LEAST_WRITTEN or sum(kept.last) > 0:
            return None
        return (
            f"None of the {sum(written.last):.0f} meta-experiences of the last {WINDOW} logs was kept, so MEL trains "
            "nothing. See why with `mel-lite experiences list`: unparsed ones want a larger analysis_max_tokens or a "
            "warmed-up model, leaked ones leak_policy='redact', failed replays easier tasks."
        )

    def _still_zero(self, untrained: bool) -> str | None:
        if not untrained or len(self._means["reward"].last) < WINDOW:
            return None
        return (
            f"After {WINDOW} logs every LoRA-B is still zero: nothing was learnt, and export will refuse the adapter. "
            "Groups need right and wrong completions; see mel/mixed_groups, grad_norm and learning_rate."
        )


class Watched:
    """Mixin over a TRL trainer: acts on its tripwires as `args.on_collapse` says, alike on every process."""

    args: Any
    accelerator: Any
    model: Any
    state: Any
    _shares: list[Any]
    _has_advantage: bool = False
    """Whether a completion of the generation batch under way, on this process, is pushed up or down."""

    @property
    def _tripwires(self) -> Tripwires:
        if not hasattr(self, "_wires"):
            self._wires = Tripwires()
        return self._wires

    def train(self, *args: Any, **kwargs: Any) -> Any:
        add_callback_once(self, _OnLog(self))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _estimated(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super()._estimated(batch)  # type: ignore[misc]
        if self.model.training:
            advantages = batch["advantages"]
            per_row = advantages.abs() if advantages.ndim == 1 else advantages.abs().sum(dim=1)
            self._has_advantage = bool((per_row * batch["completion_mask"].sum(dim=1)).any())
        return batch

    def _count_idle(self) -> None:
        """After each update: warn of a run that learns nothing, then end it. Raises: DivergedError."""
        most, wires = self.args.max_idle_steps, self._tripwires
        learns = self._has_advantage or any(self._shares)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(learns), device=self.accelerator.device)
            learns = self.accelerator.reduce(flag, "sum").item() > 0
        wires.idle_steps = 0 if learns else wires.idle_steps + 1
        if not most or not (wires.idle_steps == max(1, most // 5) or wires.idle_steps >= most):
            return
        told = (
            f"The last {wires.idle_steps} steps had nothing to learn from: in no group did rewards differ, and no "
            "meta-experience was kept. The tasks are too easy or too hard, or the verifier misses the answers: look at "
            "completions/, choose other tasks, or raise num_generations."
        )
        if wires.idle_steps >= most:
            raise DivergedError(f"{told} Stopped at step {self.state.global_step} (max_idle_steps={most}; 0 goes on "
                                f"all the same). {_kept(Path(self.args.output_dir))}")  # fmt: skip
        if self.accelerator.is_main_process:
            logger.warning("Step %s: %s The run stops after %s.", self.state.global_step, told, most)

    def _look(self, logs: dict[str, Any]) -> None:
        spike = self._tripwires.spike(logs)
        if spike and self.accelerator.is_main_process:
            logger.warning("Step %s: %s", self.state.global_step, spike)
        due = self._tripwires.look(logs, untrained=self._is_untrained())
        lower = self._tripwires.lambda_may_help and self.args.with_meta_experience and self.args.mel_weight > 0
        if self.accelerator.num_processes > 1:
            due, lower = broadcast_object_list([due, lower], from_process=0)
        if lower and self.args.on_collapse == "lower_lambda":
            before = self.args.mel_weight
            self._tripwires.lowered_from = self._tripwires.lowered_from or before
            self.args.mel_weight = self._tripwires.mel_weight = before / 2
            due[-1] += f" mel_weight was lowered from {before:g} to {before / 2:g}."
        if self.accelerator.is_main_process:
            for warning in due:
                logger.warning("Step %s: %s", self.state.global_step, warning)
        if due and self.args.on_collapse == "stop":
            kept = _kept(Path(self.args.output_dir))
            raise DivergedError(f"on_collapse='stop' at step {self.state.global_step}: {' '.join(due)} {kept}")

    def _is_untrained(self) -> bool:
        """Whether the model has trainable LoRA-B matrices, all of them zero."""
        if self._tripwires.logs_seen < WINDOW - 1:
            return False
        matrices = [p for n, p in self.model.named_parameters() if "lora_B" in n and p.requires_grad]
        return bool(matrices) and not any(bool(p.detach().any()) for p in matrices)


def _kept(run_dir: Path) -> str:
    saved = checkpoint_files.committed(run_dir)
    return f"Checkpoints: {', '.join(path.name for path in saved)}." if saved else "No checkpoint was saved."


class _OnLog(TrainerCallback):
    """Counts idle steps, and reads each log of a step or an evaluation."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._watched._count_idle()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and ("reward" in logs or "eval_reward" in logs):
            self._watched._look(logs)
