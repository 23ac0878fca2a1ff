"""The workload of a recipe: lengths and counts of its steps that memory depends on, and vLLM's share of the card."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import Internalisation, get_internalisation
from mel_lite.memory import formulas
from mel_lite.memory import vllm as vllm_memory
from mel_lite.memory.formulas import Shape
from mel_lite.memory.vllm import VLLMCard, VLLMShare
from mel_lite.models.adapters import LoraSpec, adapter_rank
from mel_lite.models.origin import DEMO
from mel_lite.recipe import Recipe
from mel_lite.types import ReplayCriterion, Schedule

DEFAULTS: dict[str, Any] = {
    "algorithm": "mel",
    "meta_experience": None,
    "internalisation": "analysis",
    "mel_schedule": "strict",
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_iterations": 1,
    "beta": 0.0,
    "use_vllm": False,
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
    "use_cpu": False,
}
"""Options of MELConfig that memory depends on, with their defaults."""

PROMPT_TOKENS, DEMO_PROMPT_TOKENS = 1024, 96
"""Prompt lengths assumed if `data.max_prompt_tokens` is unset: of any task, and of the demo's."""
INSTRUCTION_TOKENS = 1024
"""Allowance for the instructions in an analysis prompt, in addition to the question and two solutions."""
MAX_SEQUENCES = 64
"""Maximum number of sequences that the transformers engine samples together."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one forward and backward pass, each as (tokens, scored tokens)."""

    rollouts: tuple[tuple[int, int], ...] = ()
    lessons: tuple[tuple[int, int], ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per row."""
        return tuple(tokens for tokens, _ in self.rollouts + self.lessons)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of all rows together."""
        return sum(scored for _, scored in self.rollouts + self.lessons)


def _fill(budget_tokens: int, max_rows: int, row_tokens: int, scored_tokens: int) -> tuple[tuple[int, int], ...]:
    """Return equal rows that fill the budget completely. A single row over the budget keeps its length."""
    rows = max(1, min(max_rows, math.ceil(budget_tokens / row_tokens)))
    length = row_tokens if rows == 1 else min(row_tokens, budget_tokens // rows)
    return ((length, min(scored_tokens, length - 1)),) * rows


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything in a recipe that memory depends on. Token counts are maxima; other counts are per generation batch."""

    shape: Shape
    four_bit: bool
    double_quant: bool
    element_bytes: int
    fp16: bool
    lora: tuple[int, ...]
    """Element count of each LoRA tensor."""
    prompt_tokens: int
    completion_tokens: int
    context_tokens: int
    analysis_tokens: int
    evaluated_tokens: int
    """Maximum new tokens of an evaluation answer; 0 without evaluation."""
    completions: int
    micro_batch: int
    pairs: int
    lessons: int
    """Texts trained on."""
    replays: int
    teacher_states: int
    """Hidden states per rollout token that the internalisation holds at once."""
    max_cache_tokens: int | None
    max_micro_batch_tokens: int | None
    checkpointing: bool
    optim: str
    overlaps: bool
    """Analyses and replays are sampled in the calls for rollouts."""
    measures_gradients: bool
    scores_rollouts: bool
    exports: bool
    assumes_prompts: bool
    """True if the recipe does not bound prompts, so that `prompt_tokens` is an assumption."""
    max_seq_length: int | None = None
    """The recipe's bound on sequences for Unsloth and vLLM; None = no bound."""
    on_cpu: bool = False
    vllm: VLLMShare | None = None
    """None if transformers or Unsloth's own generation samples."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded base model."""
        options: dict[str, Any] = {"double_quant": self.double_quant, "element_bytes": self.element_bytes}
        return formulas.weight_bytes(self.shape, four_bit=self.four_bit, **options)

    @property
    def adapter_bytes(self) -> int:
        """Bytes per LoRA weight.

        TRL keeps the adapter of a quantized base in bfloat16; PEFT keeps the adapter of a 16-bit base in float32.
        float16 training needs float32 for its gradient scaler.
        """
        return 2 if self.four_bit and not self.fp16 else 4

    @property
    def lessons_per_micro_batch(self) -> int:
        """Maximum number of lessons added to one micro-batch."""
        return math.ceil(self.lessons / max(1, self.completions // self.micro_batch))

    @property
    def rollout_tokens(self) -> int:
        """Tokens of the longest rollout."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def lesson_tokens(self) -> int:
        """Tokens of the longest lesson row."""
        return self.context_tokens + self.analysis_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch, summed over its rows."""
        return self.micro_batch * self.rollout_tokens + self.lessons_per_micro_batch * self.lesson_tokens

    @property
    def fullest_parts(self) -> tuple[Part, ...]:
        """Candidates for the part of a micro-batch that takes the most memory.

        Rows of any length may fill a token budget, so each candidate fills it completely: rollouts with full-length
        prompts, rollouts that are nearly all completion, lessons, and one lesson together with rollouts.
        """
        lessons, budget = self.lessons_per_micro_batch, self.max_micro_batch_tokens
        rollout, lesson = (self.rollout_tokens, self.completion_tokens), (self.lesson_tokens, self.analysis_tokens)
        if budget is None or budget >= self.micro_batch_tokens:
            return (Part((rollout,) * self.micro_batch, (lesson,) * lessons),)
        parts = [
            Part(_fill(budget, self.micro_batch, *rollout)),
            Part(_fill(budget, self.micro_batch, self.completion_tokens + 1, self.completion_tokens)),
        ]
        if lessons:
            parts.append(Part((), _fill(budget, lessons, *lesson)))
        if lessons and budget > self.lesson_tokens:
            rollouts = _fill(budget - self.lesson_tokens, self.micro_batch, *rollout)
            parts.append(Part(rollouts, (lesson,)))
        return tuple(parts)

    @property
    def sampled(self) -> dict[str, tuple[int, int, int]]:
        """(sequences, prompt tokens, new tokens) of every sampling phase. Token counts are maxima.

        Sequences that share a call are padded to the longest prompt.
        """
        if not (self.overlaps and self.pairs):
            return self._kinds
        sequences, prompt_tokens, new_tokens = zip(*self._kinds.values(), strict=True)
        return {"rollout": (sum(sequences), max(prompt_tokens), max(new_tokens))}

    @property
    def _kinds(self) -> dict[str, tuple[int, int, int]]:
        """The same by kind of sequence."""
        phases = {"rollout": (self.completions, self.prompt_tokens, self.completion_tokens)}
        if self.pairs:
            replay_tokens = self.prompt_tokens + self.analysis_tokens + formulas.PREFIX_TOKENS
            phases["analysis"] = (self.pairs, self.context_tokens, self.analysis_tokens)
            phases["replay"] = (self.replays, replay_tokens, self.completion_tokens)
        return phases

    @property
    def longest_sampled(self) -> int:
        """Tokens of the longest sampled sequence, prompt included. Evaluation counts."""
        trained = max(prompt + new for _, prompt, new in self._kinds.values())
        return max(trained, self.prompt_tokens + self.evaluated_tokens)

    @property
    def vllm_context_tokens(self) -> int:
        """Longest sequence, in tokens, that vLLM is configured for."""
        return self.max_seq_length or self.longest_sampled

    @property
    def vllm_overhead_bytes(self) -> int:
        """Bytes of vLLM's share without weights and cache."""
        assert self.vllm is not None
        rank, sequences = self.vllm.rank, self.vllm.sequences
        options: dict[str, Any] = {"four_bit": self.four_bit, "element_bytes": self.element_bytes}
        return vllm_memory.overhead_bytes(self.shape, sequences, rank, **options)

    def share_of(self, cache_tokens: int) -> int:
        """Return the bytes of vLLM's share with a cache of `cache_tokens`, at least enough for the longest sequence."""
        assert self.vllm is not None
        options: dict[str, Any] = {"four_bit": self.four_bit, "element_bytes": self.element_bytes}
        longest = self.vllm_context_tokens
        minimum = vllm_memory.min_share_bytes(self.shape, longest, self.vllm.rank, **options)
        tokens = max(cache_tokens, longest) + vllm_memory.BLOCK_TOKENS  # room for a partly filled block
        cache = formulas.kv_cache_bytes(self.shape, tokens, self.element_bytes)
        return max(minimum, self.weight_bytes + self.vllm_overhead_bytes + cache)

    @property
    def share_bytes(self) -> int:
        """Bytes of vLLM's share: as set, minus what Unsloth reserves for training; the minimum if not set."""
        assert self.vllm is not None
        if self.vllm.utilization is None:
            return self.share_of(0)
        total_bytes = self.vllm.card.total_bytes
        reserved = vllm_memory.reserved_for_training_bytes(self.shape, self.vllm_context_tokens)
        return min(int(self.vllm.utilization * total_bytes), total_bytes - reserved)

    @property
    def vllm_cache_tokens(self) -> int:
        """Capacity of vLLM's cache in tokens."""
        left = self.share_bytes - self.weight_bytes - self.vllm_overhead_bytes
        return vllm_memory.cache_tokens(self.shape, left, self.element_bytes)

    @property
    def vllm_granted_tokens(self) -> int:
        """Longest sequence, in tokens, that vLLM would start for: the smaller of its cache and Unsloth's estimate."""
        assert self.vllm is not None
        options: dict[str, Any] = {"four_bit": self.four_bit, "element_bytes": self.element_bytes}
        granted = vllm_memory.granted_tokens(self.shape, self.share_bytes, self.vllm.rank, **options)
        return min(granted, self.vllm_cache_tokens)

    def at_once(self, phase: str) -> int:
        """Return the number of a phase's sequences that the engine samples together.

        For vLLM, this is the number that its cache holds at full length.
        """
        sequences, prompt_tokens, new_tokens = self.sampled[phase]
        if self.vllm is not None:
            cached = self.vllm_cache_tokens // (prompt_tokens + new_tokens)
            return max(1, min(sequences, self.vllm.sequences, cached))
        limit = min(sequences, MAX_SEQUENCES)
        if self.max_cache_tokens is None:
            return limit
        return max(1, min(limit, self.max_cache_tokens // (prompt_tokens + new_tokens)))


def workload(recipe: Recipe, shape: Shape, *, vllm_on: VLLMCard | None = None) -> Workload:
    """Return the workload of a recipe for a model of this shape. `vllm_on` is None if vLLM does not sample.

    Raises: ConfigError for full fine-tuning, which is not supported here, and for values that no run accepts.
    """
    if recipe.lora is None:
        raise ConfigError("lora=null: memory is predicted for LoRA and QLoRA only. Set the options of section `lora`.")
    option = {key: option_of(recipe, key) for key in DEFAULTS}
    micro, accumulation = option["per_device_train_batch_size"], option["gradient_accumulation_steps"]
    steps = option["steps_per_generation"] or accumulation
    completions = option["generation_batch_size"] or micro * steps
    prompts = max(1, completions // option["num_generations"])
    max_pairs = (option["num_generations"] // 2) * ((option["num_generations"] + 1) // 2)
    per_group = option["pairs_per_group"] if option["pairs_per_group"] > 0 else max_pairs
    pairs = prompts * per_group if with_lessons(recipe) else 0
    control = option["replay_control"] or ReplayCriterion(option["replay_criterion"]).compares
    way = _internalisation(recipe)
    prompt, completion = _rollout_tokens(recipe, shape)
    context = prompt + 2 * completion + INSTRUCTION_TOKENS
    window = shape.context
    if option["max_context_tokens"] is None and recipe.model.max_seq_length is not None:
        window = min(window, recipe.model.max_seq_length)
    for bound in (option["max_context_tokens"], window - option["analysis_max_tokens"]):
        context = min(context, bound) if bound and bound > 0 else context
    return Workload(
        shape=shape,
        four_bit=recipe.model.load_in_4bit,
        double_quant=recipe.model.double_quant,
        element_bytes=4 if recipe.model.dtype == "float32" else 2,
        fp16=bool(option["fp16"]),
        lora=_adapter(recipe.lora, shape),
        prompt_tokens=prompt,
        completion_tokens=completion,
        context_tokens=context,
        analysis_tokens=option["analysis_max_tokens"],
        evaluated_tokens=recipe.eval.max_new_tokens or completion if recipe.data.eval else 0,
        completions=completions,
        micro_batch=micro,
        pairs=pairs,
        lessons=pairs * way.texts_per_experience if pairs else 0,
        teacher_states=way.teacher_states if pairs else 0,
        replays=pairs * option["replay_attempts"] * (2 if control else 1),
        max_cache_tokens=option["max_cache_tokens"],
        max_micro_batch_tokens=option["max_micro_batch_tokens"],
        checkpointing=bool(option["gradient_checkpointing"]),
        optim=str(option["optim"]),
        overlaps=option["mel_schedule"] == Schedule.OVERLAP,
        measures_gradients=bool(option["grad_norm_every"]),
        # TRL scores rollouts that vLLM sampled, through TRL or through us, to compute importance weights.
        scores_rollouts=vllm_on is not None
        or option["use_vllm"]
        or option["beta"] != 0
        or accumulation % (steps * option["num_iterations"]) != 0,
        exports=recipe.export.format is not None,
        assumes_prompts=recipe.data.max_prompt_tokens is None and recipe.data.train != DEMO,
        max_seq_length=recipe.model.max_seq_length,
        on_cpu=bool(option["use_cpu"]),
        vllm=None if vllm_on is None else _vllm_share(recipe, vllm_on, max(completions, pairs)),
    )


def _internalisation(recipe: Recipe) -> Internalisation:
    # `mel_train_on` is the deprecated name.
    name = recipe.train.get("mel_train_on") or option_of(recipe, "internalisation")
    return get_internalisation(name, recipe.train.get("internalisation_options"))


def _rollout_tokens(recipe: Recipe, shape: Shape) -> tuple[int, int]:
    """Return prompt and new tokens of the longest rollout. A run drops longer prompts."""
    completion, prompt = option_of(recipe, "max_completion_length"), recipe.data.max_prompt_tokens
    if prompt is not None and prompt < 1:
        raise ConfigError(f"data.max_prompt_tokens={prompt} must be at least 1, or null. Set data.max_prompt_tokens.")
    if completion >= shape.context:
        raise ConfigError(
            f"train.max_completion_length={completion} leaves no room for a prompt in the model's context of "
            f"{shape.context} tokens. Lower train.max_completion_length."
        )
    assumed = DEMO_PROMPT_TOKENS if recipe.data.train == DEMO else PROMPT_TOKENS
    return min(prompt or assumed, shape.context - completion), completion


def _adapter(lora: LoraSpec, shape: Shape) -> tuple[int, ...]:
    """Return the element count of each LoRA tensor. Raises ConfigError if `target_modules` matches no linear module."""
    sizes = formulas.lora_sizes(shape, adapter_rank(lora), lora.target_modules)
    if not sizes:
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r} names no linear layer of the model. Its linear layers are "
            f"{', '.join(shape.linears)}."
        )
    return tuple(sizes)


def _vllm_share(recipe: Recipe, card: VLLMCard, sequences: int) -> VLLMShare:
    assert recipe.lora is not None
    spec = recipe.model
    rank = spec.max_lora_rank or adapter_rank(recipe.lora)
    in_flight = spec.max_num_seqs or min(sequences, vllm_memory.MAX_NUM_SEQS)
    return VLLMShare(card, rank, in_flight, spec.gpu_memory_utilization)


def with_lessons(recipe: Recipe) -> bool:
    """Return True if the run writes meta-experiences and trains on them."""
    enabled = option_of(recipe, "meta_experience")
    return bool(option_of(recipe, "algorithm") == "mel" if enabled is None else enabled)


def option_of(recipe: Recipe, key: str) -> Any:
    """Return an option of `train`, or its default. Raises ConfigError for a count that is not an integer or too low."""
    default = DEFAULTS[key]
    value = recipe.train.get(key, default)
    is_count = type(default) is int or key in (
        "steps_per_generation",
        "generation_batch_size",
        "max_context_tokens",
        "max_cache_tokens",
        "max_micro_batch_tokens",
    )
    if is_count and not (value is None and default is None):
        minimum = {"grad_norm_every": 0, "pairs_per_group": -1}.get(key, 1)
        if type(value) is not int or value < minimum:
            raise ConfigError(f"train.{key}={value!r} must be a whole number of at least {minimum}. Set train.{key}.")
    return value
