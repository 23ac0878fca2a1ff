"""Choose what one call of the engine samples: completions, and with the overlapped schedule lessons in flight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import gather_object

from mel_lite.config import MELConfig
from mel_lite.engines.base import Engine, Request, Sampling
from mel_lite.errors import ConfigError, DataError
from mel_lite.lessons.in_flight import InFlight
from mel_lite.lessons.internalise import Internalisation
from mel_lite.lessons.parsing import hopeless
from mel_lite.lessons.prompts import Templates
from mel_lite.models.chat import prompt_end, render
from mel_lite.seeds import prompt_hash, seed_for
from mel_lite.types import EarlyEnd
from mel_lite.verify.thoughts import opened_thought

_STRICT = "or mel_schedule='strict'."


def rollout_requests(trainer: Any, prompts: Sequence[Any], prompt_ids: Sequence[Sequence[int]]) -> list[Request]:
    """Return one request per prompt, seeded by (run seed, step, prompt, row over all ranks).

    Raises: DataError for a prompt without tokens.
    """
    if not all(prompt_ids):
        raise DataError("train_dataset or eval_dataset has a prompt without tokens. Remove prompts that are empty.")
    drawing, step, purpose = None, trainer.state.global_step, "eval_rollout"
    if trainer.model.training:
        drawing, step, purpose = trainer.dynamic_sampling, trainer._batch, "rollout"
    first = trainer.accelerator.process_index * len(prompts) if drawing is None else drawing.first_index
    return [
        Request(
            tuple(ids),
            seed_for(trainer.args.seed, step=step, prompt_hash=prompt_hash(p), index=first + i, purpose=purpose),
        )
        for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
    ]


def rollout_sampling(trainer: Any) -> Sampling:
    """Return the sampling options of rollouts."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return Sampling(trainer.max_completion_length, *(getattr(trainer, name) for name in names))


def check_overlap(
    args: MELConfig, way: Internalisation, train_dataset: Any, engine: Engine | None, *, own_rollouts: bool
) -> None:
    """Refuse what cannot be sampled with later rollouts, before a model is loaded. Raises: ConfigError, DataError.

    `own_rollouts`: our engine samples the rollouts. `engine` None: a built-in one, all of which mix.
    """
    if not args.overlaps:
        return
    if not own_rollouts:
        raise ConfigError(
            "mel_schedule='overlap' with a rollout_func, or generation options of TRL's own: the rollouts do not come "
            f"from the engine that would sample the analyses with them. Unset these, {_STRICT}"
        )
    if engine is not None and not engine.mixes:
        raise ConfigError(
            f"mel_schedule='overlap' with engine {engine.name!r}, whose requests all have the sampling options of the "
            f"call. Let it follow Request.sampling and set mixes = True, {_STRICT}"
        )
    if way.needs_own_lessons:
        raise ConfigError(
            f"mel_schedule='overlap' with internalisation={args.internalisation!r}, which reads the lessons of the "
            f"batch's own groups; they would come later. Set its context to 'bank', {_STRICT}"
        )
    row: dict[str, Any] = next(iter(train_dataset or []), {})
    try:
        json.dumps(row)
    except TypeError as error:
        raise DataError(
            f"mel_schedule='overlap' saves questions in checkpoints as JSON, but train_dataset has other values "
            f"({error}). Remove or convert that column, {_STRICT}"
        ) from error


def early_end(
    args: MELConfig, tokenizer: Any, templates: Templates, chat_template_kwargs: Mapping[str, Any] | None
) -> Callable[[Sequence[int]], str] | None:
    """Return what says why the ids of an unfinished analysis are hopeless; None where none is ended early.

    A chat template that opens a thought turns it off: what follows the thought is read alone.
    """
    when, prefill = args.early_end, templates.analysis_prefill
    if when is EarlyEnd.NEVER:
        return None
    if tokenizer.chat_template is not None:
        asked = render([{"role": "user", "content": "?"}], tokenizer, chat_template_kwargs=chat_template_kwargs)
        if opened_thought(prompt_end(asked, tokenizer), (("<think>", "</think>"),)):
            return None

    def why(ids: Sequence[int]) -> str:
        text = prefill + str(tokenizer.decode(list(ids), skip_special_tokens=True))
        return hopeless(text, when, share=len(ids) / args.analysis_max_tokens, prefill=prefill)

    return why


def build_in_flight(trainer: Any) -> InFlight | None:
    """Return the trainer's lessons in flight; None with the strict schedule."""
    args, accelerator = trainer.args, trainer.accelerator
    if not args.overlaps:
        return None
    return InFlight(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        gather=gather_object,
        most_steps=args.max_staleness_steps,
        steps_per_batch=args.steps_per_batch,
    )
