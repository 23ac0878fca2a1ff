"""Peak of live tensor bytes, counted per operator: the memory an allocator without overhead would need."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the live storages of all tensors created inside the context. It also works on fake tensors.

    It does not count temporaries inside one operator, or tensors that existed before.
    """

    def __init__(self, before: Any = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self._living: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.layout == torch._mkldnn:  # packed for oneDNN: the tensor has no storage, and no view shares it
            owner, key, size_bytes = tensor, -id(tensor), tensor.numel() * tensor.element_size()
        else:
            owner = tensor.untyped_storage()
            key, size_bytes = owner._cdata, owner.nbytes()
        if key in self._before or key in self._living:
            return
        self._living.add(key)
        weakref.finalize(owner, self._free, key, size_bytes)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, key: int, size_bytes: int) -> None:
        self._living.discard(key)
        self.live_bytes -= size_bytes
