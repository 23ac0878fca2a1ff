"""Sample sequences of unequal length in one batch without padding them, and compute what prompts share once.

A step's linear layers take the tokens of all sequences at once. Its attention runs per bucket: sequences of similar
length, whose keys and values are stored together. One long prompt in a batch of short ones then costs only its own
length. Prompts are computed as one flat sequence, in which those that begin alike share the beginning
(`models/attention.py`).

B sequences of a batch, the longest first, R of them in a bucket, S tokens stored of each, T tokens of the flat
sequence, A key heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mel_lite.models.attention import (
    lay_out,
    one_token,
    rounding_nats,
    sharing_prompts,
    takes_shared_prompts,
    why_not_full,
)
from mel_lite.models.blocks import group_lengths
from mel_lite.text import common_prefix_tokens, first_line

ROOM_TOKENS = 64
"""Room that a bucket allocates at once."""
WORTH_TOKENS = 64
"""Fewest tokens that a common beginning must save: its continuations are further calls of the attention."""

Ids = tuple[int, ...]


class Bucket:
    """Keys and values of R sequences of similar length. Shorter ones are padded on the left, and masked there."""

    def __init__(self, spans: Sequence[torch.Tensor]) -> None:
        """Make a bucket for the tokens at `spans` of a flat sequence; `store` adds its layers."""
        self.rows, self.stored_tokens = len(spans), max(map(len, spans))
        padded = [torch.nn.functional.pad(span, (self.stored_tokens - len(span), 0), value=-1) for span in spans]
        index_RS = torch.stack(padded)
        self._mask_RS = (index_RS >= 0) if bool((index_RS < 0).any()) else None
        self._index_RS = index_RS.clamp(min=0)
        self._layers: list[tuple[torch.Tensor, ...]] = []

    def store(self, *layer_1ATD: torch.Tensor) -> None:
        """Store the next layer's keys and values of the flat sequence."""
        index_RS = self._index_RS
        found = (each_1ATD[0].index_select(1, index_RS.flatten()) for each_1ATD in layer_1ATD)
        self._layers.append(tuple(self._stored(each.unflatten(1, index_RS.shape).transpose(0, 1)) for each in found))

    def make_room(self) -> None:
        """Count a further token, which every layer then stores."""
        if self.stored_tokens == self._layers[0][0].shape[2]:
            self._copy_rows(slice(None))
        self.stored_tokens += 1
        if self._mask_RS is not None:
            self._mask_RS = torch.nn.functional.pad(self._mask_RS, (0, 1), value=True)

    def attend(
        self, layer: int, query: torch.Tensor, new: Sequence[torch.Tensor], scaling: float | None
    ) -> torch.Tensor:
        """Store the key and value (R, A, 1, D) of the new token; return its attention (R, 1, heads, D)."""
        stored = []
        for buffer_RASD, new_RAD in zip(self._layers[layer], new, strict=True):
            buffer_RASD[:, :, self.stored_tokens - 1] = new_RAD[:, :, 0]
            stored.append(buffer_RASD[:, :, : self.stored_tokens])
        mask = None if self._mask_RS is None else self._mask_RS[:, None, None]
        key_RASD, value_RASD = stored
        return one_token(query, key_RASD, value_RASD, mask, 0.0, scaling)

    def keep(self, index: torch.Tensor) -> None:
        """Keep the sequences with these numbers."""
        if len(index) == self.rows:
            return
        self.rows = len(index)
        if self.rows:
            self._copy_rows(index)
            self._mask_RS = None if self._mask_RS is None else self._mask_RS[index]

    def _copy_rows(self, rows: Any) -> None:
        """Copy some rows, one layer after the other, so that never more than one is held twice."""
        for i, pair in enumerate(self._layers):
            self._layers[i] = tuple(self._stored(each[rows, :, : self.stored_tokens]) for each in pair)

    def _stored(self, states_RASD: torch.Tensor) -> torch.Tensor:
        """Return a buffer with room behind the states."""
        rows, heads, used, width = states_RASD.shape
        buffer_RASD = states_RASD.new_empty(rows, heads, used + ROOM_TOKENS, width)
        buffer_RASD[:, :, :used] = states_RASD
        return buffer_RASD


class BucketedCache:
    """Keys and values of all tokens but the last of B sequences. It stands in for transformers' cache while sampling.

    The model gets it as an argument that it passes to its attention (`models/attention.py`), which calls `attend`.
    """

    def __init__(self, layers: Iterable[tuple[torch.Tensor, torch.Tensor]], spans: Sequence[torch.Tensor]) -> None:
        """Store the tokens at `spans` of a flat sequence; those of the longest sequence come first."""
        groups = group_lengths([len(span) for span in spans])
        assert [i for group in groups for i in group] == list(range(len(spans))), "sorted by length"
        self.buckets = [Bucket([spans[i] for i in group]) for group in groups]
        for layer in layers:
            for bucket in self.buckets:
                bucket.store(*layer)
        self._device = spans[0].device

    def next_token(self) -> dict[str, Any]:
        """Make room for a token of each sequence. Returns: what a forward of these tokens needs to find the others."""
        for bucket in self.buckets:
            bucket.make_room()
        return {"attention_mask": _any_mask(self._device), "use_cache": False, "bucketed_cache": self}

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Compute a layer's attention for one token of each sequence. Returns: (B, 1, heads, D)."""
        rows = [bucket.rows for bucket in self.buckets]
        parts = zip(self.buckets, *(each.split(rows) for each in (query, key, value)), strict=True)
        return torch.cat([bucket.attend(layer, q, (k, v), scaling) for bucket, q, k, v in parts])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences with these numbers, which ascend."""
        first = 0
        for bucket in self.buckets:
            mine = indices[(indices >= first) & (indices < first + bucket.rows)] - first
            first += bucket.rows
            bucket.keep(mine.to(self._device))
        self.buckets = [bucket for bucket in self.buckets if bucket.rows]


def prefill_buckets(causal: Any, prompts: Sequence[Ids], *, least: int = WORTH_TOKENS) -> BucketedCache:
    """Compute keys and values of all tokens but the last of each prompt, with the backbone alone.

    Equal prompts are computed once, and so is the beginning that several share (`families`).

    Args: `prompts` of at least one token, the longest first, and one of at least two.
    """
    places, layout, ids_T, position_T = _flat([prompt[:-1] for prompt in prompts], least, causal.device)
    cache = DynamicCache(config=causal.config.get_text_config(decoder=True))
    causal.base_model(
        input_ids=ids_T[None],
        position_ids=position_T[None],
        attention_mask=_any_mask(causal.device),
        shared_prompts=layout,
        past_key_values=cache,
        use_cache=True,
    )
    return BucketedCache(_released(cache), [places[prompt[:-1]] for prompt in prompts])


def _released(cache: DynamicCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return each layer's keys and values, and drop them from the cache, so that no more than one is held twice."""
    for layer in cache.layers:
        yield layer.keys, layer.values
        layer.keys = layer.values = None


def why_not_bucketed(causal: Any) -> str | None:
    """Return what keeps a model from being sampled with a `BucketedCache`, or None.

    Compares its log-probs after a few tokens with those of its own forward, which no config tells for sure.
    """
    if not takes_shared_prompts(causal):
        return f"attn_implementation={causal.config._attn_implementation!r}"
    if (problem := why_not_full(causal.config)) is not None:
        return problem
    layers = DynamicCache(config=causal.config.get_text_config(decoder=True)).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return f"{type(causal).__name__}, which keeps other states than keys and values"
    if len({weight.device for weight in causal.parameters()}) > 1:
        return "a model on several devices"
    try:
        with sharing_prompts(causal):
            worst = _difference(causal)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(causal).__name__}: its attention takes no cache of ours ({first_line(error)})"
    if worst <= rounding_nats(causal):
        return None
    return f"{type(causal).__name__}: log-probs differ by {worst:.2g} nats from those of its own cache"


def _difference(causal: Any) -> float:
    """Return the largest difference of a log-prob in nats, for the token after prompts that share a beginning."""
    prompts = [(1, 2, 3, 4), (1, 2, 9), (9, 3)]
    width, rows_B = len(prompts[0]), torch.arange(len(prompts), device=causal.device)
    padded = [(*prompt, *(0,) * width)[:width] for prompt in prompts]  # nothing attends to the padding behind
    ids_BT = torch.tensor(padded, device=causal.device)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=causal.device)
    own_BTV = causal(input_ids=ids_BT, use_cache=False).logits
    cache = prefill_buckets(causal, prompts, least=1)
    options = {"position_ids": last_B[:, None], **cache.next_token()}
    ours_BTV = causal(input_ids=ids_BT[rows_B, last_B][:, None], **options).logits
    own_BV, ours_BV = (each.float().log_softmax(-1) for each in (own_BTV[rows_B, last_B], ours_BTV[:, 0]))
    return (ours_BV - own_BV).abs().max().item()


def families(stems: Sequence[Ids], least: int) -> list[tuple[int, list[Ids]]]:
    """Split distinct sequences so that computing the common beginning of each part once saves the most tokens.

    Returns: the tokens of each part's common beginning, and its sequences. A part of one sequence, or one that saves
        fewer than `least` tokens, is split up; its beginning has 0 tokens.
    """
    ordered = sorted(stems)
    common = [common_prefix_tokens(a, b) for a, b in itertools.pairwise(ordered)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    """For the first sequences: tokens saved at most, where the last part starts, and the tokens of its beginning."""
    for stop in range(1, len(ordered) + 1):
        options, shared = [(best[stop - 1][0], stop - 1, 0)], len(ordered[stop - 1])
        for start in range(stop - 2, -1, -1):
            shared = min(shared, common[start])
            saved = shared * (stop - start - 1)
            if saved >= least:
                options.append((best[start][0] + saved, start, shared))
            elif not shared:
                break
        best.append(max(options, key=lambda option: option[0]))
    parts, stop = [], len(ordered)
    while stop:
        _, start, shared = best[stop]
        parts.append((shared, ordered[start:stop]))
        stop = start
    return parts[::-1]


def _flat(
    stems: Sequence[Ids], least: int, device: torch.device
) -> tuple[dict[Ids, torch.Tensor], Any, torch.Tensor, torch.Tensor]:
    """Return where the tokens of each sequence are in a flat one, its layout, its ids (T,) and their positions (T,)."""
    ids: list[int] = []
    positions: list[int] = []

    def place(part: Ids, offset: int) -> torch.Tensor:
        placed = torch.arange(len(ids), len(ids) + len(part), device=device)
        ids.extend(part)
        positions.extend(range(offset, offset + len(part)))
        return placed

    places: dict[Ids, torch.Tensor] = {}
    roots: list[torch.Tensor] = []
    branches: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
    for shared, family in families(list(dict.fromkeys(stems)), least):
        beginning = place(family[0][:shared], 0)
        own = [place(stem[shared:], shared) for stem in family]
        places |= {stem: torch.cat([beginning, placed]) for stem, placed in zip(family, own, strict=True)}
        longer = [placed for placed in own if len(placed)]
        if shared:
            roots.append(beginning)
            branches.append((beginning, longer))
        else:
            roots += longer
    tensors = (torch.tensor(each, device=device) for each in (ids, positions))
    return places, lay_out(roots, branches), *tensors


def _any_mask(device: torch.device) -> torch.Tensor:
    """Return a mask that transformers passes on as it is. Without one, it would build its own."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
