"""Count and time what a run generates, and restart an engine that failed once."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mel_lite import signals
from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import EngineError

logger = logging.getLogger(__name__)


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

    @contextmanager
    def rest(self, phase: str) -> Iterator[None]:
        """Time what is open, without the phases that are timed inside it."""
        start_s, before_s = time.monotonic(), sum(self.seconds_s.values())
        try:
            yield
        finally:
            inner_s = sum(self.seconds_s.values()) - before_s
            self.seconds_s[phase] += time.monotonic() - start_s - inner_s

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

    def state_dict(self) -> dict[str, Any]:
        return {"generated_tokens": self.total_generated_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total_generated_tokens = state["generated_tokens"]

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
