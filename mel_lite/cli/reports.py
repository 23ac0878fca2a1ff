"""`mel-lite report` and `mel-lite compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mel_lite.cli.shared import (
    NO_PRESET,
    ConfigOption,
    GpuOption,
    SetOption,
    chosen_preset,
    console,
    loading,
    newest_run,
)
from mel_lite.errors import ConfigError

if TYPE_CHECKING:
    from mel_lite.report.arms import Arm, Comparison
    from mel_lite.report.conclusions import Control

DEFAULT_SEEDS = 3
"""Of `compare --arms`."""


def report(
    run: Annotated[Path | None, typer.Argument(help="Run folder. Default: the newest in runs/.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run folder.")] = None,
    lessons: Annotated[int, typer.Option(min=0, help="Maximum number of lessons in the page.")] = 200,
) -> None:
    """Write one self-contained HTML page about a run: result, curves, funnel, time, options and lessons."""
    folder = run or newest_run()
    with loading("reading the run"):
        from mel_lite.report.page import write_report

        try:
            path = write_report(folder, output, most_lessons=lessons)
        except OSError as error:
            raise ConfigError(
                f"--output {output or folder / 'report.html'}: it cannot be written ({error.strerror or error}). "
                "Choose another file."
            ) from error
    typer.echo(str(path))


def compare(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Finished runs. The first one's arm is the reference.")
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Train these arms and compare them, such as grpo,mel. The first is the reference."),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="An arm of your own: NAME:section.key=value; repeatable.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="With --arms: seeds per arm; 3 if not given.")] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="With --arms: the first of these seeds, which are consecutive; else 0.")
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With --arms: tokens that each run generates, lessons and replays included."),
    ] = None,
    gpu: GpuOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    output: Annotated[
        Path, typer.Option(help="Folder for comparison.html, .png and .json, and for the runs of --arms.")
    ] = Path("comparison"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare runs on the same held-out tasks: paired differences with intervals, learning curves, conclusions.

    Runs that differ in their seed alone are one arm. With --arms the runs are trained first, at equal generated tokens
    and with the same seeds; the same command continues after a stop.
    """
    from mel_lite.report.arms import read_arms
    from mel_lite.report.compare import compare as compare_arms
    from mel_lite.report.comparison_page import write_comparison

    if (arms is None) == (not runs):
        raise ConfigError("compare needs the folders of finished runs, or --arms to train some; not both.")
    if arms is None:
        given = {
            "--arm": arm, "--seeds": seeds, "--first-seed": first_seed, "--budget-tokens": budget_tokens, "--gpu": gpu,
            "--config": config, "--set": set_,
        }  # fmt: skip
        if without := next((name for name, value in given.items() if value not in (None, [])), None):
            raise ConfigError(f"{without} trains runs, so it needs --arms. Leave it out to compare finished runs.")
    left_out: list[str] = []
    controls: Mapping[str, Control] = {}
    if arms is None:
        found_arms = read_arms(runs or [])
    else:
        from mel_lite.run.experiment import CONTROLS

        controls = CONTROLS
        first = first_seed or 0
        chosen = range(first, first + (seeds or DEFAULT_SEEDS))
        found_arms, left_out = _trained(arms, arm or [], chosen, budget_tokens, gpu, config, set_ or [], output)
    found = compare_arms(found_arms, left_out=left_out, controls=controls)
    try:
        written = write_comparison(found_arms, found, output)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: it cannot be written ({error.strerror or error}). Choose another folder."
        ) from error
    _show(found, written, as_json=as_json)


def _trained(
    names: str, own: list[str], seeds: Sequence[int], budget_tokens: int | None, gpu: str | None, config: Path | None,
    set_: list[str], output: Path,
) -> tuple[list[Arm], list[str]]:  # fmt: skip
    """Train what is missing of an experiment, and return its arms and sentences on runs that are left out."""
    from mel_lite.recipe import parse_set, resolve
    from mel_lite.run.experiment import UNTUNED, Experiment, arms_of, in_subprocess, parse_arms, run_experiment

    if budget_tokens is None:
        raise ConfigError("compare --arms needs --budget-tokens: the tokens that each run generates.")
    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    gpu = chosen_preset(gpu)
    base = [*(["--gpu", gpu] if gpu else []), *(["--config", str(config)] if config else [])]
    base += [part for text in set_ for part in ("--set", text)]
    recipe = None
    if gpu != "auto":
        recipe = resolve(preset=gpu, config=config, overrides=[parse_set(text) for text in set_])
    group_size = None if recipe is None else recipe.train.get("num_generations")
    chosen = parse_arms([name.strip() for name in names.split(",") if name.strip()], own, group_size=group_size)
    experiment = Experiment(output, chosen, seeds, budget_tokens, tuple(base), recipe)
    try:
        run_experiment(experiment, launch=in_subprocess, say=lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.secho("stopped; the same command continues", err=True)
        raise typer.Exit(130) from None
    trained, left_out = arms_of(experiment)
    return trained, [*left_out, UNTUNED]


def _show(found: Comparison, written: list[Path], *, as_json: bool) -> None:
    """Print a comparison."""
    from mel_lite.report.comparison_page import comparison_table

    if as_json:
        typer.echo(found.to_json())
        return
    terminal = console()
    terminal.print(comparison_table(found, terminal.width))
    for sentence in found.conclusions:
        typer.echo(sentence)
    for sentence in found.limits:
        typer.echo(f"note: {sentence}")
    typer.echo("\n".join(map(str, written)))
