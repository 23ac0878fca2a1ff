"""Errors of the KL operator against float64, from teachers that equal the student to teachers far away.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_cases import DEVICE, FROZEN, IMPLS, assert_kl_exact, pair_case
from mel_lite.kernels import fused_kl
from mel_lite.kernels.backends import make_steps
from mel_lite.kernels.bench.truth import true_kl
from mel_lite.kernels.tiles import Divergence
from mel_lite.kernels.transform import LogitTransform

SHAPES = [
    (151936, 64), (151665, 63), (49152, 576), (257, 4096), (1000, 1536), (2049, 896), (257, 77), (2, 8), (1, 16),
]  # fmt: skip
EPS = torch.finfo(torch.float32).eps


def measure(student_NH: Tensor, teacher_NH: Tensor, weight_VH: Tensor, **options: object) -> Divergence:
    """Call the public operator, and get u from its backward pass."""
    leaf_NH = student_NH.detach().requires_grad_()
    kl_N = fused_kl(leaf_NH, teacher_NH, weight_VH, **options)
    (u_NH,) = torch.autograd.grad(kl_N.sum(), leaf_NH)
    return Divergence(kl_N.detach(), u_NH)


def case(*args: object) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in pair_case(*args)]


def logit_error(impl: str, student_NH: Tensor, weight_VH: Tensor, gain: float = 1.0) -> float:
    """Return the error of a difference of logits: 0 if the implementation multiplies differences of states."""
    steps, _ = make_steps(
        impl if impl in FROZEN else "torch", student_NH.dtype, student_NH.device, 16, LogitTransform()
    )
    if impl in FROZEN and steps.differences:
        return 0.0
    return 4 * EPS * gain * float((student_NH.double() @ weight_VH.double().T).abs().max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_float32_matches_truth(vocab: int, width: int, impl: str) -> None:
    inputs = case(24, vocab, width, torch.float32)
    error = logit_error(impl, inputs[0], inputs[2])
    assert_kl_exact(measure(*inputs, impl=impl), true_kl(*inputs), logit_error=error)


@pytest.mark.parametrize("impl", FROZEN)
def test_every_gradient_keeps_its_digits(impl: str) -> None:
    """Row by row, at KL from 1e-20 to 2 and for students of 1 - p from 1 to 1e-12."""
    inputs = case(400, 4096, 128, torch.float32)
    found, truth = measure(*inputs, impl=impl), true_kl(*inputs)
    assert float(truth.kl_N[1:].min()) < 1e-13 and float(truth.kl_N.max()) > 2
    assert_kl_exact(found, truth)
    wrong_N = (found.u_NH.double() - truth.u_NH).norm(dim=1)[1:] / truth.u_NH.norm(dim=1)[1:]
    assert float(wrong_N.max()) < 5e-5
