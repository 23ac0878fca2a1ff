"""The `mel-lite` command. Importing it is cheap: torch and TRL are imported when a command needs them."""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite import __version__
from mel_lite.cli import gpu as gpu_commands
from mel_lite.cli import reports as report_commands
from mel_lite.cli.experiences import experiences
from mel_lite.cli.probe import probe
from mel_lite.cli.rollouts import rollouts
from mel_lite.cli.shared import (
    NO_PRESET,
    AnswerColumnOption,
    ConfigOption,
    ConversationalOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    PromptColumnOption,
    SetOption,
    SplitOption,
    SystemPromptOption,
    TemplateKwargsOption,
    ThinkTagsOption,
    VerifierOption,
    console,
    hide_gpus,
    loading,
    newest_run,
    tags_of,
    template_kwargs,
)
from mel_lite.errors import ConfigError, MelLiteError
from mel_lite.files import atomic_write_text
from mel_lite.text import printable
from mel_lite.types import Algorithm

app = typer.Typer(
    name="mel-lite",
    help="Meta-Experience Learning on one GPU: GRPO plus lessons that the model draws from its own mistakes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(experiences, name="experiences")
app.add_typer(rollouts, name="rollouts")
bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command()(gpu_commands.plan)
app.command()(gpu_commands.doctor)
app.command()(report_commands.report)
app.command()(report_commands.compare)
app.command()(probe)


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"mel-lite {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Meta-Experience Learning on one GPU: GRPO plus lessons that the model draws from its own mistakes."""


@app.command()
def train(
    gpu: GpuOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    dataset: DatasetOption = None,
    split: SplitOption = None,
    prompt_column: PromptColumnOption = None,
    answer_column: AnswerColumnOption = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder. Default: a new one in runs/.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    algorithm: Annotated[str | None, typer.Option(help=", ".join(Algorithm))] = None,
    meta_experience: Annotated[
        bool | None, typer.Option(help="Also train on meta-experiences. Default: with mel only.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to continue training.")] = None,
    lessons_from: Annotated[
        Path | None, typer.Option(help="Run or checkpoint folder whose lessons the bank starts with.")
    ] = None,
    engine: EngineOption = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the run's newest intact checkpoint.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Resume the run in --output-dir if there is one, else start it.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            help="With --resume: an option (train.learning_rate) or input (dataset, templates, chat_template, dtype, "
            "batch) that may differ from the original run; repeatable."
        ),
    ] = None,
    worst_case: Annotated[
        bool | None, typer.Option(help="First run a step at full length and measure its memory. Default: on a GPU.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check options and data, print the recipe, and stop.")
    ] = False,
) -> None:
    """Train a model with GRPO and meta-experiences, evaluate it before and after, and export it."""
    from mel_lite.recipe import parse_set
    from mel_lite.run.folder import default_output_dir

    if auto_resume and output_dir is None:
        raise ConfigError("--auto-resume needs --output-dir: each start without it makes another folder in runs/.")
    resumes_again = auto_resume and output_dir is not None and (output_dir / "config.yaml").is_file()
    flags = {
        "model.name": model,
        "model.engine": engine,
        "data.train": dataset,
        "data.split": split,
        "data.prompt_column": prompt_column,
        "data.answer_column": answer_column,
        "lora.start_from": None if adapter is None else str(adapter),
        "train.max_steps": max_steps,
        "train.algorithm": algorithm,
        "train.meta_experience": meta_experience,
        "train.lessons_from": None if lessons_from is None else str(lessons_from),
    }
    overrides: list[tuple[str, Any]] = [(key, value) for key, value in flags.items() if value is not None]
    if dataset is not None and not resume:
        # The preset's held-out set belongs to the preset's dataset.
        overrides += [("data.eval", None), ("data.eval_split", None)]
    overrides += [parse_set(text) for text in set_ or []]
    resume |= resumes_again  # after the flags, which must give the same recipe at each start
    if allow_change and not resume and not auto_resume:
        raise ConfigError(f"--allow-change {allow_change[0]} without --resume: a new run has nothing to differ from.")
    if resume:
        output_dir = output_dir or newest_run()
        # Reuse the run's own config unless a preset or file is given.
        config = config or (output_dir / "config.yaml" if gpu is None else None)
    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    recipe, budget_bytes = gpu_commands.recipe_of(gpu, config, overrides, resumed=output_dir if resume else None)
    if recipe.train.get("use_cpu"):
        hide_gpus()  # loading, engine, memory check and export must all see none
    with loading("loading"):
        from mel_lite.run import train as run
    if dry_run:
        _dry_run(recipe)
        return
    try:
        folder = output_dir or default_output_dir(recipe.model.name, recipe.train.get("algorithm", "mel"))
        options: dict[str, Any] = {"worst_case": worst_case, "budget_bytes": budget_bytes, "preset": gpu}
        run.train(recipe, folder, resume=resume, console=console(), allow_change=allow_change or (), **options)
    except KeyboardInterrupt:
        typer.secho("interrupted; committed checkpoints are intact: continue with --resume", err=True)
        raise typer.Exit(130) from None


def _dry_run(recipe: Any) -> None:
    """Check options and data, and print the recipe and the number of tasks."""
    from mel_lite.run import train as run

    args = run.check(recipe, Path("runs"))
    tasks = run.load_run_tasks(recipe, args, run.run_tokenizer(recipe))
    held_out = "none" if tasks.held_out is None else len(tasks.held_out)
    typer.echo(recipe.as_yaml())
    counts = f"{len(tasks.train)} training tasks ({tasks.dropped_long} too long), held out: {held_out}"
    typer.echo(f"# {counts}. Dry run: nothing was trained.")


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
    seed: Annotated[int, typer.Option(help="Seed for sampling and for the bootstrap intervals.")] = 42,
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
        str, typer.Option("--format", help="adapter, merged-16bit, or GGUF: f16, q8_0, q4_k_m.")
    ] = "merged-16bit",
    base: Annotated[str | None, typer.Option(help="Base model. Default: the one named by the adapter.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float16.")] = "auto",
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
