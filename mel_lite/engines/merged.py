"""Sample with the adapter added into a copy of the weights, which saves two small products per linear layer and token.

oneDNN multiplies faster by packed weights, which lie in blocks of rows. The copy is packed where this build of torch
can do it; then linear layers without an adapter, such as the head, get a packed copy, too.

The copies exist while a call samples. The trained weights are not touched: they are the same tensors afterwards, so
that nothing drifts. Only for float32 on a CPU: in 16 bits, the sum would be rounded to other weights than the trained
ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

WORTH_TOKENS = 16
"""Fewest new tokens for which building the copy pays: it takes as long as a few tokens save."""
ROWS = 32
"""Rows of the batch for which oneDNN chooses its blocks. They serve other batches, too."""


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

    `why_not_merged` must have returned None. Gradients are not recorded inside the block.
    """
    from peft.tuners.lora.layer import Linear

    adapted = [layer for layer in model.modules() if type(layer) is Linear]
    linears = [layer for layer in model.modules() if _can_pack() and _is_plain(layer)]
    kept: list[tuple[Any, torch.Tensor]] = []
    room = torch.empty(max(layer.get_base_layer().weight.numel() for layer in adapted)) if linears else None
    try:
        for layer in linears:
            layer.forward = _Packed(layer, partial(getattr, layer, "weight"))
        for layer in adapted:
            base = layer.get_base_layer()
            if isinstance(base.forward, _Packed):
                base.forward.weight = partial(_with_adapter, layer, room)
            else:
                kept.append((base, base.weight.data))
                base.weight.data = _with_adapter(layer)
            layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for base, data in kept:
            base.weight.data = data
        for layer in adapted:
            layer.merged_adapters.clear()
        for layer in linears:
            layer.__dict__.pop("forward", None)


def _with_adapter(layer: Any, room: torch.Tensor | None = None) -> torch.Tensor:
    """Return W + s B A of a LoRA layer; in `room` if given, since new tensors between packed ones fragment memory."""
    (name,) = layer.active_adapters
    weight = layer.get_base_layer().weight.data
    factors = layer.lora_B[name].weight.data, layer.lora_A[name].weight.data
    out = None if room is None else room[: weight.numel()].view_as(weight)
    return torch.addmm(weight, *factors, alpha=layer.scaling[name], out=out)


def _is_plain(layer: nn.Module) -> bool:
    """Return True for a linear layer in float32 on a CPU whose forward nothing has replaced."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


class _Packed:
    """The forward of a linear layer, from a packed copy of its weight that the first call makes."""

    def __init__(self, layer: nn.Linear, weight: Callable[[], torch.Tensor]) -> None:
        self.weight = weight
        self._bias = layer.bias
        self._copy: torch.Tensor | None = None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._copy is None:
            self._copy = torch.ops.mkldnn._reorder_linear_weight(self.weight().detach(), ROWS)
        return _times(rows, self._copy, self._bias)


def _times(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")


@cache
def _can_pack() -> bool:
    """Return True where this build of torch has the two operators, and they multiply."""
    rows, weight = torch.linspace(-1, 1, 96).view(2, 48), torch.linspace(-1, 1, 768).view(16, 48).cos()
    try:
        product = _times(rows, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), None)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product, rows @ weight.T, rtol=0, atol=1e-4)
