"""Warnings of a run: shown where they arise, and kept for the summary."""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.text import Text

from mel_lite.text import printable


class Notices(logging.Handler):
    """Shows MEL-Lite's warnings above the live view of a terminal, else on stderr. Use it as a context."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self.seen: list[str] = []
        """Different warnings so far, oldest first."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = printable(record.getMessage())
            if text not in self.seen:
                self.seen.append(text)
            if self._console.is_terminal and not self._console.quiet:
                self._console.print(Text.assemble(("warning: ", "bold yellow"), text))
            else:
                print(f"warning: {text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):  # a closed terminal stops no training
            self.handleError(record)

    def __enter__(self) -> Notices:
        logging.getLogger("mel_lite").addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("mel_lite").removeHandler(self)


__all__ = ["Notices"]
