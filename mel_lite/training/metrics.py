"""Metrics in addition to TRL's: lesson funnel, gradient norms of both loss terms, peak memory, and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from mel_lite.files import atomic_write_text
from mel_lite.memory.formulas import GIB
from mel_lite.types import Experience, Finish, Group, Replay, Status

logger = logging.getLogger(__name__)

FUNNEL_COUNTS = tuple(
    f"mel/{stage}"
    for stage in (
        "groups",
        "mixed_groups",
        "pairs",
        "written",
        "parsed",
        "quoted",
        "leak_free",
        "replay_valid",
        "trained_tokens",
    )
)
"""The counts among the funnel's metrics, in the order of its stages. `quoted` is no stage: it filters nothing."""


class FunnelTotals(Counter[str]):
    """Funnel counts summed over the run, by metric name."""

    def add(self, stages: Mapping[str, float]) -> None:
        """Add one step's counts."""
        self.update({name: int(stages[name]) for name in FUNNEL_COUNTS})

    def state_dict(self) -> dict[str, Any]:
        return {"funnel_totals": dict(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clear()
        self.update(state["funnel_totals"])


def funnel(
    groups: Sequence[Group], pairs: int, experiences: Sequence[Experience], trained_tokens: int
) -> dict[str, float]:
    """Return the funnel of one step: each stage counts the meta-experiences left from the stage before.

    `mel/quoted` counts the parsed ones whose bifurcation quotes the wrong solution. `mel/retention_ratio` is kept /
    written, `mel/leak_rate` is leaked / parsed, and `mel/replay_uplift` is the mean, over replayed ones, of the solved
    rate with M minus the rate without. `mel/score_shift` is the mean shift of scored ones in nats, `mel/score_valid`
    the share of them above 0, and `mel/unscored` the number of those whose rollouts did not fit the context.
    `mel/ended_early` counts hopeless analyses, `mel/replay_attempts` attempts with M, and `mel/staleness` is the mean
    number of steps since the rollouts where it is not 0. A ratio with denominator 0 is left out.
    """
    counts = Counter(e.status for e in experiences)
    replayed = [e.replay for e in experiences if e.replay is not None]
    shifts = [e.shift_nats for e in experiences if e.shift_nats is not None]
    unscored = sum(e.status is Status.NOT_LIFTING and e.shift_nats is None for e in experiences)
    parsed = len(experiences) - counts[Status.UNPARSED]
    metrics = {
        "mel/groups": len(groups),
        "mel/mixed_groups": sum(g.is_mixed for g in groups),
        "mel/pairs": pairs,
        "mel/written": len(experiences),
        "mel/parsed": parsed,
        "mel/quoted": sum(e.quote is not None for e in experiences),
        "mel/leak_free": parsed - counts[Status.LEAKED],
        "mel/replay_valid": counts[Status.KEPT],
        "mel/trained_tokens": trained_tokens,
    }
    metrics["mel/ended_early"] = sum(e.analysis.finish is Finish.ENDED for e in experiences)
    metrics["mel/replay_attempts"] = sum(len(r.verdicts) for r in replayed)
    if shifts or unscored:
        metrics["mel/unscored"] = unscored
    stale = [e.staleness_steps for e in experiences if e.staleness_steps]
    judged = [r.verdict for g in groups for r in g.rollouts if r.verdict != "abstain"]
    rollouts = sum(len(g.rollouts) for g in groups)
    ratios = {
        "mel/pass_rate": (sum(v == "right" for v in judged), len(judged)),
        "mel/abstain_rate": (rollouts - len(judged), rollouts),
        "mel/retention_ratio": (counts[Status.KEPT], len(experiences)),
        "mel/leak_rate": (counts[Status.LEAKED], parsed),
        "mel/replay_solved": (sum(r.solved_rate for r in replayed), len(replayed)),
        "mel/replay_uplift": _uplift(replayed),
        "mel/staleness": (sum(stale), len(stale)),
        "mel/score_shift": (sum(shifts), len(shifts)),
        "mel/score_valid": (sum(shift > 0 for shift in shifts), len(shifts)),
    }
    return metrics | {name: total / n for name, (total, n) in ratios.items() if n}


def _uplift(replays: Sequence[Replay]) -> tuple[float, int]:
    uplifts = [r.uplift for r in replays if r.uplift is not None]
    return sum(uplifts), len(uplifts)


def mean_over_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return each metric's mean over the ranks that have it. Every rank must call it."""
    gathered = gather_object([dict(metrics)])
    names = dict.fromkeys(name for each in gathered for name in each)
    columns = {name: [each[name] for each in gathered if name in each] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


class GradientMeter:
    """Gradient of each loss term over one optimizer step, accumulated separately from the training gradient."""

    TERMS = ("policy", "nll")

    def __init__(self, parameters: Sequence[torch.nn.Parameter], *, every: int = 0) -> None:
        self.every = every
        """Optimizer steps between measurements; 0 = never."""
        self._parameters = [p for p in parameters if p.requires_grad]
        self._grads: dict[str, list[torch.Tensor]] = {}
        self._given_up = False

    def is_due(self, step: int) -> bool:
        """Return True when the losses of this step are to be measured."""
        return bool(self.every) and torch.is_grad_enabled() and step % self.every == 0

    def give_up(self) -> None:
        """Measure nothing until the next `drain`: a part of the step is repeated and would count twice."""
        self._grads.clear()
        self._given_up = True

    def add(self, term: str, loss: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add the gradient of `loss`, keeping its graph for the backward that trains.

        `scale` is the gradient scaler's factor; without it small float16 gradients underflow. A loss without a graph
        adds nothing.
        """
        if self._given_up or not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss * scale, self._parameters, retain_graph=True, allow_unused=True)
        sums = self._grads.setdefault(term, [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters])
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad.float() / scale

    def drain(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return `mel/grad_norm_<term>` (L2, before clipping), and `mel/grad_cosine` if both terms had a gradient.

        `reduce` averages a tensor over ranks. It is called for both terms on every rank, with zeros where a rank had
        no lesson. The cosine is in [-1, 1]; below 0 the two gradients conflict.
        """
        self._given_up = False
        if not self._grads:
            return {}
        flat = {}
        for term in self.TERMS:
            grads = self._grads.get(term) or [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
            flat[term] = reduce(torch.cat([grad.flatten() for grad in grads]))
        self._grads.clear()
        norms = {term: grad.norm().item() for term, grad in flat.items()}
        metrics = {f"mel/grad_norm_{term}": norm for term, norm in norms.items() if norm > 0}
        if all(norms.values()):
            product = torch.dot(flat["policy"], flat["nll"]).item()
            metrics["mel/grad_cosine"] = product / (norms["policy"] * norms["nll"])
        return metrics


def fill_phases(metrics: dict[str, list[float]]) -> None:
    """Add 0 seconds of a phase for each step without it: TRL logs the mean, which then is the total / steps."""
    steps = len(metrics.get("mel/generated_tokens", ()))
    for name, values in metrics.items():
        if name.startswith("time/"):
            values.extend([0.0] * (steps - len(values)))


def peak_metrics() -> dict[str, float]:
    """Return `mel/peak_memory_gib`: the peak since the process began, of the GPU or of this process's RSS.

    On a GPU it is what is in use on the device, by any program, plus what PyTorch's allocator held above that at its
    peak. Reads counters only and resets none. Empty where the system does not tell.
    """
    if torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        above_now = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        return {"mel/peak_memory_gib": (total_bytes - free_bytes + above_now) / GIB}
    peak_bytes = peak_rss_bytes()
    return {"mel/peak_memory_gib": peak_bytes / GIB} if peak_bytes else {}


def peak_rss_bytes() -> int:
    """Return this process's peak RSS, from Linux' /proc; 0 elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class MetricsWriter(TrainerCallback):
    """Append every log of the trainer to `metrics.jsonl`: one JSON object per line, numbers or null only.

    A line that cannot be written is kept and written with the next one. The user is warned once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []
        self._has_warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step} | {k: _jsonable(v) for k, v in logs.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            self._write("".join(self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            if not self._has_warned:
                logger.warning(
                    "%s cannot be written (%s). Training continues; lines are kept in memory.", self._path, error
                )
            self._has_warned = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._unwritten:
            logger.warning(
                "%s is missing its last %s lines: they could not be written.", self._path, len(self._unwritten)
            )

    def _write(self, text: str) -> None:
        """Write all of the text or none of it. Raises: OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            data = text.encode()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                file.truncate(size)
                raise


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop lines of steps after `last_step` and half-written lines, so that a resumed run logs each step once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    atomic_write_text(path, "".join(line + "\n" for line in kept))
