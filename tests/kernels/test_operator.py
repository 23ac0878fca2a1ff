"""The operator's contract: gradients, skipped rows, dispatch, memory, and errors for bad input.

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

from kernel_cases import BLOCK_ROWS, DEVICE, DTYPES, FROZEN, HALVES, IMPLS, head_case, relative
from mel_lite.kernels import fused_logprobs, reference, reference_logprobs
from mel_lite.kernels.backends import run_frozen
from mel_lite.kernels.bench.truth import true_head
from mel_lite.kernels.transform import LogitTransform


def case(rows: int = 30, vocab: int = 500, width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    hidden_NH, weight_VH, target_N = (tensor.to(DEVICE) for tensor in head_case(rows, vocab, width, dtype))
    return [hidden_NH.requires_grad_(), weight_VH, target_N]


def gradient(loss: Tensor, of: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(loss, of, **options)[0]


@pytest.mark.parametrize(("impl", "dtype"), DTYPES, ids=str)
def test_scoring_equals_training_to_the_bit(impl: str, dtype: torch.dtype) -> None:
    """The on-policy ratio is therefore exactly 1. The rows fill more than one block."""
    inputs = case(BLOCK_ROWS + 70, 3000, 24, dtype)
    training = fused_logprobs(*inputs, impl=impl, temperature=0.9)
    scoring = fused_logprobs(*inputs, impl=impl, temperature=0.9, compute_u=False)
    with torch.no_grad():
        no_grad = fused_logprobs(*inputs, impl=impl, temperature=0.9)
    assert training[0].requires_grad and not scoring[0].requires_grad and not no_grad[0].requires_grad
    for one, two, three in zip(training, scoring, no_grad, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert one.abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_linear_in_the_coefficient(impl: str) -> None:
    hidden_NH, weight_VH, target_N = case()
    logp_N, entropy_N, lse_N = fused_logprobs(hidden_NH, weight_VH, target_N, impl=impl)
    assert not entropy_N.requires_grad and not lse_N.requires_grad
    one_N, two_N = torch.randn(2, 30, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    grads = [gradient((c_N * logp_N).sum(), hidden_NH, retain_graph=True) for c_N in (one_N, two_N, one_N + 2 * two_N)]
    assert relative(grads[2], grads[0] + 2 * grads[1]) < 1e-6
    truth = true_head(hidden_NH, weight_VH, target_N)
    assert relative(grads[0], one_N.double()[:, None] * truth.u_NH) < 1e-5


@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
def test_gradient_is_rounded_once_after_the_product_with_the_coefficient(impl: str, dtype: torch.dtype) -> None:
    """A coefficient such as 1/3, from gradient accumulation over three steps, must not be rounded to 16 bits first."""
    hidden_NH, weight_VH, target_N = case(dtype=dtype)
    c_N = torch.linspace(0.1, 3, 30, device=DEVICE) / 3
    logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N, impl=impl)
    scored = run_frozen(impl, hidden_NH.detach(), weight_VH, target_N, None, LogitTransform(), want_u=True)
    expected_NH = (c_N[:, None] * scored.u_NH.float()).to(dtype)
    assert torch.equal(gradient((c_N * logp_N).sum(), hidden_NH), expected_NH)
    assert not torch.equal((c_N.to(dtype)[:, None] * scored.u_NH.to(dtype)), expected_NH)


@pytest.mark.parametrize("impl", FROZEN)
def test_small_directions_survive_float16(impl: str) -> None:
    """Confident rows have u around 1e-7, below the normal range of float16, before a loss scale multiplies it."""
    hidden_NH, weight_VH, target_N = case(60, dtype=torch.float16)
    truth = true_head(hidden_NH, weight_VH, target_N)
    small = (truth.u_NH.norm(dim=1) > 1e-7) & (truth.u_NH.norm(dim=1) < 1e-5)
    assert int(small.sum()) >= 3
    logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N, impl=impl)
    scale = 65536.0  # initial scale of a GradScaler
    grad_NH = gradient(logp_N.sum() * scale, hidden_NH)[small].double() / scale
    row_error = (grad_NH - truth.u_NH[small]).norm(dim=1) / truth.u_NH[small].norm(dim=1)
    assert float(row_error.max()) < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", ["target -100", "keep_N", "both"])
def test_rows_left_out(how: str, impl: str) -> None:
    """Skipped rows get zeros and no gradient, even if they hold NaN; the other rows do not change."""
    hidden_NH, weight_VH, target_N = case()
    out = torch.zeros(30, dtype=torch.bool, device=DEVICE)
    out[[0, 3, 4, 17, 29]] = True
    expected = fused_logprobs(hidden_NH[~out].detach(), weight_VH, target_N[~out], impl=impl)
    with torch.no_grad():
        hidden_NH[out] = torch.nan
    keep_N = None if how == "target -100" else ~out
    target_N = torch.where(out, 10**6 if how == "keep_N" else -100, target_N)
    results = fused_logprobs(hidden_NH, weight_VH, target_N, keep_N=keep_N, impl=impl)
    grad_NH = gradient((results[0] * torch.where(out, torch.nan, 2.0)).nansum(), hidden_NH)
    assert not grad_NH[out].any() and grad_NH[~out].isfinite().all() and grad_NH[~out].any()
    for found, alone in zip(results, expected, strict=True):
        assert not found[out].any()
        torch.testing.assert_close(found[~out], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_score_stays_in_the_graph(rows: int, impl: str) -> None:
    """An empty completion must not break the backward pass of the whole batch."""
    hidden_NH, weight_VH, _ = case(rows)
    target_N = torch.full((rows,), -100, device=DEVICE)
    logp_N, entropy_N, lse_N = fused_logprobs(hidden_NH, weight_VH, target_N, impl=impl)
    logp_N.sum().backward()
    assert hidden_NH.grad.shape == (rows, 16) and not hidden_NH.grad.any()
    assert logp_N.tolist() == entropy_N.tolist() == lse_N.tolist() == [0.0] * rows


@pytest.mark.parametrize("impl", FROZEN)
def test_any_strides_and_int32_targets(impl: str) -> None:
    hidden_NH, weight_VH, target_N = (tensor.detach() for tensor in case())
    bias_V = torch.linspace(-1, 1, 500, device=DEVICE)
    expected = fused_logprobs(hidden_NH, weight_VH, target_N, bias_V=bias_V, impl=impl)
    strided = torch.stack([hidden_NH, hidden_NH * 7], 2)[:, :, 0].requires_grad_()
    transposed = weight_VH.T.contiguous().T
    every_other = torch.stack([target_N.int(), target_N.int() * 0], 1)[:, 0]
    strided_bias = torch.stack([bias_V, bias_V * 0], 1)[:, 0]
    results = fused_logprobs(strided, transposed, every_other, bias_V=strided_bias, impl=impl)
    for found, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    truth = true_head(hidden_NH, weight_VH, target_N, bias_V)
    assert relative(gradient(results[0].sum(), strided), truth.u_NH) < 1e-5


@pytest.mark.parametrize("impl", FROZEN)
def test_offsets_beyond_32_bits(impl: str) -> None:
    """The third row of this weight starts 2^31 elements after the first; the memory between them is never touched."""
    storage = torch.empty(2**31 + 8, dtype=torch.float16, device=DEVICE)
    weight_VH = storage.as_strided((3, 8), (2**30, 1))
    weight_VH.copy_(torch.linspace(-1, 1, 24).view(3, 8))
    hidden_NH = torch.linspace(-2, 3, 16, device=DEVICE).view(2, 8).half().requires_grad_()
    target_N = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N, impl=impl)
    truth = true_head(hidden_NH, weight_VH, target_N)
    assert relative(logp_N.detach(), truth.logp_N) < 1e-5
    assert relative(gradient(logp_N.sum(), hidden_NH), truth.u_NH) < 4e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_round_the_logits(impl: str) -> None:
    inputs = case()
    expected = fused_logprobs(*inputs, impl=impl)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(fused_logprobs(*inputs, impl=impl)[0], expected)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a block in the reference path, at the vocabulary of `case`."""
    monkeypatch.setattr(reference, "BLOCK_BYTES", 7 * 500 * 4)


@pytest.mark.usefixtures("small_blocks")
def test_reference_trains_the_head() -> None:
    """Weight and bias gradients, over several blocks of rows, against plain float64 torch."""
    hidden_NH, weight_VH, target_N = case(100)
    bias_V = torch.randn(500, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
    weight_VH.requires_grad_()
    c_N = torch.linspace(-1, 1, 100, device=DEVICE)
    logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N, bias_V=bias_V, softcap=20.0)
    found = torch.autograd.grad((c_N * logp_N).sum(), [hidden_NH, weight_VH, bias_V])
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH, bias_V)]
    z_NV = 20 * torch.tanh((doubles[0] @ doubles[1].T + doubles[2]) / 20)
    true_logp_N = z_NV.log_softmax(1).gather(1, target_N[:, None])[:, 0]
    truth = torch.autograd.grad((c_N * true_logp_N).sum(), doubles)
    assert relative(logp_N.detach(), true_logp_N.detach()) < 1e-6
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < 2e-5


@pytest.mark.usefixtures("small_blocks")
def test_head_gradient_is_summed_in_float32() -> None:
    """A bfloat16 head: rounding each block's share before adding it up would be seen here."""
    hidden_NH, weight_VH, target_N = case(100, dtype=torch.bfloat16)
    weight_VH.requires_grad_()
    logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N)
    found = gradient(logp_N.sum(), weight_VH)
    wide_VH = weight_VH.detach().float().requires_grad_()
    logp_N, _, _ = fused_logprobs(hidden_NH.detach().float(), wide_VH, target_N)
    assert torch.equal(found, gradient(logp_N.sum(), wide_VH).bfloat16())


def test_entropy_has_its_gradient_when_asked() -> None:
    hidden_NH, weight_VH, target_N = case(20)
    _, entropy_N, _ = reference_logprobs(hidden_NH, weight_VH, target_N, temperature=0.7, entropy_grad=True)
    found = gradient(entropy_N.sum(), hidden_NH)
    leaf_NH = hidden_NH.detach().double().requires_grad_()
    log_p_NV = (leaf_NH @ weight_VH.double().T / 0.7).log_softmax(1)
    true_entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1)
    assert relative(entropy_N.detach(), true_entropy_N.detach()) < 1e-6
    assert relative(found, gradient(true_entropy_N.sum(), leaf_NH)) < 1e-5
    assert not reference_logprobs(hidden_NH, weight_VH, target_N)[1].requires_grad


def test_auto_takes_the_reference_only_for_a_trained_head() -> None:
    hidden_NH, weight_VH, target_N = case()
    frozen = fused_logprobs(hidden_NH, weight_VH, target_N)[0]
    expected = "triton" if DEVICE == "cuda" else "torch"
    assert torch.equal(frozen, fused_logprobs(hidden_NH, weight_VH, target_N, impl=expected)[0])
    weight_VH.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, target_N)
    assert gradient(logp_N.sum(), weight_VH).abs().sum() > 0
    with pytest.raises(ValueError, match="weight_VH requires grad and impl is 'torch': expected a frozen head"):
        fused_logprobs(hidden_NH, weight_VH, target_N, impl="torch")
    scored = fused_logprobs(hidden_NH, weight_VH, target_N, compute_u=False)[0]
    assert torch.equal(scored, logp_N) and not scored.requires_grad


BAD_INPUT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden_NH": [[1.0]]}, TypeError, r"hidden_NH is a list: expected a torch.Tensor of shape \(N, H\)"),
    ({"hidden_NH": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "hidden_NH is int64: expected one of float32"),
    ({"hidden_NH": torch.ones(12)}, ValueError, r"hidden_NH has shape \(12,\): expected 2 dimensions \(N, H\)"),
    ({"hidden_NH": torch.ones(3, 5)}, ValueError, r"weight_VH has shape \(7, 4\) and hidden_NH \(3, 5\)"),
    ({"hidden_NH": torch.ones(3, 4).half()}, TypeError, "weight_VH is float32 and hidden_NH float16: expected one"),
    ({"weight_VH": torch.ones(7, 4, dtype=torch.uint8)}, TypeError, "weight_VH is uint8: .*quantized"),
    ({"weight_VH": torch.ones(0, 4)}, ValueError, r"weight_VH has shape \(0, 4\): expected at least one token"),
    ({"weight_VH": torch.ones(7, 4, device="meta")}, ValueError, "weight_VH is on meta: expected"),
    ({"weight_VH": torch.ones(7, 4).to_sparse()}, TypeError, "weight_VH has layout torch.sparse_coo"),
    ({"target_N": torch.tensor([0, 1])}, ValueError, "target_N has 2 entries: expected 3"),
    ({"target_N": torch.tensor([0.0, 1, 2])}, TypeError, "target_N is float32: expected one of int64, int32"),
    ({"target_N": torch.tensor([0, 7, 2])}, ValueError, r"target_N\[1\] is 7: expected a token id in \[0, 7\) or -100"),
    ({"target_N": torch.tensor([0, 1, -1])}, ValueError, r"target_N\[2\] is -1"),
    ({"bias_V": torch.ones(6)}, ValueError, "bias_V has 6 entries: expected 7"),
    ({"bias_V": torch.ones(7, dtype=torch.int32)}, TypeError, "bias_V is int32"),
    ({"keep_N": torch.ones(3)}, TypeError, "keep_N is float32: expected one of bool"),
    ({"keep_N": torch.ones(4, dtype=torch.bool)}, ValueError, "keep_N has 4 entries: expected 3"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0: expected a finite number above 0"),
    ({"temperature": -1}, ValueError, "temperature is -1: expected"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan: expected"),
    ({"temperature": "1"}, TypeError, "temperature is '1': expected a number"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf: expected"),
    ({"softcap": 0}, ValueError, "softcap is 0: expected"),
    ({"softcap": True}, TypeError, "softcap is True: expected a number"),
]


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize(("change", "error", "text"), BAD_INPUT, ids=[case[2][:40] for case in BAD_INPUT])
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str, impl: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_NH": torch.ones(3, 4), "weight_VH": torch.ones(7, 4), "target_N": torch.tensor([0, 1, 6]),
    }  # fmt: skip
    move = {k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type != "meta" else v for k, v in change.items()}
    arguments = {k: v.to(DEVICE) for k, v in arguments.items()} | move
    with pytest.raises(error, match=text):
        fused_logprobs(**arguments, impl=impl)
    with pytest.raises(error, match=text):
        reference_logprobs(**arguments)


def test_unknown_or_unavailable_impl() -> None:
    inputs = case()
    with pytest.raises(ValueError, match="impl is 'cuda': expected one of auto, triton, torch, reference"):
        fused_logprobs(*inputs, impl="cuda")
    doubles = [inputs[0].double(), inputs[1].double(), inputs[2]]
    with pytest.raises(ValueError, match=r"impl is 'triton': expected .* float64"):
        fused_logprobs(*doubles, impl="triton")


PEAK = """
import pathlib, torch
from mel_lite.kernels import fused_logprobs
vocab, width = 16384, 64
hidden_NH, weight_VH = torch.randn(4096, width).requires_grad_(), torch.randn(vocab, width)
target_N = torch.randint(vocab, (4096,))
peaks_mib = []
for rows in (8, 1024, 4096):
    fused_logprobs(hidden_NH[:rows], weight_VH, target_N[:rows])[0].sum().backward()
    peak_kib = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    peaks_mib.append(int(peak_kib) // 1024)
print(*(peak - peaks_mib[0] for peak in peaks_mib[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc; ru_maxrss includes the parent's")
def test_memory_does_not_grow_with_the_batch() -> None:
    """The full logits would be 64 MiB at 1024 rows and 256 MiB at 4096; measured in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    peak_1024_mib, peak_4096_mib = map(int, ran.stdout.split())
    assert 0 < peak_4096_mib < 64 and peak_4096_mib - peak_1024_mib < 16


ALONE = """
import sys, torch
from fused_head import fused_logprobs
logp_N, _, _ = fused_logprobs(torch.eye(2), torch.tensor([[0.0, 0], [1, 0], [0, 2]]), torch.tensor([1, 2]))
print(logp_N.tolist(), [m for m in sys.modules if m.split(".")[0] in ("mel_lite", "triton", "transformers", "trl")])
"""


def test_the_folder_works_alone(tmp_path: Any) -> None:
    """Copied next to a user's script under a name of their own; it pulls in neither MEL-Lite nor Triton."""
    import mel_lite.kernels

    (tmp_path / "fused_head").symlink_to(mel_lite.kernels.__path__[0])
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if 'site-packages' in p or 'lib' in p]"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code + ALONE], capture_output=True, text=True, check=True)
    logp, modules = ran.stdout.strip().split("] ", 1)
    expected = [1 - torch.tensor([0.0, 1, 0]).logsumexp(0), 2 - torch.tensor([0.0, 0, 2]).logsumexp(0)]
    assert [float(x) for x in logp.strip("[").split(",")] == pytest.approx([float(x) for x in expected], rel=1e-6)
    assert modules == "[]"
