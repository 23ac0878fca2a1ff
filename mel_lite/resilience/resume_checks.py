"""What a resumed run is held to: the options it was begun with, and the data and texts behind them.

Options are compared as recipes, before anything is loaded (`mel-lite train --resume`). What a name alone does not tell,
such as the rows of a file, is noted in each checkpoint and compared when it is loaded, from Python, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import yaml

from mel_lite.errors import ConfigError
from mel_lite.recipe import SECTIONS, Recipe
from mel_lite.text import suggest

logger = logging.getLogger(__name__)

FREE = (
    "max_steps", "num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "run_name",
    "log_completions", "num_completions_to_print", "report_to", "grad_norm_every", "max_idle_steps", "on_collapse",
    "verifier_workers", "verifier_deadline_s", "dataloader_num_workers", "max_cache_tokens", "max_micro_batch_tokens",
    "probe_max_diff",
)  # fmt: skip
"""Options of `train` that change nothing of what a resumed run has already done."""
ENGINE = ("engine", "fast_inference", "gpu_memory_utilization", "max_num_seqs", "max_lora_rank", "max_seq_length")
"""Options of `model` that say how it is sampled from: a run whose engine failed may go on with another one."""
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
"""Options of `train` that say how a batch is split; free as long as the batches stay the same."""
NEVER = (
    *(f"lora.{f.name}" for f in fields(SECTIONS["lora"]) if f.name not in ("dropout", "start_from")),
    "train.optim",
)
"""What the saved weights or moments would not fit: no one can allow a change of these. A base or warm start may have
moved: another base is told by its weights."""
INPUTS: dict[str, tuple[str, ...]] = {
    "dataset": ("data.",),
    "templates": ("train.templates",),
    "chat_template": ("model.",),
    "dtype": ("model.dtype", "train.bf16", "train.fp16"),
    "batch": tuple(f"train.{name}" for name in SPLIT),
}
"""What a checkpoint notes beside the options, and the options that may change it when they may change."""
MOST_ROWS = 20_000
"""Rows of a dataset that are hashed; of a larger one as many, evenly spread."""


@dataclass(frozen=True, slots=True)
class Change:
    """One option or input that is not what the run was begun with."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.after!r}"


def changes(began: Recipe, now: Recipe) -> list[Change]:
    """What a resumed run may not change, but does. Another split of the same batches is no change."""
    before, after = yaml.safe_load(began.as_yaml()), yaml.safe_load(now.as_yaml())
    free = {*(f"train.{name}" for name in FREE), *(f"model.{name}" for name in ENGINE)}
    if _batches(began.train) == _batches(now.train) and _split_is_free(now.train):
        free |= {f"train.{name}" for name in SPLIT}
    found = []
    for section in ("model", "lora", "data", "train"):
        old, new = before[section] or {}, after[section] or {}
        for name in sorted({*old, *new}):
            if _number(old.get(name)) != _number(new.get(name)) and f"{section}.{name}" not in free:
                found.append(Change(f"{section}.{name}", old.get(name), new.get(name)))
    return found


def _number(value: Any) -> Any:
    """A number that is written as text, as YAML reads 1e-5, as a number; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value


def _batches(train: Mapping[str, Any]) -> tuple[int, int]:
    """Completions of one update and of one generation batch, per process; TRL's defaults where nothing is said."""
    rows, accumulated = train.get("per_device_train_batch_size", 8), train.get("gradient_accumulation_steps", 1)
    return rows * accumulated, train.get("generation_batch_size") or rows * (
        train.get("steps_per_generation") or accumulated
    )


def _split_is_free(train: Mapping[str, Any]) -> bool:
    """Whether the loss of a batch is the same however it is split: some of TRL's look at one micro-batch alone."""
    return train.get("loss_type") != "bnpo" and train.get("top_entropy_quantile", 1.0) == 1.0


def check_changes(began: Recipe, now: Recipe, allowed: Sequence[str], *, known: Iterable[str], where: str) -> None:
    """Let through the changes that are allowed, with a warning each.

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
                f"--allow-change {name}: the weights and moments that were saved would not fit. Begin a new run, with "
                "--adapter and another --output-dir to go on from these weights."
            )
    found = changes(began, now)
    _settle(
        found, [change for change in found if change.key not in allowed], f"--resume: the run in {where} was begun with"
    )


def _settle(found: Sequence[Change], refused: Sequence[Change], begun: str) -> None:
    for change in found:
        if change not in refused:
            logger.warning("The resumed run goes on with another %s, as was allowed.", change)
    if refused:
        listing = "\n".join(f"  {change}" for change in refused)
        forced = " ".join(f"--allow-change {change.key}" for change in refused if change.key not in NEVER)
        ways = ["leave it as it was", *([f"change it all the same with {forced}"] if forced else [])]
        raise ConfigError(
            f"{begun} something else:\n{listing}\nThe rest would be another run. Either {', or '.join(ways)}, or begin "
            "a new run with --adapter and another --output-dir."
        )


def inputs(trainer: Any) -> dict[str, str]:
    """What a run reads beside its options, each in a few words that differ when it differs."""
    args = trainer.args
    chat_template, templates = trainer._tokenizer.chat_template, trainer.lesson_context.templates
    dtype = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return {
        "dataset": _dataset(trainer.train_dataset, ("prompt", trainer.answer_column)),
        "templates": f"{templates.version}, sha256 {_digest(astuple(templates))}",
        "chat_template": "none" if chat_template is None else f"sha256 {_digest(chat_template)}",
        "dtype": f"{dtype}, mixed precision {trainer.accelerator.mixed_precision}",
        "batch": f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size} completions "
        f"per update, {args.generation_batch_size} sampled at once",
    }


def check_inputs(before: Mapping[str, str] | None, now: Mapping[str, str], allowed: Sequence[str]) -> None:
    """Refuse a checkpoint that was made from other inputs. Raises: ConfigError naming each with both values."""
    found = [
        Change(name, before[name], now[name]) for name in INPUTS if before and before.get(name, now[name]) != now[name]
    ]
    refused = [
        change for change in found
        if change.key not in allowed and not any(key.startswith(INPUTS[change.key]) for key in allowed)
    ]  # fmt: skip
    _settle(found, refused, "resume_from_checkpoint: the run was begun with")


def _dataset(dataset: Any, columns: Sequence[str | None]) -> str:
    if not (hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")):
        return "streamed"
    step = -(-len(dataset) // MOST_ROWS) or 1
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
