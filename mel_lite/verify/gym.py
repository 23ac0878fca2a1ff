"""Call reasoning-gym's own scorers without letting them evaluate model text.

A few of its tasks pass the answer to `eval` or to sympy's `parse_expr` (which is `eval`). Tasks that use `eval` give
the full score only to an exact match, which is tested here instead. For tasks that use `parse_expr`, the answer must be
a bare formula; anything else scores 0 without being parsed. Needs the `gym` extra.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mel_lite.errors import VerifierError
from mel_lite.imports import install_command

_EVALUATED = frozenset({"string_insertion", "spiral_matrix", "binary_matrix", "n_queens"})
_PARSED = frozenset(
    {"countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"}
)
_FORMULA = re.compile(r"(?:[0-9+\-*/(). ^]|\b(?:[A-Za-z]|sin|cos|tan|exp|log|ln|sqrt|asin|acos|atan)\b)*")
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z]|[A-Za-z)]\s*\.")


def require() -> Any:
    """Import the reasoning_gym package. Raises: VerifierError when it is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise VerifierError(
            f"verifier = 'reasoning-gym' needs the package reasoning-gym ({error}). "
            f"Install it with: {install_command('gym')} (one of its parts needs a C compiler)."
        ) from error
    return reasoning_gym


def score(candidate: str, gym_entry: str) -> float:
    """Score an answer to a generated entry, in [0, 1]. The entry is JSON: question, answer, metadata.source_dataset.

    Raises: VerifierError when the entry names no task, or a task that this version of reasoning-gym does not have.
    """
    try:
        entry = json.loads(gym_entry)
        task = entry["metadata"]["source_dataset"]
    except (TypeError, KeyError, ValueError) as error:
        raise VerifierError(
            f"column 'gym_entry' = {str(gym_entry)[:80]!r} is not a reasoning-gym entry ({type(error).__name__}: "
            f"{error}). Load the data with dataset = 'reasoning-gym:<task>', or choose another verifier."
        ) from error
    if not candidate:
        return 0.0
    if task in _EVALUATED:
        return float(candidate == entry["answer"].strip() or candidate in entry["metadata"].get("valid_answers", []))
    if task in _PARSED and (_FORMULA.fullmatch(candidate) is None or _ATTRIBUTE.search(candidate) is not None):
        return 0.0
    return float(_scorer(task)(candidate, entry))


@lru_cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        return require().get_score_answer_fn(task)
    except (KeyError, ValueError) as error:
        raise VerifierError(f"reasoning-gym has no task {task!r} ({error}). Update the package.") from error
