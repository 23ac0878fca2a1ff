"""Errors against float64: within a stated bound, and never larger than those of the naive path.

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
    assert_exact,
    head_case,
    naive_head,
    relative,
    worst,
)
from mel_lite.kernels import fused_logprobs
from mel_lite.kernels.backends import make_steps, run_frozen
from mel_lite.kernels.bench.truth import true_head
from mel_lite.kernels.tiles import Scored, Tiling, frozen_head
from mel_lite.kernels.transform import LogitTransform

# Each vocabulary and each width once or twice, large with small: full-size heads in float64 would take 5 GB.
SHAPES = [
    (151936, 64), (151665, 63), (128256, 96), (49152, 576), (257, 4096), (257, 2560), (1000, 1536), (5003, 1024),
    (2049, 896), (257, 77), (2, 8), (1, 16),
]  # fmt: skip


def score(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, **options: object) -> Scored:
    """Call the public operator, and get u from its backward pass."""
    leaf_NH = hidden_NH.detach().requires_grad_()
    logp_N, entropy_N, lse_N = fused_logprobs(leaf_NH, weight_VH, target_N, **options)
    (u_NH,) = torch.autograd.grad(logp_N.sum(), leaf_NH)
    return Scored(logp_N.detach(), entropy_N, lse_N, u_NH)


def case(*args: object) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in head_case(*args)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_float32_matches_truth(vocab: int, width: int, impl: str) -> None:
    inputs = case(12, vocab, width, torch.float32)
    assert_exact(score(*inputs, impl=impl), true_head(*inputs))


@pytest.mark.parametrize(("impl", "dtype"), HALVES, ids=str)
@pytest.mark.parametrize(("vocab", "width"), SHAPES)
def test_half_precision_is_never_worse_than_naive(vocab: int, width: int, impl: str, dtype: torch.dtype) -> None:
    """Only the last rounding of the gradient to the model's dtype is added; naive rounds the logits themselves."""
    inputs = case(12, vocab, width, dtype)
    truth, naive = true_head(*inputs), naive_head(*inputs)
    found = run_frozen(impl, *inputs, None, LogitTransform(), want_u=True)
    rounding = torch.finfo(dtype).eps / 2 if found.u_NH.dtype == dtype else 0.0
    assert_exact(found, truth, u_bound=5e-4 + rounding)
    assert worst(found.logp_N, truth.logp_N) <= worst(naive.logp_N, truth.logp_N)
    assert relative(found.u_NH.to(dtype), truth.u_NH) <= relative(naive.u_NH, truth.u_NH)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stratum", ["rare", "mid", "confident", "certain"])
def test_every_stratum_of_confidence(stratum: str, impl: str) -> None:
    """For certain rows (1 - p down to 1e-15) a log-softmax gives 0 and a zero gradient."""
    inputs = case(200, 4096, 128, torch.float32)
    truth = true_head(*inputs)
    low, high = {"rare": (0, 0.1), "mid": (0.1, 0.9), "confident": (0.9, 1 - 1e-6), "certain": (1 - 1e-6, 2)}[stratum]
    rows = ((truth.logp_N.exp() >= low) & (truth.logp_N.exp() < high)).nonzero()[:, 0]
    assert len(rows) >= 5
    found, truth = (Scored(*(part[rows] for part in scored)) for scored in (score(*inputs, impl=impl), truth))
    assert_exact(found, truth)
    row_error = (found.u_NH.double() - truth.u_NH).norm(dim=1) / truth.u_NH.norm(dim=1)
    assert float(row_error.max()) < 3e-5


@pytest.mark.parametrize(("impl", "dtype"), [*DTYPES, ("reference", torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.5, "logit_scale": 0.0625},
        {"softcap": 30.0},
        {"temperature": 0.8, "logit_scale": 2.0, "softcap": 15.0},
    ],
    ids=str,
)
def test_transforms_and_bias(options: dict[str, float], impl: str, dtype: torch.dtype) -> None:
    inputs = case(40, 3001, 72, dtype)
    bias_V = torch.randn(3001, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = true_head(*inputs, bias_V, LogitTransform(**options))
    found = score(*inputs, bias_V=bias_V, impl=impl, **options)
    assert_exact(found, truth, u_bound={torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype])


def adversarial() -> dict[str, Tensor]:
    """Return logits of shape (4, 700) by name; the targets of the rows are 0, 5, 300 and 699."""
    noise = torch.randn(4, 700, generator=torch.Generator().manual_seed(3))
    equal, tied, margins = torch.zeros(4, 700), torch.zeros(4, 700), noise.clone()
    tied[:, [5, 6, 699]] = 7.0
    margins[torch.arange(4), torch.tensor([0, 5, 300, 699])] = torch.tensor([30.0, 60.0, 80.0, -60.0])
    likely = noise.clone()
    likely[torch.arange(4), torch.tensor([0, 5, 300, 699])] = 18.0
    return {
        "all equal": equal, "ties": tied, "up 1000": noise + 1000, "down 1000": noise - 1000,
        "all negative": -noise.abs() - 50, "margins": margins, "wide": noise * 100,
        "likely, up 1000": likely + 1000,
    }  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", list(adversarial()))
def test_adversarial_logits(name: str, impl: str) -> None:
    """The logits are exact here, so only their spread may cost digits, not their offset. u may lose as much as a
    difference of weights of that size."""
    z_NV = adversarial()[name].to(DEVICE)
    eps = torch.finfo(torch.float32).eps
    bound, u_bound = max(1e-5, 2 * eps * float(z_NV.max() - z_NV.min())), max(1e-5, 8 * eps * float(z_NV.abs().max()))
    inputs = (torch.eye(4, device=DEVICE), z_NV.T.contiguous(), torch.tensor([0, 5, 300, 699], device=DEVICE))
    assert_exact(score(*inputs, impl=impl), true_head(*inputs), bound=bound, u_bound=u_bound)


@pytest.mark.parametrize("impl", IMPLS)
def test_banned_tokens_have_no_probability(impl: str) -> None:
    """A bias of -inf removes a token; with all others banned, the target is certain."""
    hidden_NH, weight_VH, target_N = case(3, 600, 8, torch.float32)
    target_N[:] = 599
    bias_V = torch.zeros(600, device=DEVICE)
    bias_V[:512] = -torch.inf
    found = score(hidden_NH, weight_VH, target_N, bias_V=bias_V, impl=impl)
    assert_exact(found, true_head(hidden_NH, weight_VH[512:], target_N - 512))
    bias_V[:599] = -torch.inf
    alone = score(hidden_NH, weight_VH, target_N, bias_V=bias_V, impl=impl)
    assert alone.logp_N.tolist() == alone.entropy_N.tolist() == [0.0] * 3
    assert not alone.u_NH.any()
    bias_V[:] = 0.0
    bias_V[599] = -torch.inf
    banned = score(hidden_NH, weight_VH, target_N, bias_V=bias_V, impl=impl)
    assert banned.logp_N.tolist() == [-torch.inf] * 3
    truth = true_head(hidden_NH, weight_VH[:599], torch.zeros_like(target_N))
    assert worst(banned.lse_N, truth.lse_N) < 1e-6 and worst(banned.entropy_N, truth.entropy_N) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_hidden_reaches_the_loss(impl: str) -> None:
    """A check downstream must see the NaN; other rows do not change."""
    hidden_NH, weight_VH, target_N = case(3, 300, 8, torch.float32)
    clean = score(hidden_NH, weight_VH, target_N, impl=impl)
    hidden_NH[1, 3] = torch.nan
    dirty = score(hidden_NH, weight_VH, target_N, impl=impl)
    for found, expected in zip(dirty, clean, strict=True):
        assert found[1].isnan().all()
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", FROZEN)
@pytest.mark.parametrize("rows", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_row_counts_around_a_block(rows: int, impl: str) -> None:
    inputs = case(rows, 300, 16, torch.float32)
    found, truth = score(*inputs, impl=impl), true_head(*inputs)
    assert found.logp_N.shape == (rows,) and found.u_NH.shape == (rows, 16)
    assert relative(found.logp_N, truth.logp_N) < 1e-6 and relative(found.u_NH, truth.u_NH) < 1e-5


@pytest.mark.parametrize(("impl", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("tiling", [(1, 90), (7, 16), (24, 33), (64, 1), (13, 4096)])
def test_tile_sizes_change_nothing_but_rounding(tiling: tuple[int, int], impl: str, dtype: torch.dtype) -> None:
    """With many tiles the running maximum changes and the accumulators are rescaled. u is kept in float32 here."""
    inputs = case(24 if tiling[1] > 1 else 3, 90, 16, dtype)
    steps, _ = make_steps(impl, dtype, inputs[0].device, 16, LogitTransform())
    found = frozen_head(*inputs, None, steps=steps, tiling=Tiling(*tiling), u_dtype=torch.float32)
    assert_exact(found, true_head(*inputs), u_bound=1e-5 if dtype == torch.float32 else 5e-4)


def test_float64_is_exact() -> None:
    inputs = head_case(40, 700, 16, torch.float64)
    truth = true_head(*inputs)
    for impl in ("torch", "reference"):
        found = score(*inputs, impl=impl)
        assert worst(found.logp_N, truth.logp_N) < 1e-13 and relative(found.u_NH, truth.u_NH) < 1e-13
        assert worst(found.entropy_N, truth.entropy_N, floor=1e-12) < 1e-12
