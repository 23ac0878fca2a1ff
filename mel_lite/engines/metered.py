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
        self.phase = ""
        """The innermost phase that is open; empty between phases."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start_s, outer = time.monotonic(), self.phase
        self.phase = phase
        try:
            yield
        finally:
            self.phase = outer
            self.seconds_s[phase] += time.monotonic() - start_s

    @contextmanager
    def rest(self, phase: str) -> Iterator[None]:
        """Time the block, excluding phases timed inside it."""
        start_s, before_s, outer = time.monotonic(), sum(self.seconds_s.values()), self.phase
        self.phase = phase
        try:
            yield
        finally:
            self.phase = outer
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


class MeteredEngine(Engine):
    """Counts what an engine generates, so that runs can be compared at equal generated tokens."""

    def __init__(self, engine: Engine, clock: PhaseClock) -> None:
        self.name, self.own_kernels, self.context_tokens = engine.name, engine.own_kernels, engine.context_tokens
        self.share, self.max_num_seqs = engine.share, engine.max_num_seqs
        self.unmetered = engine
        self._clock = clock
        self.total_generated_tokens = 0

    def wake(self) -> None:
        self.unmetered.wake()

    def sleep(self) -> None:
        self.unmetered.sleep()

    def limit_cache(self, tokens: int) -> bool:
        return self.unmetered.limit_cache(tokens)

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
        """While open, generated tokens do not count as training's."""
        before = self._clock.generated_tokens, self.total_generated_tokens
        try:
            yield
        finally:
            self._clock.generated_tokens, self.total_generated_tokens = before

    def _with_one_restart(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample, restarting the engine after one failure; the requests' seeds give the same completions again."""
        try:
            return self.unmetered.generate(requests, sampling)
        except EngineError:
            raise  # the engine reports that a retry cannot help
        except Exception as error:
            logger.warning("Engine %s failed (%s: %s). Restarting it.", self.name, type(error).__name__, error)
        try:
            self.unmetered.sleep()
            self.unmetered.wake()  # with the current adapter
            return self.unmetered.generate(requests, sampling)
        except Exception as error:
            raise EngineError(
                f"engine {self.name!r} failed twice on {len(requests)} requests ({type(error).__name__}: {error}). See "
                "its own log; if memory is short, lower max_completion_length or analysis_max_tokens."
            ) from error
