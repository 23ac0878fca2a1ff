"""Scoring head: one forward of the model over blocks of rows, ending in the fused log-prob operator.

B rows of a block, T tokens, H hidden size, V vocabulary, N scored positions of all blocks in order.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import maybe_gather_lm_head_ctx

from mel_lite.errors import ModelError
from mel_lite.kernels import HeadSpec, check_head_spec, head_logprobs, head_spec
from mel_lite.training.packing import IGNORE, Block, Packed


class Scores(NamedTuple):
    """Per scored position, in block order, float32. The entropy carries a gradient only on request."""

    logp_N: torch.Tensor
    entropy_N: torch.Tensor


def install_scoring_head(model: Any) -> None:
    """Teach a causal language model `model(score_blocks=...) -> Scores`; its other calls are unchanged.

    The blocks go through the backbone one after another and their scored hidden states through one call of the fused
    operator per temperature, all inside the model's own forward, so that DDP's hooks fire as for any forward. Install
    it on the base model before anything wraps it; head and backbone are looked up at each call, since wrappers replace
    them.

    Raises: ModelError when the model's logits are not what its config says, so that fused scores would be wrong.
    """
    original_forward = model.forward
    try:
        spec = head_spec(model)
        if not is_deepspeed_zero3_enabled():  # weights are partitioned until the model is wrapped
            check_head_spec(model, spec)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{type(model).__name__}: {error}. Train it with TRL's GRPOTrainer instead.") from error

    # Keep the signature: `generate` checks its model arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        score_blocks: Any = None,
        entropy_grad: bool = False,
        recompute: bool = False,
        **kwargs: Any,
    ) -> Any:
        if score_blocks is None:
            return original_forward(*args, **kwargs)
        parts = []
        for temperature, blocks in itertools.groupby(score_blocks, key=lambda block: block.temperature):
            hidden_NH, target_N = _scored_hidden(self, list(blocks), recompute)
            parts.append(_score(self, spec, hidden_NH, target_N, temperature, entropy_grad))
        return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    model.forward = types.MethodType(forward, model)


def _scored_hidden(model: Any, blocks: Sequence[Block], recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states that predict a scored id, and those ids: h_{t-1} predicts id t.

    `recompute`: keep no activations of a block; compute them again in the backward, one block at a time.
    """

    def forward(input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> torch.Tensor:
        output = model.base_model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        return output.last_hidden_state

    hidden, targets = [], []
    for block in blocks:
        inputs = (block.input_ids_BT, block.attention_mask_BT)
        again = recompute and torch.is_grad_enabled()
        hidden_BTH = checkpoint(forward, *inputs, use_reentrant=False) if again else forward(*inputs)
        target_BT = block.target_BT[:, 1:]
        wanted_BT = target_BT != IGNORE
        hidden.append(hidden_BTH[:, :-1][wanted_BT])
        targets.append(target_BT[wanted_BT])
    return torch.cat(hidden), torch.cat(targets)


def _score(
    model: Any,
    spec: HeadSpec,
    hidden_NH: torch.Tensor,
    target_N: torch.Tensor,
    temperature: float,
    entropy_grad: bool,
) -> Scores:
    head = model.get_output_embeddings()
    device = head.weight.device
    hidden_NH, target_N = hidden_NH.to(device), target_N.to(device)
    if head.weight.dtype.is_floating_point:
        hidden_NH = hidden_NH.to(head.weight.dtype)
    # The operator accumulates in float32; autocast would round its products to 16 bits.
    with maybe_gather_lm_head_ctx(head.weight, head.bias), _no_autocast(device.type):
        logp_N, entropy_N, _ = head_logprobs(
            head,
            hidden_NH,
            target_N,
            spec=spec,
            temperature=temperature,
            compute_u=torch.is_grad_enabled() and hidden_NH.requires_grad,
            entropy_grad=entropy_grad,
        )
    return Scores(logp_N, entropy_N)


def _no_autocast(device: str) -> Any:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def score(
    model: Any, packed: Packed, *, entropy_grad: bool = False, recompute: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return log-probability and entropy of every row's scored ids, in row order: lists of (scored_tokens,) float32.

    Equals log softmax(z/T)[id] and the entropy of softmax(z/T), with z the model's logits and T the row's temperature.
    `recompute` trades time for memory: the activations of one block at a time.
    """
    logp_N, entropy_N = model(score_blocks=packed.blocks, entropy_grad=entropy_grad, recompute=recompute)
    return packed.unpack(logp_N), packed.unpack(entropy_N)
