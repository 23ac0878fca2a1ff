"""Context managers for the mode of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off inside the block, then restore the training flag."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
