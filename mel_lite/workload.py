"""What a recipe asks of a GPU's memory: the lengths and counts of its steps, and the peak of every phase of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mel_lite import memory
from mel_lite.errors import ConfigError
from mel_lite.memory import CONTEXT_BYTES, Shape
from mel_lite.presets import Recipe

DEFAULTS: dict[str, Any] = {
    "algorithm": "mel",
    "meta_experience": None,
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_iterations": 1,
    "beta": 0.0,
    "max_completion_length": 512,
    "analysis_max_tokens": 1024,
    "max_context_tokens": None,
    "max_cache_tokens": None,
    "max_micro_batch_tokens": None,
    "pairs_per_group": 1,
    "replay_attempts": 1,
    "replay_control": False,
    "replay_criterion": "solved",
    "gradient_checkpointing": True,
    "grad_norm_every": 0,
    "optim": "adamw_torch_fused",
    "fp16": False,
}
"""Options of MELConfig that memory depends on, and their defaults."""

PROMPT_TOKENS = 1024
"""Assumed where `data.max_prompt_tokens` leaves prompts open."""
INSTRUCTION_TOKENS = 1024
"""Allowance for the analysis instructions beside the question and two solutions."""
MAX_SEQUENCES = 64
"""Of the transformers engine: most sequences at once."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Predicted peak of one phase of a run."""

    name: str
    bytes: int
    parts: dict[str, int]
    """What the bytes are made of; they sum to `bytes`."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that go forward and backward at once, each as (tokens, scored tokens)."""

    rollouts: tuple[tuple[int, int], ...] = ()
    lessons: tuple[tuple[int, int], ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every row."""
        return tuple(tokens for tokens, _ in self.rollouts + self.lessons)

    @property
    def scored_tokens(self) -> int:
        """Of all rows together."""
        return sum(scored for _, scored in self.rollouts + self.lessons)


def _filled(budget_tokens: int, most_rows: int, row_tokens: int, scored_tokens: int) -> tuple[tuple[int, int], ...]:
    """As many equal rows as fill the budget without a gap; one row that is longer stays as it is."""
    rows = max(1, min(most_rows, math.ceil(budget_tokens / row_tokens)))
    length = row_tokens if rows == 1 else min(row_tokens, budget_tokens // rows)
    return ((length, min(scored_tokens, length - 1)),) * rows


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything a recipe says that memory depends on; tokens are the longest, counts are of one generation batch."""

    shape: Shape
    four_bit: bool
    double_quant: bool
    element_bytes: int
    fp16: bool
    lora: tuple[int, ...]
    """Elements of each LoRA tensor."""
    prompt_tokens: int
    completion_tokens: int
    context_tokens: int
    analysis_tokens: int
    completions: int
    micro_batch: int
    pairs: int
    replays: int
    max_cache_tokens: int | None
    max_micro_batch_tokens: int | None
    checkpointing: bool
    optim: str
    measures_gradients: bool
    scores_rollouts: bool
    exports: bool

    @property
    def adapter_bytes(self) -> int:
        """Of one LoRA weight. TRL keeps the adapter of a quantised base in bfloat16, PEFT that of a 16-bit base in
        float32; float16 training needs float32 for its gradient scaler."""
        return 2 if self.four_bit and not self.fp16 else 4

    @property
    def lessons_per_micro_batch(self) -> int:
        """Most lessons that ride with one micro-batch."""
        return math.ceil(self.pairs / max(1, self.completions // self.micro_batch))

    @property
    def rollout_tokens(self) -> int:
        """Longest rollout."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def lesson_tokens(self) -> int:
        """Longest row of a lesson."""
        return self.context_tokens + self.analysis_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Of the fullest micro-batch, all of its rows together."""
        return self.micro_batch * self.rollout_tokens + self.lessons_per_micro_batch * self.lesson_tokens

    @property
    def fullest_parts(self) -> tuple[Part, ...]:
        """The parts a micro-batch can be taken in that hold the most, of which the worst counts.

        Under a token budget rows of any length may fill it, so that it is full whatever its multiple: rollouts with
        their prompts at full length, rollouts that are nearly all completion, lessons, and a lesson among rollouts.
        """
        lessons, budget = self.lessons_per_micro_batch, self.max_micro_batch_tokens
        rollout, lesson = (self.rollout_tokens, self.completion_tokens), (self.lesson_tokens, self.analysis_tokens)
        if budget is None or budget >= self.micro_batch_tokens:
            return (Part((rollout,) * self.micro_batch, (lesson,) * lessons),)
        parts = [
            Part(_filled(budget, self.micro_batch, *rollout)),
            Part(_filled(budget, self.micro_batch, self.completion_tokens + 1, self.completion_tokens)),
        ]
        if lessons:
            parts.append(Part((), _filled(budget, lessons, *lesson)))
        if lessons and budget > self.lesson_tokens:
            beside = _filled(budget - self.lesson_tokens, self.micro_batch, *rollout)
            parts.append(Part(beside, (lesson,)))
        return tuple(parts)

    @property
    def sampled(self) -> dict[str, tuple[int, int, int]]:
        """Per phase that samples: number of sequences, prompt and new tokens of the longest."""
        phases = {"rollout": (self.completions, self.prompt_tokens, self.completion_tokens)}
        if self.pairs:
            replay_tokens = self.prompt_tokens + self.analysis_tokens + memory.PREFIX_TOKENS
            phases["analysis"] = (self.pairs, self.context_tokens, self.analysis_tokens)
            phases["replay"] = (self.replays, replay_tokens, self.completion_tokens)
        return phases

    def at_once(self, phase: str) -> int:
        """Sequences of a phase that the engine samples together."""
        sequences, prompt_tokens, new_tokens = self.sampled[phase]
        most = min(sequences, MAX_SEQUENCES)
        if self.max_cache_tokens is None:
            return most
        return max(1, min(most, self.max_cache_tokens // (prompt_tokens + new_tokens)))


def workload(recipe: Recipe, shape: Shape) -> Workload:
    """What a recipe asks of a model of this shape. Raises ConfigError for full fine-tuning, which is not predicted."""
    if recipe.lora is None:
        raise ConfigError("lora=null: memory is predicted for LoRA and QLoRA only. Give section `lora` its options.")
    option = {key: option_of(recipe, key) for key in DEFAULTS}
    micro, accumulation = option["per_device_train_batch_size"], option["gradient_accumulation_steps"]
    steps = option["steps_per_generation"] or accumulation
    completions = option["generation_batch_size"] or micro * steps
    prompts = max(1, completions // option["num_generations"])
    most_pairs = (option["num_generations"] // 2) * ((option["num_generations"] + 1) // 2)
    per_group = option["pairs_per_group"] if option["pairs_per_group"] > 0 else most_pairs
    pairs = prompts * per_group if with_lessons(recipe) else 0
    control = option["replay_control"] or option["replay_criterion"] == "uplift"
    prompt, completion = recipe.data.max_prompt_tokens or PROMPT_TOKENS, option["max_completion_length"]
    context = prompt + 2 * completion + INSTRUCTION_TOKENS
    for bound in (option["max_context_tokens"], shape.context - option["analysis_max_tokens"]):
        context = min(context, bound) if bound and bound > 0 else context
    return Workload(
        shape=shape,
        four_bit=recipe.model.load_in_4bit,
        double_quant=recipe.model.double_quant,
        element_bytes=4 if recipe.model.dtype == "float32" else 2,
        fp16=bool(option["fp16"]),
        lora=tuple(memory.lora_sizes(shape, recipe.lora.r, recipe.lora.target_modules)),
        prompt_tokens=prompt,
        completion_tokens=completion,
        context_tokens=context,
        analysis_tokens=option["analysis_max_tokens"],
        completions=completions,
        micro_batch=micro,
        pairs=pairs,
        replays=pairs * option["replay_attempts"] * (2 if control else 1),
        max_cache_tokens=option["max_cache_tokens"],
        max_micro_batch_tokens=option["max_micro_batch_tokens"],
        checkpointing=bool(option["gradient_checkpointing"]),
        optim=str(option["optim"]),
        measures_gradients=bool(option["grad_norm_every"]),
        scores_rollouts=option["beta"] != 0 or accumulation % (steps * option["num_iterations"]) != 0,
        exports=recipe.export.format is not None,
    )


def with_lessons(recipe: Recipe) -> bool:
    """Whether the run writes meta-experiences and learns from them."""
    wanted = option_of(recipe, "meta_experience")
    return bool(option_of(recipe, "algorithm") == "mel" if wanted is None else wanted)


def option_of(recipe: Recipe, key: str) -> Any:
    """An option of `train`, or its default. Raises ConfigError for a value no plan can be made with."""
    default = DEFAULTS[key]
    value = recipe.train.get(key, default)
    counts = type(default) is int or key in (
        "steps_per_generation",
        "generation_batch_size",
        "max_context_tokens",
        "max_cache_tokens",
        "max_micro_batch_tokens",
    )
    if counts and value is not None:
        least = {"grad_norm_every": 0, "pairs_per_group": -1}.get(key, 1)
        if type(value) is not int or value < least:
            raise ConfigError(f"train.{key}={value!r} must be a whole number of at least {least}. Set train.{key}.")
    return value


def predict(load: Workload) -> tuple[Phase, ...]:
    """Peak of every phase of a run, in order: what stays, and what comes and goes with the allocator's share."""
    shape, e, four_bit = load.shape, load.element_bytes, load.four_bit
    weights = memory.weight_bytes(shape, four_bit=four_bit, double_quant=load.double_quant, element_bytes=e)
    parameter_bytes, parameters = load.adapter_bytes, sum(load.lora)
    states, temporaries = memory.optimiser_bytes(load.lora, load.optim, parameter_bytes)
    adapter = {"LoRA": parameter_bytes * parameters, "optimiser states": states}
    gradients = {"LoRA gradients": parameter_bytes * parameters}

    def phase(name: str, moving: Mapping[str, int], staying: Mapping[str, int] = adapter) -> Phase:
        overhead = CONTEXT_BYTES + int(memory.ALLOCATOR_SHARE * sum(moving.values()))
        parts = {"CUDA and allocator": overhead, "weights": weights, **staying, **moving}
        return Phase(name, sum(parts.values()), parts)

    def generation(name: str) -> Phase:
        at_once, (_, prompt_tokens, new_tokens) = load.at_once(name), load.sampled[name]
        total = memory.generation_bytes(shape, at_once, prompt_tokens, new_tokens, four_bit=four_bit, element_bytes=e)
        cache = memory.kv_cache_bytes(shape, at_once * (prompt_tokens + new_tokens), e)
        return phase(name, {"KV cache": min(cache, total), "activations": max(0, total - cache)})

    phases = [phase("load", {"tensors on their way to 4 bits": memory.load_bytes(shape, four_bit=four_bit)}, {})]
    phases += [generation(name) for name in load.sampled]
    if scored := _scoring(load):
        phases.append(phase("scoring", {"activations": scored}))
    phases.append(phase("update", max((_update(load, part) for part in load.fullest_parts), key=_total)))
    vectors = 16 * parameters if load.measures_gradients else 0
    phases.append(phase("optimiser", {**gradients, "temporaries": temporaries, "measured gradients": vectors}))
    if load.exports:
        # The trained model is given up first; `weights` are those of the merged one.
        merged = memory.export_bytes(shape, e)
        overhead = CONTEXT_BYTES + int(memory.ALLOCATOR_SHARE * merged)
        phases.append(Phase("export", overhead + merged, {"CUDA and allocator": overhead, "weights": merged}))
    return tuple(phases)


def _scoring(load: Workload) -> int:
    """Passes without gradient: lessons after their update, one row at a time, and rollouts where TRL asks for them."""
    options: dict[str, Any] = {"four_bit": load.four_bit, "element_bytes": load.element_bytes}
    most = 0
    if load.pairs:
        block = (1, load.lesson_tokens)
        most = memory.scoring_bytes(load.shape, block, load.pairs * load.analysis_tokens, **options)
    if load.scores_rollouts:
        rows = load.micro_batch
        if load.max_micro_batch_tokens is not None:
            rows = max(1, min(rows, load.max_micro_batch_tokens // load.rollout_tokens))
        block = (rows, load.rollout_tokens)
        scored = load.completions * load.completion_tokens
        most = max(most, memory.scoring_bytes(load.shape, block, scored, **options))
    return most


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _update(load: Workload, part: Part) -> dict[str, int]:
    """Forward and backward of one part of a micro-batch, and the gradients it leaves."""
    sixteen_bit = not load.four_bit and load.element_bytes == 2
    activations = memory.update_bytes(
        load.shape,
        part.lengths,
        part.scored_tokens,
        checkpointing=load.checkpointing,
        four_bit=load.four_bit,
        measured=load.measures_gradients,
        # PEFT's float32 adapters beside 16-bit layers; those beside 4-bit layers leave their input to autocast.
        casts=sixteen_bit,
        element_bytes=load.element_bytes,
        u_bytes=4 if load.fp16 or load.element_bytes == 4 else 2,
    )
    parameters = sum(load.lora)
    # Autograd sums a weight's gradients of several blocks before it adds them to the rest.
    in_flight = 2 if len(memory.blocks_of(part.lengths)) > 1 else 1
    # Autocast keeps a 16-bit copy of an adapter in another dtype. The gradient meter keeps a float32 sum for each loss
    # term, beside the gradient it adds.
    copies = 2 * parameters if load.fp16 or not load.four_bit else 0
    sums = 12 * parameters if load.measures_gradients else 0
    return {
        "LoRA gradients": in_flight * load.adapter_bytes * parameters,
        "activations": activations,
        "adapter copies": copies,
        "measured gradients": sums,
    }
