"""Run one training from recipe to exported model.

Everything is written to the run folder: config.yaml, run.json, metrics.jsonl, experiences.sqlite, completions/,
checkpoint-N/, adapter/, merged-16bit/, eval/ and report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase, TrainerCallback

from mel_lite.config import MELConfig
from mel_lite.data.tasks import load_tasks, recommended_verifier
from mel_lite.engines import distributed
from mel_lite.engines.distributed import SplitEngine
from mel_lite.engines.unsloth import is_unsloth
from mel_lite.errors import ConfigError, DataError, EngineError, MelLiteError, ModelError
from mel_lite.evaluate import EvalResult, evaluate
from mel_lite.export.gguf import GGUF_TYPES, find_tools
from mel_lite.files import atomic_write_text
from mel_lite.lessons.internalise import get_internalisation
from mel_lite.lessons.prompts import load_templates
from mel_lite.memory.plan import shape_for
from mel_lite.memory.predict import predict
from mel_lite.memory.workload import DEFAULTS, VLLMCard, Workload, option_of, workload
from mel_lite.models.adapters import find_adapter, lora_config
from mel_lite.models.chat import render
from mel_lite.models.load import context_length, load_config, load_tokenizer
from mel_lite.recipe import Recipe, build_args, resolve
from mel_lite.report.record import RunRecord, device_here
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.memory_gauge import Gauge, gauge_here
from mel_lite.resilience.resume_checks import check_changes
from mel_lite.resilience.saved_bank import build_bank
from mel_lite.resilience.worst_step import PhasePeak, WorstStepFirst, as_started
from mel_lite.run.display import peaks_table
from mel_lite.run.finish import export_trained, print_summary, release, save, write_cards, write_run_report
from mel_lite.run.folder import run_folder
from mel_lite.run.load_model import load_for_training
from mel_lite.run.preflight import check_dependencies
from mel_lite.run.progress import LiveDisplay
from mel_lite.text import first_line
from mel_lite.trainer import MELTrainer
from mel_lite.verify.verifiers import get_verifier


@dataclass(frozen=True, slots=True)
class Tasks:
    """Datasets of a run, with prompts in conversational or plain-text form."""

    train: Any
    held_out: Any | None
    dropped_long: int
    """Number of training prompts dropped because prompt and completion together exceed the context."""
    longest_prompt_tokens: int
    """Length of the longest remaining training prompt."""


def load_run_tasks(recipe: Recipe, args: MELConfig, tokenizer: Any) -> Tasks:
    """Load and check the datasets of a recipe.

    Raises: DataError for malformed rows, if no prompt fits the model's context, or if there are too few rows;
        ModelError for a conversation that the chat template rejects.
    """
    options = recipe.data
    conversational = options.conversational
    if conversational is None:
        conversational = tokenizer.chat_template is not None
    columns = {"prompt_column": options.prompt_column, "answer_column": options.answer_column}
    shared: dict[str, Any] = columns | {"system_prompt": options.system_prompt, "conversational": conversational}
    as_ids = partial(render, tokenizer=tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    lengths: list[int] = []
    train = load_tasks(
        options.train,
        split=options.split,
        limit=options.limit,
        render=lambda prompt: lengths.append(len(as_ids(prompt))),
        **shared,
    )
    held_out = None
    if options.eval:
        held_out = load_tasks(options.eval, split=options.eval_split, limit=recipe.eval.limit, render=as_ids, **shared)
    room_tokens = context_length(load_config(recipe.model)) - args.max_completion_length
    room_tokens = min(room_tokens, options.max_prompt_tokens or room_tokens)
    fits = train.select([i for i, length in enumerate(lengths) if length <= room_tokens])
    if len(fits) == 0:
        raise DataError(
            f"None of the {len(train)} prompts of {options.train!r} leaves room for max_completion_length="
            f"{args.max_completion_length} in the model's context. Lower train.max_completion_length."
        )
    prompts = args.generation_batch_size // args.num_generations
    if len(fits) < prompts:
        raise DataError(
            f"{options.train!r} has {len(fits)} usable rows, but one step needs {prompts} different prompts. Lower "
            "train.gradient_accumulation_steps or train.per_device_train_batch_size, or add rows."
        )
    longest = max(length for length in lengths if length <= room_tokens)
    return Tasks(fits, held_out, len(train) - len(fits), longest)


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run: with the chat template of the adapter it starts from. Raises: ModelError."""
    start = None if recipe.lora is None else recipe.lora.start_from
    return load_tokenizer(recipe.model, saved_in=None if start is None else find_adapter(start))


def check(recipe: Recipe, folder: Path) -> MELConfig:
    """Validate everything in a recipe that can be checked before a model is loaded, and return the trainer's arguments.

    Raises: ConfigError, VerifierError, ModelError; ExportError if the export needs programs that are not installed.
    """
    for key in DEFAULTS:
        option_of(recipe, key)
    args = build_args(recipe, folder)
    args.verifier = args.verifier or recommended_verifier(recipe.data.train)
    args.disable_tqdm = True
    if args.verifier is not None:
        get_verifier(args.verifier)
    load_templates(args.templates)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    way = get_internalisation(args.internalisation, args.internalisation_options)
    build_bank(args, used=way.uses_bank)
    if recipe.export.format is not None and recipe.export.format in GGUF_TYPES:
        find_tools(recipe.export.format, folder)
    check_dependencies(recipe, args)
    return args


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
    with ExitStack() as lock:
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
        path = folder / "eval" / "before.json"
        evaluation = record.stage("evaluation")(partial(_evaluation, recipe, trainer, tasks, console=console))
        trainer.add_callback(baseline := _Baseline(trainer, lambda: evaluation(path, reuse=resume)))
        with record.stage("training"):
            _fit(trainer, folder, console, resume=resume, allow_change=allow_change)
        with record.stage("export"):
            adapter_dir = save(trainer, recipe, folder) if is_main else folder  # before anything else can fail
        after = evaluation(folder / "eval" / "after.json")
        trainer.accelerator.wait_for_everyone()
        if is_main:
            before = baseline.result or _stored_evaluation(path)  # a finished run is not trained again
            _export_and_report(recipe, trainer, folder, adapter_dir, before, after, record, console)
        trainer.accelerator.end_training()


def _export_and_report(
    recipe: Recipe, trainer: MELTrainer, folder: Path, adapter_dir: Path, before: EvalResult | None,
    after: EvalResult | None, record: RunRecord, console: Console,
) -> None:  # fmt: skip
    """Export the trained model, print the summary and write the report, on rank 0."""
    patched = is_unsloth(trainer.model)
    release(trainer)
    with record.stage("export"):
        exported = export_trained(recipe, adapter_dir, folder, console, in_subprocess=patched)
    print_summary(trainer, folder, adapter_dir, exported, before, after, record.elapsed_s, console)
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


def _gauge(worst_case: bool | None, console: Console) -> Gauge | None:
    """Return the gauge that measures the worst step; None if that step is skipped."""
    if not (torch.cuda.is_available() if worst_case is None else worst_case):
        return None
    if distributed.world() > 1:
        console.print("Worst step skipped: it runs on a single process only.")
        return None
    return gauge_here()


def _fit(trainer: MELTrainer, folder: Path, console: Console, *, resume: bool, allow_change: Sequence[str]) -> None:
    """Train, with a live display. Raises EngineError if the GPU runs out of memory."""
    display = LiveDisplay(console, trainer)
    trainer.add_callback(display)  # last, since nothing else may print while its progress bar is up
    try:
        trainer.train(resume_from_checkpoint=resume or None, allow_change=allow_change)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error, folder) from error
    finally:
        display.close()


class _Baseline(TrainerCallback):
    """Evaluate the model before its first step. A resumed run loads the stored result instead."""

    def __init__(self, trainer: MELTrainer, evaluation: Callable[[], EvalResult | None]) -> None:
        self._trainer, self._evaluation = trainer, evaluation
        self.result: EvalResult | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.result = self._evaluation()
        self._trainer.stop_together()  # if a signal arrived during the evaluation


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


def _evaluation(
    recipe: Recipe, trainer: MELTrainer, tasks: Tasks, path: Path, *, console: Console, reuse: bool = False
) -> EvalResult | None:
    """Evaluate the current model on the held-out tasks, and store the result; None if there are no held-out tasks.

    `reuse`: load the stored result instead; None if there is none.
    """
    if tasks.held_out is None:
        return None
    if reuse:  # the model has been trained since, so it cannot be evaluated as the baseline
        return _stored_evaluation(path)
    with console.status(f"evaluating on {len(tasks.held_out)} held-out tasks"), trainer.engine.uncounted():
        result = evaluate(
            SplitEngine(trainer.engine) if distributed.world() > 1 else trainer.engine,
            trainer.processing_class,
            tasks.held_out,
            trainer.judge,
            k=recipe.eval.k,
            temperature=recipe.eval.temperature,
            max_new_tokens=recipe.eval.max_new_tokens or trainer.args.max_completion_length,
            seed=trainer.args.seed,
            chat_template_kwargs=trainer.args.chat_template_kwargs,
            context_tokens=min(context_length(trainer.model), trainer.engine.context_tokens or sys.maxsize),
        )
    if distributed.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, result.to_json() + "\n")
    return result


def _stored_evaluation(path: Path) -> EvalResult | None:
    return EvalResult.from_json(path.read_text()) if path.is_file() else None
