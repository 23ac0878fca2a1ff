"""Compile the Triton kernels for any NVIDIA card, without a GPU, and read the resources they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mel_lite.kernels.tiles import HALF_SCALES
from mel_lite.kernels.triton_kernels import (
    direction_kernel,
    finish_kernel,
    finish_pairs_kernel,
    fold_kernel,
    fold_pairs_kernel,
)
from mel_lite.kernels.triton_steps import (
    BLOCK_H,
    DIRECTION_OPTIONS,
    FINISH_OPTIONS,
    FINISH_ROWS,
    MAX_PAIR_BLOCK,
    fold_options,
    fold_pairs_options,
)

ARCHITECTURES = (75, 80, 86, 89, 90, 120)


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources of one compiled kernel: registers and stack (spilled) bytes per thread, shared bytes per block."""

    kernel: str
    architecture: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    """Loads of 16 bytes; fewer if a tile is read 4 bytes at a time."""


def fold_usage(
    architecture: int, operand: str, *, block: int, bias: bool = False, cap: bool = False, ragged: bool = False
) -> Usage:
    """Compile `fold_kernel` like `TritonSteps.fold`.

    Args:
        operand: Triton's name for the dtype of p (bf16, fp16, fp32).
        ragged: compile for the last tile of a vocabulary that is not a multiple of 16, whose loads cannot be wide.
    """
    pointers = {name: "*fp32" for name in ("z_ptr", "m_ptr", "s_ptr", "a_ptr", "z_t_ptr", "acc_ptr")}
    pointers |= {"p_ptr": f"*{operand}", "target_ptr": "*i64", "bias_ptr": f"*{operand}"}
    scalars = dict.fromkeys(("first", "columns", "z_stride", "p_stride", "width"), "i32")
    scalars |= dict.fromkeys(("gain", "inner", "cap"), "fp32")
    constants = {
        "BLOCK": block, "BLOCK_H": BLOCK_H, "HAS_BIAS": bias, "HAS_CAP": cap, "WANT_P": True,
        "P_SCALE": 2.0**15 if operand == "fp16" else 1.0,
    }  # fmt: skip
    unaligned = ("columns",) if ragged else ()
    return _compile(fold_kernel, architecture, pointers | scalars, constants, fold_options(block), unaligned)


def fold_pairs_usage(
    architecture: int, operand: str, *, bias: bool = False, cap: bool = False, ragged: bool = False
) -> Usage:
    """Compile `fold_pairs_kernel` like `TritonSteps.fold_pairs` at its widest tile; arguments as in `fold_usage`."""
    pointers = {f"{name}_ptr": "*fp32" for name in ("z", "m", "n", "s", "a", "b", "t", "c", "acc")}
    pointers |= {"p_ptr": f"*{operand}", "bias_ptr": f"*{operand}"}
    scalars = dict.fromkeys(("pairs", "columns", "z_stride", "p_stride", "width"), "i32")
    scalars |= dict.fromkeys(("gain", "inner", "cap"), "fp32")
    p_scale, r_scale = HALF_SCALES if operand == "fp16" else (1.0, 1.0)
    constants = {
        "BLOCK": MAX_PAIR_BLOCK, "BLOCK_H": BLOCK_H, "HAS_BIAS": bias, "HAS_CAP": cap, "DIFFERENCES": operand == "fp32",
        "WANT_P": True, "P_SCALE": p_scale, "R_SCALE": r_scale,
    }  # fmt: skip
    unaligned = ("columns",) if ragged else ()
    options = fold_pairs_options(MAX_PAIR_BLOCK)
    return _compile(fold_pairs_kernel, architecture, pointers | scalars, constants, options, unaligned)


def finish_pairs_usage(architecture: int) -> Usage:
    """Compile `finish_pairs_kernel` like `TritonSteps.finish_pairs`."""
    names = ("n", "s", "a", "b", "t", "kl", "to_r", "to_p")
    signature = {f"{name}_ptr": "*fp32" for name in names} | {"rows": "i32", "gain": "fp32"}
    constants = {"BLOCK": FINISH_ROWS, "P_SCALE": 1.0, "R_SCALE": 1.0}
    return _compile(finish_pairs_kernel, architecture, signature, constants, FINISH_OPTIONS)


def finish_usage(architecture: int, *, cap: bool = False) -> Usage:
    """Compile `finish_kernel` like `TritonSteps.finish`."""
    names = ("m", "s", "a", "z_t", "logp", "entropy", "lse", "to_target", "to_others")
    signature = {f"{name}_ptr": "*fp32" for name in names} | {"rows": "i32", "gain": "fp32", "cap": "fp32"}
    constants = {"BLOCK": FINISH_ROWS, "HAS_CAP": cap, "P_SCALE": 1.0}
    return _compile(finish_kernel, architecture, signature, constants, FINISH_OPTIONS)


def direction_usage(architecture: int, operand: str, *, pairs: bool = False) -> Usage:
    """Compile `direction_kernel` like `TritonSteps.direction`; for pairs, an accumulator takes the weight's place."""
    signature = {
        "acc_ptr": "*fp32", "weight_ptr": "*fp32" if pairs else f"*{operand}", "target_ptr": "*i64",
        "to_target_ptr": "*fp32", "to_others_ptr": "*fp32", "u_ptr": f"*{operand}", "width": "i32",
        "weight_stride_v": "i32",
        "weight_stride_h": "constexpr",
    }  # fmt: skip
    constants = {"weight_stride_h": 1, "BLOCK_H": BLOCK_H}
    return _compile(direction_kernel, architecture, signature, constants, DIRECTION_OPTIONS)


def _compile(
    kernel: Any,
    architecture: int,
    signature: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
    unaligned: tuple[str, ...] = (),
) -> Usage:
    """Compile with the specialization that the launcher would choose: aligned pointers, integers divisible by 16."""
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if name not in unaligned and (kind == "i32" or kind.startswith("*"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    wide_loads = len(re.findall(r"ld\.global\.\S*v4", compiled.asm["ptx"]))
    return Usage(kernel.fn.__name__, architecture, registers, stack_bytes, compiled.metadata.shared, wide_loads)


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, f"no resource usage in {report!r}"
    return int(found[1]), int(found[2])
