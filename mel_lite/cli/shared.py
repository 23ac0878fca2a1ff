"""Options and helpers shared by the command-line modules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mel_lite.errors import ConfigError
from mel_lite.text import first_line
from mel_lite.verify.verifiers import BUILT_IN

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

GpuOption = Annotated[str | None, typer.Option(help="Preset: cpu, 12gb, 16gb, 24gb, 40gb, 80gb or auto.")]
ModelOption = Annotated[str | None, typer.Option(help="Hub id, local folder, or `demo`.")]
DatasetOption = Annotated[
    str | None, typer.Option(help="Hub id, JSONL/JSON/CSV/parquet file, `demo`, or reasoning-gym:<task>.")
]
SplitOption = Annotated[str | None, typer.Option(help="Split of that dataset. Default: train.")]
ConfigOption = Annotated[Path | None, typer.Option(help="YAML file that overrides the preset.")]
EngineOption = Annotated[
    str | None, typer.Option(help="Engine that loads the model and samples: auto, unsloth or hf. Default: auto.")
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
VerifierOption = Annotated[str | None, typer.Option(help=f"{', '.join(BUILT_IN)}, or pkg:fn. Default: the dataset's.")]
ThinkTagsOption = Annotated[
    list[str] | None,
    typer.Option(help="Tags around thoughts, 'START END'; repeatable; none = no tags. Default: the usual ones."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value; overrides everything else; repeatable.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest in runs/.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Number of newest rows.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


NO_PRESET = "No preset or config given. Use --gpu (cpu, 12gb, 16gb, 24gb, 40gb, 80gb) or --config FILE."


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


def loading(what: str) -> Status:
    """Return a spinner to show while torch and TRL are imported, on stderr. Without a terminal it prints nothing."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def newest_run() -> Path:
    """Return the newest run folder in `runs/`. Raises ConfigError if there is none."""
    from mel_lite.run.folder import newest_run as newest

    return newest()
