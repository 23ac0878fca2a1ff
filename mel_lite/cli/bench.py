"""`mel-lite bench`: measure speed and memory on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.gpu import measured_recipe
from mel_lite.cli.shared import (
    ConfigOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    SetOption,
    console,
    loading,
)

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
    flags = {
        "model.name": ("--model", model),
        "model.engine": ("--engine", engine),
        "data.train": ("--dataset", dataset),
    }
    with measured_recipe(gpu, config, flags, set_, as_json=as_json) as recipe:
        with loading("loading"):
            from mel_lite.run.bench_step import bench_step as run
        cost = run(recipe, console=console(), steps=steps)
    if as_json:
        typer.echo(cost.to_json())
