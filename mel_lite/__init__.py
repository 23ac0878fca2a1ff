"""MEL-Lite: Meta-Experience Learning on one GPU. Importing it is cheap: torch and TRL are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mel_lite.config import MELConfig as MELConfig
    from mel_lite.trainer import MELTrainer as MELTrainer

_LAZY = {"MELConfig": "mel_lite.config", "MELTrainer": "mel_lite.trainer"}

__all__ = ["MELConfig", "MELTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        from mel_lite.deferred import deferring

        with deferring():
            return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mel_lite' has no attribute {name!r}")
