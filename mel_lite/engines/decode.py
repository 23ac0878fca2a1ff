"""Decode a batch with one forward per token, from which finished sequences leave.

B sequences still in the batch, P padded prompt tokens, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from mel_lite.engines.base import LOOK_TOKENS, Completion, Sampling
from mel_lite.engines.buckets import BucketedCache
from mel_lite.engines.seeded_sampler import SeededSampler
from mel_lite.types import Finish

LEAVE_SHARE = 8
"""Finished sequences leave once they are 1/8 of the batch: leaving copies the cache."""
ROOM_TOKENS = 64
"""Room that a layer of the cache allocates at once."""


def decode(
    model: Any,
    cache: Any,
    ids_BP: torch.Tensor,
    mask_BP: torch.Tensor,
    sampler: SeededSampler,
    *,
    ends: Sequence[int],
    samplings: Sequence[Sampling],
) -> list[Completion]:
    """Sample a completion of every row, up to and including one of `ends` and within the row's own limit.

    `cache` holds keys and values of all prompt tokens but the last: transformers' cache, or a `BucketedCache`.
    """
    rows_B = torch.arange(len(ids_BP), device=ids_BP.device)
    end_E = torch.tensor(list(ends), dtype=torch.long, device=ids_BP.device)
    is_open_B = torch.ones_like(rows_B, dtype=torch.bool)
    limit_B = torch.tensor([each.max_new_tokens for each in samplings], device=ids_BP.device)
    ids_BT, mask_BT = ids_BP, mask_BP
    sampled: list[list[int]] = [[] for _ in range(len(ids_BP))]
    logprobs: list[list[float]] = [[] for _ in range(len(ids_BP))]
    given_up: set[int] = set()
    for position in range(max(each.max_new_tokens for each in samplings)):
        logits_BV = model(
            input_ids=ids_BT[:, -1:],
            position_ids=mask_BT.sum(dim=1, keepdim=True) - 1,
            **_attending(cache, mask_BT),
        ).logits[:, -1].float()  # fmt: skip
        choice_B, logp_B = sampler.draw(ids_BT, logits_BV, position, rows_B)
        drawn = zip(rows_B.tolist(), is_open_B.tolist(), choice_B.tolist(), logp_B.tolist(), strict=True)
        for row, is_open, choice, logp in drawn:
            if is_open:
                sampled[row].append(choice)
                logprobs[row].append(logp)
        is_open_B &= ~torch.isin(choice_B, end_E) & (position + 1 < limit_B[rows_B])
        if (position + 1) % LOOK_TOKENS == 0:
            given_up |= (hopeless := hopeless_rows(rows_B[is_open_B].tolist(), sampled, samplings))
            is_open_B &= torch.tensor([row not in hopeless for row in rows_B.tolist()], device=is_open_B.device)
        ids_BT = torch.cat([ids_BT, choice_B[:, None]], dim=1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        still = int(is_open_B.sum())
        if not still:
            break
        if LEAVE_SHARE * (len(rows_B) - still) >= len(rows_B):
            stay = is_open_B.nonzero()[:, 0]
            cache.batch_select_indices(stay.cpu())  # layers may be on several devices
            ids_BT, mask_BT, rows_B, is_open_B = (each[stay] for each in (ids_BT, mask_BT, rows_B, is_open_B))
    return [
        completion(ids, logps, ends, otherwise=Finish.ENDED if row in given_up else Finish.LENGTH)
        for row, (ids, logps) in enumerate(zip(sampled, logprobs, strict=True))
    ]


def _attending(cache: Any, mask_BT: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a forward that say what the next token of each row attends to."""
    if isinstance(cache, BucketedCache):
        return cache.next_token()
    return {"attention_mask": mask_BT, "past_key_values": cache, "use_cache": True}


def hopeless_rows(rows: Sequence[int], sampled: Sequence[list[int]], samplings: Sequence[Sampling]) -> set[int]:
    """Return the rows whose `is_hopeless` says so of their ids."""
    looks = ((row, samplings[row].is_hopeless) for row in rows)
    return {row for row, is_hopeless in looks if is_hopeless is not None and is_hopeless(sampled[row])}


def completion(
    ids: Sequence[int], logprobs: Sequence[float], ends: Sequence[int], *, otherwise: Finish = Finish.LENGTH
) -> Completion:
    """Return the completion up to and including its first end. `otherwise`: its finish where it has none."""
    end = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    finish = otherwise if end is None else Finish.STOP
    return Completion(tuple(ids[:end]), tuple(logprobs[:end]), finish)


def with_room(cache: Any) -> None:
    """Let the layers of a cache append a token without copying the others; sliding windows stay as they are."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _LayerWithRoom(layer)


class _LayerWithRoom(DynamicLayer):
    """Keys and values at the front of a larger buffer."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        used, new = self.keys.shape[-2], key_states.shape[-2]
        if self._buffers is None or used + new > self._buffers[0].shape[-2]:
            self._buffers = self._grown(self.keys, new), self._grown(self.values, new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used : used + new] = states
        self.keys, self.values = (buffer[:, :, : used + new] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    @staticmethod
    def _grown(states: torch.Tensor, new: int) -> torch.Tensor:
        batch, heads, used, width = states.shape
        buffer = states.new_empty(batch, heads, used + new + ROOM_TOKENS, width)
        buffer[:, :, :used] = states
        return buffer
