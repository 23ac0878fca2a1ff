"""Weights and gradients that are spread over processes (FSDP2, DeepSpeed): gathering, and equal numbers of forwards.

A forward or backward over spread weights is a collective: every process takes part in each. Training passes are
therefore counted alike on all processes. Everything else, such as sampling, scoring and evaluation, runs over whole
weights, where a process needs no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from trl.models.utils import add_hooks, remove_hooks

from mel_lite.models.modes import evaluating

F = TypeVar("F", bound=Callable[..., Any])


class Sharding:
    """The state of one trainer's weights: spread, or whole on every process."""

    def __init__(self, trainer: Any) -> None:
        plugin = trainer.args.deepspeed_plugin
        self._trainer = trainer
        self.fsdp: bool = trainer.is_fsdp_enabled
        self.deepspeed: bool = trainer.is_deepspeed_enabled
        self.zero3 = plugin is not None and plugin.zero_stage == 3
        self._is_whole = False

    @property
    def in_lockstep(self) -> bool:
        """True when every process must take part in each training pass of the others."""
        return self.fsdp or self.deepspeed

    @property
    def is_spread(self) -> bool:
        """True once the weights of the model are spread: the Trainer does it when it begins to train."""
        trainer = self._trainer
        return isinstance(trainer.model, FSDPModule) or (self.zero3 and trainer.model_wrapped is not trainer.model)

    @contextmanager
    def whole(self, *, wanted: bool = True) -> Iterator[Any]:
        """Gather all weights on every process while open, and yield the model. All processes open it together.

        Inside an open one, where nothing is spread, and where no process wants it, it does nothing. A `state_dict` of
        the model must not be taken while it is open: FSDP2 would spread the weights again.
        """
        model = self._trainer.model
        if self._is_whole or not self.is_spread or not self.most(wanted):
            yield model
            return
        self._is_whole = True
        try:
            with self._unsharded(model) if self.fsdp else _gathered(self._trainer.model_wrapped):
                yield model
        finally:
            self._is_whole = False

    def settle_fsdp(self) -> None:
        """Begin with the adapter of rank 0 everywhere, and leave results of a forward in their own dtype."""
        trainer = self._trainer
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = broadcast(weight.data.to(trainer.accelerator.device)).to(weight.device)
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = in_own_dtype(plugin.mixed_precision_policy)

    def any_nonzero(self, weights: Sequence[torch.Tensor]) -> bool:
        """Return True when a weight has a value other than 0, on any process. All processes call it."""
        here = any(bool(_local(weight).any()) for weight in weights)
        return bool(self.most(here)) if self.is_spread else here

    def most(self, count: int) -> int:
        """Return the highest count of all processes."""
        accelerator = self._trainer.accelerator
        return int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max().item())

    def part(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of the backward of one part of a micro-batch.

        DDP averages gradients with the last part, FSDP2 with each. DeepSpeed updates the weights with the last.
        """
        accelerator = self._trainer.accelerator
        if is_last or self.fsdp:
            return nullcontext()
        return _accumulating(accelerator.gradient_state) if self.deepspeed else accelerator.no_sync(model)

    @contextmanager
    def _unsharded(self, model: Any) -> Iterator[None]:
        """Keep what one forward gathers; free it, and after each forward again, when the block ends."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        frees = bool(self._trainer.accelerator.state.fsdp_plugin.reshard_after_forward)
        model.set_reshard_after_forward(False)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with evaluating(model), torch.no_grad():
            model(input_ids=token, use_cache=False)
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                if unit is not model:  # as accelerate sets it: neither the root nor the head is freed after a forward
                    unit.set_reshard_after_forward(frees, recurse=False)
            if isinstance(head := model.get_output_embeddings(), FSDPModule):
                head.set_reshard_after_forward(False, recurse=False)


def in_own_dtype(policy: MixedPrecisionPolicy | None) -> MixedPrecisionPolicy | None:
    """Return the policy without rounding of results: accelerate's would round log-probs to the dtype of the weights."""
    return None if policy is None else replace(policy, output_dtype=None)


def _local(weight: torch.Tensor) -> torch.Tensor:
    """Return the part of a weight that this process has."""
    if isinstance(weight, DTensor):
        return weight.detach().to_local()
    return getattr(weight, "ds_tensor", weight).detach()


def with_whole_weights(method: F) -> F:
    """Decorate a trainer's method: it runs with whole weights, which all processes gather together."""

    @wraps(method)
    def gathered(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.sharding.whole():
            return method(self, *args, **kwargs)

    return gathered  # type: ignore[return-value]


@contextmanager
def _gathered(engine: Any) -> Iterator[None]:
    """Gather the weights of a ZeRO-3 engine, whose hooks would gather and free them layer by layer."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(engine.parameters()):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


@contextmanager
def _accumulating(gradient_state: Any) -> Iterator[None]:
    before = gradient_state.sync_gradients
    gradient_state._set_sync_gradients(False)
    try:
        yield
    finally:
        gradient_state._set_sync_gradients(before)
