"""`mel-lite train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.gpu import recipe_of
from mel_lite.cli.shared import (
    NO_PRESET,
    TRACKERS,
    AlgorithmOption,
    AnswerColumnOption,
    ConfigOption,
    DatasetOption,
    EngineOption,
    GpuOption,
    ModelOption,
    PromptColumnOption,
    SetOption,
    SplitOption,
    SystemPromptOption,
    VerifierOption,
    chosen_preset,
    completing,
    console,
    hide_gpus,
    loading,
    newest_run,
    overrides_of,
)
from mel_lite.data.held_out import HELD_OUT
from mel_lite.errors import ConfigError

NOTHING = "none"
"""Value of --eval-dataset for no evaluation."""
OF_PRESET = "the preset's"
"""Default of an option that the preset or file sets."""


def train(
    gpu: GpuOption = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(
            "--load-in-4bit/--no-load-in-4bit", help="Quantize the base model to NF4.", show_default=OF_PRESET
        ),
    ] = None,
    dataset: DatasetOption = None,
    split: SplitOption = None,
    prompt_column: PromptColumnOption = None,
    answer_column: AnswerColumnOption = None,
    system_prompt: SystemPromptOption = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of training tasks, from the first on.", show_default="all")
    ] = None,
    verifier: VerifierOption = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            help="Tasks of the evaluation before and after: as --dataset, `held-out` for a part of the training tasks, "
            "or `none`.",
            show_default="the preset's; with --dataset, held-out",
        ),
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of --eval-dataset.", show_default="train")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run folder.", show_default="a new one in runs/")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default=OF_PRESET)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=OF_PRESET)] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of task order, sampling and LoRA initialization.", show_default=OF_PRESET),
    ] = None,
    algorithm: AlgorithmOption = None,
    meta_experience: Annotated[
        bool | None, typer.Option(help="Also train on meta-experiences.", show_default="with mel only")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter to continue training.")] = None,
    lessons_from: Annotated[
        Path | None, typer.Option(help="Run or checkpoint folder whose lessons the bank starts with.")
    ] = None,
    engine: EngineOption = None,
    engine_url: Annotated[
        str | None, typer.Option(help="Address of a vLLM server that samples; implies --engine vllm-server.")
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            help=f"Trackers, separated by commas: {', '.join(TRACKERS)}, ...",
            show_default=OF_PRESET,
            autocompletion=completing(*TRACKERS),
        ),
    ] = None,
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
        bool | None,
        typer.Option(help="First run a step at full length and measure its memory.", show_default="on a GPU"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check options and data, print the recipe, and stop.")
    ] = False,
) -> None:
    """Train a model with GRPO and meta-experiences, evaluate it before and after, and export it.

    Every flag sets the option of the recipe that docs/configuration.md describes; --set reaches all of them.
    """
    from mel_lite.run.folder import check_folder, default_output_dir

    if auto_resume and output_dir is None:
        raise ConfigError("--auto-resume needs --output-dir: each start without it makes another folder in runs/.")
    resumes_again = auto_resume and output_dir is not None and (output_dir / "config.yaml").is_file()
    if resume:
        output_dir = output_dir or newest_run()
    flags = {
        "model.name": ("--model", model),
        "model.load_in_4bit": ("--load-in-4bit" if load_in_4bit else "--no-load-in-4bit", load_in_4bit),
        "model.engine": ("--engine", engine or ("vllm-server" if engine_url else None)),
        "train.engine_url": ("--engine-url", engine_url),
        "data.train": ("--dataset", dataset),
        "data.split": ("--split", split),
        "data.prompt_column": ("--prompt-column", prompt_column),
        "data.answer_column": ("--answer-column", answer_column),
        "data.system_prompt": ("--system-prompt", system_prompt),
        "data.limit": ("--limit", limit),
        "data.eval": ("--eval-dataset", None if eval_dataset == NOTHING else eval_dataset),
        "data.eval_split": ("--eval-split", eval_split),
        "lora.start_from": ("--adapter", None if adapter is None else str(adapter)),
        "train.verifier": ("--verifier", verifier),
        "train.max_steps": ("--max-steps", max_steps),
        "train.learning_rate": ("--learning-rate", learning_rate),
        "train.seed": ("--seed", seed),
        "train.algorithm": ("--algorithm", algorithm),
        "train.meta_experience": ("--meta-experience", meta_experience),
        "train.lessons_from": ("--lessons-from", None if lessons_from is None else str(lessons_from)),
        "train.report_to": ("--report-to", None if report_to is None else _trackers(report_to)),
    }
    resumed = output_dir if resume or resumes_again else None
    if eval_split is not None and eval_dataset in (None, NOTHING, HELD_OUT):
        raise ConfigError(f"--eval-split {eval_split}: name the dataset that has this split with --eval-dataset.")
    overrides = _evaluation(dataset, eval_dataset, config=config, resumed=resumed) + overrides_of(flags, set_)
    resume |= resumes_again  # after the flags, which must give the same recipe at each start
    if allow_change and not resume and not auto_resume:
        raise ConfigError(f"--allow-change {allow_change[0]} without --resume: a new run has nothing to differ from.")
    if resume:
        assert output_dir is not None
        # Reuse the run's own config unless a preset or file is given.
        config = config or (output_dir / "config.yaml" if gpu is None else None)
    if gpu is None and config is None:
        raise ConfigError(NO_PRESET)
    preset = chosen_preset(gpu)
    recipe, budget_bytes = recipe_of(preset, config, overrides, resumed=output_dir if resume else None)
    if recipe.train.get("use_cpu"):
        hide_gpus()  # loading, engine, memory check and export must all see none
    with loading("loading"):
        from mel_lite.run import train as run
    if dry_run:
        if output_dir is not None:
            check_folder(output_dir, resume=resume)
        _dry_run(recipe)
        return
    try:
        folder = output_dir or default_output_dir(recipe.model.name, recipe.train.get("algorithm", "mel"))
        options: dict[str, Any] = {"worst_case": worst_case, "budget_bytes": budget_bytes, "preset": preset}
        run.train(recipe, folder, resume=resume, console=console(), allow_change=allow_change or (), **options)
    except KeyboardInterrupt:
        typer.secho("interrupted; committed checkpoints are intact: continue with --resume", err=True)
        raise typer.Exit(130) from None


def _evaluation(
    dataset: str | None, eval_dataset: str | None, *, config: Path | None, resumed: Path | None
) -> list[tuple[str, Any]]:
    """Return what is evaluated where neither flags nor `--set` say it; empty where the preset or `config` says it.

    The preset's tasks belong to the preset's dataset. A resumed run keeps its own: holding out others would change the
    tasks that it trains on.
    """
    from mel_lite.recipe import keys_of, value_in

    if eval_dataset is not None:
        return [("data.eval", None), ("data.eval_split", None)]
    stored = None if resumed is None else resumed / "config.yaml"
    if stored is not None and stored.is_file():
        keys = {"data.eval", "data.eval_split"} - (keys_of(config) if config is not None else set())
        return [(key, value_in(stored, key)) for key in sorted(keys)]
    return [] if dataset is None else [("data.eval", HELD_OUT), ("data.eval_split", None)]


def _trackers(text: str) -> str | list[str]:
    """Return the value of --report-to as TRL takes it: one name, or a list of several."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names


def _dry_run(recipe: Any) -> None:
    """Check options and data, and print the recipe and the number of tasks."""
    from mel_lite.run.tasks import load_run_tasks, run_tokenizer
    from mel_lite.run.train import check

    tasks = load_run_tasks(recipe, check(recipe, Path("runs")), run_tokenizer(recipe))
    held_out = "none" if tasks.held_out is None else len(tasks.held_out)
    typer.echo(recipe.as_yaml())
    for note in tasks.notes:
        typer.echo(f"# {note}")
    counts = f"{len(tasks.train)} training tasks ({tasks.dropped_long} too long), held out: {held_out}"
    typer.echo(f"# {counts}. Dry run: nothing was trained.")
