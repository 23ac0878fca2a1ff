"""Keep trackers, terminal output, completion tables and uploads from stopping training."""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl.extras import profiling

from mel_lite.text import printable_all
from mel_lite.trl_compat import released_grpo_trainer

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5
"""Timeout of one tracker call; after the first timeout, calls are not awaited."""
START_PATIENCE_S = 30.0
"""The same at the start of training, when trackers log in."""
AT_EXIT_S = 10.0
"""Longest wait for trackers when the program ends."""
MAX_QUEUED = 10_000
"""Events kept for a tracker that hangs; later ones are dropped."""
MAX_FAILURES = 10
"""Consecutive failures after which a service is no longer called."""
EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


class SideService:
    """Calls something that may raise, and reports each kind of failure once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._failures = 0
        self._reported: set[str] = set()

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._failures >= MAX_FAILURES:
            return
        try:
            method(*args, **kwargs)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self.report(f"failed ({type(error).__name__}: {error})")
            if self._failures == MAX_FAILURES:
                self.report(f"failed {MAX_FAILURES} times in a row and is no longer called", kind="dropped")

    def report(self, what: str, *, kind: str = "failed") -> None:
        """Warn once per kind of failure, since the same one may recur at every step."""
        if kind not in self._reported:
            logger.warning("%s %s. Training continues; what it misses is in metrics.jsonl.", self.name, what)
        self._reported.add(kind)


class AsyncTracker(SideService):
    """Deliver events in order from a thread, so a hanging tracker cannot block training."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._events: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._late = False
        self._thread: threading.Thread | None = None
        self.sent_lessons = 0
        """Id of the newest meta-experience in a table."""

    def send(self, method: Callable[..., Any], args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `method` with a copy of the current state; return when it is done, or after PATIENCE_S."""
        if "logs" in kwargs:
            kwargs["logs"] = dict(kwargs["logs"] or {})
        patience_s = START_PATIENCE_S if method.__name__ == "on_train_begin" else PATIENCE_S
        self._deliver(patience_s, method, args, copy.copy(state), copy.copy(control), **kwargs)

    def post(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `method` after the events sent so far; return when it is done, or after PATIENCE_S."""
        self._deliver(PATIENCE_S, method, *args, **kwargs)

    def _deliver(self, patience_s: float, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._events.qsize() >= MAX_QUEUED:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"mel-lite-{self.name}", daemon=True)
            self._thread.start()
            atexit.register(self._idle.wait, AT_EXIT_S)
        done = threading.Event()
        self._idle.clear()
        self._events.put((functools.partial(self.call, method, *args, **kwargs), done))
        if not self._late and not done.wait(patience_s):
            self._late = True
            self.report(f"has not answered for {patience_s} s", kind="late")

    def _work(self) -> None:
        while True:
            call, done = self._events.get()
            call()
            done.set()
            if self._events.empty():
                self._late = False
                self._idle.set()


class _InItsThread:
    """A tracker's package whose `log` is called in the tracker's thread."""

    def __init__(self, package: Any, tracker: AsyncTracker) -> None:
        self._package, self._tracker = package, tracker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._package, name)

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._tracker.post(self._package.log, *args, **kwargs)


def _route_logs(callback: Any, tracker: AsyncTracker) -> None:
    """Send what TRL itself logs to a tracker (tables of completions, times of its functions) to the tracker's thread.

    trackio knows its run only in the thread that started it, and would raise in any other, which ends training.
    """
    for package in ("trackio", "wandb"):
        held = getattr(callback, f"_{package}", None)
        for names in (released_grpo_trainer().log.__globals__, vars(profiling)):
            if held is not None and package in names:
                names[package] = _InItsThread(held, tracker)


def guard_trackers(callbacks: Iterable[Any]) -> None:
    """Keep trackers and terminal callbacks from raising or hanging, in place; a second call is a no-op.

    Trackers get a thread of their own. A user's own callback is left alone: raising is how it stops a run.
    """
    for callback in callbacks:
        is_tracker = isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))
        prints = isinstance(callback, (PrinterCallback, ProgressCallback)) or getattr(callback, "side_service", False)
        if not (is_tracker or prints) or getattr(callback, "is_guarded", False):
            continue
        callback.is_guarded = True
        service = AsyncTracker(type(callback).__name__) if is_tracker else SideService(type(callback).__name__)
        if isinstance(service, AsyncTracker):
            callback.tracker = service
            _route_logs(callback, service)
        bound = service.send if isinstance(service, AsyncTracker) else service.call
        for event in EVENTS:
            if getattr(type(callback), event) is not getattr(TrainerCallback, event):
                setattr(callback, event, functools.partial(bound, getattr(callback, event)))


@contextmanager
def _printable_samples() -> Iterator[None]:
    """While open, the samples TRL prints have no control characters; its tables on disk keep them."""
    names = released_grpo_trainer().log.__globals__
    original = names["print_prompt_completions_sample"]

    def show(*args: Any, **kwargs: Any) -> None:
        original(*printable_all(args), **printable_all(kwargs))

    names["print_prompt_completions_sample"] = show
    try:
        yield
    finally:
        names["print_prompt_completions_sample"] = original


@contextmanager
def guarded_tables(service: SideService) -> Iterator[None]:
    """While open, the completion tables that TRL's `log` prints and writes may fail; errors of callbacks propagate."""
    try:
        with _printable_samples():
            yield
    except Exception as error:
        if any(frame.name == "call_event" for frame in traceback.extract_tb(error.__traceback__)):
            raise  # a callback stops the run
        service.report(f"failed ({type(error).__name__}: {error})")
