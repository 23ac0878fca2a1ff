"""Workers of the built-in verifiers that outlive a trainer. Starting two took a third of a test that trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

from mel_lite.training import assemble
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.verifiers import BUILT_IN

_shared = functools.cache(VerifyPool)


def _pool(verifier: Any, **options: Any) -> VerifyPool:
    return _shared(verifier, **options) if verifier in BUILT_IN else VerifyPool(verifier, **options)


@contextlib.contextmanager
def warm_verifiers() -> Iterator[None]:
    """Let trainers that are built in this block judge in the test process's pool of their verifier and options."""
    with mock.patch.object(assemble, "VerifyPool", _pool):
        yield
