"""`mel-lite bench`: measure speed and memory on this machine."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.gpu import recipe_of
from mel_lite.cli.shared import (
    NO_PRESET,
    ConfigOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    SetOption,
    chosen_preset,
    console,
    hide_gpus,
    loading,
    overrides_of,
)
from mel_lite.errors import ConfigError

bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@bench.command("kernel")
def bench_kernel(
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda if there is a GPU.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Measurements per implementation.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all measured times to this file.")] = None,
) -> None:
    """Compare speed and numerical error of the fused log-prob operator with other implementations."""
    import importlib

    import torch

    # By name: in a checkout the folder is outside the package, where the type checker does not find its modules.
    run = importlib.import_module("mel_lite.kernels.bench").run
    run(device or ("cuda" if torch.cuda.is_available() else "cpu"), rounds=rounds, json_path=json_path)


@bench.command("step")
def bench_step(
    gpu: GpuOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    engine: EngineOption = None,
    set_: SetOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps; the figures are per step.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show where a training step goes: seconds, tokens and operations of each phase. Keeps nothing."""
    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    flags = {
        "model.name": ("--model", model),
        "model.engine": ("--engine", engine),
        "data.train": ("--dataset", dataset),
    }
    overrides = overrides_of(flags, set_)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        recipe, _ = recipe_of(chosen_preset(gpu), config, overrides, resumed=None)
        if recipe.train.get("use_cpu"):
            hide_gpus()
        with loading("loading"):
            from mel_lite.run.bench_step import bench_step as run
        try:
            cost = run(recipe, console=console(), steps=steps)
        except KeyboardInterrupt:
            typer.secho("interrupted; nothing was measured to the end", err=True)
            raise typer.Exit(130) from None
    if as_json:
        typer.echo(cost.to_json())
