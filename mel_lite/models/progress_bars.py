"""Progress bars of transformers and huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def are_readable() -> bool:
    """Return True where a bar can be redrawn: on a terminal and in a notebook, not in a file or pipe."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.is_terminal or console.is_jupyter


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide the bars inside the block unless `shown`, then restore the setting."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


__all__ = ["are_readable", "progress_bars"]
