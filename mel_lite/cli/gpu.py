"""The commands about the machine: will it fit (`plan`), and is everything in order (`doctor`)?"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.shared import ConfigOption, EngineOption, SetOption, console, loading
from mel_lite.errors import ConfigError


def is_for_cpu(gpu: str, config: Path | None, overrides: list[tuple[str, Any]]) -> bool:
    """Whether a run with the preset of a GPU is to stay on the CPU, so that nothing may wake CUDA.

    Raises: ConfigError for `auto`, which is a card.
    """
    from mel_lite.recipe import value_in

    on_cpu = dict(overrides).get("train.use_cpu", value_in(config, "train.use_cpu"))
    if on_cpu and gpu == "auto":
        raise ConfigError("--gpu auto with train.use_cpu=true: auto asks a GPU. Take --gpu cpu, or name a preset.")
    return bool(on_cpu)


def begun_with(began: Path, config: Path | None) -> list[tuple[str, Any]]:
    """Settings of a run that a plan may choose and that resuming must keep, but for those `config` sets."""
    from mel_lite.memory.search import BATCH, GROUP, OPTIM
    from mel_lite.recipe import keys_of, value_in

    keys = {GROUP, BATCH, OPTIM, "train.max_context_tokens"} & keys_of(began)
    return [(key, value_in(began, key)) for key in sorted(keys - (keys_of(config) if config else set()))]


def _give_up_expandable_segments() -> None:
    """Take them out of PyTorch's allocator options where vLLM may share the GPU, for it cannot sleep with them.

    The options are read once, as CUDA starts; Unsloth drops them too late for a process that has looked at its GPU.
    """
    if not all(importlib.util.find_spec(name) for name in ("unsloth", "vllm")):
        return
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        kept = [part for part in os.environ.get(name, "").split(",") if not part.startswith("expandable_segments:")]
        if name in os.environ and ",".join(kept) != os.environ[name]:
            os.environ[name] = ",".join(kept)
            typer.secho(f"{name}: expandable_segments is off, since vLLM cannot sleep with it", err=True)


def planned(gpu: str, config: Path | None, overrides: list[tuple[str, Any]]) -> tuple[Any, int | None]:
    """The recipe with settings that fit the card, and the card's bytes; prints the plan, and refuses one that does not
    fit."""
    _give_up_expandable_segments()
    from mel_lite.memory.plan import plan_for

    recipe, made, reason = plan_for(gpu, config, overrides, run_here=True)
    if made is None:
        typer.secho(f"no memory plan: {reason}", err=True)
        return recipe, None
    console().print(made.view())
    if not made.fits:
        raise ConfigError(made.refusal())
    return recipe, made.budget_bytes


def plan(
    gpu: Annotated[str, typer.Option(help="12gb, 16gb, 24gb, 40gb, 80gb, or auto: the card that is here.")],
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option(help="Hub id, local folder, or `demo`.")] = None,
    engine: EngineOption = None,
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict the GPU memory of every phase of a run, before anything is loaded; exit code 2 if it does not fit."""
    from mel_lite.memory.plan import plan_for
    from mel_lite.recipe import build_args, parse_set

    flags = {"model.name": model, "model.engine": engine}
    overrides: list[tuple[str, Any]] = [(key, value) for key, value in flags.items() if value is not None]
    recipe, made, reason = plan_for(gpu, config, overrides + [parse_set(text) for text in set_ or []])
    with loading("checking options"):  # as a run would, but on this machine, which need not have the card
        checked = replace(recipe, train={**recipe.train, "use_cpu": True, "bf16": False, "fp16": False})
        build_args(checked, Path("runs"))
    if made is None:
        raise ConfigError(reason)
    if as_json:
        typer.echo(made.to_json())
    else:
        console().print(made.view())
        console().print(made.engine.line, highlight=False, markup=False)
    if not made.fits:
        raise ConfigError(made.refusal())


def doctor(
    run: Annotated[Path | None, typer.Option(help="Folder runs are written to. Default: runs/.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model whose export must find room on the disk.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check drivers, versions, disk and caches, with a fix for each fault; exit code 1 if something is broken."""
    from mel_lite.cli.doctor import examine

    with loading("looking around"):
        report = examine(run or Path("runs"), model)
    if as_json:
        typer.echo(report.to_json())
    else:
        console().print(report.as_table())
    if report.failed:
        raise typer.Exit(1)
