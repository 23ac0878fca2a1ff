"""Public API of the verifiers: `get_verifier("numeric")("Answer: 42", "42")` returns the verdict `right`."""

from __future__ import annotations

from mel_lite.types import Verdict
from mel_lite.verify.verifiers import BUILT_IN, Verifier, get_verifier

__all__ = ["BUILT_IN", "Verdict", "Verifier", "get_verifier"]
