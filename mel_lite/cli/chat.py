"""`mel-lite chat`: ask the base model and the trained one the same questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.shared import SystemPromptOption, console, loading, newest_run, spinner
from mel_lite.errors import ConfigError


def chat(
    run: Annotated[
        Path | None, typer.Argument(help="Run, checkpoint or adapter folder.", show_default="the newest in runs/")
    ] = None,
    once: Annotated[str | None, typer.Option(help="Ask this question, and end.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one named by the adapter.")] = None,
    system_prompt: SystemPromptOption = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 = greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of sampling, the same for both.")] = 42,
) -> None:
    """Talk with the base model and the trained one, side by side.

    Questions come from the terminal or, one per line, from a pipe. `/new` starts over, `/quit` ends.
    """
    if once is not None and not once.strip():
        raise ConfigError("--once is empty. Give a question.")
    with loading("loading"):
        from mel_lite.engines.base import Sampling
        from mel_lite.run.chat import find_speaker, load_talk

        speaker = find_speaker(run or newest_run(), base, system_prompt)
        talk = load_talk(speaker, Sampling(max_new_tokens, temperature), seed=seed)
    if sys.stdin.isatty() and once is None:
        typer.echo(f"base {speaker.base.name} | trained {speaker.adapter} | /new starts over, /quit ends", err=True)
    for question in [once] if once is not None else _questions():
        if question == "/new":
            talk.start_over()
            continue
        try:
            with spinner("answering"):
                answers = talk.answer(question)
        except ConfigError as error:
            if once is not None:
                raise
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            continue
        _show(answers)


def _questions() -> Iterator[str]:
    """Yield what is typed or piped, until its end or `/quit`; empty lines are skipped."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if line:
            yield line


def _show(answers: dict[str, str]) -> None:
    from mel_lite.run.chat import answers_text, answers_view

    out: Any = console()
    if out.is_terminal:
        out.print(answers_view(answers, out.width))
    else:
        typer.echo("\n".join(answers_text(answers)))
