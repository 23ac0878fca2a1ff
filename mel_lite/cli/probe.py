"""`mel-lite probe`: measure what a run and its lessons would learn from, before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.gpu import measured_recipe
from mel_lite.cli.shared import (
    AnswerColumnOption,
    ConfigOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    PromptColumnOption,
    SetOption,
    SplitOption,
    console,
    loading,
)


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

    flags = {
        "model.name": ("--model", model),
        "model.engine": ("--engine", engine),
        "data.train": ("--dataset", dataset),
        "data.split": ("--split", split),
        "data.prompt_column": ("--prompt-column", prompt_column),
        "data.answer_column": ("--answer-column", answer_column),
        "lora.start_from": ("--adapter", None if adapter is None else str(adapter)),
    }
    with measured_recipe(gpu, config, flags, set_, as_json=as_json) as recipe:
        with loading("loading"):
            from mel_lite.run.probe.run import probe as run
        folder = output_dir or default_output_dir(recipe.model.name, "probe")
        result = run(recipe, folder, console=console(), prompts=prompts, attempts=attempts)
    if as_json:
        typer.echo(result.to_json())
