"""States of a model and an optimizer that FSDP2 spreads, in the form in which one process has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from mel_lite.models.adapters import WEIGHTS, base_weights
from mel_lite.models.peft_support import is_peft

_WRAPPER = "_checkpoint_wrapped_module."
"""Part of the names of weights in layers whose activations FSDP recomputes."""


def gathered(tree: Any) -> Any:
    """Return a tree of dicts and lists with whole tensors. All processes call it with the same tree."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    return [gathered(value) for value in tree] if isinstance(tree, list) else tree


def whole_weights(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return the weights that are saved, on the CPU: all, or those beyond the base of an adapter.

    All processes call it; `keep` = False returns nothing, on processes that do not save.
    """
    base = {id(weight) for _, weight in base_weights(model)} if is_peft(model) else set()
    tied = {id(weight) for weight in model.parameters()}
    named = [(name, weight) for name, weight in model.named_parameters() if id(weight) not in base]
    saved = model.state_dict(keep_vars=True)
    named += [(name, tensor) for name, tensor in saved.items() if id(tensor) not in tied]  # persistent buffers
    found = {}
    for name, weight in named:
        whole = gathered(weight.detach())
        if keep:
            found[name.replace(_WRAPPER, "")] = whole.to("cpu", copy=True)
    return found


def load_weights(model: Any, folder: Path) -> None:
    """Read the weights of a checkpoint into a model that may be spread. Every process reads the files."""
    from safetensors.torch import load_file

    if is_peft(model):
        named, weights = get_peft_model_state_dict(model, save_embedding_layers=False), load_file(folder / WEIGHTS)
    else:
        named = dict(model.named_parameters())
        weights = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    with torch.no_grad():
        for name, weight in named.items():
            weight.copy_(_spread_like(weight, weights[name.replace(_WRAPPER, "")]))


def spread_optimizer_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return a whole state of the optimizer with the tensors of each weight spread like the weight."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        i: {
            name: _spread_like(weights[i], value)
            if torch.is_tensor(value) and value.shape == weights[i].shape and value.ndim
            else value
            for name, value in each.items()
        }
        for i, each in state["state"].items()
    }
    return state | {"state": moments}


def _spread_like(weight: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    whole = whole.to(weight.device)
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
