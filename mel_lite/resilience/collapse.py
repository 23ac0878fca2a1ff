"""Detect runs that go wrong while their loss still looks fine, and act as `on_collapse` says.

Each check compares means over the last WINDOW logs of a metric. It warns when it fails and every AGAIN logs while it
keeps failing, with the figures and the likely fix.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from mel_lite.errors import DivergedError
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.first_batches import FirstBatches
from mel_lite.types import CollapseAction, Experience, Finish, Group

logger = logging.getLogger(__name__)

WINDOW = 10
"""Logs a mean is taken over; no check fails before there are that many."""
AGAIN = 25
"""Logs between repeated warnings of one check."""
EVALUATIONS = 2
"""Evaluations a mean is taken over; each is itself a mean over many tasks."""
FALLEN_REWARD, FALLEN_EVALUATION = 0.5, 0.8
"""Share of the best mean so far below which the reward, or the evaluation, has collapsed."""
LEAST_BEST = 0.05
"""A best mean below this is noise, and falling from it means nothing."""
SHRUNK_LENGTH = 0.3
"""Share of the longest mean completion below which completions have collapsed, unless the reward rose since."""
MEMORIZED_NATS = 0.05
"""NLL per token of new meta-experiences below which the model recites them."""
FULL_RETENTION, MORE_LEAKS = 0.95, 0.2
"""Thresholds of the leak check: minimum share kept, minimum rise of the leak rate."""
SPIKE = 10.0
"""A gradient norm this many times the median of the last WINDOW is an outlier. It was clipped; it is reported."""
IDLE_FIRST, IDLE_AGAIN = 10, 50
"""Consecutive steps with nothing to learn from before the first warning, and between later ones, if nothing stops."""
LEAST_ANALYSES, CUT_OFF = 8, 0.5
"""Analyses looked at together, and the share of them cut off at the token limit that needs advice."""
LEAST_WRITTEN = 20
"""Fewest meta-experiences in the window for keeping none of them to mean something."""


class Means:
    """Running means of one metric over a window. The whole state is plain JSON."""

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
        """Return the mean of the last `size` values; None until there are that many."""
        return sum(self.last) / self.size if len(self.last) == self.size else None


class CollapseChecks:
    """Read the logs of a run; `look` returns the warnings that are due."""

    METRICS = ("reward", "eval_reward", "eval_avg_at_k", "completions/mean_length", "mel/nll", "mel/retention_ratio",
               "mel/leak_rate", "mel/written", "mel/replay_valid")  # fmt: skip

    def __init__(self) -> None:
        self._means = {name: Means(EVALUATIONS if name.startswith("eval") else WINDOW) for name in self.METRICS}
        self._norms: list[float] = []
        self._reward_when_longest: float | None = None
        self.lambda_may_help = False
        """True when a smaller lesson weight may fix what the last warnings reported."""
        self._failing: dict[str, int] = {}
        """Number of logs for which each failing check has failed."""
        self.mel_weight: float | None = None
        """Lambda after it was lowered; None while it is the configured one."""
        self.lowered_from: float | None = None
        """The configured one, once it was lowered."""
        self.idle_steps = 0
        """Consecutive optimizer steps with nothing to learn from."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": {name: [m.last, m.best, m.lowest] for name, m in self._means.items()},
            "norms": self._norms,
            "reward_when_longest": self._reward_when_longest,
            "tripped": self._failing,
            "mel_weight": self.mel_weight,
            "lowered_from": self.lowered_from,
            "idle_steps": self.idle_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, configured_weight: float) -> None:
        """Restore a state. A lambda lowered from another weight than the configured one is dropped."""
        for name, (last, best, lowest) in state["means"].items():
            if name in self._means:
                self._means[name].last, self._means[name].best, self._means[name].lowest = last, best, lowest
        self._norms = list(state["norms"])
        self._reward_when_longest = state["reward_when_longest"]
        self._failing = dict(state["tripped"])
        self.mel_weight, self.lowered_from = state["mel_weight"], state.get("lowered_from")
        self.idle_steps = state.get("idle_steps", 0)
        if self.lowered_from not in (None, configured_weight):
            self.mel_weight = self.lowered_from = None

    def look(self, logs: dict[str, Any], *, untrained: bool = False) -> list[str]:
        """Add one log and return the warnings that are due. `untrained`: LoRA-B is still zero after this step."""
        longest = self._means["completions/mean_length"].best
        for name, means in self._means.items():
            value = logs.get(name)
            if isinstance(value, (int, float)) and value == value:
                means.add(float(value))
        if self._means["completions/mean_length"].best != longest:
            self._reward_when_longest = self._means["reward"].mean()
        due = []
        self.lambda_may_help = False
        checks: dict[str, Callable[[], str | None]] = {
            "reward": self._fallen_reward,
            "evaluation": self._fallen_evaluation,
            "length": self._shrunk,
            "memorised": self._memorized,  # spelled as in the checkpoints of older versions
            "leaks": self._leaking,
            "nothing kept": self._nothing_kept,
            "untrained": lambda: self._still_zero(untrained),
        }
        for name, check in checks.items():
            warning = check()
            if warning is None:
                self._failing.pop(name, None)
                continue
            self._failing[name] = self._failing.get(name, -1) + 1
            if self._failing[name] % AGAIN == 0:
                due.append(warning)
                self.lambda_may_help |= name not in ("nothing kept", "untrained")
        return due

    @property
    def logs_seen(self) -> int:
        """Number of logs with a reward so far, at most WINDOW."""
        return len(self._means["reward"].last)

    def spike(self, logs: dict[str, Any]) -> str | None:
        """Return a warning when this log's gradient norm is an outlier; one outlier is no collapse."""
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

    # ---- the checks ----

    def _fallen_reward(self) -> str | None:
        mean, best = self._means["reward"].mean(), self._means["reward"].best
        if mean is None or best is None or best < LEAST_BEST or mean >= FALLEN_REWARD * best:
            return None
        return (
            f"The reward fell to {mean:.3g} (mean of the last {WINDOW} logs) from {best:.3g} at its best. Lower "
            "learning_rate or mel_weight, set beta above 0, or go back to an earlier checkpoint."
        )

    def _fallen_evaluation(self) -> str | None:
        kinds = [self._means[name] for name in ("eval_reward", "eval_avg_at_k")]
        fallen = [
            (mean, kind.best) for kind in kinds
            if (mean := kind.mean()) is not None and kind.best is not None and kind.best >= LEAST_BEST
            and mean < FALLEN_EVALUATION * kind.best
        ]  # fmt: skip
        if not fallen:
            return None
        mean, best = fallen[0]
        return (
            f"The evaluation fell to {mean:.3g} (mean of the last {EVALUATIONS}) from {best:.3g} at its best: training "
            "does not generalize to held-out tasks. Stop, and use the best checkpoint."
        )

    def _shrunk(self) -> str | None:
        length, reward = self._means["completions/mean_length"], self._means["reward"].mean()
        mean, best = length.mean(), length.best
        if mean is None or best is None or mean >= SHRUNK_LENGTH * best:
            return None
        if reward is not None and self._reward_when_longest is not None and reward > self._reward_when_longest:
            return None  # shorter and better is an improvement
        return (
            f"Completions shrank to {mean:.0f} tokens (mean of the last {WINDOW} logs) from {best:.0f}, and the reward "
            "did not rise. Look at completions/; lower mel_weight, or set loss_type to one that ignores length."
        )

    def _memorized(self) -> str | None:
        mean = self._means["mel/nll"].mean()
        if mean is None or mean >= MEMORIZED_NATS:
            return None
        return (
            f"New meta-experiences have an NLL of {mean:.3g} nats per token (mean of the last {WINDOW} logs) before "
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
            "nothing. See why with `mel-lite experiences list`: unparsed ones need a larger analysis_max_tokens or a "
            "warmed-up model, leaked ones leak_policy='redact', failed replays easier tasks."
        )

    def _still_zero(self, untrained: bool) -> str | None:
        if not untrained or len(self._means["reward"].last) < WINDOW:
            return None
        return (
            f"After {WINDOW} logs every LoRA-B is still zero: nothing was learned, and export will refuse the adapter. "
            "Groups need right and wrong completions; see mel/mixed_groups, grad_norm and learning_rate."
        )


class IdleWatch:
    """Warn, with the likely fix, when no group is mixed: then neither GRPO nor MEL has anything to learn from."""

    FIRST, AGAIN = 5, 25
    """Generation batches without a mixed group before the first warning, and between later ones."""

    def __init__(self) -> None:
        self.idle_batches = 0
        """Consecutive generation batches without a mixed group."""
        self._right = 0
        self._judged = 0

    def saw(self, groups: Sequence[Group]) -> None:
        """Count a generation batch."""
        if any(g.is_mixed for g in groups):
            self.idle_batches = self._right = self._judged = 0
            return
        self.idle_batches += 1
        self._right += sum(len(g.right) for g in groups)
        self._judged += sum(len(g.right) + len(g.wrong) for g in groups)
        if self.idle_batches == self.FIRST or self.idle_batches % self.AGAIN == 0:
            logger.warning("%s", self.advice())

    def advice(self) -> str:
        """Return what is wrong and what to change, in two sentences."""
        seen = f"The last {self.idle_batches} generation batches had no group with both a right and a wrong completion"
        if self._judged == 0:
            return f"{seen}: the verifier abstained on all of them. Check `verifier` and the answer column."
        rate = self._right / self._judged
        if rate > 0.5:
            return f"{seen} ({rate:.0%} right): the tasks are too easy. Use harder ones, or a higher temperature."
        return (
            f"{seen} ({rate:.0%} right): the tasks are too hard, or answers are not found. Use easier tasks, raise "
            "num_generations or max_completion_length, and look at completions/ for answers the verifier misses."
        )


class CollapseWatch:
    """Apply the checks to a trainer's logs and act as `args.on_collapse` says, with the same outcome on every rank."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.checks = CollapseChecks()
        self.idle = IdleWatch()
        self.first_batches = FirstBatches(trainer)
        self._configured_weight = trainer.args.mel_weight
        self._learns = False
        """True when the current generation batch, on this rank, has an advantage or a lesson."""

        self._analyses, self._cut_off, self._cut_windows = 0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"tripwires": self.checks.state_dict()} | self.first_batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first_batches.load_state_dict(state)
        if state.get("tripwires") is None:
            return
        self.checks.load_state_dict(state["tripwires"], configured_weight=self._configured_weight)
        if self.checks.mel_weight is not None:
            self._trainer.args.mel_weight = self.checks.mel_weight

    def saw_batch(self, batch: Mapping[str, Any], *, has_lessons: bool) -> None:
        """Record a generation batch of this rank, as it is trained on."""
        advantages = batch["advantages"]
        per_row = advantages.abs() if advantages.ndim == 1 else advantages.abs().sum(dim=1)
        is_taught = "teacher_mask" in batch or self._trainer.needs_every_rollout
        self._learns = has_lessons or is_taught or bool((per_row * batch["completion_mask"].sum(dim=1)).any())

    def saw_analyses(self, experiences: Sequence[Experience]) -> None:
        """Count a batch's analyses, and warn when many do not end within `analysis_max_tokens`."""
        self._analyses += len(experiences)
        self._cut_off += sum(each.analysis.finish is Finish.LENGTH for each in experiences)
        if self._analyses < LEAST_ANALYSES:
            return
        if self._cut_off >= CUT_OFF * self._analyses:
            if self._cut_windows % AGAIN == 0 and self._trainer.accelerator.is_main_process:
                limit = self._trainer.args.analysis_max_tokens
                logger.warning(
                    "%s of the last %s analyses were cut off at analysis_max_tokens=%s, and no lesson is read from "
                    "those. Raise it (--set train.analysis_max_tokens=%s), or start from a warmed-up model, which "
                    "writes shorter ones.", self._cut_off, self._analyses, limit, 2 * limit,
                )  # fmt: skip
            self._cut_windows += 1
        self._analyses = self._cut_off = 0

    def after_update(self) -> None:
        """Warn when a run learns nothing, and stop it after `max_idle_steps`. Raises: DivergedError."""
        trainer, checks = self._trainer, self.checks
        most, learns = trainer.args.max_idle_steps, self._learns
        if trainer.accelerator.num_processes > 1:
            flag = torch.tensor(float(learns), device=trainer.accelerator.device)
            learns = trainer.accelerator.reduce(flag, "sum").item() > 0
        checks.idle_steps = 0 if learns else checks.idle_steps + 1
        stops = 0 < most <= checks.idle_steps
        warns = checks.idle_steps == (max(1, most // 5) if most else IDLE_FIRST)
        warns |= not most and checks.idle_steps > 0 and checks.idle_steps % IDLE_AGAIN == 0
        if not (stops or warns):
            return
        step = trainer.state.global_step
        warning = (
            f"The last {checks.idle_steps} steps had nothing to learn from: in no group did rewards differ, and no "
            "meta-experience was kept or taught. The tasks are too easy or too hard, or the verifier misses the "
            "answers: look at completions/, choose other tasks, or raise num_generations."
        )
        if stops:
            raise DivergedError(
                f"{warning} Stopped at step {step} (max_idle_steps={most}; 0 never stops). {self._checkpoints()}"
            )
        if trainer.accelerator.is_main_process:
            outlook = f"The run stops after {most}." if most else "Set max_idle_steps to stop such a run."
            logger.warning("Step %s: %s %s", step, warning, outlook)

    def on_log(self, logs: dict[str, Any]) -> None:
        """Check one log of a step or an evaluation. Raises: DivergedError under `on_collapse='stop'`."""
        self.first_batches.on_log(logs)
        if not {"reward", "eval_reward", "eval_avg_at_k"} & logs.keys():
            return
        trainer, checks = self._trainer, self.checks
        args, step, is_main = trainer.args, trainer.state.global_step, trainer.accelerator.is_main_process
        spike = checks.spike(logs)
        if spike and is_main:
            logger.warning("Step %s: %s", step, spike)
        due = checks.look(logs, untrained=self._is_untrained())
        lower = checks.lambda_may_help and args.with_meta_experience and args.mel_weight > 0
        if trainer.accelerator.num_processes > 1:
            due, lower = broadcast_object_list([due, lower], from_process=0)
        if lower and args.on_collapse == CollapseAction.LOWER_LAMBDA:
            before = args.mel_weight
            checks.lowered_from = checks.lowered_from or before
            args.mel_weight = checks.mel_weight = before / 2
            due[-1] += f" mel_weight was lowered from {before:g} to {before / 2:g}."
        if is_main:
            for warning in due:
                logger.warning("Step %s: %s", step, warning)
        if due and args.on_collapse == CollapseAction.STOP:
            raise DivergedError(f"on_collapse='stop' at step {step}: {' '.join(due)} {self._checkpoints()}")

    def _is_untrained(self) -> bool:
        """Return True when the model has trainable LoRA-B matrices and all of them are zero."""
        if self.checks.logs_seen < WINDOW - 1:
            return False
        named = self._trainer.model.named_parameters()
        matrices = [p for n, p in named if "lora_B" in n and p.requires_grad]
        return bool(matrices) and not self._trainer.sharding.any_nonzero(matrices)

    def _checkpoints(self) -> str:
        saved = checkpoint_files.committed(Path(self._trainer.args.output_dir))
        return f"Checkpoints: {', '.join(path.name for path in saved)}." if saved else "No checkpoint was saved."
