"""Options and helpers shared by the command-line modules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

ConfigOption = Annotated[Path | None, typer.Option(help="YAML file that overrides the preset.")]
EngineOption = Annotated[
    str | None, typer.Option(help="Engine that loads the model and samples: auto, unsloth or hf. Default: auto.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; overrides everything else; repeatable.")
]


def console() -> Console:
    """Return the console for results (stdout)."""
    from rich.console import Console

    return Console()


def loading(what: str) -> Status:
    """Return a spinner to show while torch and TRL are imported, on stderr. Without a terminal it prints nothing."""
    from rich.console import Console

    return Console(stderr=True).status(what)
