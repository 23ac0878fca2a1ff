"""Sample with the adapter added into a copy of the weights, which saves two small products per linear layer and token.

The copy exists while a call samples. The trained weights are not touched: they are the same tensors afterwards, so that
nothing drifts. Only for float32 on a CPU: in 16 bits, the sum would be rounded to other weights than the trained ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WORTH_TOKENS = 16
"""Fewest new tokens for which building the copy pays: it takes as long as a few tokens save."""


def why_not_merged(model: Any) -> str | None:
    """Return what keeps the adapter of a model from being added into a copy of its weights, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return "a model without an adapter"
    if (other := next((why for layer in layers if (why := _why_not(layer)) is not None), None)) is not None:
        return other
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    if any(uses[id(layer.get_base_layer().weight)] > 1 for layer in layers):
        return "an adapter on weights that two layers share"
    if torch.is_autocast_enabled("cpu"):
        return "autocast to 16 bits"
    return None


def _why_not(layer: Any) -> str | None:
    from peft.tuners.lora.layer import Linear

    active = list(layer.active_adapters)
    if type(layer) is not Linear or type(layer.get_base_layer()) is not nn.Linear or layer.fan_in_fan_out:
        return f"an adapter layer of type {type(layer).__name__}"
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return "an adapter that is off, merged, or one of several"
    weights = layer.get_base_layer().weight, layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return "weights that are not float32 on a CPU"
    if active[0] in layer.lora_variant or layer.lora_B[active[0]].bias is not None:
        return "a variant of LoRA that is more than a product of two matrices"
    return None


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside the block, each adapted layer computes (W + s B A) x in place of W x + s B (A x).

    `why_not_merged` must have returned None.
    """
    from peft.tuners.lora.layer import Linear

    kept: list[tuple[Any, torch.Tensor]] = []
    try:
        for layer in model.modules():
            if type(layer) is Linear:
                (name,) = layer.active_adapters
                weight = layer.get_base_layer().weight
                kept.append((layer, weight.data))
                factors = layer.lora_B[name].weight.data, layer.lora_A[name].weight.data
                weight.data = torch.addmm(weight.data, *factors, alpha=layer.scaling[name])
                layer.merged_adapters.append(name)
        yield
    finally:
        for layer, data in kept:
            layer.get_base_layer().weight.data = data
            layer.merged_adapters.clear()
