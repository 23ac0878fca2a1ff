"""`mel-lite push`: upload a model or a dataset to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.shared import loading


def push(
    folder: Annotated[
        Path, typer.Argument(help="Run (its adapter), adapter, exported model, or folder of `experiences export`.")
    ],
    repository: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name. It is made if needed.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Upload an adapter, a model or a dataset with its card to the Hub. Lists the files first; private by default."""
    with loading("loading"):
        from mel_lite.hub import push as hub

        upload = hub.prepare(folder, repository, private=not public)
    typer.echo(upload.listing())
    if dry_run:
        typer.echo("Dry run: nothing was uploaded.")
        return
    typer.echo(hub.push(upload))
