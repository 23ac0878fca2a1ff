"""Export trained adapters as adapter folders, merged models or GGUF files, checked for fidelity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mel_lite.export.merge import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    """Import `export` on first use, since reading a module of this package must not load transformers."""
    if name == "export":
        from mel_lite.export.merge import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
