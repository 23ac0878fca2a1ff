"""What a step measures beside TRL's metrics: phases, the funnel, gradient norms of the two terms; and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mel_lite import signals
from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import EngineError
from mel_lite.types import Experience, Group, Replay, Status

logger = logging.getLogger(__name__)

FUNNEL_COUNTS = tuple(
    f"mel/{stage}"
    for stage in ("groups", "mixed_groups", "pairs", "written", "parsed", "leak_free", "replay_valid", "trained_tokens")
)
"""The counts among the funnel's metrics, in the order of its stages."""


class PhaseClock:
    """Seconds and generated tokens per phase of a step, on a monotonic clock."""

    def __init__(self) -> None:
        self.seconds_s: defaultdict[str, float] = defaultdict(float)
        self.generated_tokens = 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds_s[phase] += time.monotonic() - start_s

    def drain(self) -> dict[str, float]:
        """Metrics since the last call: `time/<phase>_s`, `mel/generated_tokens` and `mel/tokens_per_s`."""
        generation_s = sum(self.seconds_s.get(p, 0.0) for p in ("rollout", "analysis", "replay"))
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds_s.items()}
        metrics["mel/generated_tokens"] = float(self.generated_tokens)
        if generation_s > 0:
            metrics["mel/tokens_per_s"] = self.generated_tokens / generation_s
        self.seconds_s.clear()
        self.generated_tokens = 0
        return metrics


class MeteredEngine:
    """An engine that counts what it generates. A run compares algorithms at equal generated tokens."""

    def __init__(self, engine: Engine, clock: PhaseClock) -> None:
        self.name = engine.name
        self.own_kernels = bool(getattr(engine, "own_kernels", False))
        self.context_tokens: int | None = getattr(engine, "context_tokens", None)
        """Longest sequence it takes; None = the model's own bound."""
        self.unmetered = engine
        self._engine = engine
        self._clock = clock
        self.total_generated_tokens = 0

    def wake(self) -> None:
        self._engine.wake()

    def sleep(self) -> None:
        self._engine.sleep()

    def limit_cache(self, tokens: int) -> bool:
        """Have the engine hold fewer tokens at once; False when it cannot."""
        limit = getattr(self._engine, "limit_cache", None)
        if limit is not None:
            limit(tokens)
        return limit is not None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        signals.poll()
        completions = self._with_one_restart(requests, sampling)
        signals.poll()
        tokens = sum(len(c.ids) for c in completions)
        self._clock.generated_tokens += tokens
        self.total_generated_tokens += tokens
        return completions

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """While open, tokens do not count: they are not training's."""
        noted = self._clock.generated_tokens, self.total_generated_tokens
        try:
            yield
        finally:
            self._clock.generated_tokens, self.total_generated_tokens = noted

    def _with_one_restart(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Seeds belong to the requests, so what is sampled after a restart is what the failed call would have."""
        try:
            return self._engine.generate(requests, sampling)
        except EngineError:
            raise  # it knows that trying again is of no use
        except Exception as error:
            logger.warning("Engine %s failed (%s: %s). Restarting it.", self.name, type(error).__name__, error)
        try:
            self._engine.sleep()
            self._engine.wake()  # with the adapter as it is now
            return self._engine.generate(requests, sampling)
        except Exception as error:
            raise EngineError(
                f"engine {self.name!r} failed twice on {len(requests)} requests ({type(error).__name__}: {error}). See "
                "its own log; for want of memory lower max_completion_length or analysis_max_tokens."
            ) from error


def funnel(
    groups: Sequence[Group], pairs: int, experiences: Sequence[Experience], trained_tokens: int
) -> dict[str, float]:
    """Where the meta-experiences of a step went: each stage counts what is left of the one before.

    `mel/retention_ratio` is kept / written, `mel/leak_rate` leaked / parsed, `mel/replay_uplift` the mean over replayed
    ones of the solved rate with M minus the rate without; a ratio whose denominator is 0 is left out.
    """
    counts = Counter(e.status for e in experiences)
    replayed = [e.replay for e in experiences if e.replay is not None]
    parsed = len(experiences) - counts[Status.UNPARSED]
    metrics = {
        "mel/groups": len(groups),
        "mel/mixed_groups": sum(g.is_mixed for g in groups),
        "mel/pairs": pairs,
        "mel/written": len(experiences),
        "mel/parsed": parsed,
        "mel/leak_free": len(replayed),
        "mel/replay_valid": counts[Status.KEPT],
        "mel/trained_tokens": trained_tokens,
    }
    judged = [r.verdict for g in groups for r in g.rollouts if r.verdict != "abstain"]
    rollouts = sum(len(g.rollouts) for g in groups)
    ratios = {
        "mel/pass_rate": (sum(v == "right" for v in judged), len(judged)),
        "mel/abstain_rate": (rollouts - len(judged), rollouts),
        "mel/retention_ratio": (counts[Status.KEPT], len(experiences)),
        "mel/leak_rate": (counts[Status.LEAKED], parsed),
        "mel/replay_solved": (sum(r.solved_rate for r in replayed), len(replayed)),
        "mel/replay_uplift": _uplift(replayed),
    }
    return metrics | {name: total / n for name, (total, n) in ratios.items() if n}


def _uplift(replays: Sequence[Replay]) -> tuple[float, int]:
    uplifts = [r.uplift for r in replays if r.uplift is not None]
    return sum(uplifts), len(uplifts)


class GradientMeter:
    """Gradient of each loss term over one optimiser step, accumulated apart from the training gradient."""

    TERMS = ("policy", "nll")

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._grads: dict[str, list[torch.Tensor]] = {}
        self._given_up = False

    def give_up(self) -> None:
        """Measure nothing more until the next `drain`: a part of the step is done again and would count twice."""
        self._grads.clear()
        self._given_up = True

    def add(self, term: str, loss: torch.Tensor, *, scale: float = 1.0) -> None:
        """Add the gradient of `loss`, keeping its graph for the backward that trains.

        `scale` is the gradient scaler's: without it, small float16 gradients would vanish on the way. A loss without
        graph adds nothing.
        """
        if self._given_up or not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss * scale, self._parameters, retain_graph=True, allow_unused=True)
        sums = self._grads.setdefault(term, [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters])
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad.float() / scale

    def drain(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`mel/grad_norm_<term>` (L2, before clipping) and `mel/grad_cosine` where both terms had a gradient.

        `reduce` averages a tensor over ranks; it is called for both terms on every rank, with zeros where a rank had
        no lesson. The cosine is in [-1, 1]: below 0 the two terms pull apart.
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


class MetricsWriter(TrainerCallback):
    """Appends every log of the trainer to `metrics.jsonl`: one JSON object per line, numbers or null only.

    Where the disk does not take a line it is kept and written with the next one; there is one warning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []
        self._told = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step} | {k: _jsonable(v) for k, v in logs.items()}
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            self._write("".join(self._unwritten))
            self._unwritten.clear()
        except OSError as error:
            if not self._told:
                logger.warning("%s cannot be written (%s). Training goes on; lines wait.", self._path, error)
            self._told = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._unwritten:
            logger.warning("%s lacks the last %s lines: the disk did not take them.", self._path, len(self._unwritten))

    def _write(self, text: str) -> None:
        """All of the text or nothing of it. Raises: OSError."""
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
    """Drop the lines of steps after `last_step` and any half-written one, so that a resumed run logs each step once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(line + "\n" for line in kept))
    staged.replace(path)
