"""Commands and recipes that depend on the machine: `plan`, `doctor`, and the recipe that `train` plans for a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.shared import (
    GPUS,
    NO_PRESET,
    ConfigOption,
    EngineOption,
    ModelOption,
    SetOption,
    chosen_preset,
    completing,
    console,
    hide_gpus,
    loading,
    overrides_of,
)
from mel_lite.errors import ConfigError
from mel_lite.gpus import preset_of


def _is_for_cpu(gpu: str, config: Path | None, overrides: list[tuple[str, Any]]) -> bool:
    """Return True if a run is on the CPU, by its preset or forced, so that CUDA must not be initialized.

    Raises: ConfigError for `auto`, which needs a GPU.
    """
    from mel_lite.recipe import value_in

    on_cpu = dict(overrides).get("train.use_cpu", value_in(config, "train.use_cpu"))
    if on_cpu is None:
        return preset_of(gpu)[0] == "cpu"
    if on_cpu and gpu == "auto":
        raise ConfigError("--gpu auto with train.use_cpu=true: auto needs a GPU. Use --gpu cpu, or name a preset.")
    return bool(on_cpu)


def _settings_to_keep(stored: Path, config: Path | None) -> list[tuple[str, Any]]:
    """Return the planned settings of a run's stored config.yaml that resuming must keep, except those `config` sets."""
    from mel_lite.memory.search import BATCH, CHECKPOINTING, CONTEXT, GROUP, OPTIM, TOKENS
    from mel_lite.recipe import keys_of, value_in

    kept = {GROUP, BATCH, OPTIM, CONTEXT}
    if value_in(stored, "train.use_cpu"):
        kept |= {TOKENS, CHECKPOINTING}  # so that its sums are rounded alike
    keys = kept & keys_of(stored)
    return [(key, value_in(stored, key)) for key in sorted(keys - (keys_of(config) if config else set()))]


def _disable_expandable_segments() -> None:
    """Remove `expandable_segments` from PyTorch's allocator options if vLLM may share the GPU: it cannot sleep with it.

    PyTorch reads the options once, when CUDA is initialized. Unsloth removes it too late in a process that has already
    queried its GPU.
    """
    if not all(importlib.util.find_spec(name) for name in ("unsloth", "vllm")):
        return
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        kept = [part for part in os.environ.get(name, "").split(",") if not part.startswith("expandable_segments:")]
        if name in os.environ and ",".join(kept) != os.environ[name]:
            os.environ[name] = ",".join(kept)
            typer.secho(f"{name}: expandable_segments disabled, since vLLM's sleep mode does not support it", err=True)


def planned(gpu: str, config: Path | None, overrides: list[tuple[str, Any]]) -> tuple[Any, int | None]:
    """Return the recipe with settings that fit the card, and the memory budget in bytes; None without a plan.

    Prints the plan. Raises: ConfigError if it does not fit.
    """
    _disable_expandable_segments()
    with loading("planning"):
        from rich.console import Console

        from mel_lite.memory.plan import plan_for
        from mel_lite.run.display import plan_view

        recipe, made, reason = plan_for(gpu, config, overrides, run_here=True)
    if made is None:
        typer.secho(f"no memory plan: {reason}", err=True)
        return recipe, None
    Console(stderr=True).print(plan_view(made))  # a dry run prints a recipe to stdout
    if not made.fits:
        raise ConfigError(made.refusal())
    return recipe, made.budget_bytes


def recipe_of(
    gpu: str | None, config: Path | None, overrides: list[tuple[str, Any]], *, resumed: Path | None
) -> tuple[Any, int | None]:
    """Return the recipe of a run and, if a GPU plan was made for it, the memory budget in bytes.

    `resumed`: folder of the run to resume, or None.
    """
    from mel_lite.engines import distributed
    from mel_lite.recipe import resolve

    on_cpu = None if gpu is None else _is_for_cpu(gpu, config, overrides)
    planned_on_cpu = gpu is not None and preset_of(gpu)[0] == "cpu"
    if gpu is None or bool(on_cpu) != planned_on_cpu:
        return resolve(preset=gpu, config=config, overrides=overrides), None
    if resumed is not None and (stored := resumed / "config.yaml").is_file():
        # Keep the planned settings of the run: its checkpoint needs the same group size and optimizer.
        overrides = [*_settings_to_keep(stored, config), *overrides]
    # Rank 0 plans for all processes: free memory may differ between them, batch shapes must not.
    return distributed.on_first(lambda: planned(gpu, config, overrides), cpu=planned_on_cpu)


@contextmanager
def measured_recipe(
    gpu: str | None, config: Path | None, flags: Mapping[str, tuple[str, Any]], set_: list[str] | None, *, as_json: bool
) -> Iterator[Any]:
    """Give the recipe of a command that measures before a run. With `as_json`, all output in the block goes to stderr.

    Raises: ConfigError without a preset and a file, or as `recipe_of`; typer.Exit when it is interrupted.
    """
    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    overrides = overrides_of(flags, set_)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        try:
            recipe, _ = recipe_of(chosen_preset(gpu), config, overrides, resumed=None)
            if recipe.train.get("use_cpu"):
                hide_gpus()
            yield recipe
        except KeyboardInterrupt:
            typer.secho("interrupted; nothing was measured to the end", err=True)
            raise typer.Exit(130) from None


def plan(
    gpu: Annotated[
        str,
        typer.Option(
            help="Memory (12gb, 16gb, 24gb, 40gb, 80gb, or any other), card (rtx4090, a100-80gb, t4, ...), auto for "
            "this machine's GPU, or cpu (cpu-4gb: with so much memory).",
            autocompletion=completing(*GPUS),
        ),
    ],
    config: ConfigOption = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the memory of every phase of a run without loading a model. Exit code 2 if it does not fit."""
    from mel_lite.memory.plan import plan_for
    from mel_lite.recipe import build_args
    from mel_lite.run.display import plan_view

    overrides = overrides_of({"model.name": ("--model", model), "model.engine": ("--engine", engine)}, set_)
    recipe, made, reason = plan_for(str(chosen_preset(gpu)), config, overrides)
    with loading("checking options"):  # as for a run on the CPU, since this machine may have no GPU
        checked = replace(recipe, train={**recipe.train, "use_cpu": True, "bf16": False, "fp16": False})
        build_args(checked, Path("runs"))
    if made is None:
        raise ConfigError(reason)
    if as_json:
        typer.echo(made.to_json())
    else:
        console().print(plan_view(made))
        console().print(made.engine.line, highlight=False, markup=False)
    if not made.fits:
        raise ConfigError(made.refusal())


def doctor(
    run: Annotated[Path | None, typer.Option(help="Folder that runs are written to. Default: runs/.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model whose export must fit on the disk. Default: Qwen3-8B.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check drivers, versions, disk and caches, and suggest fixes. Exit code 1 if a check fails."""
    from mel_lite.cli.doctor import examine

    with loading("checking this machine"):
        report = examine(run or Path("runs"), model)
    if as_json:
        typer.echo(report.to_json())
    else:
        console().print(report.as_table())
    if report.failed:
        raise typer.Exit(1)
