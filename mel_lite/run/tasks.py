"""The tasks of a run: loaded, checked, and divided into those to train on and those to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from mel_lite.config import MELConfig
from mel_lite.data.held_out import HELD_OUT, LEAST, hold_out, trained_too
from mel_lite.data.tasks import load_tasks
from mel_lite.errors import DataError
from mel_lite.models.adapters import find_adapter
from mel_lite.models.chat import render
from mel_lite.models.load import context_length, load_config, load_tokenizer
from mel_lite.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Tasks:
    """Datasets of a run, with prompts in conversational or plain-text form."""

    train: Any
    held_out: Any | None
    dropped_long: int
    """Number of training prompts dropped because prompt and completion together exceed the context."""
    longest_prompt_tokens: int
    """Length of the longest prompt of the remaining ones and those held out of them."""
    notes: tuple[str, ...]
    """Sentences for the user: what is evaluated, and whether it is trained on."""


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
    longest, dropped_long = max(length for length in lengths if length <= room_tokens), len(train) - len(fits)
    held_out, notes = None, ["No evaluation before and after training: data.eval is unset."]
    if options.eval == HELD_OUT:
        fits, held_out, notes = _held_out(fits, recipe.eval.limit, prompts)
    elif options.eval:
        held_out = load_tasks(options.eval, split=options.eval_split, limit=recipe.eval.limit, render=as_ids, **shared)
        notes = _notes(options.eval, held_out, trained_too(fits, held_out))
    return Tasks(fits, held_out, dropped_long, longest, tuple(notes))


def _held_out(fits: Any, limit: int | None, prompts: int) -> tuple[Any, Any | None, list[str]]:
    """Hold out a part of the training tasks, and say so."""
    train, held_out = hold_out(fits, limit=limit, least_left=prompts)
    note = (
        f"No evaluation before and after training: {len(fits)} tasks are too few to hold some of them out (at least "
        f"{LEAST} different ones). Name evaluation tasks with --eval-dataset."
    )
    if held_out is not None:
        note = (
            f"Evaluation before and after training on {len(held_out)} of the {len(fits)} tasks, which are not trained "
            "on. Choose others with --eval-dataset."
        )
    return train, held_out, [note]


def _notes(spec: str, held_out: Any, repeated: int) -> list[str]:
    notes = [f"Evaluation before and after training on {len(held_out)} tasks of {spec}."]
    if repeated:
        notes.append(
            f"warning: {repeated} of these {len(held_out)} tasks are also trained on, so the result may show what was "
            f"memorized. Choose others with --eval-dataset, or hold tasks out with --eval-dataset {HELD_OUT}."
        )
    return notes


def run_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run: with the chat template of the adapter it starts from. Raises: ModelError."""
    start = None if recipe.lora is None else recipe.lora.start_from
    return load_tokenizer(recipe.model, saved_in=None if start is None else find_adapter(start))
