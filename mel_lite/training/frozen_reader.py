"""The policy as it was at the start of the run, kept as a copy of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FILE_NAME = "frozen_reader.safetensors"


class FrozenReader:
    """Copy of the trainable weights at the start, in host memory. Under LoRA it has the size of the adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = {name: weight.detach().to("cpu", copy=True) for name, weight in self._trained()}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give the model its start weights inside the block, and the current ones back after it."""
        current = {name: weight.data for name, weight in self._trained()}
        try:
            for name, weight in self._trained():
                weight.data = self._start[name].to(weight.device, weight.dtype)
            yield
        finally:
            for name, weight in self._trained():
                weight.data = current[name]

    def save(self, folder: Path) -> None:
        """Write the start weights into a checkpoint."""
        save_file(self._start, folder / FILE_NAME)

    def load(self, folder: Path) -> None:
        """Read the start weights of the run that a checkpoint belongs to; without the file nothing changes."""
        if (folder / FILE_NAME).is_file():
            self._start = load_file(folder / FILE_NAME)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
