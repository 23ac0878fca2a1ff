"""The KL operator's contract: gradients, skipped rows, dispatch, memory, and errors for bad input.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_cases import BLOCK_ROWS, DEVICE, DTYPES, FROZEN, HALVES, IMPLS, pair_case, relative
from mel_lite.kernels import fused_kl, fused_logprobs, reference, reference_kl
from mel_lite.kernels.backends import run_frozen_kl
from mel_lite.kernels.bench.truth import true_kl
from mel_lite.kernels.transform import LogitTransform


def case(rows: int = 30, vocab: int = 500, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    student_NH, teacher_NH, weight_VH = (tensor.to(DEVICE) for tensor in pair_case(rows, vocab, width, dtype))
    return [student_NH.requires_grad_(), teacher_NH, weight_VH]


def gradient(loss: Tensor, of: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(loss, of, **options)[0]


@pytest.mark.parametrize(("impl", "dtype"), DTYPES, ids=str)
def test_measuring_equals_training_to_the_bit(impl: str, dtype: torch.dtype) -> None:
    """The rows fill more than one block."""
    inputs = case(BLOCK_ROWS // 2 + 70, 3000, 24, dtype)
    training = fused_kl(*inputs, impl=impl, temperature=0.9)
    measuring = fused_kl(*inputs, impl=impl, temperature=0.9, compute_u=False)
    with torch.no_grad():
        no_grad = fused_kl(*inputs, impl=impl, temperature=0.9)
    assert training.requires_grad and not measuring.requires_grad and not no_grad.requires_grad
    assert torch.equal(training, measuring) and torch.equal(training, no_grad) and training.sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_linear_in_the_coefficient_and_the_students_alone(impl: str) -> None:
    student_NH, teacher_NH, weight_VH = case()
    teacher_NH.requires_grad_()
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, impl=impl)
    one_N, two_N = torch.randn(2, 30, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    grads = [gradient((c_N * kl_N).sum(), student_NH, retain_graph=True) for c_N in (one_N, two_N, one_N + 2 * two_N)]
    assert relative(grads[2], grads[0] + 2 * grads[1]) < 1e-5
    truth = true_kl(student_NH, teacher_NH, weight_VH)
    assert relative(grads[0], one_N.double()[:, None] * truth.u_NH) < (1e-5 if impl in FROZEN else 1e-4)
    assert torch.autograd.grad(kl_N.sum(), teacher_NH, allow_unused=True) == (None,)


@pytest.mark.parametrize("impl", FROZEN)
def test_gradient_agrees_with_finite_differences(impl: str) -> None:
    student_NH, teacher_NH, weight_VH = case(12, 90, 8)
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 12.0, "logit_scale": 1.5}
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, impl=impl, **options)
    u_NH = gradient(kl_N.sum(), student_NH).double()
    wide = [tensor.detach().double() for tensor in (student_NH, teacher_NH, weight_VH)]
    for feature in range(8):
        step_H = 1e-4 * torch.eye(8, dtype=torch.float64, device=DEVICE)[feature]
        ends = [fused_kl(wide[0] + sign * step_H, *wide[1:], impl="torch", **options) for sign in (1, -1)]
        slope_N = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(u_NH[:, feature], slope_N, rtol=1e-4, atol=1e-6)


def test_float64_passes_gradcheck() -> None:
    student_NH, teacher_NH, weight_VH = (tensor.detach().cpu() for tensor in case(5, 40, 6, torch.float64))
    teacher_NH += 0.3
    for impl in ("torch", "reference"):
        assert torch.autograd.gradcheck(
            lambda h, impl=impl: fused_kl(h, teacher_NH, weight_VH, impl=impl, softcap=9.0), student_NH.requires_grad_()
        )


@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
def test_gradient_is_rounded_once_after_the_product_with_the_coefficient(impl: str, dtype: torch.dtype) -> None:
    student_NH, teacher_NH, weight_VH = case(dtype=dtype)
    c_N = torch.linspace(0.1, 3, 30, device=DEVICE) / 3
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, impl=impl)
    alone = run_frozen_kl(impl, student_NH.detach(), teacher_NH, weight_VH, None, LogitTransform(), want_u=True)
    expected_NH = (c_N[:, None] * alone.u_NH.float()).to(dtype)
    assert torch.equal(gradient((c_N * kl_N).sum(), student_NH), expected_NH) and expected_NH.any()
    assert alone.u_NH.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_left_out(impl: str) -> None:
    """Skipped rows get zeros and no gradient, even if they hold NaN; the other rows do not change."""
    student_NH, teacher_NH, weight_VH = case()
    keep_N = torch.ones(30, dtype=torch.bool, device=DEVICE)
    keep_N[[0, 3, 4, 17, 29]] = False
    expected_N = fused_kl(student_NH[keep_N].detach(), teacher_NH[keep_N], weight_VH, impl=impl)
    with torch.no_grad():
        student_NH[~keep_N] = torch.nan
        teacher_NH[~keep_N] = torch.nan
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, keep_N=keep_N, impl=impl)
    grad_NH = gradient((kl_N * torch.where(keep_N, 2.0, torch.nan)).nansum(), student_NH)
    assert not grad_NH[~keep_N].any() and grad_NH[keep_N].isfinite().all() and grad_NH[keep_N].any()
    assert not kl_N[~keep_N].any()
    torch.testing.assert_close(kl_N[keep_N].detach(), expected_N, rtol=1e-5, atol=1e-12)
    all_N = torch.ones(30, dtype=torch.bool, device=DEVICE)
    clean = case()
    assert torch.equal(fused_kl(*clean, keep_N=all_N, impl=impl), fused_kl(*clean, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_compare_stays_in_the_graph(rows: int, impl: str) -> None:
    student_NH, teacher_NH, weight_VH = case(rows)
    keep_N = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, keep_N=keep_N, impl=impl)
    kl_N.sum().backward()
    assert student_NH.grad.shape == (rows, 16) and not student_NH.grad.any()
    assert kl_N.tolist() == [0.0] * rows


@pytest.mark.parametrize("impl", FROZEN)
def test_any_strides(impl: str) -> None:
    student_NH, teacher_NH, weight_VH = (tensor.detach() for tensor in case())
    bias_V = torch.linspace(-1, 1, 500, device=DEVICE)
    expected_N = fused_kl(student_NH, teacher_NH, weight_VH, bias_V=bias_V, impl=impl)
    strided = torch.stack([student_NH, student_NH * 7], 2)[:, :, 0].requires_grad_()
    other = teacher_NH.T.contiguous().T
    strided_bias = torch.stack([bias_V, bias_V * 0], 1)[:, 0]
    kl_N = fused_kl(strided, other, weight_VH.T.contiguous().T, bias_V=strided_bias, impl=impl)
    torch.testing.assert_close(kl_N.detach(), expected_N, rtol=1e-5, atol=1e-12)
    truth = true_kl(student_NH, teacher_NH, weight_VH, bias_V)
    assert relative(gradient(kl_N.sum(), strided), truth.u_NH) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round_the_logits(impl: str) -> None:
    inputs = case()
    expected_N = fused_kl(*inputs, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(fused_kl(*inputs, impl=impl), expected_N)


def test_reference_trains_the_head_through_the_student_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and bias gradients, over several blocks of rows, against plain float64 torch."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 7 * 2 * 500 * 4)
    student_NH, teacher_NH, weight_VH = case(100)
    bias_V = torch.randn(500, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
    weight_VH.requires_grad_()
    c_N = torch.linspace(-1, 1, 100, device=DEVICE)
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, bias_V=bias_V, softcap=20.0)
    found = torch.autograd.grad((c_N * kl_N).sum(), [student_NH, weight_VH, bias_V])
    doubles = [tensor.detach().double().requires_grad_() for tensor in (student_NH, weight_VH, bias_V)]

    def log_p(hidden_NH: Tensor) -> Tensor:
        return (20 * torch.tanh((hidden_NH @ doubles[1].T + doubles[2]) / 20)).log_softmax(1)

    log_p_NV, log_q_NV = log_p(doubles[0]), log_p(teacher_NH.double()).detach()
    true_kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)
    truth = torch.autograd.grad((c_N * true_kl_N).sum(), doubles)
    assert relative(kl_N.detach(), true_kl_N.detach()) < 1e-5
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < 1e-4


def test_auto_takes_the_reference_only_for_a_trained_head() -> None:
    student_NH, teacher_NH, weight_VH = case()
    frozen_N = fused_kl(student_NH, teacher_NH, weight_VH)
    expected = "triton" if DEVICE == "cuda" else "torch"
    assert torch.equal(frozen_N, fused_kl(student_NH, teacher_NH, weight_VH, impl=expected))
    weight_VH.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl_N = fused_kl(student_NH, teacher_NH, weight_VH)
    assert gradient(kl_N.sum(), weight_VH).abs().sum() > 0
    assert torch.equal(kl_N, reference_kl(student_NH, teacher_NH, weight_VH))
    with pytest.raises(ValueError, match="weight_VH requires grad and impl is 'torch': expected a frozen head"):
        fused_kl(student_NH, teacher_NH, weight_VH, impl="torch")
    measured_N = fused_kl(student_NH, teacher_NH, weight_VH, compute_u=False)
    assert torch.equal(measured_N, kl_N) and not measured_N.requires_grad


def test_it_is_the_mean_of_the_log_ratio_over_the_students_samples() -> None:
    """Averaged over every token by its probability, the sampled-token estimate of `fused_logprobs` is the KL."""
    student_NH, teacher_NH, weight_VH = (tensor.detach() for tensor in case(3, 50, 8))
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, temperature=0.8)
    every_V = torch.arange(50, device=DEVICE)
    for row in range(3):
        logp_V, logq_V = (
            fused_logprobs(hidden_NH[row].expand(50, 8), weight_VH, every_V, temperature=0.8)[0].double()
            for hidden_NH in (student_NH, teacher_NH)
        )
        expected = float((logp_V.exp() * (logp_V - logq_V)).sum())
        assert float(kl_N[row]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_NH": [[1.0]]}, TypeError, r"student_NH is a list: expected a torch.Tensor of shape \(N, H\)"),
    ({"teacher_NH": None}, TypeError, r"teacher_NH is a NoneType: expected a torch.Tensor of shape \(N, H\)"),
    ({"student_NH": torch.ones(12)}, ValueError, r"student_NH has shape \(12,\): expected 2 dimensions \(N, H\)"),
    ({"teacher_NH": torch.ones(2, 4)}, ValueError, r"teacher_NH has shape \(2, 4\) and student_NH \(3, 4\)"),
    ({"teacher_NH": torch.ones(3, 4).half()}, TypeError, "teacher_NH is float16 and student_NH float32: expected one"),
    ({"teacher_NH": torch.ones(3, 4, device="meta")}, ValueError, "teacher_NH is on meta: expected .* of student_NH"),
    ({"weight_VH": torch.ones(7, 5)}, ValueError, r"weight_VH has shape \(7, 5\) and student_NH \(3, 4\)"),
    ({"weight_VH": torch.ones(7, 4).half()}, TypeError, "weight_VH is float16 and student_NH float32: expected one"),
    ({"weight_VH": torch.ones(7, 4, dtype=torch.uint8)}, TypeError, "weight_VH is uint8: .*quantized"),
    ({"weight_VH": torch.ones(0, 4)}, ValueError, r"weight_VH has shape \(0, 4\): expected at least one token"),
    ({"weight_VH": torch.ones(7, 4, device="meta")}, ValueError, "weight_VH is on meta: .* the device of student_NH"),
    ({"bias_V": torch.ones(6)}, ValueError, "bias_V has 6 entries: expected 7"),
    ({"keep_N": torch.ones(3)}, TypeError, "keep_N is float32: expected one of bool"),
    ({"keep_N": torch.ones(4, dtype=torch.bool)}, ValueError, "keep_N has 4 entries: expected 3, .* student_NH has"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0: expected a finite number above 0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf: expected"),
    ({"softcap": 0}, ValueError, "softcap is 0: expected"),
]


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize(("change", "error", "text"), BAD_INPUT, ids=[case[2][:40] for case in BAD_INPUT])
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str, impl: str) -> None:
    arguments: dict[str, Any] = {
        "student_NH": torch.ones(3, 4), "teacher_NH": torch.ones(3, 4), "weight_VH": torch.ones(7, 4),
    }  # fmt: skip
    move = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in change.items()}
    arguments = {k: v.to(DEVICE) for k, v in arguments.items()} | move
    with pytest.raises(error, match=text):
        fused_kl(**arguments, impl=impl)
    with pytest.raises(error, match=text):
        reference_kl(**arguments)


def test_unknown_or_unavailable_impl() -> None:
    inputs = case()
    with pytest.raises(ValueError, match="impl is 'cuda': expected one of auto, triton, torch, reference"):
        fused_kl(*inputs, impl="cuda")
    with pytest.raises(ValueError, match=r"impl is 'triton': expected .* float64"):
        fused_kl(*(tensor.double() for tensor in inputs), impl="triton")


PEAK = """
import pathlib, torch
from mel_lite.kernels import fused_kl
vocab, width = 16384, 64
student_NH, weight_VH = torch.randn(4096, width).requires_grad_(), torch.randn(vocab, width)
teacher_NH = torch.randn(4096, width)
peaks_mib = []
for rows in (8, 1024, 4096):
    fused_kl(student_NH[:rows], teacher_NH[:rows], weight_VH).sum().backward()
    peak_kib = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    peaks_mib.append(int(peak_kib) // 1024)
print(*(peak - peaks_mib[0] for peak in peaks_mib[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc; ru_maxrss includes the parent's")
def test_memory_does_not_grow_with_the_batch() -> None:
    """Both full logits would be 128 MiB at 1024 rows and 512 MiB at 4096; measured in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    peak_1024_mib, peak_4096_mib = map(int, ran.stdout.split())
    assert 0 < peak_4096_mib < 64 and peak_4096_mib - peak_1024_mib < 16
