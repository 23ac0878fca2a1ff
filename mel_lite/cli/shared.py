"""What the modules of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

ConfigOption = Annotated[Path | None, typer.Option(help="YAML file over the preset.")]
EngineOption = Annotated[
    str | None, typer.Option(help="auto, unsloth or hf: what loads the model and samples. Default: auto.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value over everything else; may be repeated.")
]


def console() -> Console:
    """Where results are printed."""
    from rich.console import Console

    return Console()


def loading(what: str) -> Status:
    """A spinner for the seconds that importing torch and TRL takes; silent where there is no terminal."""
    from rich.console import Console

    return Console(stderr=True).status(what)
