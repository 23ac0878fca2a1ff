"""Load the model of a run: choose the engine, report the choice, then load one model for sampling and training."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mel_lite.config import MELConfig
from mel_lite.engines import distributed
from mel_lite.engines.choice import EngineChoice, check_engine, check_length, choose_engine, this_machine
from mel_lite.engines.unsloth import UnslothUnusable, load_unsloth
from mel_lite.memory.formulas import PREFIX_TOKENS
from mel_lite.memory.workload import INSTRUCTION_TOKENS
from mel_lite.models.adapters import attach_adapter, find_adapter, lora_config
from mel_lite.models.load import context_length, load_base, load_config
from mel_lite.recipe import Recipe


def load_for_training(
    recipe: Recipe, args: MELConfig, console: Console, *, prompt_tokens: int | None = None
) -> tuple[Any, Any]:
    """Return the model, and the PEFT config that the trainer must apply (None if the model already has its adapter).

    Prints the chosen engine and the reason before anything is loaded. `prompt_tokens` is the length of the longest
    training prompt, which sizes Unsloth and vLLM if the recipe sets no bound; None = unknown.

    Raises: ConfigError if the requested engine is unavailable; ModelError, EngineError if loading fails.
    """
    spec, lora = recipe.model, recipe.lora
    choice = choose_engine(spec, lora, this_machine(distributed.world()))
    console.print(choice.line, highlight=False, markup=False)
    check_engine(choice, recipe)
    if choice.engine == "unsloth":
        assert lora is not None  # guaranteed by choose_engine
        try:
            longest = longest_tokens(recipe, args, prompt_tokens)
            check_length(choice, spec, longest)
            context = spec.max_seq_length or longest
            return load_unsloth(spec, lora, vllm=choice.vllm, max_seq_length=context, seed=args.seed), None
        except UnslothUnusable as error:
            if spec.engine == "unsloth":
                raise
            console.print(EngineChoice("hf", False, str(error)).line, highlight=False, markup=False)
    model = load_base(spec)
    if lora is None:
        if spec.freeze_head:
            model.get_output_embeddings().requires_grad_(False)
        return model, None
    if lora.start_from is not None:
        return attach_adapter(model, find_adapter(lora.start_from), trainable=True), None
    return model, lora_config(lora)


def longest_tokens(recipe: Recipe, args: MELConfig, prompt_tokens: int | None = None) -> int:
    """Return the length in tokens of the longest sequence a run may sample or train on, capped at the model's context.

    Rollouts and evaluation: prompt + completion. Analyses: C_retro + analysis. Replays: prompt + lesson + completion.
    """
    context = context_length(load_config(recipe.model))
    prompt = recipe.data.max_prompt_tokens or prompt_tokens or context - args.max_completion_length
    evaluated = (recipe.eval.max_new_tokens or 0) if recipe.data.eval else 0
    needs = [prompt + max(args.max_completion_length, evaluated)]
    if args.with_meta_experience:
        unbounded = prompt + 2 * args.max_completion_length + INSTRUCTION_TOKENS  # C_retro without max_context_tokens
        room = (recipe.model.max_seq_length or context) - args.analysis_max_tokens
        needs.append((args.max_context_tokens or min(unbounded, room)) + args.analysis_max_tokens)
        needs.append(prompt + args.analysis_max_tokens + PREFIX_TOKENS + args.max_completion_length)
    return min(context, max(needs))
