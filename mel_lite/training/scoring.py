"""Scoring head: one forward of the model over blocks of rows, ending in the fused log-prob operator.

B rows of a block, T tokens, H hidden size, V vocabulary, N scored positions of all blocks in order.
"""

from __future__ import annotations

import functools
import itertools
import sys
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
    aux_loss: torch.Tensor | None = None
    """Load-balancing loss () of a mixture of experts over the rows that balance; None unless requested."""


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
        load_balancing: bool = False,
        **kwargs: Any,
    ) -> Any:
        if score_blocks is None:
            return original_forward(*args, **kwargs)
        parts = []
        routers: list[tuple[torch.Tensor, ...]] | None = [] if load_balancing else None
        for temperature, blocks in itertools.groupby(score_blocks, key=lambda block: block.temperature):
            hidden_NH, target_N = _scored_hidden(self, list(blocks), recompute, routers)
            parts.append(_score(self, spec, hidden_NH, target_N, temperature, entropy_grad))
        logp_N, entropy_N = (torch.cat(column) for column in zip(*parts, strict=True))
        return Scores(logp_N, entropy_N, None if routers is None else _load_balancing_loss(self, routers))

    model.forward = types.MethodType(forward, model)


def _scored_hidden(
    model: Any, blocks: Sequence[Block], recompute: bool, routers: list[tuple[torch.Tensor, ...]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states that predict a scored id, and those ids: h_{t-1} predicts id t.

    `recompute`: keep no activations of a block; compute them again in the backward, one block at a time.
    `routers`: receives, per block and layer, the router logits (tokens, experts) of the rows that balance.
    """
    options = {} if routers is None else {"output_router_logits": True}

    def forward(input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = model.base_model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **options)
        return (output.last_hidden_state, *(() if routers is None else output.router_logits))

    hidden, targets = [], []
    for block in blocks:
        inputs = (block.input_ids_BT, block.attention_mask_BT)
        again = recompute and torch.is_grad_enabled()
        hidden_BTH, *logits = checkpoint(forward, *inputs, use_reentrant=False) if again else forward(*inputs)
        if routers is not None:
            balances_B = torch.tensor(block.balances, device=hidden_BTH.device)
            counted = (block.attention_mask_BT.bool() & balances_B[:, None]).flatten()
            routers.append(tuple(layer.reshape(len(counted), -1)[counted] for layer in logits))
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probability and entropy (N,) of the targets."""
    head = model.get_output_embeddings()
    device = head.weight.device
    hidden_NH, target_N = hidden_NH.to(device), target_N.to(device)
    if head.weight.dtype.is_floating_point:
        hidden_NH = hidden_NH.to(head.weight.dtype)
    # The operator accumulates in float32; autocast would round its products to 16 bits.
    with maybe_gather_lm_head_ctx(head.weight, getattr(head, "bias", None)), _no_autocast(device.type):
        logp_N, entropy_N, _ = head_logprobs(
            head,
            hidden_NH,
            target_N,
            spec=spec,
            temperature=temperature,
            compute_u=torch.is_grad_enabled() and hidden_NH.requires_grad,
            entropy_grad=entropy_grad,
        )
    return logp_N, entropy_N


def balances_experts(model: Any) -> bool:
    """Return True when the load-balancing loss of this mixture of experts is known."""
    known = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    return known and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _load_balancing_loss(model: Any, routers: Sequence[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return the architecture's own loss over the tokens of all blocks, padding excluded."""
    layers = tuple(torch.cat(parts) for parts in zip(*routers, strict=True))
    if not len(layers[0]):
        return layers[0].sum()
    loss = sys.modules[type(model).__module__].load_balancing_loss_func
    return loss(layers, model.num_experts, model.num_experts_per_tok)


def _no_autocast(device: str) -> Any:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def score(
    model: Any,
    packed: Packed,
    *,
    entropy_grad: bool = False,
    recompute: bool = False,
    load_balancing: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
    """Return log-probability and entropy of every row's scored ids, in row order: lists of (scored_tokens,) float32.

    Equals log softmax(z/T)[id] and the entropy of softmax(z/T), with z the model's logits and T the row's temperature.
    The third value is the load-balancing loss (), None unless requested.
    `recompute` trades time for memory: the activations of one block at a time.
    """
    logp_N, entropy_N, aux_loss = model(
        score_blocks=packed.blocks, entropy_grad=entropy_grad, recompute=recompute, load_balancing=load_balancing
    )
    return packed.unpack(logp_N), packed.unpack(entropy_N), aux_loss
