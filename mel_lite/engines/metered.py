"""Count and time what a run generates, and restart an engine that failed once."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mel_lite import signals
from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import EngineError

logger = logging.getLogger(__name__)


OF_LESSONS = ("forks", "analysis", "scored", "replay", "examine", "internalise", "rescore")
"""Phases that exist for lessons alone."""


@dataclass(frozen=True, slots=True)
class PhaseEnd:
    """A phase that has just ended."""

    name: str
    seconds_s: float
    """Without the phases inside it."""
    parts: int
    """Sequences, answers or micro-batches it had; 0 = it has none."""
    tokens: int
    """Tokens generated in it."""


class PhaseClock:
    """Seconds and generated tokens per phase of a step, on a monotonic clock.

    `phase`, `done`, `total`, `tokens_each` and `since_s` say what is going on; another thread may read them.
    """

    def __init__(self) -> None:
        self.seconds_s: defaultdict[str, float] = defaultdict(float)
        self.generated_tokens = 0
        self.lesson_tokens = 0
        """Those of them that analyses and replays have."""
        self.shared_s = 0.0
        """Seconds of calls for rollouts and lessons together that count as the lessons', in proportion to tokens."""
        self.phase = ""
        """The innermost phase that is open; empty between phases."""
        self.done, self.total = 0, 0
        """Parts of the open phase that are done, of how many: sequences, answers or micro-batches; 0 = unknown."""
        self.tokens_each = 0
        """Tokens that each of the sequences being sampled has so far; 0 = unknown."""
        self.most_tokens = 0
        """Most tokens that each of them may get; 0 = unknown."""
        self.since_s = 0.0
        """Start of the open phase by `time.monotonic`."""
        self.on_end: Callable[[PhaseEnd], None] | None = None
        """Called at the end of each phase."""
        self.on_change: Callable[[str], None] = lambda phase: None
        """Called with the innermost phase before another one becomes the innermost."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with self._open(phase) as start_s:
            tokens = self.generated_tokens
            try:
                yield
            finally:
                self._end(phase, time.monotonic() - start_s, tokens)

    @contextmanager
    def rest(self, phase: str) -> Iterator[None]:
        """Time the block, excluding phases timed inside it."""
        before_s = sum(self.seconds_s.values())
        with self._open(phase) as start_s:
            try:
                yield
            finally:
                inner_s = sum(self.seconds_s.values()) - before_s
                self._end(phase, time.monotonic() - start_s - inner_s, self.generated_tokens)

    @contextmanager
    def untimed(self, phase: str) -> Iterator[None]:
        """Name the phase that is going on, without counting its seconds: it is no part of a step."""
        with self._open(phase):
            yield

    def expect(self, total: int, *, most_tokens: int = 0) -> None:
        """The open phase has this many parts, of which none is done."""
        self.done, self.total, self.tokens_each, self.most_tokens = 0, total, 0, most_tokens

    def saw(self, done: int, tokens_each: int = 0) -> None:
        """Note how far the open phase is."""
        self.done, self.tokens_each = done, tokens_each

    @contextmanager
    def _open(self, phase: str) -> Iterator[float]:
        outer = self.phase, self.done, self.total, self.tokens_each, self.most_tokens, self.since_s
        self.on_change(self.phase)
        self.phase, self.done, self.total, self.tokens_each = phase, 0, 0, 0
        self.since_s = time.monotonic()
        try:
            yield self.since_s
        finally:
            self.on_change(self.phase)
            self.phase, self.done, self.total, self.tokens_each, self.most_tokens, self.since_s = outer

    def _end(self, phase: str, seconds_s: float, tokens_before: int) -> None:
        self.seconds_s[phase] += seconds_s
        if phase in OF_LESSONS:
            self.lesson_tokens += self.generated_tokens - tokens_before
        if self.on_end is not None:
            self.on_end(PhaseEnd(phase, seconds_s, self.total, self.generated_tokens - tokens_before))

    def overhead(self) -> dict[str, float]:
        """Cost of lessons since the last `drain`, without their rows in the update: what plain GRPO would not spend.

        `mel/time_overhead_s` are the seconds of phases of their own and their part of shared calls;
        `mel/token_overhead` their generated tokens over those of the rollouts.
        """
        of_rollouts = self.generated_tokens - self.lesson_tokens
        seconds_s = self.shared_s + sum(self.seconds_s.get(phase, 0.0) for phase in OF_LESSONS)
        tokens = {"mel/token_overhead": self.lesson_tokens / of_rollouts} if of_rollouts else {}
        return tokens | {"mel/time_overhead_s": seconds_s}

    def drain(self) -> dict[str, float]:
        """Metrics since the last call: `time/<phase>_s`, `mel/generated_tokens` and `mel/tokens_per_s`."""
        generation_s = sum(self.seconds_s.get(p, 0.0) for p in ("rollout", "analysis", "replay"))
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds_s.items()}
        metrics["mel/generated_tokens"] = float(self.generated_tokens)
        if generation_s > 0:
            metrics["mel/tokens_per_s"] = self.generated_tokens / generation_s
        self.seconds_s.clear()
        self.generated_tokens, self.lesson_tokens, self.shared_s = 0, 0, 0.0
        return metrics


class MeteredEngine(Engine):
    """Counts what an engine generates, so that runs can be compared at equal generated tokens."""

    def __init__(self, engine: Engine, clock: PhaseClock) -> None:
        self.name, self.own_kernels, self.context_tokens = engine.name, engine.own_kernels, engine.context_tokens
        self.mixes, self.share, self.max_num_seqs = engine.mixes, engine.share, engine.max_num_seqs
        self.ends_hopeless = engine.ends_hopeless
        self.unmetered = engine
        engine.watch = clock.saw
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
        most = max((request.options(sampling).max_new_tokens for request in requests), default=0)
        self._clock.expect(len(requests), most_tokens=most)
        completions = self._with_one_restart(requests, sampling)
        signals.poll()
        self._clock.saw(len(requests))
        tokens = sum(len(c.ids) for c in completions)
        self._clock.generated_tokens += tokens
        self.total_generated_tokens += tokens
        return completions

    def generate_with(
        self, of_lessons: Sequence[Request], requests: Sequence[Request], sampling: Sampling
    ) -> tuple[list[Completion], list[Completion]]:
        """Sample the completions of `requests` and `of_lessons` in one call; the latter are charged to lessons.

        Returns: the completions of both, each in the order of its requests.
        """
        start_s = time.monotonic()
        both = self.generate([*requests, *of_lessons], sampling)
        first, others = both[: len(requests)], both[len(requests) :]
        tokens = sum(len(each.ids) for each in others)
        self._clock.lesson_tokens += tokens
        if tokens:
            all_tokens = tokens + sum(len(each.ids) for each in first)
            self._clock.shared_s += (time.monotonic() - start_s) * tokens / all_tokens
        return first, others

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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open, neither tokens nor seconds count as training's."""
        with self._clock.untimed("evaluation"), self.uncounted():
            yield

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
