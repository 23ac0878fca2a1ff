"""The search for settings that keep every phase of a recipe under a card's memory, and for changes where none do.

Settings that leave the result of a step as it is (tokens at once, concurrency, vLLM's share, checkpointing, the
optimiser's storage) are tried in order, best first; then an open length of C_retro, and last the group size.
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
from mel_lite.memory.workload import DEFAULTS, MAX_SEQUENCES, VLLMCard, Workload, option_of, with_lessons, workload
from mel_lite.recipe import Recipe

MOST_TOKENS = 16384
"""More at once keep a GPU no busier."""
TOKEN_STEP = 1024
SHORTEST_CONTEXT = 1536
SMALLEST_GROUP = 4
"""Below it hardly a group has both a right and a wrong completion."""
TOKENS, CACHE = "train.max_micro_batch_tokens", "train.max_cache_tokens"
CHECKPOINTING, OPTIM = "train.gradient_checkpointing", "train.optim"
UTILIZATION, SEQUENCES = "model.gpu_memory_utilization", "model.max_num_seqs"
NEUTRAL = (TOKENS, CACHE, CHECKPOINTING, OPTIM)
"""What is chosen freely: the result of a step does not depend on it (8-bit moments: by rounding only)."""
GROUP, BATCH = "train.num_generations", "train.per_device_train_batch_size"


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a `train` or `model` key."""
    section, _, name = key.partition(".")
    return option_of(recipe, name) if section == "train" else getattr(recipe.model, name)


def changed(recipe: Recipe, **train: Any) -> Recipe:
    """The recipe with other options of `train`."""
    return replace(recipe, train={**recipe.train, **train})


def _with_prompts(recipe: Recipe, tokens: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, max_prompt_tokens=tokens))


def _with_rank(recipe: Recipe, rank: int) -> Recipe:
    assert recipe.lora is not None
    return replace(recipe, lora=replace(recipe.lora, r=rank))


@dataclass(frozen=True, slots=True)
class Search:
    """Settings of recipes for one model on one card."""

    shape: Shape
    budget_bytes: int
    pinned: frozenset[str]
    """Keys that stay as a recipe has them."""
    vllm_on: VLLMCard | None = None
    """The card vLLM takes its share of; None where something else samples."""
    halves_groups: bool = False
    """Whether groups are halved where nothing else helps."""

    @property
    def neutral(self) -> tuple[str, ...]:
        """Keys that are chosen freely, mildest first."""
        if self.vllm_on is None:
            return NEUTRAL
        return (TOKENS, UTILIZATION, SEQUENCES, CHECKPOINTING, OPTIM)

    def workload(self, recipe: Recipe) -> Workload:
        """What the recipe asks of the card."""
        return workload(recipe, self.shape, vllm_on=self.vllm_on)

    def fitting(self, recipe: Recipe) -> Recipe | None:
        """The first of the settings, best first, whose every phase but the export is within the budget."""

        def trains(sized: Recipe) -> bool:
            peaks = {phase.name: phase.bytes for phase in predict(self.workload(sized))}
            return max(peaks[name] for name in ("load", "update", "optimiser")) <= self.budget_bytes

        for candidate in self._storage(self._open(recipe)):
            sizes = self._micro_batches(candidate)
            # More tokens take more memory, so the largest micro-batch that fits is found by halving.
            first = bisect.bisect_left(sizes, True, key=trains)
            if first < len(sizes) and (whole := self._sampling(sizes[first])) is not None:
                return whole
        return None

    def smallest(self, recipe: Recipe) -> Recipe:
        """The recipe with the least of everything."""
        sized = self._micro_batches(list(self._storage(self._open(recipe)))[-1])[-1]
        if self.vllm_on is not None:
            return self._with_sequences(sized) if UTILIZATION in self.pinned else self._with_share(sized, 0)
        longest = self.workload(sized).longest_sampled
        return sized if CACHE in self.pinned else changed(sized, max_cache_tokens=longest)

    # ---- what is tried ----

    def _storage(self, recipe: Recipe) -> Iterator[Recipe]:
        """The recipe, then with less to store: shorter C_retro where its length is open, checkpointing, 8-bit moments;
        last, where that is allowed, with smaller groups."""
        option = {key: option_of(recipe, key) for key in DEFAULTS}
        full = self.workload(recipe).context_tokens
        contexts: list[int] = [full]
        if option["max_context_tokens"] is None and with_lessons(recipe):
            shorter = range(full - full % 512, SHORTEST_CONTEXT - 1, -512)
            contexts += [tokens for tokens in shorter if tokens < full]
        checkpointings = {bool(option["gradient_checkpointing"]): None, True: None}
        optimisers = {str(option["optim"]): None, "paged_adamw_8bit": None}
        sized = recipe
        for context in contexts:
            for checkpointing in [option["gradient_checkpointing"]] if CHECKPOINTING in self.pinned else checkpointings:
                for optim in [option["optim"]] if OPTIM in self.pinned else optimisers:
                    storage = {"gradient_checkpointing": checkpointing, "optim": optim}
                    sized = changed(recipe, max_context_tokens=context, **storage)
                    yield sized
        for group, batch in self._smaller_groups(recipe):
            yield changed(sized, num_generations=group, per_device_train_batch_size=batch)

    def _smaller_groups(self, recipe: Recipe) -> Iterator[tuple[int, int]]:
        """Halved group sizes with the batch that has as many prompts; none where group or batch is given."""
        group, batch = option_of(recipe, "num_generations"), option_of(recipe, "per_device_train_batch_size")
        given = option_of(recipe, "generation_batch_size") is not None or bool({GROUP, BATCH} & self.pinned)
        while self.halves_groups and not given and group % 2 == 0 and batch % 2 == 0 and group // 2 >= SMALLEST_GROUP:
            group, batch = group // 2, batch // 2
            yield group, batch

    def _micro_batches(self, recipe: Recipe) -> list[Recipe]:
        """The recipe with ever fewer tokens going forward and backward at once, down to the longest row."""
        if TOKENS in self.pinned:
            return [recipe]
        load = self.workload(recipe)
        longest = max(load.rollout_tokens, load.lesson_tokens if load.pairs else 0)
        most = max(longest, min(MOST_TOKENS, load.micro_batch_tokens))
        sizes = [*range(most, longest, -TOKEN_STEP), longest]
        return [changed(recipe, max_micro_batch_tokens=size) for size in sizes]

    def _sampling(self, recipe: Recipe) -> Recipe | None:
        """The most that fits to be sampled at once; None when no sequence does."""
        return self._concurrency(recipe) if self.vllm_on is None else self._share(recipe)

    def _concurrency(self, recipe: Recipe) -> Recipe | None:
        """The most tokens in the cache, less what saves no round of sampling."""
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
        """The largest share for vLLM that leaves the trainer its part, less what no phase could fill."""
        if UTILIZATION in self.pinned:
            sharing = self._with_sequences(recipe)
            load = self.workload(sharing)
            held = load.vllm_granted_tokens >= load.vllm_context_tokens
            return sharing if held and self._fits(load) else None
        load = self.workload(recipe)
        at_least = {phase.name: phase.bytes for phase in predict(load)}["rollout"]
        room = self.budget_bytes - (at_least - load.share_bytes) - load.weight_bytes - load.vllm_overhead_bytes
        tokens = vllm_memory.cache_tokens(self.shape, room, load.element_bytes) - 2 * vllm_memory.BLOCK_TOKENS
        sharing = self._with_share(recipe, tokens)
        whole = self.workload(sharing)
        return sharing if whole.vllm_granted_tokens >= whole.vllm_context_tokens and self._fits(whole) else None

    def _with_share(self, recipe: Recipe, tokens: int) -> Recipe:
        """With a cache of so many tokens, but at least the longest sequence's and at most all sequences'."""
        sharing = self._with_sequences(recipe)
        load = self.workload(sharing)
        assert load.vllm is not None
        most = max(min(n, load.vllm.sequences) * (prompt + new) for n, prompt, new in load.sampled.values())
        card = load.vllm.card
        # A block more than asked for is rounded away.
        share = load.share_of(min(tokens, most) + vllm_memory.BLOCK_TOKENS) / card.total_bytes
        share = min(share, vllm_memory.most_share(card.total_bytes, card.free_bytes))
        model = replace(sharing.model, gpu_memory_utilization=math.floor(1e5 * share) / 1e5)
        return replace(sharing, model=model)

    def _with_sequences(self, recipe: Recipe) -> Recipe:
        """With `max_num_seqs`, where it is open, set to what it was taken for."""
        load = self.workload(recipe)
        assert load.vllm is not None
        return replace(recipe, model=replace(recipe.model, max_num_seqs=load.vllm.sequences))

    def _open(self, recipe: Recipe) -> Recipe:
        """Without the share that the recipe has and that need not stay."""
        if self.vllm_on is None or UTILIZATION in self.pinned:
            return recipe
        return replace(recipe, model=replace(recipe.model, gpu_memory_utilization=None))

    def _fits(self, load: Workload) -> bool:
        return all(phase.bytes <= self.budget_bytes for phase in predict(load) if phase.name != "export")

    # ---- where nothing fits ----

    def released(self, recipe: Recipe) -> Iterator[str]:
        """Other values of single settings that are pinned, with which it would fit."""
        for key in self.neutral:
            freed = replace(self, pinned=self.pinned - {key}).fitting(recipe) if key in self.pinned else None
            if freed is not None:
                yield f"--set {key}={value_of(freed, key)}"

    def advice(self, recipe: Recipe) -> Iterator[str]:
        """Single changes of what is trained that make it fit, mildest first."""

        def fits(other: Recipe, shape: Shape = self.shape) -> bool:
            return replace(self, shape=shape).fitting(other) is not None

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
        if recipe.lora is not None and recipe.lora.start_from is None:  # else the adapter has its rank
            ranks = (recipe.lora.r >> halvings for halvings in range(1, 12))
            rank = next((r for r in ranks if r >= 8 and fits(_with_rank(recipe, r))), None)
            if rank:
                yield f"--set lora.r={rank}"
        if not load.four_bit and fits(replace(recipe, model=replace(recipe.model, load_in_4bit=True))):
            yield "--set model.load_in_4bit=true"
        smaller = sorted(formulas.KNOWN.items(), key=lambda item: -formulas.linear_parameters(item[1]))
        family, base = recipe.model.name.partition("-")[0], "-Base" if recipe.model.name.endswith("-Base") else ""
        for name, other in smaller:
            less = formulas.linear_parameters(other) < formulas.linear_parameters(self.shape)
            if name.startswith(f"{family}-") and less and fits(recipe, other):
                yield f"--model {name}{base}"
                break
