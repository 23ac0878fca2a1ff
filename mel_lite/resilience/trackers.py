"""Trackers, terminal, tables and uploads: what they do wrong is told once and never stops training."""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mel_lite.text import printable_all
from mel_lite.trl_compat import released_grpo_trainer

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5
"""How long training waits for a tracker that was in time so far. One that was not is called without waiting."""
START_PATIENCE_S = 30.0
"""The same at the start of training, where trackers log in."""
AT_EXIT_S = 10.0
"""How long the program waits at its end for trackers to finish."""
MOST_WAITING = 10_000
"""Events kept for a tracker that hangs; later ones are dropped."""
MOST_FAILURES = 10
"""Failures in a row after which a side service is not called any more."""
EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))


class _Service:
    """One callback that may raise."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._failures = 0
        self._told: set[str] = set()

    def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._failures >= MOST_FAILURES:
            return
        try:
            method(*args, **kwargs)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            self.tell(f"failed ({type(error).__name__}: {error})")
            if self._failures == MOST_FAILURES:
                self.tell(f"failed {MOST_FAILURES} times in a row and is not called any more", kind="dropped")

    def tell(self, what: str, *, kind: str = "failed") -> None:
        """Warn once of each kind of trouble: the same comes back at every step."""
        if kind not in self._told:
            logger.warning("%s %s. Training goes on; what it misses is in metrics.jsonl.", self.name, what)
        self._told.add(kind)


class _Courier(_Service):
    """Brings events to one callback in order, in a thread of its own, so that it may hang, too."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._events: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._late = False
        self._thread: threading.Thread | None = None

    def send(self, method: Callable[..., Any], args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call `method` with the state as it is now; returns when it is done, or after PATIENCE_S."""
        if self._events.qsize() >= MOST_WAITING:
            return
        if "logs" in kwargs:
            kwargs["logs"] = dict(kwargs["logs"] or {})
        call = functools.partial(self.call, method, args, copy.copy(state), copy.copy(control), **kwargs)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"mel-lite-{self.name}", daemon=True)
            self._thread.start()
            atexit.register(self._idle.wait, AT_EXIT_S)
        done = threading.Event()
        self._idle.clear()
        self._events.put((call, done))
        patience_s = START_PATIENCE_S if method.__name__ == "on_train_begin" else PATIENCE_S
        if not self._late and not done.wait(patience_s):
            self._late = True
            self.tell(f"has not answered for {patience_s} s", kind="late")

    def _work(self) -> None:
        while True:
            call, done = self._events.get()
            call()
            done.set()
            if self._events.empty():
                self._late = False
                self._idle.set()


def shelter(callback: Any) -> None:
    """Make a callback harmless, in place: trackers get a thread of their own, the terminal is only kept from raising.

    A callback of the user's own is left alone: raising is how it stops a run.
    """
    is_tracker = isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values()))
    prints = isinstance(callback, (PrinterCallback, ProgressCallback)) or getattr(callback, "side_service", False)
    if not (is_tracker or prints) or getattr(callback, "_sheltered", False):
        return
    callback._sheltered = True
    service = _Courier(type(callback).__name__) if is_tracker else _Service(type(callback).__name__)
    for event in EVENTS:
        if getattr(type(callback), event) is not getattr(TrainerCallback, event):
            method = getattr(callback, event)
            bound = service.send if isinstance(service, _Courier) else service.call
            setattr(callback, event, functools.partial(bound, method))


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


class Sheltered:
    """Mixin over a TRL trainer: trackers, completion tables and Hub uploads cannot end a run."""

    callback_handler: Any
    _side: _Service

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._side = _Service("A table of completions or an upload")
        for callback in self.callback_handler.callbacks:
            shelter(callback)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's; the tables it writes after the callbacks have been called may fail."""
        try:
            with _printable_samples():
                super().log(logs, start_time)  # type: ignore[misc]
        except Exception as error:
            if any(frame.name == "call_event" for frame in traceback.extract_tb(error.__traceback__)):
                raise  # a callback stops the run
            self._side.tell(f"failed ({type(error).__name__}: {error})")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._side.call(super()._push_from_checkpoint, checkpoint_folder)  # type: ignore[misc]
