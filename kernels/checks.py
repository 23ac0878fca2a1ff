"""Argument checks shared by all implementations. N rows, V vocabulary, H hidden size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .transform import LogitTransform

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, shape: str, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return the value if it is a dense tensor of one of the dtypes, with one dimension per letter of `shape`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch.Tensor of shape ({', '.join(shape)})")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        hint = " (if the head is quantized, dequantize its weight first)" if name == "weight_VH" else ""
        raise TypeError(f"{name} is {str(value.dtype).removeprefix('torch.')}: expected one of {allowed}{hint}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense (strided) tensor")
    if value.dim() != len(shape):
        wanted = f"{len(shape)} dimensions ({', '.join(shape)})"
        raise ValueError(f"{name} has shape {tuple(value.shape)}: expected {wanted}")
    return value


def check_like(
    name: str, value: Tensor, size: int, size_of: str, device: torch.device, device_of: str = "hidden_NH"
) -> None:
    """Check that a vector has as many entries as `size_of` says, and is on the same device."""
    if value.shape[0] != size:
        raise ValueError(f"{name} has {value.shape[0]} entries: expected {size}, as many as {size_of}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}: expected {device}, the device of {device_of}")


def check_number(name: str, value: object) -> float:
    """Return the value as a finite float above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}: expected a number")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} is {value!r}: expected a finite number above 0")
    return float(value)


def check_transform(temperature: object, logit_scale: object, softcap: object) -> LogitTransform:
    """Return the transform between product and softmax, if its three numbers are finite and above 0."""
    return LogitTransform(
        temperature=check_number("temperature", temperature),
        logit_scale=check_number("logit_scale", logit_scale),
        softcap=None if softcap is None else check_number("softcap", softcap),
    )


def check_weight(hidden_NH: object, weight_VH: object, bias_V: object, name: str = "hidden_NH") -> Tensor:
    """Return the hidden state, called `name` in messages, if weight and bias match it in shape, dtype and device."""
    hidden = check_tensor(name, hidden_NH, "NH", FLOATS)
    weight = check_tensor("weight_VH", weight_VH, "VH", FLOATS)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight_VH is {str(weight.dtype).removeprefix('torch.')} and {name} "
            f"{str(hidden.dtype).removeprefix('torch.')}: expected one dtype; cast one of them"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight_VH is on {weight.device}: expected {hidden.device}, the device of {name}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight_VH has shape {tuple(weight.shape)}: expected at least one token and one feature")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight_VH has shape {tuple(weight.shape)} and {name} {tuple(hidden.shape)}: expected equal last sizes"
        )
    if bias_V is not None:
        bias = check_tensor("bias_V", bias_V, "V", FLOATS)
        check_like("bias_V", bias, weight.shape[0], "weight_VH has rows", hidden.device, name)
    return hidden


def check_head(hidden_NH: object, weight_VH: object, target_N: object, bias_V: object) -> None:
    """Check that shapes, dtypes and devices match; `rows.py` checks the values of the targets."""
    hidden = check_weight(hidden_NH, weight_VH, bias_V)
    target = check_tensor("target_N", target_N, "N", (torch.int64, torch.int32))
    check_like("target_N", target, hidden.shape[0], "hidden_NH has rows", hidden.device)


def check_pair(student_NH: object, teacher_NH: object) -> None:
    """Check that both hidden states have one shape, dtype and device."""
    student = check_tensor("student_NH", student_NH, "NH", FLOATS)
    teacher = check_tensor("teacher_NH", teacher_NH, "NH", FLOATS)
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_NH has shape {tuple(teacher.shape)} and student_NH {tuple(student.shape)}: expected equal shapes"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(
            f"teacher_NH is {str(teacher.dtype).removeprefix('torch.')} and student_NH "
            f"{str(student.dtype).removeprefix('torch.')}: expected one dtype; cast one of them"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher_NH is on {teacher.device}: expected {student.device}, the device of student_NH")
