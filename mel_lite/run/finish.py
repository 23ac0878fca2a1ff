"""Finish a run: save the adapter, export the merged model, and print the summary."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from mel_lite.errors import ExportError
from mel_lite.evaluate import EvalResult
from mel_lite.export.merge import export
from mel_lite.export.report import ExportReport
from mel_lite.files import share_weights
from mel_lite.hub.model_card import write_run_cards
from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.memory.host import return_freed_memory
from mel_lite.models.adapters import write_record
from mel_lite.recipe import Recipe
from mel_lite.report.page import write_report
from mel_lite.run.display import comparison_table, funnel_table, sample_panel
from mel_lite.text import first_line, printable
from mel_lite.trainer import MELTrainer
from mel_lite.types import Status

MOST_WARNINGS = 5
"""Warnings of the run that the summary repeats, the newest ones."""


def save(trainer: MELTrainer, recipe: Recipe, folder: Path) -> Path:
    """Write the trained adapter in PEFT's layout, or the full model if there is no LoRA. Returns the folder.

    All ranks call it, and rank 0 writes.
    """
    adapted = hasattr(trainer.model, "peft_config")
    target = folder / ("adapter" if adapted else "model")
    if trainer.sharding.in_lockstep:
        trainer.save_model(str(target), _internal_call=True)
    elif trainer.is_world_process_zero():
        trainer.model.save_pretrained(target)
        trainer.processing_class.save_pretrained(target)
    if trainer.is_world_process_zero():
        share_weights(target)
        if adapted:
            write_record(target, trainer.base_record, revision=recipe.model.revision)
    return target


def release(trainer: MELTrainer) -> None:
    """Free the memory of a trained and saved model, so that the export can use all of it.

    Tensor storage is emptied in place, because too many objects hold references to the tensors to drop them all.
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
        if getattr(module, "quant_state", None) is not None:  # a 4-bit layer holds a second reference
            module.quant_state = None
    gc.collect()
    torch.cuda.empty_cache()
    return_freed_memory()


def export_trained(
    recipe: Recipe, adapter_dir: Path, folder: Path, console: Console, *, in_subprocess: bool = False
) -> ExportReport | None:
    """Write the merged model and return its report.

    Returns None if nothing is exported, or if the export fails or runs in a subprocess; then the outcome is printed.
    """
    if recipe.export.format is None or adapter_dir.name != "adapter":
        return None
    target = folder / recipe.export.format
    if target.exists():  # left by the run before it was resumed
        shutil.rmtree(target)
    if in_subprocess:
        _export_in_subprocess(recipe, adapter_dir, target, console)
        return None
    try:
        with console.status(f"exporting {recipe.export.format}"):
            return export(
                adapter_dir, target, format=recipe.export.format, base=recipe.model, dtype=recipe.export.dtype
            )
    except ExportError as error:
        # The adapter is saved, so the user can export later with `mel-lite export`.
        console.print(f"[yellow]not exported:[/] {escape(printable(str(error)))}")
    except torch.OutOfMemoryError:
        console.print(
            "[yellow]not exported:[/] the GPU is too small for the model in 16 bits. Export on the CPU: "
            f"CUDA_VISIBLE_DEVICES= mel-lite export {escape(str(folder))}"
        )
    return None


def _export_in_subprocess(recipe: Recipe, adapter_dir: Path, target: Path, console: Console) -> None:
    """Export on the CPU in a fresh process, since Unsloth's patches keep this one from loading a plain model."""
    arguments = ["export", str(adapter_dir), "--output", str(target)]
    arguments += ["--format", str(recipe.export.format), "--dtype", recipe.export.dtype]
    command = [sys.executable, "-m", "mel_lite", *arguments]
    with console.status(f"exporting {recipe.export.format} in a separate process"):
        done = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
    message = done.stdout
    if done.returncode:
        killed = "the process was killed, probably because the host ran out of memory"
        reason = killed if done.returncode < 0 else done.stderr.strip().removeprefix("error: ")
        retry = f"CUDA_VISIBLE_DEVICES= {shlex.join(['mel-lite', *arguments])}"
        message = f"not exported: {reason}\nThe adapter is saved. Try again with: {retry}"
    console.print(printable(message), highlight=False, markup=False, soft_wrap=True)  # keeps the command on one line


def print_summary(
    trainer: MELTrainer,
    folder: Path,
    adapter_dir: Path,
    exported: ExportReport | None,
    results: tuple[EvalResult | None, EvalResult | None],
    warnings: Sequence[str],
    elapsed_s: float,
    console: Console,
) -> None:
    """Print evaluations before and after, funnel, samples, export report, warnings of the run, and output paths."""
    before, after = results
    console.rule("summary")
    if before is not None and after is not None:
        console.print(comparison_table(before, after))
    if trainer.args.with_meta_experience:
        console.print(funnel_table(trainer.funnel_totals))
        if trainer.in_flight is not None and (left := len(trainer.in_flight.waiting)):
            console.print(f"{left} more were in flight and are dropped; a run that is continued completes them.")
        with ExperienceStore(folder / "experiences.sqlite", read_only=True) as store:
            for row in sample_rows(store):
                console.print(sample_panel(row))
    if exported is not None:
        console.print(exported.as_table())
    if trainer.collapse.idle.idle_batches and not trainer.funnel_totals["mel/mixed_groups"]:
        console.print(f"[yellow]{trainer.collapse.idle.advice()}[/]")
    for warning in warnings[-MOST_WARNINGS:]:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))
    console.print(f"adapter   {escape(str(adapter_dir))}")
    if exported is not None:
        console.print(f"exported  {escape(str(exported.path))}")
    if trainer.args.with_meta_experience:
        console.print(f"lessons   mel-lite experiences list --run {escape(str(folder))}")
    console.print(f"took {elapsed_s / 60:.1f} min")


def write_run_report(folder: Path, console: Console) -> None:
    """Write report.html and print its path. The run is complete by then, so a failure is printed and not raised."""
    try:
        path = write_report(folder)
    except Exception as error:
        retry = escape(shlex.join(["mel-lite", "report", str(folder)]))
        reason = escape(printable(f"{type(error).__name__}: {first_line(error)}"))
        console.print(f"[yellow]no report:[/] {reason}. Try again with: {retry}", soft_wrap=True)
        return
    console.print(f"report    {escape(str(path))}", soft_wrap=True)


def write_cards(folder: Path, console: Console) -> None:
    """Write the model cards of a finished run. A failure is printed and not raised, as for the report."""
    try:
        write_run_cards(folder)
    except Exception as error:
        console.print(f"[yellow]no model card:[/] {escape(printable(f'{type(error).__name__}: {first_line(error)}'))}")


def sample_rows(store: ExperienceStore, limit: int = 3) -> list[ExperienceRow]:
    """Return up to `limit` meta-experiences to show: kept ones first, then the newest of each other status."""
    kept = store.list(status=Status.KEPT, limit=limit - 1)
    dropped = [row for status in Status if status is not Status.KEPT for row in store.list(status=status, limit=1)]
    return [*kept, *dropped][:limit]
