"""Defer SIGINT and SIGTERM to the next safe point.

Inside `deferred()`, the first signal only sets a flag. Long loops call `poll()` once per generated token, verdict and
micro-batch; it raises Interrupted, which unwinds to the caller of `deferred()`. A second signal ends the process
immediately.
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
"""With several processes, each one gets Ctrl-C twice, from the terminal and from the launcher. A repeat within this
time is not a second request."""


class Interrupted(BaseException):
    """Unwinds training to the code that saves it. A BaseException, so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def as_exit(self, message: str) -> BaseException:
        """Return the conventional exception: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM."""
        return KeyboardInterrupt(message) if self.signum == signal.SIGINT else SystemExit(128 + self.signum)


class _Flag:
    """State set by the handler, which runs in the main thread between two bytecodes."""

    signum: int | None = None
    since_s = 0.0
    armed = False
    """True if `poll` may raise. False with several processes, which agree on a common point through `pending`."""


_flag = _Flag()


def pending() -> int | None:
    """Return the number of the signal received, or None."""
    return _flag.signum


def poll() -> None:
    """Raise Interrupted if a signal was received. Cheap; call it in every loop that may take seconds."""
    if _flag.signum is not None and _flag.armed and threading.current_thread() is threading.main_thread():
        raise Interrupted(_flag.signum)


@contextmanager
def deferred(*, alone: bool = True) -> Iterator[None]:
    """Catch SIGINT and SIGTERM for `poll`. Outside the main thread, this is a no-op.

    `alone`: False with several processes, which must stop at the same point. Then `poll` does nothing, and the caller
    that coordinates the processes checks `pending` and raises Interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[signal.Signals, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if _flag.signum is None:
            _flag.signum, _flag.since_s = signum, now_s
            name = signal.Signals(signum).name
            _write_stderr(f"\n{name}: saving a checkpoint, then stopping. A second signal stops immediately.\n")
        elif alone or now_s - _flag.since_s > DEBOUNCE_S:
            _write_stderr("\nstopped immediately; committed checkpoints are intact\n")
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
        _flag.signum = None  # after the handlers are removed, so that a late signal is not kept


def _write_stderr(text: str) -> None:
    """Write to stderr without a buffer, since a handler must not wait for a lock that the interrupted code may hold."""
    try:
        os.write(2, text.encode())
    except OSError:
        pass
