"""One training run from recipe to exported model, with everything it leaves in the run folder.

config.yaml  metrics.jsonl  experiences.sqlite  completions/  checkpoint-N/  adapter/  merged-16bit/  eval/
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from mel_lite import checkpoint, ranks
from mel_lite.adapters import lora_config, write_fingerprint
from mel_lite.config import MELConfig
from mel_lite.data import load_tasks, recommended_verifier
from mel_lite.display import LiveDisplay, comparison_table, funnel_table, peaks_table, sample_panel
from mel_lite.engines.unsloth import is_unsloth
from mel_lite.errors import ConfigError, DataError, EngineError, ExportError, MelLiteError, ModelError
from mel_lite.evaluate import EvalResult, evaluate
from mel_lite.export import export
from mel_lite.gguf_files import GGUF_TYPES, find_tools
from mel_lite.loading import load_for_training
from mel_lite.models import context_length, load_config, load_tokenizer
from mel_lite.planning import shape_for
from mel_lite.presets import Recipe, build_args, resolve
from mel_lite.ranks import SplitEngine
from mel_lite.resuming import check_changes
from mel_lite.runs import run_folder
from mel_lite.store import ExperienceRow, ExperienceStore
from mel_lite.templates import load_templates, render
from mel_lite.terminal import printable
from mel_lite.trainer import MELTrainer
from mel_lite.types import Status
from mel_lite.verifiers import get_verifier
from mel_lite.workload import predict, workload
from mel_lite.worst_case import PhasePeak, WorstStepFirst, gauge_here


@dataclass(frozen=True, slots=True)
class Tasks:
    """Datasets of a run, prompts ready for the model's chat template or plain."""

    train: Any
    held_out: Any | None
    dropped_long: int
    """Training prompts left out because prompt and completion do not fit the context together."""


def load_run_tasks(recipe: Recipe, args: MELConfig, tokenizer: Any) -> Tasks:
    """Load and check the datasets of a recipe.

    Raises: DataError for malformed rows, and when no prompt fits the model's context.
    """
    options = recipe.data
    conversational = options.conversational
    if conversational is None:
        conversational = tokenizer.chat_template is not None
    columns = {"prompt_column": options.prompt_column, "answer_column": options.answer_column}
    shared: dict[str, Any] = columns | {"system_prompt": options.system_prompt, "conversational": conversational}
    train = load_tasks(options.train, split=options.split, limit=options.limit, **shared)
    held_out = None
    if options.eval:
        held_out = load_tasks(options.eval, split=options.eval_split, limit=recipe.eval.limit, **shared)
    room_tokens = context_length(load_config(recipe.model)) - args.max_completion_length
    room_tokens = min(room_tokens, options.max_prompt_tokens or room_tokens)
    fits = train.filter(
        lambda row: len(render(row["prompt"], tokenizer, chat_template_kwargs=args.chat_template_kwargs)) <= room_tokens
    )
    if len(fits) == 0:
        raise DataError(
            f"None of the {len(train)} prompts of {options.train!r} leaves room for max_completion_length="
            f"{args.max_completion_length} in the model's context. Lower train.max_completion_length."
        )
    prompts = args.generation_batch_size // args.num_generations
    if len(fits) < prompts:
        raise DataError(
            f"{options.train!r} has {len(fits)} usable rows, but one step takes {prompts} different prompts. Lower "
            "train.gradient_accumulation_steps or train.per_device_train_batch_size, or add rows."
        )
    return Tasks(fits, held_out, len(train) - len(fits))


def check(recipe: Recipe, folder: Path) -> MELConfig:
    """Everything about a recipe that can be known before a model is loaded.

    Raises: ConfigError, VerifierError; ExportError when the export needs programs that are not here.
    """
    args = build_args(recipe, folder)
    args.verifier = args.verifier or recommended_verifier(recipe.data.train)
    args.disable_tqdm = True
    if args.verifier is not None:
        get_verifier(args.verifier)
    load_templates(args.templates)
    if recipe.lora is not None:
        lora_config(recipe.lora)
    if recipe.export.format in GGUF_TYPES:
        find_tools(recipe.export.format, folder)
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
) -> None:
    """Train, evaluate before and after, save the adapter, export, and print what came of it.

    `allow_change` names options and inputs that a resumed run may change (`resuming.py`). Several processes
    (`accelerate launch`) train together; the first one prints, writes, saves and exports.

    Args:
        worst_case: take the worst step before the first and compare its memory with the plan; None = on a GPU.
        budget_bytes: memory the run may take; None = as much as there is.
    Raises: MelLiteError subclasses for anything the user can mend; what was already saved stays.
    """
    on_cpu = bool(recipe.train.get("use_cpu"))
    folder = ranks.on_first(lambda: folder, cpu=on_cpu)
    args = check(recipe, folder)
    if resume and not (folder / "config.yaml").is_file():
        raise ConfigError(f"--resume: {folder} holds no run (no config.yaml). Name the run's folder with --output-dir.")
    leads = ranks.rank() == 0
    console = console if leads else Console(quiet=True)
    with ExitStack() as claim:
        ranks.on_first(lambda: claim.enter_context(run_folder(folder, resume=resume)), cpu=on_cpu)
        started_s = time.monotonic()
        resume = ranks.on_first(lambda: resume and _can_resume(recipe, folder, console, allow_change), cpu=on_cpu)
        tokenizer = load_tokenizer(recipe.model)
        tasks = load_run_tasks(recipe, args, tokenizer)
        console.print(
            f"[bold]{escape(recipe.model.name)}[/] learns {escape(recipe.data.train)} with {args.algorithm}: "
            f"{len(tasks.train)} tasks, output in {escape(str(folder))}"
            + (f", {ranks.world()} processes" if ranks.world() > 1 else "")
        )
        if tasks.dropped_long:
            console.print(f"{tasks.dropped_long} prompts were left out: too long for the context.")
        display = LiveDisplay(console)
        trainer = _build_trainer(recipe, args, tokenizer, tasks, display, console)
        if leads and not resume:
            _write_config(recipe, folder)
        elif leads:
            trainer.add_callback(_OnceAccepted(recipe, folder))
        if torch.cuda.is_available() if worst_case is None else worst_case:
            _worst_step_first(trainer, recipe, console, budget_bytes)
        try:
            before = _evaluation(recipe, trainer, tasks, folder / "eval" / "before.json", console, reuse=resume)
            trainer.train(resume_from_checkpoint=resume or None, allow_change=allow_change)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(error, folder) from error
        finally:
            display.close()
        after = _evaluation(recipe, trainer, tasks, folder / "eval" / "after.json", console)
        trainer.accelerator.wait_for_everyone()
        if leads:
            adapter_dir = _save(trainer, recipe, folder)
            apart = is_unsloth(trainer.model)
            _release(trainer)
            exported = _export(recipe, adapter_dir, folder, console, apart=apart)
            _summary(trainer, folder, adapter_dir, exported, before, after, time.monotonic() - started_s, console)
        trainer.accelerator.end_training()


def _write_config(recipe: Recipe, folder: Path) -> None:
    """The old file or the new one, never half of one: without it a run cannot be resumed."""
    part = folder / ".config.yaml"
    part.write_text(recipe.as_yaml())
    part.replace(folder / "config.yaml")


class _OnceAccepted(TrainerCallback):
    """Notes changed options when the checkpoint was taken with them: a refused resume leaves the run as it was."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder = recipe, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _write_config(self._recipe, self._folder)


def _out_of_memory(error: torch.OutOfMemoryError, folder: Path) -> EngineError:
    return EngineError(
        "Out of GPU memory in training. Go on with --resume and a lower --set train.max_micro_batch_tokens=...; or, "
        "with a lower train.max_completion_length or train.max_context_tokens, in a new run from a checkpoint: "
        f"--adapter {folder}/checkpoint-N --output-dir NEW. ({str(error).splitlines()[0]})"
    )


def _worst_step_first(trainer: MELTrainer, recipe: Recipe, console: Console, budget_bytes: int | None) -> None:
    """Have the trainer begin with the worst step, where a plan says what that is."""
    if ranks.world() > 1:
        console.print("No worst step first: it is taken on one process only.")
        return
    try:
        load = workload(recipe, shape_for(recipe))
    except (ModelError, ConfigError) as reason:
        console.print(f"No worst step first: {reason}", markup=False)
        return

    def report(peaks: tuple[PhasePeak, ...], change: str) -> None:
        console.print(peaks_table(peaks, budget_bytes))
        if change:
            console.print(f"Too much. Again with {change}")

    predicted = predict(load) if torch.cuda.is_available() else ()
    console.print("before the first step comes the worst one: everything at full length (--no-worst-case skips it)")
    trainer.add_callback(
        WorstStepFirst(trainer, load, predicted, report, gauge=gauge_here(), budget_bytes=budget_bytes)
    )


def _can_resume(recipe: Recipe, folder: Path, console: Console, allow_change: Sequence[str] = ()) -> bool:
    """Whether the folder has a checkpoint to go on from; without one its half-run start is cleared away.

    Raises: CheckpointError when every checkpoint is damaged; ConfigError when the recipe is not the run's.
    """
    began = resolve(config=folder / "config.yaml")
    options = [option.name for option in fields(MELConfig)]
    check_changes(began, recipe, allow_change, known=options, where=str(folder))
    if checkpoint.committed(folder):
        checkpoint.resolve(folder, True)  # fail before minutes of loading
        return True
    console.print(f"{escape(str(folder))} has no checkpoint yet: starting from the first step.")
    for leftover in (*folder.glob("experiences.sqlite*"), folder / "metrics.jsonl"):
        leftover.unlink(missing_ok=True)
    return False


def _build_trainer(
    recipe: Recipe, args: MELConfig, tokenizer: Any, tasks: Tasks, display: LiveDisplay, console: Console
) -> MELTrainer:
    from transformers import PrinterCallback

    model, peft_config = load_for_training(recipe, args, console)
    try:
        trainer = MELTrainer(
            model=model,
            args=args,
            train_dataset=tasks.train,
            eval_dataset=tasks.held_out,
            processing_class=tokenizer,
            callbacks=[display],
            peft_config=peft_config,
        )
    except MelLiteError:
        raise
    except (ValueError, ImportError) as error:  # TRL's and transformers' own checks of their options
        raise ConfigError(f"section 'train': {error}") from error
    trainer.remove_callback(PrinterCallback)
    display.trainer = trainer
    return trainer


def _evaluation(
    recipe: Recipe, trainer: MELTrainer, tasks: Tasks, path: Path, console: Console, *, reuse: bool = False
) -> EvalResult | None:
    """Measure the model as it is on the held-out tasks; None when the recipe has none."""
    if tasks.held_out is None:
        return None
    if reuse and path.is_file():
        return EvalResult.from_json(path.read_text())
    with console.status(f"evaluating on {len(tasks.held_out)} held-out tasks"):
        result = evaluate(
            SplitEngine(trainer.engine) if ranks.world() > 1 else trainer.engine,
            trainer.processing_class,
            tasks.held_out,
            trainer.judge,
            k=recipe.eval.k,
            temperature=recipe.eval.temperature,
            max_new_tokens=recipe.eval.max_new_tokens or trainer.args.max_completion_length,
            seed=trainer.args.seed,
            chat_template_kwargs=trainer.args.chat_template_kwargs,
            context_tokens=context_length(trainer.model),
        )
    if ranks.rank() == 0:
        path.parent.mkdir(exist_ok=True)
        path.write_text(result.to_json() + "\n")
    return result


def _save(trainer: MELTrainer, recipe: Recipe, folder: Path) -> Path:
    """Write the trained adapter (or the whole model, without LoRA) in PEFT's layout; returns its folder."""
    adapted = hasattr(trainer.model, "peft_config")
    target = folder / ("adapter" if adapted else "model")
    trainer.model.save_pretrained(target)
    trainer.processing_class.save_pretrained(target)
    if adapted:
        write_fingerprint(target, trainer.model, revision=recipe.model.revision)
    return target


def _release(trainer: MELTrainer) -> None:
    """Give up the memory of a trained and saved model, so that the export has the GPU to itself.

    Storage is emptied in place: too many objects refer to the tensors to let go of all of them.
    """
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()
    for model in filter(None, (trainer.model, trainer.ref_model)):
        for weight in [*model.parameters(), *model.buffers()]:
            weight.grad = None
            weight.data = weight.data.new_empty(0)
            if getattr(weight, "quant_state", None) is not None:
                weight.quant_state = None
    for module in trainer.model.modules():
        if getattr(module, "quant_state", None) is not None:  # a 4-bit layer keeps it a second time
            module.quant_state = None
    gc.collect()
    torch.cuda.empty_cache()


def _export(recipe: Recipe, adapter_dir: Path, folder: Path, console: Console, *, apart: bool = False) -> Any:
    """Write the merged model; the report, or None when there is none to show. `apart`: in a process of its own."""
    if recipe.export.format is None or adapter_dir.name != "adapter":
        return None
    target = folder / recipe.export.format
    if target.exists():  # of the run before it was resumed
        shutil.rmtree(target)
    if apart:
        _export_apart(recipe, adapter_dir, target, console)
        return None
    try:
        with console.status(f"exporting {recipe.export.format}"):
            return export(
                adapter_dir, target, format=recipe.export.format, base=recipe.model, dtype=recipe.export.dtype
            )
    except ExportError as error:
        # The adapter is saved; an export can be had later with `mel-lite export`.
        console.print(f"[yellow]not exported:[/] {escape(printable(str(error)))}")
    except torch.OutOfMemoryError:
        console.print(
            "[yellow]not exported:[/] the GPU has no room for the model in 16 bits. Export on the CPU: "
            f"CUDA_VISIBLE_DEVICES= mel-lite export {escape(str(folder))}"
        )
    return None


def _export_apart(recipe: Recipe, adapter_dir: Path, target: Path, console: Console) -> None:
    """Export on the CPU, in a process that Unsloth did not patch: its layers would not load a plain model any more."""
    command = [sys.executable, "-m", "mel_lite", "export", str(adapter_dir), "--output", str(target)]
    command += ["--format", str(recipe.export.format), "--dtype", recipe.export.dtype]
    with console.status(f"exporting {recipe.export.format} in a process of its own"):
        done = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
    told = done.stdout if done.returncode == 0 else f"not exported: {done.stderr}"
    console.print(printable(told), highlight=False, markup=False)


def _summary(
    trainer: MELTrainer,
    folder: Path,
    adapter_dir: Path,
    exported: Any,
    before: EvalResult | None,
    after: EvalResult | None,
    elapsed_s: float,
    console: Console,
) -> None:
    console.rule("summary")
    if before is not None and after is not None:
        console.print(comparison_table(before, after))
    if trainer.args.with_meta_experience:
        console.print(funnel_table(trainer.funnel_totals))
        with ExperienceStore(folder / "experiences.sqlite", read_only=True) as store:
            for row in exemplary(store):
                console.print(sample_panel(row))
    if exported is not None:
        console.print(exported.as_table())
    if trainer.idle_batches and not trainer.funnel_totals["mel/mixed_groups"]:
        console.print(f"[yellow]{trainer.idle_advice}[/]")
    console.print(f"adapter   {escape(str(adapter_dir))}")
    if exported is not None:
        console.print(f"exported  {escape(str(exported.path))}")
    if trainer.args.with_meta_experience:
        console.print(f"lessons   mel-lite experiences list --run {escape(str(folder))}")
    console.print(f"took {elapsed_s / 60:.1f} min")


def exemplary(store: ExperienceStore, most: int = 3) -> list[ExperienceRow]:
    """Up to `most` meta-experiences to show: kept ones first, then one of each way to be dropped, newest first."""
    kept = store.list(status=Status.KEPT, limit=most - 1)
    dropped = [row for status in Status if status is not Status.KEPT for row in store.list(status=status, limit=1)]
    return [*kept, *dropped][:most]
