"""Optimizer, scheduler, scaler and RNG state as JSON and safetensors, so that a checkpoint is never unpickled.

A state is a tree of plain values and tensors. `<stem>.json` holds the tree, `<stem>.safetensors` the tensors by the
names that the tree gives them. transformers writes the same states with `torch.save`. Unpickling such a file can run
code, so they are not loaded.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mel_lite.errors import CheckpointError, MelLiteError

logger = logging.getLogger(__name__)

OPTIMIZER, SCHEDULER, SCALER, RNG = "optimizer", "scheduler", "scaler", "rng_state"
PICKLED_WEIGHTS = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "adapter_model*.bin", "*/adapter_model*.bin")
PICKLED_STATE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin")
"""Names of the files that transformers writes with `torch.save`."""
_TAG = "__kind__"


def dump(stem: Path, value: Any) -> None:
    """Write a tree of None, bool, int, float, str, list, tuple, dict, array and tensor to `<stem>.json`.

    Tensors go to `<stem>.safetensors`; one that occurs twice is written once. Raises: TypeError for any other type.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    tree = _encode(value, tensors, names)
    if tensors:
        save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(tree, allow_nan=False) + "\n")


def load(stem: Path) -> Any:
    """Read what `dump` wrote, tensors on the CPU. Raises: CheckpointError for a missing or garbled file."""
    tree_file, tensor_file = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    try:
        tensors = load_file(tensor_file) if tensor_file.is_file() else {}
        return _decode(json.loads(tree_file.read_text()), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{tree_file} cannot be read ({type(error).__name__}: {error}). Resume from an earlier checkpoint."
        ) from error


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turn errors caused by wrong content of a state file into a CheckpointError that names the file."""
    try:
        yield
    except (MelLiteError, torch.OutOfMemoryError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} cannot be used ({type(error).__name__}: {error}). Resume from an earlier checkpoint."
        ) from error


def _encode(value: Any, tensors: dict[str, torch.Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(value, torch.Tensor):
        key = (
            value.device,
            value.data_ptr(),
            value.dtype,
            tuple(value.shape),
            value.stride(),
            value.numel() or id(value),
        )
        if key not in names:
            names[key] = f"t{len(tensors)}"
            # A contiguous copy: safetensors refuses views of shared memory.
            tensors[names[key]] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {_TAG: "tensor", "name": names[key]}
    if isinstance(value, np.ndarray):
        return {_TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "items": value.ravel().tolist()}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TAG: "float", "text": repr(value)}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, names) for item in value]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, dict):
        # As pairs: JSON would turn the optimizer's integer keys into strings.
        return {_TAG: "dict", "items": [[k, _encode(v, tensors, names)] for k, v in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be stored in a state file")


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree[_TAG]
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "array":
        return np.array(tree["items"], dtype=np.dtype(tree["dtype"])).reshape(tree["shape"])
    if kind == "float":
        return float(tree["text"])
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in tree["items"])
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in tree["items"]}
    raise ValueError(f"unknown kind {kind!r}")


def rng_state(*, all_gpus: bool) -> dict[str, Any]:
    """Return the states of the global generators of Python, numpy, torch, and this process's GPU or all GPUs."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if all_gpus else torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the global random generators to a state from `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        if isinstance(state["cuda"], list):
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            torch.cuda.set_rng_state(state["cuda"])


def pickles(folder: Path, patterns: tuple[str, ...] = PICKLED_WEIGHTS + PICKLED_STATE) -> list[str]:
    """Return the names of pickled files in a checkpoint folder."""
    return sorted(str(p.relative_to(folder)) for pattern in patterns for p in folder.glob(pattern))


def check_weights(folder: Path) -> None:
    """Refuse a checkpoint whose weights are pickled. Raises: CheckpointError."""
    if found := pickles(folder, PICKLED_WEIGHTS):
        raise CheckpointError(
            f"Checkpoint {folder}: {found[0]} is a pickle, and loading one can run any code. Only safetensors and JSON "
            "are loaded. Save the model again with save_pretrained(..., safe_serialization=True)."
        )
