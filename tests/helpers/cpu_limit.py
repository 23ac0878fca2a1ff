"""A bound on CPU time: input that takes quadratic time fails, a machine that is busy with other work does not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import pytest


@contextlib.contextmanager
def cpu_limit(limit_s: float) -> Iterator[None]:
    """Fail the test when the body takes more than `limit_s` seconds of this process's CPU time.

    The body is interrupted, in a regular expression, too. Call it from the main thread.
    """

    def expire(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"took more than {limit_s} s of CPU time")

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
