"""`mel-lite probe`: measure what a run and its lessons would learn from, before the run."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.gpu import recipe_of
from mel_lite.cli.shared import (
    NO_PRESET,
    AnswerColumnOption,
    ConfigOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    PromptColumnOption,
    SetOption,
    SplitOption,
    chosen_preset,
    console,
    hide_gpus,
    loading,
    overrides_of,
)
from mel_lite.errors import ConfigError


def probe(
    gpu: GpuOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    split: SplitOption = None,
    prompt_column: PromptColumnOption = None,
    answer_column: AnswerColumnOption = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter that training would continue.")] = None,
    engine: EngineOption = None,
    set_: SetOption = None,
    prompts: Annotated[int, typer.Option(min=12, help="Different prompts to sample; lessons come from a third.")] = 36,
    attempts: Annotated[int, typer.Option(min=1, help="Replays per lesson, with it and without.")] = 4,
    output_dir: Annotated[Path | None, typer.Option(help="New folder for figures and lessons, in runs/.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure on a few dozen prompts if lessons can help, and which internalization to choose. Trains nothing."""
    from mel_lite.run.folder import default_output_dir

    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    flags = {
        "model.name": ("--model", model),
        "model.engine": ("--engine", engine),
        "data.train": ("--dataset", dataset),
        "data.split": ("--split", split),
        "data.prompt_column": ("--prompt-column", prompt_column),
        "data.answer_column": ("--answer-column", answer_column),
        "lora.start_from": ("--adapter", None if adapter is None else str(adapter)),
    }
    overrides = overrides_of(flags, set_)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        recipe, _ = recipe_of(chosen_preset(gpu), config, overrides, resumed=None)
        if recipe.train.get("use_cpu"):
            hide_gpus()
        with loading("loading"):
            from mel_lite.run.probe.run import probe as run
        folder = output_dir or default_output_dir(recipe.model.name, "probe")
        try:
            result = run(recipe, folder, console=console(), prompts=prompts, attempts=attempts)
        except KeyboardInterrupt:
            typer.secho("interrupted; nothing was measured to the end", err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(result.to_json())
