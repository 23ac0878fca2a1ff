"""Errors of the KL operator against float64, from teachers that equal the student to teachers far away.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_cases import (
    BLOCK_ROWS,
    DEVICE,
    DTYPES,
    FROZEN,
    HALVES,
    IMPLS,
    assert_kl_exact,
    naive_kl,
    pair_case,
    relative,
)
from mel_lite.kernels import fused_kl
from mel_lite.kernels.backends import make_steps, run_frozen_kl
from mel_lite.kernels.bench.truth import true_kl
from mel_lite.kernels.tiles import Divergence, Tiling, frozen_kl
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
    if impl in FROZEN:
        steps, _ = make_steps(impl, student_NH.dtype, student_NH.device, 16, LogitTransform())
        if steps.differences:
            return 0.0
    return 4 * EPS * gain * float((student_NH.double() @ weight_VH.double().T).abs().max())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_float32_matches_truth(vocab: int, width: int, impl: str) -> None:
    inputs = case(24, vocab, width, torch.float32)
    error = logit_error(impl, inputs[0], inputs[2])
    assert_kl_exact(measure(*inputs, impl=impl), true_kl(*inputs), logit_error=error)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_half_precision_is_never_worse_than_naive(vocab: int, width: int, impl: str, dtype: torch.dtype) -> None:
    inputs = case(24, vocab, width, dtype)
    truth, naive = true_kl(*inputs), naive_kl(*inputs)
    found = run_frozen_kl(impl, *inputs, None, LogitTransform(), want_u=True)
    rounding = torch.finfo(dtype).eps / 2 if found.u_NH.dtype == dtype else 0.0
    assert_kl_exact(found, truth, u_bound=1e-3 + rounding, logit_error=logit_error(impl, inputs[0], inputs[2]))
    assert bool(((found.kl_N.double() - truth.kl_N).abs() <= (naive.kl_N.double() - truth.kl_N).abs() + 1e-9).all())
    assert relative(found.u_NH.to(dtype), truth.u_NH) <= relative(naive.u_NH, truth.u_NH)


@pytest.mark.parametrize("impl", FROZEN)
def test_every_row_keeps_its_digits(impl: str) -> None:
    """At KL from 1e-20 to 2, and for students of 1 - p from 1 to 1e-10; a naive KL is lost below 1e-7."""
    inputs = case(400, 4096, 128, torch.float32)
    found, truth = measure(*inputs, impl=impl), true_kl(*inputs)
    assert float(truth.kl_N[1:].min()) < 1e-20 and float(truth.kl_N.max()) > 2
    assert_kl_exact(found, truth)
    wrong_N = (found.u_NH.double() - truth.u_NH).norm(dim=1)[1:] / truth.u_NH.norm(dim=1)[1:]
    assert float(wrong_N.max()) < 5e-5
    assert float(found.kl_N[0]) == 0.0 and not found.u_NH[0].any()  # this teacher equals the student


@pytest.mark.parametrize(("impl", "dtype"), [*DTYPES, ("reference", torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.5, "logit_scale": 0.0625},
        {"softcap": 30.0},
        {"temperature": 0.8, "logit_scale": 2.0, "softcap": 15.0},
        {"softcap": 1.0},  # almost all logits are at the cap
    ],
    ids=str,
)
def test_transforms_and_bias(options: dict[str, float], impl: str, dtype: torch.dtype) -> None:
    inputs = case(40, 3001, 72, dtype)
    bias_V = torch.randn(3001, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    transform = LogitTransform(**options)
    truth, found = true_kl(*inputs, bias_V, transform), measure(*inputs, bias_V=bias_V, impl=impl, **options)
    u_bound = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 3e-3}[dtype]
    error = logit_error(impl, inputs[0], inputs[2], transform.gain)
    assert_kl_exact(found, truth, u_bound=u_bound, logit_error=error)


def adversarial() -> dict[str, tuple[Tensor, Tensor]]:
    """Return logits of student and teacher, both of shape (4, 700), by name."""
    noise, other = torch.randn(2, 4, 700, generator=torch.Generator().manual_seed(3))
    peak, elsewhere = noise.clone(), noise.clone()
    peak[torch.arange(4), torch.tensor([0, 5, 300, 699])] = torch.tensor([20.0, 60.0, 80.0, 18.0])
    elsewhere[torch.arange(4), torch.tensor([1, 699, 2, 698])] = torch.tensor([20.0, 60.0, 80.0, 18.0])
    tied = torch.zeros(4, 700)
    tied[:, [5, 6, 699]] = 7.0
    rising = torch.linspace(0, 90, 700).expand(4, 700)
    return {
        "all equal": (torch.zeros(4, 700), torch.zeros(4, 700)),
        "a constant apart": (noise, noise + 500), "up 1000": (noise + 1000, other + 1000),
        "opposite offsets": (noise - 1000, other + 1000), "all negative": (-noise.abs() - 50, -other.abs() - 50),
        "ties": (tied, tied.roll(1, 1)), "certain of the same": (peak, peak + 0.1 * other),
        "certain of another": (peak, elsewhere), "flat student": (0.01 * noise, peak), "flat teacher": (peak, noise),
        "wide": (noise * 100, other * 100), "rising": (rising, rising + 0.01 * other),
        "rising apart": (rising, -rising), "far teacher first": (rising, rising + 200 * (rising < 10)),
    }  # fmt: skip


def as_inputs(z_NV: Tensor, y_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return states and a weight with exactly these logits."""
    states_2NH = torch.eye(2 * len(z_NV), device=z_NV.device)
    return states_2NH[: len(z_NV)], states_2NH[len(z_NV) :], torch.cat([z_NV, y_NV]).T.contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_logits(name: str, impl: str) -> None:
    """The logits are exact here, so only differences between student and teacher may cost digits, not offsets.

    u may lose as much as a sum of weights of that size, each times p |r - E_p r|.
    """
    z_NV, y_NV = (logits.to(DEVICE) for logits in adversarial()[name])
    inputs = as_inputs(z_NV, y_NV)
    found, truth = measure(*inputs, impl=impl), true_kl(*inputs)
    largest = float(inputs[2].abs().max())
    error = EPS * (2 * largest if impl == "reference" else float((z_NV - y_NV).abs().max()))
    assert_kl_exact(found, truth, logit_error=error, u_bound=torch.inf)
    p_NV, r_NV = z_NV.double().softmax(1), (z_NV - y_NV).double()
    deviation = float((p_NV * (r_NV - (p_NV * r_NV).sum(1, keepdim=True)).abs()).sum(1).max())
    allowed = 1e-5 * float(truth.u_NH.norm()) + largest * (100 * EPS * deviation + 2 * error)
    assert float((found.u_NH.double() - truth.u_NH).norm()) <= allowed


@pytest.mark.parametrize("impl", IMPLS)
def test_banned_tokens_have_no_probability(impl: str) -> None:
    """A bias of -inf removes a token from both distributions; with all others banned, they are equal."""
    student_NH, teacher_NH, weight_VH = case(8, 600, 8, torch.float32)
    bias_V = torch.zeros(600, device=DEVICE)
    bias_V[:512] = -torch.inf
    found = measure(student_NH, teacher_NH, weight_VH, bias_V=bias_V, impl=impl)
    truth = true_kl(student_NH, teacher_NH, weight_VH[512:])
    assert_kl_exact(found, truth, logit_error=logit_error(impl, student_NH, weight_VH))
    bias_V[:599] = -torch.inf
    alone = measure(student_NH, teacher_NH, weight_VH, bias_V=bias_V, impl=impl)
    assert alone.kl_N.tolist() == [0.0] * 8 and not alone.u_NH.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", [0, 1])
def test_nan_in_hidden_reaches_the_loss(where: int, impl: str) -> None:
    """A check downstream must see the NaN, in student or teacher; other rows do not change."""
    inputs = case(3, 300, 8, torch.float32)
    clean = measure(*inputs, impl=impl)
    inputs[where][1, 3] = torch.nan
    dirty = measure(*inputs, impl=impl)
    for found, expected in zip(dirty, clean, strict=True):
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", FROZEN)
@pytest.mark.parametrize("rows", [0, 1, BLOCK_ROWS // 2, BLOCK_ROWS // 2 + 1, BLOCK_ROWS + 1])
def test_row_counts_around_a_block(rows: int, impl: str) -> None:
    """A block has half as many pairs as rows."""
    inputs = case(rows, 300, 16, torch.float32)
    found, truth = measure(*inputs, impl=impl), true_kl(*inputs)
    assert found.kl_N.shape == (rows,) and found.u_NH.shape == (rows, 16)
    assert_kl_exact(found, truth)


@pytest.mark.parametrize(("impl", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("tiling", [(1, 90), (5, 16), (8, 33), (64, 7), (13, 4096)])
def test_tile_sizes_change_nothing_but_rounding(tiling: tuple[int, int], impl: str, dtype: torch.dtype) -> None:
    """With many tiles the student's first choice changes, and sums and accumulators are moved to the new one."""
    inputs = case(6, 90, 16, dtype)
    steps, _ = make_steps(impl, dtype, inputs[0].device, 16, LogitTransform())
    found = frozen_kl(*inputs, None, steps=steps, tiling=Tiling(*tiling), u_dtype=torch.float32)
    error = logit_error(impl, inputs[0], inputs[2])
    assert_kl_exact(found, true_kl(*inputs), u_bound=1e-5 if dtype == torch.float32 else 1e-3, logit_error=error)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("impl", FROZEN)
def test_sums_move_with_the_first_choice(seed: int, impl: str) -> None:
    """Logits that rise over the tiles: every tile has a new first choice, each as far from the teacher as any."""
    generator = torch.Generator().manual_seed(seed)
    rise_V = torch.linspace(0, 40, 700)
    z_NV = rise_V + torch.randn(4, 700, generator=generator)
    y_NV = z_NV + 10.0 ** torch.arange(-3, 1)[:, None] * torch.randn(4, 700, generator=generator)
    inputs = as_inputs(z_NV.to(DEVICE), y_NV.to(DEVICE))
    steps, _ = make_steps(impl, torch.float32, inputs[0].device, 8, LogitTransform())
    found = frozen_kl(*inputs, None, steps=steps, tiling=Tiling(8, 32), u_dtype=torch.float32)
    truth = true_kl(*inputs)
    assert_kl_exact(found, truth, u_bound=2e-4)
    wrong_N = (found.u_NH.double() - truth.u_NH).norm(dim=1) / truth.u_NH.norm(dim=1)
    assert float(wrong_N.max()) < 2e-4


@pytest.mark.parametrize("impl", FROZEN)
def test_a_constant_between_the_logits_costs_no_digits(impl: str) -> None:
    """It leaves both distributions as they are. All logits are multiples of 1/256: 256 is subtracted exactly."""
    noise, other = torch.randn(2, 4, 700, generator=torch.Generator().manual_seed(3))
    z_NV, d_NV = (noise * 256).round() / 256, (other * 2).round() / 256
    inputs = as_inputs(z_NV.to(DEVICE), (z_NV + d_NV - 256).to(DEVICE))
    found, truth = run_frozen_kl(impl, *inputs, None, LogitTransform(), want_u=True), true_kl(*inputs)
    assert 1e-5 < float(truth.kl_N.min()) < 1e-4
    assert_kl_exact(Divergence(found.kl_N, None), truth)


@pytest.mark.parametrize("impl", FROZEN)
def test_far_teachers_do_not_overflow_in_float16(impl: str) -> None:
    """exp(z - m) |r| is beyond the largest float16 here, and is clipped where products have 16 bits."""
    noise, other = torch.randn(2, 4, 700, generator=torch.Generator().manual_seed(3))
    inputs = tuple(tensor.half() for tensor in as_inputs(noise.to(DEVICE), 2000 * other.to(DEVICE)))
    found, truth = run_frozen_kl(impl, *inputs, None, LogitTransform(), want_u=True), true_kl(*inputs)
    assert float(truth.kl_N.min()) > 4000
    assert_kl_exact(Divergence(found.kl_N, None), truth, logit_error=4 * EPS * 8000)
    assert torch.cosine_similarity(found.u_NH.double(), truth.u_NH).min() > 0.9


def test_float64_is_exact() -> None:
    inputs = pair_case(40, 700, 16, torch.float64)
    inputs[1][:] = inputs[0] + 0.1 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).double()
    truth = true_kl(*inputs)
    for impl in ("torch", "reference"):
        found = measure(*inputs, impl=impl)
        assert_kl_exact(found, truth, bound=1e-11, u_bound=1e-12)
