"""Choice of the implementation, and the conditions it runs under. N rows, V vocabulary, H hidden size."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tiles import Divergence, Scored, Steps, Tiling, frozen_head, frozen_kl
from .torch_steps import CPU_TILING, GPU_TILING, TorchSteps
from .transform import LogitTransform

IMPLS = ("auto", "triton", "torch", "reference")


def choose_impl(
    impl: str, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, training: bool, kl: bool = False
) -> str:
    """Return the implementation to run: the same for scoring and training, so that they agree to the bit.

    Args:
        kl: choose for KL divergences, whose Triton kernels are tried separately.

    Raises: ValueError if the requested one would not be exact, or cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}: expected one of {', '.join(IMPLS)}")
    trained = [n for n, t in (("weight_VH", weight_VH), ("bias_V", bias_V)) if t is not None and t.requires_grad]
    if impl == "reference" or (impl == "auto" and trained):
        return "reference"
    if trained and training:
        raise ValueError(
            f"{trained[0]} requires grad and impl is {impl!r}: expected a frozen head; "
            'use impl="reference" (or "auto"), or pass the head detached'
        )
    if impl == "torch" or (impl == "auto" and hidden_NH.device.type == "cpu"):
        return "torch"
    problem = triton_problem(hidden_NH.dtype, hidden_NH.device.type, hidden_NH.device.index, kl)
    if problem is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f'impl is \'triton\': expected "auto" or "torch" here, since {problem}')
    results = "KL divergences" if kl else "log-probabilities"
    warn_once(f"{results} are computed in plain torch, slower than in Triton: {problem}")
    return "torch"


def run_frozen(
    impl: str,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    *,
    want_u: bool,
) -> Scored:
    """Run `tiles.frozen_head` with the steps and tiles of an implementation."""
    steps, tiling = make_steps(impl, hidden_NH.dtype, hidden_NH.device, hidden_NH.shape[1], transform)
    with torch.cuda.device_of(hidden_NH):  # Triton launches on the current device
        return frozen_head(
            hidden_NH, weight_VH, target_N.contiguous(), None if bias_V is None else bias_V.contiguous(),
            steps=steps, tiling=tiling, u_dtype=_u_dtype(hidden_NH) if want_u else None,
        )  # fmt: skip


def run_frozen_kl(
    impl: str,
    student_NH: Tensor,
    teacher_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    transform: LogitTransform,
    *,
    want_u: bool,
) -> Divergence:
    """Run `tiles.frozen_kl` with the steps and tiles of an implementation."""
    steps, tiling = make_steps(impl, student_NH.dtype, student_NH.device, student_NH.shape[1], transform, pairs=True)
    with torch.cuda.device_of(student_NH):
        return frozen_kl(
            student_NH, teacher_NH, weight_VH, None if bias_V is None else bias_V.contiguous(),
            steps=steps, tiling=tiling, u_dtype=_u_dtype(student_NH) if want_u else None,
        )  # fmt: skip


def _u_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Return the dtype of u: small components underflow in float16; bfloat16 has the range of float32."""
    return torch.float32 if hidden_NH.dtype == torch.float16 else hidden_NH.dtype


def make_steps(
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    transform: LogitTransform,
    *,
    pairs: bool = False,
) -> tuple[Steps, Tiling]:
    """Return the elementwise part of the tile loop, and the tile size; neither depends on the rows of a call.

    Args:
        pairs: for `frozen_kl`, which holds two rows in registers.
    """
    if impl == "torch":
        return TorchSteps(dtype, device, transform), CPU_TILING if device.type == "cpu" else GPU_TILING
    from .triton_steps import MAX_BLOCK, MAX_PAIR_BLOCK, TritonSteps, gpu_tiling

    widest = MAX_PAIR_BLOCK if pairs else MAX_BLOCK
    if device.type == "cpu":  # Triton's interpreter: small blocks, few launches
        return TritonSteps(dtype, device, transform), Tiling(64, widest)
    return TritonSteps(dtype, device, transform), gpu_tiling(device, width, widest)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Disable autocast, which would round the operands of float32 products to 16 bits."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@functools.cache
def warn_once(message: str) -> None:
    """Emit a RuntimeWarning, once per text and process."""
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def triton_problem(dtype: torch.dtype, device_type: str, device_index: int | None, kl: bool = False) -> str | None:
    """Return why the Triton kernels (of the KL divergence) cannot run for this dtype and device, or None.

    Decided once per process.
    """
    if dtype == torch.float64:
        return "float64 is for tests and has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .triton_steps import interpreted

    if device_type == "cpu":
        if not interpreted():
            return "the tensors are on the CPU"
        return "the interpreter does not support bfloat16" if dtype == torch.bfloat16 else None
    if device_type != "cuda" or torch.version.hip is not None:
        return f"no Triton path was tested on this device ({device_type})"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (7, 5):
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return _trial_run(dtype, torch.device(device_type, device_index), kl)


def _trial_run(dtype: torch.dtype, device: torch.device, kl: bool) -> str | None:
    """Compile and run the kernels on a few rows, to detect a broken compiler or driver before training."""
    hidden_NH = torch.linspace(-1, 1, 4 * 64, device=device).mul(9).sin().view(4, 64).to(dtype)
    weight_VH = torch.linspace(-1, 1, 96 * 64, device=device).mul(99).sin().view(96, 64).to(dtype)
    target_N, plain = torch.arange(4, device=device), LogitTransform()
    results = []
    try:
        for impl in ("triton", "torch"):
            scored: Scored | Divergence
            if kl:
                scored = run_frozen_kl(impl, hidden_NH, hidden_NH.roll(1, 0), weight_VH, None, plain, want_u=True)
            else:
                scored = run_frozen(impl, hidden_NH, weight_VH, target_N, None, plain, want_u=True)
            results.append(torch.cat([part.flatten().float() for part in scored if part is not None]))
    except Exception as error:  # compiler, driver and a missing C compiler raise different types
        return f"a trial run failed: {type(error).__name__}: {error}"
    worst = float((results[0] - results[1]).abs().max())
    return None if worst < 1e-2 else f"a trial run differs from torch by {worst:.2g}"
