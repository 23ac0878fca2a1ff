"""Generation with transformers, on any device, from the model that is being trained.

Shapes: B sequences in one call, U different prompts among them, P padded prompt tokens, T sampled positions, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mel_lite.engines.base import LOOK_TOKENS, Completion, Engine, Request, Sampling
from mel_lite.engines.buckets import BucketedCache, prefill_buckets, why_not_bucketed
from mel_lite.engines.decode import completion, decode, hopeless_rows, with_room
from mel_lite.engines.merged import WORTH_TOKENS, merged, why_not_merged
from mel_lite.engines.seeded_sampler import SeededSampler
from mel_lite.errors import EngineError
from mel_lite.models.attention import sharing_prompts
from mel_lite.models.modes import evaluating
from mel_lite.types import Finish


class HFEngine(Engine):
    """Samples from one uniform random number per (seed, position), with one forward per token.

    Models with another cache than keys and values, and sharded or patched ones, go through `model.generate`.

    Each token is the inverse of the cumulative distribution at that number. A sequence therefore depends only on its
    prompt and seed: not on the rest of the batch, the global RNG, or how a batch was split after running out of memory.

    Args:
        model: causal language model, PEFT-wrapped or not; ignored if `unwrap` is given.
        eos_ids: every id that ends a completion.
        pad_id: id used for padding. It is masked, so its value has no effect.
        max_concurrent: most sequences sampled at once, >= 1.
        max_cache_tokens: bound on the number of sequences times the longest prompt plus completion; None = no bound. A
            single sequence is always sampled.
        unwrap: opens a context that yields the model to sample from, without the wrapper of distributed training.
        autocast: opens the autocast context of training, so that sampling and scoring compute the same numbers.
        shares_prefill: prefill equal prompts of a batch once, with the backbone alone, and let finished sequences leave
            the batch. False: sample with `model.generate`.
        merges_adapter: says before each call if a copy of the weights with the adapter in it may sample (`merged`).
        buckets: says before each call if sequences of unequal length are sampled without padding, where
            `why_not_bucketed` finds nothing against it; None = on CPUs.
    """

    name = "hf"
    mixes = True
    ends_hopeless = True

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_concurrent: int = 64,
        max_cache_tokens: int | None = None,
        unwrap: Callable[[], AbstractContextManager[Any]] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        shares_prefill: bool = True,
        merges_adapter: Callable[[], bool] = lambda: True,
        buckets: Callable[[], bool] | None = None,
    ) -> None:
        assert max_concurrent >= 1
        self._unwrap = unwrap or (lambda: nullcontext(model))
        self._autocast = autocast
        self._shares_prefill = shares_prefill
        self._merges_adapter = merges_adapter
        self._buckets = buckets
        self._can_bucket: bool | None = None if shares_prefill else False
        """True if `why_not_bucketed` finds nothing; None = not asked yet."""
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._max_concurrent = max_concurrent
        self._max_cache_tokens = max_cache_tokens
        self._saw: Callable[[int, int], None] | None = None
        """`watch` for the current batch: it adds the sequences that earlier batches of the call have finished."""

    def wake(self) -> None:
        """No-op: the engine samples from the model that is trained."""

    def sleep(self) -> None:
        """No-op: the key-value cache exists only during a call."""

    def limit_cache(self, tokens: int) -> bool:
        """Limit the KV cache to `tokens`. Returns: True."""
        self._max_cache_tokens = min(self._max_cache_tokens or tokens, tokens)
        return True

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in their order.

        Raises: EngineError when there is not enough memory for a single sequence.
        """
        done: dict[int, Completion] = {}
        pending = self._batches(requests, sampling)[::-1]
        with (
            self._unwrap() as model,
            self._sampling_mode(model),
            self._autocast(),
            torch.no_grad(),
            self._quick(model, sampling),
        ):
            while pending:
                rows = pending.pop()
                self._saw = None if self.watch is None else partial(_add, self.watch, len(done))
                try:
                    completions = self._generate_batch(model, [requests[i] for i in rows], sampling)
                except torch.OutOfMemoryError as error:
                    new_tokens = _new_tokens(requests, rows, sampling)
                    if len(rows) == 1:
                        raise EngineError(
                            f"Out of memory while sampling one sequence of {len(requests[rows[0]].prompt_ids)} prompt "
                            f"and up to {new_tokens} new tokens. Lower max_completion_length or analysis_max_tokens, "
                            "or use a smaller model."
                        ) from error
                    torch.cuda.empty_cache()
                    longest = max(len(requests[i].prompt_ids) for i in rows) + new_tokens
                    self.limit_cache(max(1, len(rows) // 2) * longest)
                    pending += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
                    continue
                done.update(zip(rows, completions, strict=True))
                if self.watch is not None:
                    self.watch(len(done), 0)
        return [done[i] for i in range(len(requests))]

    def _sampling_mode(self, model: Any) -> AbstractContextManager[None]:
        """Return the context that switches the model to inference while it samples."""
        return evaluating(model)

    def _quick(self, model: Any, sampling: Sampling) -> AbstractContextManager[None]:
        worth = self._shares_prefill and sampling.max_new_tokens >= WORTH_TOKENS and self._merges_adapter()
        return merged(model) if worth and why_not_merged(model) is None else nullcontext()

    def _batches(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Split request indices into batches, shortest prompt first, since similar lengths need the least padding."""
        batches: list[list[int]] = []
        for i in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids)):
            width = len(requests[i].prompt_ids) + _new_tokens(requests, [*(batches or [[]])[-1], i], sampling)
            room = self._max_concurrent
            if self._max_cache_tokens is not None:
                room = min(room, self._max_cache_tokens // width)
            if batches and len(batches[-1]) < room:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _generate_batch(self, model: Any, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        causal = _causal(model)
        if max(len(each.prompt_ids) for each in requests) < 2 or not self._in_buckets(causal):
            return self._sample(model, requests, sampling)
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        requests = [requests[i] for i in longest_first]
        with sharing_prompts(causal):
            cache = prefill_buckets(causal, [each.prompt_ids for each in requests])
            completions = self._sample(model, requests, sampling, cache)
        done = dict(zip(longest_first, completions, strict=True))
        return [done[i] for i in range(len(requests))]

    def _in_buckets(self, causal: Any) -> bool:
        """Return True when sequences of unequal length are sampled without padding."""
        if not (causal.device.type == "cpu" if self._buckets is None else self._buckets()):
            return False
        if self._can_bucket is None:
            self._can_bucket = why_not_bucketed(causal) is None
        return self._can_bucket

    def _sample(
        self, model: Any, requests: Sequence[Request], sampling: Sampling, cache: BucketedCache | None = None
    ) -> list[Completion]:
        prompts = {request.prompt_ids: row for row, request in reversed(list(enumerate(requests)))}
        firsts = sorted(prompts.values())
        source = torch.tensor([firsts.index(prompts[request.prompt_ids]) for request in requests])
        prompt_tokens = max(map(len, prompts))
        device = model.device
        ids_UP = torch.full((len(firsts), prompt_tokens), self._pad_id, dtype=torch.long)
        mask_UP = torch.zeros_like(ids_UP)
        for u, row in enumerate(firsts):
            prompt_ids = requests[row].prompt_ids
            ids_UP[u, prompt_tokens - len(prompt_ids) :] = torch.tensor(prompt_ids)
            mask_UP[u, prompt_tokens - len(prompt_ids) :] = 1
        ids_UP, mask_UP = ids_UP.to(device), mask_UP.to(device)
        samplings = [request.options(sampling) for request in requests]
        sampler = SeededSampler([r.seed for r in requests], prompt_tokens, samplings, device, self._saw)
        ends = [] if sampling.ignore_eos else self._eos_ids
        states = cache or (_prefill(model, ids_UP, mask_UP, source) if self._shares_prefill else None)
        if states is not None:
            return decode(model, states, ids_UP[source], mask_UP[source], sampler, ends=ends, samplings=samplings)
        stops = _Stops(samplings, prompt_tokens, ends, device)
        config = GenerationConfig(
            max_new_tokens=max(each.max_new_tokens for each in samplings),
            do_sample=False,
            eos_token_id=None if sampling.ignore_eos else self._eos_ids,
            pad_token_id=self._pad_id,
            use_cache=True,
            disable_compile=True,
        )
        with _generation_config(model, config):
            output = model.generate(
                input_ids=ids_UP[source],
                attention_mask=mask_UP[source],
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stops]),
            )
        sampled = output[:, prompt_tokens:].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        rows = zip(sampled, logprobs, stops.most_tokens, stops.finishes, strict=True)
        return [completion(ids[:most], logps[:most], ends, otherwise=finish) for ids, logps, most, finish in rows]


class _Stops(StoppingCriteria):
    """Ends each row of `model.generate` at its own number of sampled tokens, or as soon as it is hopeless."""

    def __init__(
        self, samplings: Sequence[Sampling], prompt_tokens: int, ends: Sequence[int], device: torch.device
    ) -> None:
        self.most_tokens = [each.max_new_tokens for each in samplings]
        self.finishes = [Finish.LENGTH] * len(samplings)
        self._samplings, self._prompt_tokens, self._ends, self._device = samplings, prompt_tokens, set(ends), device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids.shape[1] - self._prompt_tokens
        if tokens % LOOK_TOKENS == 0 and any(each.is_hopeless for each in self._samplings):
            sampled = input_ids[:, self._prompt_tokens :].tolist()
            unfinished = [
                row for row, ids in enumerate(sampled) if tokens < self.most_tokens[row] and self._ends.isdisjoint(ids)
            ]
            for row in hopeless_rows(unfinished, sampled, self._samplings):
                self.most_tokens[row], self.finishes[row] = tokens, Finish.ENDED
        return torch.tensor([tokens >= most for most in self.most_tokens], device=self._device)


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _new_tokens(requests: Sequence[Request], rows: Sequence[int], sampling: Sampling) -> int:
    """Return the most tokens that one of these requests may get."""
    return max(requests[i].options(sampling).max_new_tokens for i in rows)


def _add(watch: Callable[[int, int], None], before: int, finished: int, tokens: int) -> None:
    watch(before + finished, tokens)


def _prefill(model: Any, ids_UP: torch.Tensor, mask_UP: torch.Tensor, source: torch.Tensor) -> Any:
    """Compute the key-value cache of all but the last token of each row's prompt.

    The G completions of a prompt share its prefill, and the head is not applied to the prompt at all.

    Args: `source`, (B,): index of each row's prompt among the U prompts; on the CPU, since layers may be on several
        devices.
    Returns: None if the model keeps another kind of state.
    """
    causal = _causal(model)
    cache = DynamicCache(config=causal.config.get_text_config(decoder=True))
    # Subclasses of these layers keep further states, which selecting rows does not select.
    known = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if ids_UP.shape[1] < 2 or not known:
        return None
    position_UP = (mask_UP.cumsum(dim=1) - 1).clamp(min=0)
    before = slice(None, -1)
    causal.base_model(
        input_ids=ids_UP[:, before],
        attention_mask=mask_UP[:, before],
        position_ids=position_UP[:, before],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_select_indices(source)
    if ids_UP.device.type == "cpu":
        with_room(cache)
    return cache


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config inside the block: its defaults would fill every unset field of `config`.

    PEFT copies the wrapper's generation config to the base model when it generates, so both are restored.
    """
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    originals = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.generation_config = original
