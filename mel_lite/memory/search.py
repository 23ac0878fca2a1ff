"""Search for settings that keep every phase of a recipe within a card's memory, and for changes to advise if none do.

Settings that do not change the result of a step (tokens per micro-batch, concurrency, vLLM's share, checkpointing,
optimizer storage) are tried first, best first. Then an unset length of C_retro is shortened, and last the group size is
halved.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mel_lite.memory import formulas
from mel_lite.memory import vllm as vllm_memory
from mel_lite.memory.formulas import Shape
from mel_lite.memory.predict import predict
from mel_lite.memory.vllm import VLLMCard
from mel_lite.memory.workload import DEFAULTS, MAX_SEQUENCES, Workload, option_of, with_lessons, workload
from mel_lite.recipe import Recipe

MAX_TOKENS = 16384
"""Maximum tokens per micro-batch part. Beyond this the GPU is already saturated."""
TOKEN_STEP = 1024
CPU_TOKENS = (512, 384, 256, 128)
"""The same on a CPU, whose matrix products are as fast with 128 rows as with more, and the choices below it."""
MIN_CONTEXT_TOKENS = 1536
MIN_GROUP = 4
"""Minimum group size. In smaller groups, a right and a wrong completion together are too rare."""
TOKENS, CACHE = "train.max_micro_batch_tokens", "train.max_cache_tokens"
CHECKPOINTING, OPTIM = "train.gradient_checkpointing", "train.optim"
CONTEXT = "train.max_context_tokens"
UTILIZATION, SEQUENCES = "model.gpu_memory_utilization", "model.max_num_seqs"
NEUTRAL = (TOKENS, CACHE, CHECKPOINTING, OPTIM)
CPU_NEUTRAL = (TOKENS, CACHE, CHECKPOINTING)
"""Settings that do not change the result of a step, except that 8-bit moments are rounded."""
GROUP, BATCH = "train.num_generations", "train.per_device_train_batch_size"


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a `train` or `model` key."""
    section, _, name = key.partition(".")
    return option_of(recipe, name) if section == "train" else getattr(recipe.model, name)


def changed(recipe: Recipe, **train: Any) -> Recipe:
    """Return the recipe with other options of `train`."""
    return replace(recipe, train={**recipe.train, **train})


def _with_prompts(recipe: Recipe, tokens: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, max_prompt_tokens=tokens))


def _with_rank(recipe: Recipe, rank: int) -> Recipe:
    assert recipe.lora is not None
    return replace(recipe, lora=replace(recipe.lora, r=rank))


@dataclass(frozen=True, slots=True)
class Search:
    """Search over the settings of a recipe, for one model on one card."""

    shape: Shape
    budget_bytes: int
    pinned: frozenset[str]
    """Keys that keep the recipe's value."""
    vllm_on: VLLMCard | None = None
    """Card that vLLM shares; None if another engine samples."""
    halves_groups: bool = False
    """Allow halving the groups if nothing else helps."""
    on_cpu: bool = False
    """True for the memory of a run on a CPU, where no optimizer stores its state in 8 bits."""

    @property
    def neutral(self) -> tuple[str, ...]:
        """Keys that do not change the result of a step, least costly first."""
        if self.on_cpu:
            return CPU_NEUTRAL
        if self.vllm_on is None:
            return NEUTRAL
        return (TOKENS, UTILIZATION, SEQUENCES, CHECKPOINTING, OPTIM)

    def workload(self, recipe: Recipe) -> Workload:
        """Return the recipe's workload on this card."""
        return workload(recipe, self.shape, vllm_on=self.vllm_on)

    def fit(self, recipe: Recipe) -> Recipe | None:
        """Return the recipe with the best settings that keep every phase but the export within the budget, or None."""

        def update_fits(sized: Recipe) -> bool:
            peaks = {phase.name: phase.bytes for phase in predict(self.workload(sized))}
            return max(peaks[name] for name in ("load", "update", "optimizer")) <= self.budget_bytes

        for candidate in self._storage_candidates(self._without_share(recipe)):
            sizes = self._micro_batches(candidate)
            # Memory grows with tokens, so bisection finds the largest micro-batch that fits.
            first = bisect.bisect_left(sizes, True, key=update_fits)
            if first < len(sizes) and (fitting := self._sampling(sizes[first])) is not None:
                return fitting
        return None

    def smallest(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the settings that take the least memory."""
        sized = self._micro_batches(list(self._storage_candidates(self._without_share(recipe)))[-1])[-1]
        if self.vllm_on is not None:
            return self._with_sequences(sized) if UTILIZATION in self.pinned else self._with_share(sized, 0)
        longest = self.workload(sized).longest_sampled
        return sized if CACHE in self.pinned else changed(sized, max_cache_tokens=longest)

    # ---- candidates ----

    def _storage_candidates(self, recipe: Recipe) -> Iterator[Recipe]:
        """Yield the recipe, then variants that store less.

        These are checkpointing, 8-bit moments, a shorter C_retro if its length is unset, and last, if allowed, smaller
        groups.
        """
        option = {key: option_of(recipe, key) for key in DEFAULTS}
        full = self.workload(recipe).context_tokens
        contexts: list[int] = [full]
        if option["max_context_tokens"] is None and with_lessons(recipe):
            shorter = range(full - full % 512, MIN_CONTEXT_TOKENS - 1, -512)
            contexts += [tokens for tokens in shorter if tokens < full]
        checkpointings = {bool(option["gradient_checkpointing"]): None, True: None}
        optimizers = {str(option["optim"]): None, **({} if self.on_cpu else {"paged_adamw_8bit": None})}
        sized = recipe
        for context in contexts:
            for checkpointing in [option["gradient_checkpointing"]] if CHECKPOINTING in self.pinned else checkpointings:
                for optim in [option["optim"]] if OPTIM in self.pinned else optimizers:
                    storage = {"gradient_checkpointing": checkpointing, "optim": optim}
                    sized = changed(recipe, max_context_tokens=context, **storage)
                    yield sized
        for group, batch in self._smaller_groups(recipe):
            yield changed(sized, num_generations=group, per_device_train_batch_size=batch)

    def _smaller_groups(self, recipe: Recipe) -> Iterator[tuple[int, int]]:
        """Yield halved group sizes, each with the batch size that keeps the number of prompts.

        Yields none if the recipe sets group or batch.
        """
        group, batch = option_of(recipe, "num_generations"), option_of(recipe, "per_device_train_batch_size")
        fixed = option_of(recipe, "generation_batch_size") is not None or bool({GROUP, BATCH} & self.pinned)
        while self.halves_groups and not fixed and group % 2 == 0 and batch % 2 == 0 and group // 2 >= MIN_GROUP:
            group, batch = group // 2, batch // 2
            yield group, batch

    def _micro_batches(self, recipe: Recipe) -> list[Recipe]:
        """Return copies of the recipe with decreasing token limits per micro-batch part, down to the longest row.

        On a CPU the limits are lower: a longer row is a part of its own.
        """
        if TOKENS in self.pinned:
            return [recipe]
        load = self.workload(recipe)
        if self.on_cpu:
            return [changed(recipe, max_micro_batch_tokens=min(n, load.micro_batch_tokens)) for n in CPU_TOKENS]
        longest = max(load.rollout_tokens, load.lesson_tokens if load.pairs else 0)
        most = max(longest, min(MAX_TOKENS, load.micro_batch_tokens))
        sizes = [*range(most, longest, -TOKEN_STEP), longest]
        return [changed(recipe, max_micro_batch_tokens=size) for size in sizes]

    def _sampling(self, recipe: Recipe) -> Recipe | None:
        """Return the recipe with the highest sampling concurrency that fits; None if not even one sequence fits."""
        return self._concurrency(recipe) if self.vllm_on is None else self._share(recipe)

    def _concurrency(self, recipe: Recipe) -> Recipe | None:
        """Return the recipe with the smallest cache that takes no more sampling rounds than the largest that fits."""
        load = self.workload(recipe)

        def fits(tokens: int | None) -> bool:
            return self._fits(replace(load, max_cache_tokens=tokens))

        if CACHE in self.pinned:
            return recipe if fits(load.max_cache_tokens) else None
        counts = {name: min(n, MAX_SEQUENCES) for name, (n, _, _) in load.sampled.items()}
        lengths = {name: prompt + new for name, (_, prompt, new) in load.sampled.items()}
        sizes = sorted({n * length for name, length in lengths.items() for n in range(1, counts[name] + 1)})
        fitting = bisect.bisect_left(sizes, True, key=lambda tokens: not fits(tokens))
        if fitting == 0:
            return None
        most = sizes[fitting - 1]
        full = replace(load, max_cache_tokens=most)
        needed = []
        for name, length in lengths.items():
            rounds = math.ceil(load.sampled[name][0] / full.at_once(name))
            needed.append(math.ceil(load.sampled[name][0] / rounds) * length)
        return changed(recipe, max_cache_tokens=min(most, max(needed)))

    def _share(self, recipe: Recipe) -> Recipe | None:
        """Return the recipe with vLLM's largest share that leaves enough to the trainer, capped at what it can fill."""
        if UTILIZATION in self.pinned:
            sharing = self._with_sequences(recipe)
            load = self.workload(sharing)
            granted = load.vllm_granted_tokens >= load.vllm_context_tokens
            return sharing if granted and self._fits(load) else None
        load = self.workload(recipe)
        at_least = {phase.name: phase.bytes for phase in predict(load)}["rollout"]
        room = self.budget_bytes - (at_least - load.share_bytes) - load.weight_bytes - load.vllm_overhead_bytes
        tokens = vllm_memory.cache_tokens(self.shape, room, load.element_bytes) - 2 * vllm_memory.BLOCK_TOKENS
        sharing = self._with_share(recipe, tokens)
        load = self.workload(sharing)
        return sharing if load.vllm_granted_tokens >= load.vllm_context_tokens and self._fits(load) else None

    def _with_share(self, recipe: Recipe, tokens: int) -> Recipe:
        """Return the recipe with vLLM's share for a cache of `tokens`.

        The cache holds at least the longest sequence and at most all sequences.
        """
        sharing = self._with_sequences(recipe)
        load = self.workload(sharing)
        assert load.vllm is not None
        most = max(min(n, load.vllm.sequences) * (prompt + new) for n, prompt, new in load.sampled.values())
        card = load.vllm.card
        # The extra block compensates for rounding.
        share = load.share_of(min(tokens, most) + vllm_memory.BLOCK_TOKENS) / card.total_bytes
        share = min(share, vllm_memory.max_share(card.total_bytes, card.free_bytes))
        model = replace(sharing.model, gpu_memory_utilization=math.floor(1e5 * share) / 1e5)
        return replace(sharing, model=model)

    def _with_sequences(self, recipe: Recipe) -> Recipe:
        """Return the recipe with an unset `max_num_seqs` replaced by the number that the workload assumes."""
        load = self.workload(recipe)
        assert load.vllm is not None
        return replace(recipe, model=replace(recipe.model, max_num_seqs=load.vllm.sequences))

    def _without_share(self, recipe: Recipe) -> Recipe:
        """Return the recipe without vLLM's share, unless the share is pinned."""
        if self.vllm_on is None or UTILIZATION in self.pinned:
            return recipe
        return replace(recipe, model=replace(recipe.model, gpu_memory_utilization=None))

    def _fits(self, load: Workload) -> bool:
        return all(phase.bytes <= self.budget_bytes for phase in predict(load) if phase.name != "export")

    # ---- advice if nothing fits ----

    def unpinned(self, recipe: Recipe) -> Iterator[str]:
        """Yield the single pinned settings that would make the recipe fit, with the value to use."""
        for key in self.neutral:
            fitting = replace(self, pinned=self.pinned - {key}).fit(recipe) if key in self.pinned else None
            if fitting is not None:
                yield f"--set {key}={value_of(fitting, key)}"

    def advice(self, recipe: Recipe) -> Iterator[str]:
        """Yield the single changes to the training itself that would make the recipe fit, mildest first."""

        def fits(other: Recipe, shape: Shape = self.shape) -> bool:
            return replace(self, shape=shape).fit(other) is not None

        load = self.workload(recipe)
        if load.measures_gradients and fits(changed(recipe, grad_norm_every=0)):
            yield "--set train.grad_norm_every=0"
        if load.pairs:
            contexts = range(load.context_tokens - load.context_tokens % 512, 1023, -512)
            shorter = next((n for n in contexts if fits(changed(recipe, max_context_tokens=n))), None)
            if shorter:
                yield f"--set train.max_context_tokens={shorter}"
        lengths = (load.completion_tokens >> halvings for halvings in range(1, 12))
        short = next((n for n in lengths if n >= 256 and fits(changed(recipe, max_completion_length=n))), None)
        if short:
            yield f"--set train.max_completion_length={short}"
        prompts = (load.prompt_tokens >> halvings for halvings in range(1, 12))
        prompt = next((n for n in prompts if n >= 256 and fits(_with_prompts(recipe, n))), None)
        if prompt:
            yield f"--set data.max_prompt_tokens={prompt}"
        if recipe.lora is not None and recipe.lora.start_from is None:  # an existing adapter fixes the rank
            ranks = (recipe.lora.r >> halvings for halvings in range(1, 12))
            rank = next((r for r in ranks if r >= 8 and fits(_with_rank(recipe, r))), None)
            if rank:
                yield f"--set lora.r={rank}"
        if not (load.four_bit or self.on_cpu) and fits(replace(recipe, model=replace(recipe.model, load_in_4bit=True))):
            yield "--set model.load_in_4bit=true"
        smaller = sorted(formulas.KNOWN.items(), key=lambda item: -formulas.linear_parameters(item[1]))
        family, base = recipe.model.name.partition("-")[0], "-Base" if recipe.model.name.endswith("-Base") else ""
        for name, other in smaller:
            less = formulas.linear_parameters(other) < formulas.linear_parameters(self.shape)
            if name.startswith(f"{family}-") and less and fits(recipe, other):
                yield f"--model {name}{base}"
                break
