"""Collect facts about this machine for `mel_lite.cli.doctor`, once, so that each check is a pure function."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mel_lite.files import nearest_existing_folder

COMPILED_CACHE = "unsloth_compiled_cache"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first CUDA device, as reported by PyTorch."""

    name: str
    capability: tuple[int, int]
    bf16: bool
    """True if bfloat16 is supported natively."""
    total_bytes: int
    architectures: tuple[str, ...]
    """Targets of PyTorch's compiled kernels: `sm_80`, ..., and `compute_90` for PTX that newer cards translate."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a machine. None means that the thing does not exist."""

    python: tuple[int, int]
    packages: Mapping[str, str | None]
    """Installed version of every package of interest."""
    requirements: tuple[str, ...]
    """Requirements in mel-lite's own metadata; empty if it is not installed."""
    driver_cuda: tuple[int, int] | None
    """Newest CUDA version that the NVIDIA driver supports."""
    torch_cuda: tuple[int, int] | None
    """CUDA version that PyTorch was built with."""
    visible_devices: str | None
    """CUDA_VISIBLE_DEVICES."""
    gpu: Gpu | None
    compiler: str | None
    """Path of the C compiler that Triton calls."""
    kernels_origin: str | None
    """File that `import kernels` would load."""
    loaded_early: tuple[str, ...]
    """Patching packages that were imported before this command imported anything."""
    trl_problem: str | None
    """Reason why TRL's released trainer cannot be loaded."""
    compiled_cache: Path | None
    compiled_for: tuple[str, ...] | None
    """Versions in that cache's header; None if it has no header."""
    model: str
    model_bytes: int | None
    """Size of the model in 16 bits; None if its config is not available locally."""
    model_cached: bool
    run_folder: Path
    run_free_bytes: int
    hub_cache: Path
    hub_free_bytes: int
    hub_writable: bool
    offline: bool
    hub_answers: bool | None = None
    """True if the Hub answered a request; None if it was not asked, because nothing is downloaded."""


def gather(run_folder: Path, model: str, packages: tuple[str, ...]) -> Facts:
    """Collect the facts about this machine. Imports torch and TRL; asks the Hub for one answer if the model is not
    cached, and writes nothing."""
    loaded_early = tuple(name for name in ("unsloth", "unsloth_zoo") if name in sys.modules)
    import torch
    from huggingface_hub import constants

    cache = _compiled_cache()
    hub_cache = Path(constants.HF_HUB_CACHE)
    return Facts(
        python=sys.version_info[:2],
        packages={name: _installed(name) for name in packages},
        requirements=_requirements(),
        driver_cuda=_driver_cuda(),
        torch_cuda=_pair(torch.version.cuda),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        gpu=_gpu(),
        compiler=shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang"),
        kernels_origin=_origin("kernels"),
        loaded_early=loaded_early,
        trl_problem=_trl_problem(),
        compiled_cache=cache,
        compiled_for=None if cache is None else _compiled_for(cache),
        model=model,
        model_bytes=_model_bytes(model),
        model_cached=_is_cached(model),
        run_folder=run_folder,
        run_free_bytes=shutil.disk_usage(nearest_existing_folder(run_folder)).free,
        hub_cache=hub_cache,
        hub_free_bytes=shutil.disk_usage(nearest_existing_folder(hub_cache)).free,
        hub_writable=os.access(nearest_existing_folder(hub_cache), os.W_OK),
        offline=bool(constants.HF_HUB_OFFLINE),
        hub_answers=None if constants.HF_HUB_OFFLINE or _is_cached(model) else _hub_answers(),
    )


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> tuple[str, ...]:
    with suppress(metadata.PackageNotFoundError):
        return tuple(metadata.requires("mel-lite") or ())
    return ()


def _pair(version: str | None) -> tuple[int, int] | None:
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _driver_cuda() -> tuple[int, int] | None:
    """Query the driver's own library, so that neither nvidia-smi nor a CUDA build of PyTorch is needed."""
    number = ctypes.c_int()
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
                return number.value // 1000, number.value % 1000 // 10
    return None


def _gpu() -> Gpu | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return Gpu(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        torch.cuda.is_bf16_supported(including_emulation=False),
        torch.cuda.get_device_properties(0).total_memory,
        tuple(torch.cuda.get_arch_list()),
    )


def _origin(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def _trl_problem() -> str | None:
    try:
        from mel_lite.trl_compat import released_grpo_config, released_grpo_trainer

        for released in (released_grpo_trainer(), released_grpo_config()):
            if not released.__module__.startswith("trl."):
                return f"{released.__name__} comes from {released.__module__}"
    except Exception as error:  # a broken installation may raise anything on import; report it
        return f"{type(error).__name__}: {error}"
    return None


def _compiled_cache() -> Path | None:
    folder = Path(os.environ.get("UNSLOTH_COMPILE_LOCATION", COMPILED_CACHE))
    return folder.absolute() if folder.is_dir() and any(folder.glob("*.py")) else None


def _compiled_for(cache: Path) -> tuple[str, ...] | None:
    """Return the versions that wrote the generated files: lines of a file's first docstring, up to a marker."""
    for file in sorted(cache.glob("*.py")):
        with suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace")[:2000].splitlines()
            if "__UNSLOTH_VERSIONING__" in lines:
                head = lines[: lines.index("__UNSLOTH_VERSIONING__")]
                return tuple(line.strip() for line in head if line.strip(' "'))
    return None


def _is_cached(model: str) -> bool:
    """Return True if no download is needed: a folder, the demo model (which has its own source), or a cached model."""
    from huggingface_hub import errors, try_to_load_from_cache

    if model == "demo" or Path(model).is_dir():
        return True
    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except errors.HFValidationError:  # neither a folder nor a Hub id; loading it raises the proper error
        return False


def _hub_answers(timeout_s: float = 3.0) -> bool:
    """Return True if any answer of the Hub arrives in time, through the client that downloads would use."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout_s)
    except Exception:  # no route, no name, a proxy's refusal: the client has many errors for it
        return False
    return True


def _model_bytes(model: str) -> int | None:
    from mel_lite.errors import ModelError
    from mel_lite.memory import formulas
    from mel_lite.models.load import ModelSpec, load_config

    shape = formulas.known_shape(model)
    if shape is None:
        if not Path(model).is_dir():
            return None
        try:
            shape = formulas.shape_of(load_config(ModelSpec(model)).to_dict())
        except ModelError:
            return None
    return formulas.weight_bytes(shape, four_bit=False)
