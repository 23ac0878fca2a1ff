"""The `mel-lite` command. Importing it is cheap: torch and TRL are imported when a command needs them."""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mel_lite import __version__
from mel_lite.cli import gpu as gpu_commands
from mel_lite.cli import reports as report_commands
from mel_lite.cli.bench import bench
from mel_lite.cli.chat import chat
from mel_lite.cli.experiences import experiences
from mel_lite.cli.probe import probe
from mel_lite.cli.push import push
from mel_lite.cli.rollouts import rollouts
from mel_lite.cli.shared import (
    AnswerColumnOption,
    ConversationalOption,
    ModelOption,
    PromptColumnOption,
    SystemPromptOption,
    TemplateKwargsOption,
    ThinkTagsOption,
    VerifierOption,
    completing,
    console,
    loading,
    newest_run,
    tags_of,
    template_kwargs,
)
from mel_lite.cli.train import train
from mel_lite.errors import ConfigError, MelLiteError
from mel_lite.files import atomic_write_text
from mel_lite.text import printable

ALSO = {"evaluate": "eval", "sft": "warmup", "merge": "export", "lessons": "experiences", "upload": "push"}
"""Verbs of other tools -> our command."""


class Commands(TyperGroup):
    """The commands, which also answer to the verbs of other tools."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, [ALSO.get(args[0], args[0]), *args[1:]])


app = typer.Typer(
    name="mel-lite",
    cls=Commands,
    help="Meta-Experience Learning on one GPU: GRPO plus lessons that the model draws from its own mistakes.",
    epilog="Other names: " + ", ".join(f"{name} = {command}" for name, command in ALSO.items()) + ".",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(experiences, name="experiences")
app.add_typer(rollouts, name="rollouts")
app.add_typer(bench, name="bench")
app.command()(train)
app.command()(gpu_commands.plan)
app.command()(gpu_commands.doctor)
app.command()(report_commands.report)
app.command()(report_commands.compare)
app.command()(probe)
app.command()(chat)
app.command()(push)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"mel-lite {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Meta-Experience Learning on one GPU: GRPO plus lessons that the model draws from its own mistakes."""


@app.command("eval")
def evaluate(
    model: ModelOption = None,
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter to evaluate. Without --model, its own base model is used.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Hub id, file, `demo:test`, or reasoning-gym:<task>.")] = "demo:test",
    verifier: VerifierOption = None,
    think_tags: ThinkTagsOption = None,
    k: Annotated[int, typer.Option(min=1, help="Samples per task for Avg@k and Pass@k.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature for Avg@k and Pass@k.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum answer length in tokens.")] = 1024,
    split: Annotated[str | None, typer.Option(help="Split of the dataset. Default: train.")] = None,
    prompt_column: PromptColumnOption = None,
    answer_column: AnswerColumnOption = None,
    conversational: ConversationalOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of tasks.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantize the base model to NF4.")] = False,
    system_prompt: SystemPromptOption = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 42,
    with_lessons: Annotated[
        Path | None,
        typer.Option(help="Run whose lessons are put into the prompts that they match; also measured without them."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON to this file.")] = None,
) -> None:
    """Measure Pass@1 (greedy), Avg@k and unbiased Pass@k with 95 % intervals."""
    with loading("loading"):
        from mel_lite.evaluate import evaluate_model
        from mel_lite.models.load import ModelSpec

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: folder {output.parent} does not exist. Create it, or use another file.")
    spec = None if model is None else ModelSpec(model, load_in_4bit=load_in_4bit)
    rendering = template_kwargs(chat_template_kwargs)
    measure: Any = None
    if with_lessons is not None:
        from mel_lite.lessons.bank.prompt_memory import evaluate_with_lessons
        from mel_lite.resilience.saved_bank import saved_bank

        bank, templates = saved_bank(with_lessons, field="--with-lessons")
        measure = functools.partial(evaluate_with_lessons, bank=bank, templates=templates)
    result = evaluate_model(
        spec,
        adapter,
        dataset,
        verifier=verifier,
        think_tags=tags_of(think_tags),
        k=k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        split=split,
        prompt_column=prompt_column,
        answer_column=answer_column,
        conversational=conversational,
        chat_template_kwargs=rendering,
        limit=limit,
        system_prompt=system_prompt,
        seed=seed,
        measure=measure,
    )
    console().print(result.as_table())
    if output is not None:
        atomic_write_text(output, result.to_json() + "\n")


@app.command()
def warmup(
    examples: Annotated[
        str, typer.Argument(help='File or Hub id of {"prompt": text or messages, "completion": text}.')
    ],
    output_dir: Annotated[Path, typer.Option(help="New folder for the adapter.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder, or `demo`.")] = "demo",
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to continue training.")] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Evaluate before and after: Hub id, file, `demo:test`, or reasoning-gym:<task>.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of evaluation tasks.")] = None,
    verifier: VerifierOption = None,
    think_tags: ThinkTagsOption = None,
    split: Annotated[str | None, typer.Option(help="Split of the examples. Default: train.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of the evaluation tasks. Default: train.")] = None,
    prompt_column: PromptColumnOption = None,
    answer_column: AnswerColumnOption = None,
    completion_column: Annotated[str, typer.Option(help="Column of the text to learn.")] = "completion",
    system_prompt: SystemPromptOption = None,
    conversational: ConversationalOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps; -1 = as many as --epochs needs.")] = -1,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 8,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per forward pass.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    lora_r: Annotated[int | None, typer.Option(min=1, help="LoRA rank. Default: 16. Alpha is twice the rank.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per example. Longer examples are skipped.")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Save a checkpoint every N steps.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantize the base model to NF4.")] = False,
    seed: Annotated[int, typer.Option(help="Seed for the example order and for LoRA initialization.")] = 42,
) -> None:
    """Fine-tune an adapter on formatted examples before RL. Continue from it with `train --adapter`."""
    with loading("loading"):
        from mel_lite.models.adapters import LoraSpec
        from mel_lite.models.load import ModelSpec
        from mel_lite.warmup import train as warmup_train
        from mel_lite.warmup.options import WarmupData, WarmupEval, WarmupOptions

    evaluation = None
    if eval_dataset is not None:
        evaluation = WarmupEval(
            eval_dataset, verifier, eval_split, prompt_column, answer_column, limit, think_tags=tags_of(think_tags)
        )
    result = warmup_train.warmup(
        examples,
        output_dir,
        model=ModelSpec(model, load_in_4bit=load_in_4bit),
        lora=None if lora_r is None else LoraSpec(r=lora_r, alpha=2 * lora_r),
        adapter=adapter,
        options=WarmupOptions(
            epochs, max_steps, batch_size, micro_batch_size, learning_rate,
            max_length_tokens=max_length, save_steps=save_steps, seed=seed,
        ),
        data=WarmupData(
            split, prompt_column, completion_column, system_prompt, conversational,
            chat_template_kwargs=template_kwargs(chat_template_kwargs),
        ),
        evaluation=evaluation,
        console=console(),
    )  # fmt: skip
    typer.echo(result.summary())


@app.command("export")
def export_(
    adapter: Annotated[
        Path | None, typer.Argument(help="Run, checkpoint or adapter folder. Default: the newest run.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: a subfolder of the argument, named after the format.")
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="adapter, merged-16bit, or GGUF: f16, q8_0, q4_k_m.",
            autocompletion=completing("adapter", "merged-16bit", "f16", "q8_0", "q4_k_m"),
        ),
    ] = "merged-16bit",
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one named by the adapter.")] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto, bfloat16 or float16.", autocompletion=completing("auto", "bfloat16", "float16")),
    ] = "auto",
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Allow an adapter whose LoRA-B weights are still zero.")
    ] = False,
) -> None:
    """Write a clean adapter or a merged model, reload it, and compare it with the base model plus adapter."""
    source = adapter or newest_run()
    with loading("loading"):
        from mel_lite.export.merge import export
        from mel_lite.models.load import ModelSpec

    spec = None if base is None else ModelSpec(base)
    target = output or source / ("exported-adapter" if format_ == "adapter" else format_)
    report = export(source, target, format=format_, base=spec, dtype=dtype, allow_untrained=allow_untrained)
    console().print(report.as_table())
    typer.echo(str(report.path))


def _quiet_libraries() -> None:
    """Silence library output that users do not need. Call it before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Let waiting threads spin for some microseconds before they sleep. A decoding step has hundreds of short parallel
    # regions: without spinning it ran at half the speed, and long spinning steals cores on a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # On a CPU, bitsandbytes warns about a missing optional kernel that MEL-Lite disables anyway.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if logging.lastResort is not None:  # handler for warnings when logging is not configured
        logging.lastResort.addFilter(_printable_record)


def _printable_record(record: logging.LogRecord) -> bool:
    """Escape a log record for the terminal, since file names and verifier messages are untrusted. Returns True."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def main() -> None:
    """Run the command. User errors end with one message and an exit code, never a traceback."""
    _quiet_libraries()
    try:
        app()
    except MelLiteError as error:
        if not error.already_reported:
            rank = f"[process {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
            typer.secho(f"{rank}error: {printable(str(error))}", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)
