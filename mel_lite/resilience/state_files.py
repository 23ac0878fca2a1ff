"""Optimiser, scheduler, scaler and RNG state as JSON and safetensors: nothing of a checkpoint is ever unpickled.

A state is a tree of plain values with tensors in it. `<stem>.json` holds the tree, `<stem>.safetensors` its tensors,
which the tree names. transformers writes the same states with `torch.save`; loading those runs code of whoever wrote
the file, so such files are left alone.
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
"""What transformers writes with `torch.save`, by file name."""
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
    """What `dump` wrote, tensors on the CPU. Raises: CheckpointError for a missing or garbled file."""
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
    """Turn what wrong content of a state file leads to, however late, into a CheckpointError that names the file."""
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
            # Contiguous and of its own: safetensors refuses tensors that are views of shared memory.
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
        # As pairs: JSON would turn the optimiser's integer keys into text.
        return {_TAG: "dict", "items": [[k, _encode(v, tensors, names)] for k, v in value.items()]}
    raise TypeError(f"a {type(value).__name__} has no place in a state file")


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
    """State of the global random generators of Python, numpy, torch and its GPUs (of this process's, or all)."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if all_gpus else torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the global random generators back to a state of `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        if isinstance(state["cuda"], list):
            torch.cuda.set_rng_state_all(state["cuda"])
        else:
            torch.cuda.set_rng_state(state["cuda"])


def pickles(folder: Path, patterns: tuple[str, ...] = PICKLED_WEIGHTS + PICKLED_STATE) -> list[str]:
    """Names of pickled files in a checkpoint folder."""
    return sorted(str(p.relative_to(folder)) for pattern in patterns for p in folder.glob(pattern))


def check_weights(folder: Path) -> None:
    """Refuse a checkpoint whose weights are pickled. Raises: CheckpointError."""
    if found := pickles(folder, PICKLED_WEIGHTS):
        raise CheckpointError(
            f"Checkpoint {folder}: {found[0]} is a pickle, and loading one can run any code. Only safetensors and JSON "
            "are loaded. Save the model again with save_pretrained(..., safe_serialization=True)."
        )


class SafeState:
    """Mixin over a transformers Trainer: its states in JSON and safetensors, under the names of its own files.

    DeepSpeed and FSDP write and read formats of their own, pickles among them: there this changes nothing.
    """

    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any

    @property
    def _sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # A pickle that nothing reads: config.yaml has the options.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_rng_state(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # a process may get here before process 0 has saved the model
        dump(self._rng_stem(folder), rng_state(all_gpus=self.args.world_size > 1))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = self._rng_stem(Path(checkpoint))
        if stem.with_suffix(".json").is_file():
            with usable(stem.with_suffix(".json")):
                set_rng_state(load(stem))
        else:
            logger.warning("%s is missing: random numbers go on from another state.", stem.with_suffix(".json"))

    def _rng_stem(self, folder: Path) -> Path:
        return folder / (RNG if self.args.world_size <= 1 else f"{RNG}_{self.args.process_index}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        elif self.args.should_save:
            dump(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
            dump(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        folder = Path(checkpoint)
        found = pickles(folder, PICKLED_STATE)
        if (folder / f"{OPTIMIZER}.json").is_file():
            with usable(folder / f"{OPTIMIZER}.json"):
                self.optimizer.load_state_dict(load(folder / OPTIMIZER))
            with usable(folder / f"{SCHEDULER}.json"):
                self.lr_scheduler.load_state_dict(load(folder / SCHEDULER))
        elif found:
            logger.warning(
                "%s: %s are pickles and are not loaded, since loading one can run any code. The optimiser and the "
                "learning rate start afresh on the saved weights.",
                folder,
                ", ".join(found),
            )
        if not found:  # else transformers would open them
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            dump(Path(output_dir) / SCALER, scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / f"{SCALER}.json").is_file():
            with usable(Path(checkpoint) / f"{SCALER}.json"):
                scaler.load_state_dict(load(Path(checkpoint) / SCALER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_weights(Path(resume_from_checkpoint))
        model = model or self.model
        dtypes = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, weight in model.named_parameters():
            # PEFT loads a 16-bit adapter (TRL's choice on a 4-bit base) into float32: another run from here on.
            weight.data = weight.data.to(dtypes.get(name, weight.dtype))

    def _load_best_model(self) -> None:
        check_weights(Path(self.state.best_model_checkpoint))  # type: ignore[attr-defined]
        super()._load_best_model()  # type: ignore[misc]
