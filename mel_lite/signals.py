"""SIGINT and SIGTERM as a wish that is granted at the next safe point, not as a crash.

While `deferred()` is open the first signal only raises a flag. `poll()`, which long loops call once per generated
token, verdict and micro-batch, then unwinds to whoever opened it. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEBOUNCE_S = 2.0
"""Each of several processes gets a Ctrl-C twice, from terminal and launcher: that is not the user asking again."""


class Interrupted(BaseException):
    """Unwinds training to the place where it is saved. No `except Exception` on the way may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def as_exit(self, message: str) -> BaseException:
        """What a program expects: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM."""
        return KeyboardInterrupt(message) if self.signum == signal.SIGINT else SystemExit(128 + self.signum)


class _Flag:
    """Set by the handler, which runs in the main thread between two bytecodes."""

    signum: int | None = None
    since_s = 0.0
    armed = False
    """Whether `poll` unwinds; several processes agree on it instead (`pending`)."""


_flag = _Flag()


def pending() -> int | None:
    """The signal that came in, if one did."""
    return _flag.signum


def poll() -> None:
    """Raise Interrupted when a signal came in. Cheap; call it in every loop that may take seconds."""
    if _flag.signum is not None and _flag.armed and threading.current_thread() is threading.main_thread():
        raise Interrupted(_flag.signum)


@contextmanager
def deferred(*, alone: bool = True) -> Iterator[None]:
    """Catch SIGINT and SIGTERM for `poll`. In a thread other than the main one, signals stay as they are.

    Several processes (`alone` False) must stop at the same point: there `poll` does nothing, and whoever knows them
    all asks `pending` and raises Interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if _flag.signum is None:
            _flag.signum, _flag.since_s = signum, now_s
            _say(f"\n{signal.Signals(signum).name}: saving a checkpoint, then stopping. A second one stops at once.\n")
        elif alone or now_s - _flag.since_s > DEBOUNCE_S:
            _say("\nstopped at once; committed checkpoints are whole\n")
            os._exit(128 + signum)

    try:
        for each in SIGNALS:
            previous[each] = signal.signal(each, handle)
        _flag.armed = alone
        yield
    finally:
        _flag.armed = False
        for each, handler in previous.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
        _flag.signum = None  # after the handlers are gone: one more signal must not outlive this


def _say(text: str) -> None:
    """Straight to stderr: a handler must not wait for a lock that the code it interrupted may hold."""
    try:
        os.write(2, text.encode())
    except OSError:
        pass
