"""Benchmark of the operator: times, errors and memory next to those of other implementations.

All contenders of a shape are timed in turns, in one process.
"""

from __future__ import annotations

from .inputs import Inputs, Shape, default_shapes, model_like
from .measure import run

__all__ = ["Inputs", "Shape", "default_shapes", "model_like", "run"]
