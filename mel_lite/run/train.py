"""Run one training from recipe to exported model.

Everything is written to the run folder: config.yaml, run.json, metrics.jsonl, experiences.sqlite, completions/,
checkpoint-N/, adapter/, merged-16bit/, eval/ and report.html.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from mel_lite.config import MELConfig
from mel_lite.data.tasks import recommended_verifier
from mel_lite.engines import distributed
from mel_lite.engines.unsloth import is_unsloth
from mel_lite.errors import ConfigError, EngineError, MelLiteError, ModelError
from mel_lite.evaluate import EvalResult
from mel_lite.export.gguf import GGUF_TYPES, find_tools
from mel_lite.files import atomic_write_text
from mel_lite.lessons.internalise import get_internalisation
from mel_lite.lessons.prompts import load_templates
from mel_lite.memory.plan import shape_for
from mel_lite.memory.predict import predict
from mel_lite.memory.vllm import VLLMCard
from mel_lite.memory.workload import DEFAULTS, Workload, option_of, workload
from mel_lite.models.adapters import lora_config
from mel_lite.models.load import load_config
from mel_lite.recipe import EvalOptions, Recipe, build_args, resolve
from mel_lite.report.record import RunRecord, device_here
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.memory_gauge import Gauge, gauge_here
from mel_lite.resilience.resume_checks import check_changes
from mel_lite.resilience.saved_bank import build_bank
from mel_lite.resilience.worst_step import PhasePeak, WorstStepFirst, as_started
from mel_lite.run.display import peaks_table
from mel_lite.run.evaluations import Evaluations
from mel_lite.run.finish import export_trained, print_summary, release, save, write_cards, write_run_report
from mel_lite.run.folder import run_folder
from mel_lite.run.load_model import load_for_training
from mel_lite.run.notices import Notices
from mel_lite.run.preflight import check_dependencies
from mel_lite.run.progress import LiveDisplay
from mel_lite.run.tasks import Tasks, load_run_tasks, run_tokenizer
from mel_lite.text import first_line
from mel_lite.trainer import MELTrainer
from mel_lite.training.rollouts import check_overlap
from mel_lite.training.savings import not_shared, why_not_shared_by
from mel_lite.training.sharding.checks import check_sharding
from mel_lite.verify.verifiers import get_verifier


def check(recipe: Recipe, folder: Path) -> MELConfig:
    """Validate everything in a recipe that can be checked before a model is loaded, and return the trainer's arguments.

    Raises: ConfigError, VerifierError, ModelError; ExportError if the export needs programs that are not installed.
    """
    for key in DEFAULTS:
        option_of(recipe, key)
    args = build_args(recipe, folder)
    check_sharding(args, load_in_4bit=recipe.model.load_in_4bit, adapter=recipe.lora is not None)
    _check_evaluation(recipe.eval, args)
    args.verifier = args.verifier or recommended_verifier(recipe.data.train)
    args.disable_tqdm = True
    args.run_name = args.run_name or folder.resolve().name  # trackers resume a run by its name
    if args.verifier is not None:
        get_verifier(args.verifier)
    load_templates(args.templates)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    if args.share_prompts:
        dropout = 0.0 if recipe.lora is None else recipe.lora.dropout
        if (problem := why_not_shared_by(load_config(recipe.model), dropout=dropout)) is not None:
            raise not_shared(problem)
    way = get_internalisation(args.internalisation, args.internalisation_options)
    check_overlap(args, way, None, None, own_rollouts=True)
    build_bank(args, used=way.uses_bank)
    if recipe.export.format is not None and recipe.export.format in GGUF_TYPES:
        find_tools(recipe.export.format, folder)
    check_dependencies(recipe, args)
    return args


def _check_evaluation(options: EvalOptions, args: MELConfig) -> None:
    if options.with_lessons and not args.with_meta_experience:
        raise ConfigError(
            f"eval.with_lessons=true with algorithm={args.algorithm!r}: such a run writes no lessons. Set "
            "train.algorithm=mel, or eval.with_lessons=false."
        )
    if options.every_steps is not None and options.every_steps < 1:
        raise ConfigError(
            f"eval.every_steps={options.every_steps} must be at least 1, or null for no evaluation during training."
        )


def train(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    console: Console,
    allow_change: Sequence[str] = (),
    worst_case: bool | None = None,
    budget_bytes: int | None = None,
    preset: str | None = None,
) -> None:
    """Train, evaluate before and after, save the adapter, export, print a summary, and write the report.

    With several processes (`accelerate launch`), only rank 0 prints, writes, saves and exports.

    Args:
        allow_change: options and inputs that a resumed run may change (`resilience.resume_checks`).
        worst_case: run the worst step before the first one and compare its memory with the plan; None = on a GPU only.
        budget_bytes: memory that the run may use; None = no limit.
        preset: name of the preset that the recipe began with, for the report.
    Raises: MelLiteError subclasses for anything that the user can fix. Saved files are kept.
    """
    on_cpu = bool(recipe.train.get("use_cpu"))
    folder = distributed.on_first(lambda: folder, cpu=on_cpu)
    args = check(recipe, folder)
    if resume and not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume: {folder} holds no run (no config.yaml). Pass the run's folder with --output-dir.")
    is_main = distributed.rank() == 0
    console = console if is_main else Console(quiet=True)
    with ExitStack() as lock, Notices(console) as notices:
        distributed.on_first(lambda: lock.enter_context(run_folder(folder, resume=resume)), cpu=on_cpu)
        resume = distributed.on_first(lambda: resume and _can_resume(recipe, folder, console, allow_change), cpu=on_cpu)
        gauge = _gauge(worst_case, console)  # before the model allocates anything
        record = RunRecord(folder if is_main else None, preset=preset, device=device_here(), resume=resume)
        with record.stage("load"):
            tokenizer = run_tokenizer(recipe)
            tasks = load_run_tasks(recipe, args, tokenizer)
            _announce(recipe, args, tasks, folder, console)
            trainer = build_trainer(recipe, args, tokenizer, tasks, console)
        if is_main and not resume:
            atomic_write_text(folder / "config.yaml", recipe.as_yaml())  # a run cannot be resumed without it
            record.write()
        elif is_main:
            trainer.add_callback(_WriteConfigOnTrainBegin(recipe, folder))
        if gauge is not None:
            _add_worst_step(trainer, _with_prompt_bound(recipe, tasks), console, gauge, budget_bytes)
        # Added after the worst step: a run that does not fit should fail before it spends time on the evaluation.
        display = LiveDisplay(console, trainer, evaluations=_count(recipe.eval, args, tasks, resumed=resume))
        evaluations = _evaluations(recipe, trainer, tasks, folder, display, record, console, resumed=resume)
        trainer.add_callback(evaluations)
        with record.stage("training"):
            _fit(trainer, folder, display, resume=resume, allow_change=allow_change)
        with record.stage("export"):
            adapter_dir = save(trainer, recipe, folder)  # before anything else can fail
        after = evaluations.after()
        trainer.accelerator.wait_for_everyone()
        if is_main:
            results = evaluations.before, after
            _export_and_report(recipe, trainer, folder, adapter_dir, results, record, notices, console)
        trainer.accelerator.end_training()


def _export_and_report(
    recipe: Recipe, trainer: MELTrainer, folder: Path, adapter_dir: Path,
    results: tuple[EvalResult | None, EvalResult | None], record: RunRecord, notices: Notices, console: Console,
) -> None:  # fmt: skip
    """Export the trained model, print the summary and write the report, on rank 0."""
    patched = is_unsloth(trainer.model)
    release(trainer)
    with record.stage("export"):
        exported = export_trained(recipe, adapter_dir, folder, console, in_subprocess=patched)
    print_summary(trainer, folder, adapter_dir, exported, results, notices.seen, record.elapsed_s, console)
    write_cards(folder, console)
    write_run_report(folder, console)


def _announce(recipe: Recipe, args: MELConfig, tasks: Tasks, folder: Path, console: Console) -> None:
    console.print(
        f"Training [bold]{escape(recipe.model.name)}[/] on {escape(recipe.data.train)} with {args.algorithm}: "
        f"{len(tasks.train)} tasks, output in {escape(str(folder))}"
        + (f", {distributed.world()} processes" if distributed.world() > 1 else "")
    )
    if tasks.dropped_long:
        console.print(f"{tasks.dropped_long} prompts were dropped: too long for the context.")
    for note in tasks.notes:
        console.print(note, style="yellow" if note.startswith("warning") else None, markup=False, highlight=False)


def _gauge(worst_case: bool | None, console: Console) -> Gauge | None:
    """Return the gauge that measures the worst step; None if that step is skipped."""
    if not (torch.cuda.is_available() if worst_case is None else worst_case):
        return None
    if distributed.world() > 1:
        console.print("Worst step skipped: it runs on a single process only.")
        return None
    return gauge_here()


def _evaluations(
    recipe: Recipe, trainer: MELTrainer, tasks: Tasks, folder: Path, display: LiveDisplay, record: RunRecord,
    console: Console, *, resumed: bool,
) -> Evaluations:  # fmt: skip
    @contextmanager
    def shown() -> Iterator[None]:
        with record.stage("evaluation"), display.evaluating():
            yield

    return Evaluations(
        recipe.eval, trainer, tasks.held_out, folder / "eval", resumed=resumed, shown=shown, console=console
    )


def _count(options: EvalOptions, args: MELConfig, tasks: Tasks, *, resumed: bool) -> int:
    """Return the number of evaluations of a run: before, after, and those during training."""
    if tasks.held_out is None:
        return 0
    return 2 - resumed + (max(0, args.max_steps - 1) // options.every_steps if options.every_steps else 0)


def _fit(trainer: MELTrainer, folder: Path, display: LiveDisplay, *, resume: bool, allow_change: Sequence[str]) -> None:
    """Train, with a live display. Raises EngineError if the GPU runs out of memory."""
    trainer.add_callback(display)  # last: a step ends for it after the evaluation that follows the step
    try:
        trainer.train(resume_from_checkpoint=resume or None, allow_change=allow_change)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, folder) from error
    finally:
        display.close()


class _WriteConfigOnTrainBegin(TrainerCallback):
    """Write the changed options once the checkpoint is loaded with them, so that a refused resume changes nothing."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        atomic_write_text(self._folder / "config.yaml", self._recipe.as_yaml())


def _out_of_memory(error: torch.OutOfMemoryError, folder: Path) -> EngineError:
    return EngineError(
        "Out of GPU memory during training. Either continue with --resume and a lower --set "
        "train.max_micro_batch_tokens=...; or start a new run from a checkpoint, with a lower "
        "train.max_completion_length or train.max_context_tokens: "
        f"--adapter {folder}/checkpoint-N --output-dir NEW. ({first_line(error)})"
    )


def _with_prompt_bound(recipe: Recipe, tasks: Tasks) -> Recipe:
    """Set `max_prompt_tokens` to the longest actual prompt if the recipe leaves it unset."""
    if recipe.data.max_prompt_tokens is not None:
        return recipe
    return replace(recipe, data=replace(recipe.data, max_prompt_tokens=tasks.longest_prompt_tokens))


def _workload(trainer: MELTrainer, recipe: Recipe) -> Workload:
    """Return the recipe's workload, with the share that vLLM was actually started with.

    The plan's workload cannot be reused: it assumes prompt lengths, and the card's memory before the model was loaded.
    """
    vllm_on = None
    if trainer.engine.share is not None:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        vllm_on = VLLMCard(total_bytes, free_bytes)
    return as_started(workload(recipe, shape_for(recipe), vllm_on=vllm_on), trainer.engine)


def _add_worst_step(
    trainer: MELTrainer, recipe: Recipe, console: Console, gauge: Gauge, budget_bytes: int | None
) -> None:
    """Make the trainer start with the worst step, if memory can be predicted for this model."""
    try:
        load = _workload(trainer, recipe)
    except (ModelError, ConfigError) as reason:
        console.print(f"Worst step skipped: {reason}", markup=False)
        return

    def report(peaks: tuple[PhasePeak, ...], change: str) -> None:
        console.print(peaks_table(peaks, budget_bytes))
        if change:
            console.print(f"Too much memory. Trying again with {change}")

    predicted = predict(load) if torch.cuda.is_available() else ()
    console.print("Running the worst step first: everything at full length (skip it with --no-worst-case).")
    trainer.add_callback(WorstStepFirst(trainer, load, predicted, report, gauge=gauge, budget_bytes=budget_bytes))


def _can_resume(recipe: Recipe, folder: Path, console: Console, allow_change: Sequence[str] = ()) -> bool:
    """Return True if the folder has a checkpoint to resume from. Otherwise delete the leftovers of the aborted start.

    Raises: CheckpointError if every checkpoint is damaged; ConfigError if the recipe differs from the run's.
    """
    stored = resolve(config=folder / "config.yaml")
    options = [option.name for option in fields(MELConfig)]
    check_changes(stored, recipe, allow_change, known=options, where=str(folder))
    if checkpoint_files.committed(folder):
        checkpoint_files.resolve(folder, True)  # fail now rather than after minutes of loading
        return True
    console.print(f"{escape(str(folder))} has no checkpoint yet: starting from the first step.")
    for leftover in (*folder.glob("experiences.sqlite*"), folder / "metrics.jsonl"):
        leftover.unlink(missing_ok=True)
    return False


def build_trainer(recipe: Recipe, args: MELConfig, tokenizer: Any, tasks: Tasks, console: Console) -> MELTrainer:
    """Load the model and build the trainer of a run. Raises: MelLiteError subclasses for what the user can fix."""
    from transformers import PrinterCallback

    model, peft_config = load_for_training(recipe, args, console, prompt_tokens=tasks.longest_prompt_tokens)
    try:
        trainer = MELTrainer(
            model=model,
            args=args,
            train_dataset=tasks.train,
            eval_dataset=tasks.held_out,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    except MelLiteError:
        raise
    except (ValueError, ImportError) as error:  # TRL and transformers validate their own options
        raise ConfigError(f"section 'train': {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer
