"""Options and helpers shared by the command-line modules."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mel_lite.errors import ConfigError
from mel_lite.gpus import CARDS_GB, GPU_PRESETS, cpu_budget_bytes, preset_of
from mel_lite.text import first_line
from mel_lite.types import Algorithm
from mel_lite.verify.verifiers import BUILT_IN

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


def completing(*values: str) -> Callable[[str], list[str]]:
    """Return the function by which a shell completes an option with these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


GPUS = (*GPU_PRESETS, "auto", *CARDS_GB)
TRACKERS = ("none", "tensorboard", "trackio", "wandb")
GpuOption = Annotated[
    str | None,
    typer.Option(
        help=f"Memory ({', '.join(GPU_PRESETS)}, cpu-4gb, or any other), card (rtx4090, a100-80gb, t4, ...), or auto.",
        autocompletion=completing(*GPUS),
    ),
]
ModelOption = Annotated[str | None, typer.Option(help="Hub id, local folder, or `demo`.")]
DatasetOption = Annotated[
    str | None, typer.Option(help="Hub id, JSONL/JSON/CSV/parquet file, `demo`, or reasoning-gym:<task>.")
]
SplitOption = Annotated[str | None, typer.Option(help="Split of that dataset. Default: train.")]
ConfigOption = Annotated[Path | None, typer.Option(help="YAML file that overrides the preset, or `bank`.")]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="Engine that loads the model and samples: auto, unsloth, hf or vllm-server. Default: auto.",
        autocompletion=completing("auto", "unsloth", "hf", "vllm-server"),
    ),
]
AlgorithmOption = Annotated[
    str | None, typer.Option(help=", ".join(Algorithm) + ". Default: mel.", autocompletion=completing(*Algorithm))
]
PromptColumnOption = Annotated[
    str | None, typer.Option(help="Column of the question, dots for nested ones. Default: by its usual names.")
]
AnswerColumnOption = Annotated[
    str | None, typer.Option(help="Column of the reference answer. Default: by its usual names.")
]
SystemPromptOption = Annotated[str | None, typer.Option(help="System message before each task.")]
ConversationalOption = Annotated[
    bool | None, typer.Option(help="Turn plain questions into a user turn. Default: if there is a chat template.")
]
TemplateKwargsOption = Annotated[
    str | None,
    typer.Option(help="Variables of the chat template as YAML or JSON, such as '{enable_thinking: false}'."),
]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(BUILT_IN)}, or pkg:fn. Default: the dataset's.", autocompletion=completing(*BUILT_IN)
    ),
]
ThinkTagsOption = Annotated[
    list[str] | None,
    typer.Option(help="Tags around thoughts, 'START END'; repeatable; none = no tags. Default: the usual ones."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; overrides preset and file; repeatable.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest in runs/.")]
FolderArgument = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder, as --run.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Number of newest rows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


NO_PRESET = f"No preset or config given. Use --gpu ({', '.join(GPU_PRESETS)}, auto, rtx4090, ...) or --config FILE."


def chosen_preset(gpu: str | None) -> str | None:
    """Return the preset of a `--gpu` value, and say on stderr which one a card or another memory means.

    Raises: ConfigError for an unknown card, or one below every preset.
    """
    if gpu is None:
        return None
    preset, line = preset_of(gpu)
    if cpu_budget_bytes(gpu) is not None:
        return gpu  # with the memory that it states
    if line and os.environ.get("RANK", "0") == "0":
        typer.echo(line, err=True)
    return preset


def overrides_of(flags: Mapping[str, tuple[str, Any]], set_: list[str] | None) -> list[tuple[str, Any]]:
    """Return flags and then `--set` as overrides of a recipe.

    Args:
        flags: recipe key -> name of the flag and its value; None = not given.
    Raises: ConfigError for a `--set` that is no assignment, or that sets what a flag sets.
    """
    from mel_lite.recipe import parse_set

    given = {key: pair for key, pair in flags.items() if pair[1] is not None}
    sets = [parse_set(text) for text in set_ or []]
    for key, value in sets:
        if key in given:
            flag, wanted = given[key]
            raise ConfigError(f"{flag} {wanted} and --set {key}={value} set the same option. Give one of them.")
    return [(key, value) for key, (_, value) in given.items()] + sets


def hide_gpus() -> None:
    """Make this process see no GPU. Call it before PyTorch initializes CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def tags_of(values: list[str] | None) -> list[str] | None:
    """Return the value of --think-tags as the Python API takes it: None when it is not given, [] for `none`."""
    return [] if values == ["none"] else values or None


def template_kwargs(text: str | None) -> dict[str, Any] | None:
    """Return the value of --chat-template-kwargs. Raises: ConfigError unless it is a mapping of names."""
    import yaml

    if text is None:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--chat-template-kwargs {text!r} is not YAML ({first_line(error)}).") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"--chat-template-kwargs {text!r} must map names to values, such as '{{a: 1}}'.")
    return value


def console() -> Console:
    """Return the console for results (stdout)."""
    from rich.console import Console

    return Console()


def print_json(value: Any) -> None:
    """Print a value as JSON in ASCII, which no terminal reads as control characters."""
    typer.echo(json.dumps(value, indent=1))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Show a spinner on stderr while torch and TRL are imported, without the packages that few runs use.

    Without a terminal it prints nothing.
    """
    from mel_lite.deferred import deferring

    with spinner(what), deferring():
        yield
        gc.freeze()  # no later collection visits what was imported


def spinner(what: str) -> Status:
    """Return a spinner on stderr. Without a terminal it prints nothing."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def newest_run() -> Path:
    """Return the newest run folder in `runs/`. Raises ConfigError if there is none."""
    from mel_lite.run.folder import newest_run as newest

    return newest()
