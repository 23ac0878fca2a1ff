"""Hold a resumed run to the options, data and texts it was started with.

Options are compared as recipes, before anything is loaded (`mel-lite train --resume`). Inputs that a name alone does
not identify, such as the rows of a file, are recorded in each checkpoint and compared when it is loaded, also from
Python.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from mel_lite.errors import ConfigError
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import Templates
from mel_lite.recipe import SECTIONS, Recipe
from mel_lite.text import suggest

logger = logging.getLogger(__name__)

FREE = (
    "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "run_name",
    "log_completions", "num_completions_to_print", "report_to", "grad_norm_every", "max_idle_steps", "on_collapse",
    "verifier_workers", "verifier_deadline_s", "dataloader_num_workers", "max_cache_tokens", "max_micro_batch_tokens",
    "max_generated_tokens", "probe_max_diff", "token_credit_rollouts",
)  # fmt: skip
"""Options of `train` that do not affect the steps a resumed run has already done."""
ENGINE = ("engine", "fast_inference", "gpu_memory_utilization", "max_num_seqs", "max_lora_rank", "max_seq_length")
"""Options of `model` that choose the engine: a run whose engine failed may resume with another one."""
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
"""Options of `train` that split a batch; free as long as the batches stay the same."""
NEVER = (
    *(f"lora.{f.name}" for f in fields(SECTIONS["lora"]) if f.name not in ("dropout", "start_from")),
    "train.optim",
)
"""Options whose change the saved weights or moments would not fit, so it cannot be allowed. The path of a base or warm
start may change: another base is recognized by its weights."""
INPUTS: dict[str, tuple[str, ...]] = {
    "dataset": ("data.",),
    "templates": ("train.templates",),
    "chat_template": ("model.",),
    "dtype": ("model.dtype", "train.bf16", "train.fp16"),
    "batch": tuple(f"train.{name}" for name in SPLIT),
}
"""Inputs that a checkpoint records in addition to the options, and the options whose allowed change covers them."""
MAX_HASHED_ROWS = 20_000
"""Rows of a dataset that are hashed; of a larger one, this many at even distances."""


@dataclass(frozen=True, slots=True)
class Change:
    """One option or input that differs from the start of the run."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def changes(began: Recipe, now: Recipe) -> list[Change]:
    """Return the changed options that a resume does not allow. Another split of the same batches is no change."""
    before, after = yaml.safe_load(began.as_yaml()), yaml.safe_load(now.as_yaml())
    free = {*(f"train.{name}" for name in FREE), *(f"model.{name}" for name in ENGINE)}
    if _batches(began.train) == _batches(now.train) and _split_is_free(now.train):
        free |= {f"train.{name}" for name in SPLIT}
    found = []
    for section in ("model", "lora", "data", "train"):
        old, new = _renamed(before[section] or {}), _renamed(after[section] or {})
        for name in sorted({*old, *new}):
            if _number(old.get(name)) != _number(new.get(name)) and f"{section}.{name}" not in free:
                found.append(Change(f"{section}.{name}", old.get(name), new.get(name)))
    return found


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a section under their current names."""
    old_names = {"mel_train_on": "internalisation"}
    return {old_names.get(name, name): value for name, value in options.items() if name not in old_names or value}


def _number(value: Any) -> Any:
    """Convert a number that YAML reads as text, like 1e-5; return anything else unchanged."""
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value


def _batches(train: Mapping[str, Any]) -> tuple[int, int]:
    """Return the completions per update and per generation batch on one rank; TRL's defaults for unset options."""
    rows, accumulated = train.get("per_device_train_batch_size", 8), train.get("gradient_accumulation_steps", 1)
    return rows * accumulated, train.get("generation_batch_size") or rows * (
        train.get("steps_per_generation") or accumulated
    )


def _split_is_free(train: Mapping[str, Any]) -> bool:
    """Return True when the loss does not depend on the split; some of TRL's use statistics of one micro-batch."""
    return train.get("loss_type") != "bnpo" and train.get("top_entropy_quantile", 1.0) == 1.0


def check_changes(began: Recipe, now: Recipe, allowed: Sequence[str], *, known: Iterable[str], where: str) -> None:
    """Accept the allowed changes, with a warning each.

    `known` are the names of all options of `train`. Raises: ConfigError for every other change, naming key, old and new
    value; and for a name in `allowed` that does not exist, or may never change.
    """
    names = {f"{section}.{f.name}" for section, kind in SECTIONS.items() for f in fields(kind)}
    names |= {*INPUTS, *(f"train.{name}" for name in known)}
    for name in allowed:
        if name not in names:
            raise ConfigError(f"--allow-change {name}: there is no such option or input.{suggest(name, names)}")
        if name in NEVER:
            raise ConfigError(
                f"--allow-change {name}: the saved weights and moments would not fit. Start a new run from "
                "these weights, with --adapter and another --output-dir."
            )
    found = changes(began, now)
    refused = [change for change in found if change.key not in allowed]
    _settle(found, refused, f"--resume: the run in {where} was started with")


def _settle(found: Sequence[Change], refused: Sequence[Change], started: str) -> None:
    for change in found:
        if change not in refused:
            logger.warning("Resuming with a changed option (allowed): %s", change)
    if refused:
        listing = "\n".join(f"  {change}" for change in refused)
        forced = " ".join(f"--allow-change {change.key}" for change in refused if change.key not in NEVER)
        ways = ["restore the old value", *([f"allow the change with {forced}"] if forced else [])]
        raise ConfigError(
            f"{started} other values:\n{listing}\nResuming with them would give a different run. Either "
            f"{', or '.join(ways)}, or start a new run with --adapter and another --output-dir."
        )


def inputs(trainer: Any) -> dict[str, str]:
    """Return the inputs of a run beyond its options, each as a short text that changes with it."""
    args, lessons = trainer.args, trainer.lesson_context
    chat_template = trainer._tokenizer.chat_template
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return {
        "dataset": _dataset(trainer.train_dataset, ("prompt", trainer.answer_column)),
        "templates": _templates(lessons.templates, marked=lessons.mark_fork),
        "chat_template": "none" if chat_template is None else f"sha256 {_digest(chat_template)}",
        "dtype": f"{dtype}, mixed precision {trainer.accelerator.mixed_precision}",
        "batch": f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size} completions "
        f"per update, {args.generation_batch_size} sampled at once",
    }


def _templates(templates: Templates, *, marked: bool) -> str:
    return f"{templates.version_of(marked=marked)}, sha256 {_digest(templates.texts(marked=marked))}"


def began_unmarked(before: Mapping[str, str] | None, lessons: LessonContext) -> bool:
    """Return True for a checkpoint whose analysis prompts had no mark, as in releases without `mark_fork`."""
    recorded = (before or {}).get("templates")
    return recorded is None or recorded == _templates(lessons.templates, marked=False)


def check_inputs(before: Mapping[str, str] | None, now: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Refuse a checkpoint that was made from other inputs. Raises: ConfigError naming each with both values."""
    found = [
        Change(name, before[name], now[name]) for name in INPUTS if before and before.get(name, now[name]) != now[name]
    ]
    refused = [
        change for change in found
        if change.key not in allowed and not any(key.startswith(INPUTS[change.key]) for key in allowed)
    ]  # fmt: skip
    _settle(found, refused, "resume_from_checkpoint: the run was started with")


def _dataset(dataset: Any, columns: Sequence[str | None]) -> str:
    if not (hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")):
        return "streamed"
    step = -(-len(dataset) // MAX_HASHED_ROWS) or 1
    names = [name for name in columns if name in dataset.column_names]
    rows = dataset.select_columns(names).select(range(0, len(dataset), step))
    sha = hashlib.sha256()
    for batch in rows.iter(1000):
        sha.update(_json([batch[name] for name in names]))
    return f"{len(dataset)} rows, sha256 {sha.hexdigest()[:16]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()[:16]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=lambda other: type(other).__name__).encode()
