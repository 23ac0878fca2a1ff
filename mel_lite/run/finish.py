"""What a trained run leaves: the adapter, the exported model, and the summary of what came of it."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from mel_lite.errors import ExportError
from mel_lite.evaluate import EvalResult
from mel_lite.export.merge import export
from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.models.adapters import write_fingerprint
from mel_lite.recipe import Recipe
from mel_lite.run.display import comparison_table, funnel_table, sample_panel
from mel_lite.text import printable
from mel_lite.trainer import MELTrainer
from mel_lite.types import Status


def save(trainer: MELTrainer, recipe: Recipe, folder: Path) -> Path:
    """Write the trained adapter (or the whole model, without LoRA) in PEFT's layout; returns its folder."""
    adapted = hasattr(trainer.model, "peft_config")
    target = folder / ("adapter" if adapted else "model")
    trainer.model.save_pretrained(target)
    trainer.processing_class.save_pretrained(target)
    if adapted:
        write_fingerprint(target, trainer.model, revision=recipe.model.revision)
    return target


def release(trainer: MELTrainer) -> None:
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


def export_trained(recipe: Recipe, adapter_dir: Path, folder: Path, console: Console, *, apart: bool = False) -> Any:
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
    arguments = ["export", str(adapter_dir), "--output", str(target)]
    arguments += ["--format", str(recipe.export.format), "--dtype", recipe.export.dtype]
    command = [sys.executable, "-m", "mel_lite", *arguments]
    with console.status(f"exporting {recipe.export.format} in a process of its own"):
        done = subprocess.run(
            command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
        )
    told = done.stdout
    if done.returncode:
        killed = "the process was killed, as it is where the host's memory runs out"
        reason = killed if done.returncode < 0 else done.stderr.strip().removeprefix("error: ")
        again = f"CUDA_VISIBLE_DEVICES= {shlex.join(['mel-lite', *arguments])}"
        told = f"not exported: {reason}\nThe adapter is saved. Try again with: {again}"
    console.print(printable(told), highlight=False, markup=False, soft_wrap=True)  # the command stays in one piece


def print_summary(
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
    if trainer.collapse.idle.idle_batches and not trainer.funnel_totals["mel/mixed_groups"]:
        console.print(f"[yellow]{trainer.collapse.idle.advice()}[/]")
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
