"""The combined loss in one call against the same mathematics, written once more over `fused_logprobs`.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_cases import DEVICE, IMPLS, head_case, relative
from mel_lite.kernels import LossTerms, fused_logprobs, fused_mel_loss
from mel_lite.kernels.mel_loss import row_losses
from mel_lite.kernels.truth import true_head


def case(rows: int = 60, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], LossTerms]:
    """Mixed rows around the clip bounds: a third NLL, all signs of advantage, some zeros."""
    hidden_NH, weight_VH, target_N = head_case(rows, 400, 16, dtype)
    random = torch.Generator().manual_seed(5)
    logp_N = true_head(hidden_NH, weight_VH, target_N).logp_N.to(torch.promote_types(dtype, torch.float32))
    terms = LossTerms(
        is_nll_N=torch.arange(rows) % 3 == 0,
        weight_N=torch.rand(rows, generator=random) / rows,
        advantage_N=torch.randint(-1, 2, (rows,), generator=random) * torch.rand(rows, generator=random),
        old_logp_N=logp_N + 0.4 * torch.randn(rows, generator=random),
        ref_logp_N=logp_N + 0.4 * torch.randn(rows, generator=random),
        clip_low=0.2,
        clip_high=0.28,
        kl_weight=0.04,
    )
    moved = replace(terms, **{name: value.to(DEVICE) for name, value in terms.tensors().items()})
    return [hidden_NH.to(DEVICE).requires_grad_(), weight_VH.to(DEVICE), target_N.to(DEVICE)], moved


def plain_loss(logp_N: Tensor, terms: LossTerms) -> Tensor:
    """The loss as a paper writes it, row by row in Python."""
    total = logp_N.sum() * 0
    for i, nll in enumerate(terms.is_nll_N.tolist()):
        if nll:
            total = total - terms.weight_N[i] * logp_N[i]
            continue
        ratio = torch.exp(logp_N[i] - (logp_N[i].detach() if terms.old_logp_N is None else terms.old_logp_N[i]))
        clipped = torch.clamp(ratio, 1 - terms.clip_low, 1 + terms.clip_high)
        row = -torch.min(ratio * terms.advantage_N[i], clipped * terms.advantage_N[i])
        if terms.ref_logp_N is not None:
            away = terms.ref_logp_N[i] - logp_N[i]
            row = row + terms.kl_weight * (torch.exp(away) - away - 1)
        total = total + terms.weight_N[i] * row
    return total


@pytest.mark.parametrize("drop", ["", "old", "ref", "old ref"])
@pytest.mark.parametrize("impl", IMPLS)
def test_parity_with_the_loss_over_logprobs(impl: str, drop: str) -> None:
    inputs, terms = case()
    if "old" in drop:
        terms = replace(terms, old_logp_N=None)
    if "ref" in drop:
        terms = replace(terms, ref_logp_N=None, kl_weight=0.0)
    expected = plain_loss(fused_logprobs(*inputs, impl=impl)[0], terms)
    found = fused_mel_loss(*inputs, terms, impl=impl)
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    grads = [torch.autograd.grad(loss * 3.0, inputs[0])[0] for loss in (found.loss, expected)]
    assert relative(grads[0], grads[1]) < 1e-5 and grads[1].abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_rows_equal_separate_calls(impl: str) -> None:
    inputs, terms = case()
    mixed = fused_mel_loss(*inputs, terms, impl=impl)
    parts = [
        fused_mel_loss(*inputs, replace(terms, weight_N=torch.where(rows_N, terms.weight_N, 0.0)), impl=impl)
        for rows_N in (terms.is_nll_N, ~terms.is_nll_N)
    ]
    loss = parts[0].loss + parts[1].loss
    assert float(mixed.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    grads = [torch.autograd.grad(each, inputs[0])[0] for each in (mixed.loss, loss)]
    assert relative(grads[0], grads[1]) < 1e-6
    assert float(mixed.metrics["nll_loss"]) == pytest.approx(float(parts[0].loss.detach()), rel=1e-6)
    assert float(mixed.metrics["policy_loss"]) == pytest.approx(float(parts[1].loss.detach()), rel=1e-6)


def test_gradient_is_the_finite_difference() -> None:
    inputs, terms = case(24, torch.float64)
    loss = fused_mel_loss(*(t.cpu() for t in inputs), _cpu(terms)).loss
    (grad_NH,) = torch.autograd.grad(loss, inputs[0])
    grad_NH, hidden_NH = grad_NH.cpu(), inputs[0].detach().cpu()
    for row, column in ((0, 0), (1, 3), (5, 7), (8, 2), (23, 15)):
        step = torch.zeros_like(hidden_NH)
        step[row, column] = 1e-6
        up, down = (
            fused_mel_loss(hidden_NH + sign * step, *(t.cpu() for t in inputs[1:]), _cpu(terms)).loss
            for sign in (1, -1)
        )
        assert float(up - down) / 2e-6 == pytest.approx(float(grad_NH[row, column]), rel=1e-4, abs=1e-9)


def _cpu(terms: LossTerms) -> LossTerms:
    return replace(terms, **{name: value.cpu() for name, value in terms.tensors().items()})


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_cannot_matter_are_not_computed(impl: str) -> None:
    """Zero advantage without KL, zero weight, target -100: dropped, counted, and nothing else changes."""
    inputs, terms = case()
    terms = replace(terms, ref_logp_N=None, kl_weight=0.0)
    with torch.no_grad():
        terms.weight_N[4] = 0.0
        inputs[2][5] = -100
    idle_N = (~terms.is_nll_N & (terms.advantage_N == 0)) | (terms.weight_N == 0) | (inputs[2] == -100)
    assert 10 < int(idle_N.sum()) < 40
    clean = fused_mel_loss(*inputs, terms, impl=impl)
    with torch.no_grad():
        inputs[0][idle_N] = torch.nan
    found = fused_mel_loss(*inputs, terms, impl=impl)
    assert float(found.loss.detach()) == float(clean.loss.detach()) != 0
    assert int(found.metrics["rows_dropped"]) == int(idle_N.sum())
    assert int(found.metrics["policy_rows"] + found.metrics["nll_rows"]) == int((~idle_N).sum())
    (grad_NH,) = torch.autograd.grad(found.loss, inputs[0])
    assert not grad_NH[idle_N].any() and grad_NH[~idle_N].isfinite().all()
    assert torch.equal(grad_NH, torch.autograd.grad(clean.loss, inputs[0])[0]) and grad_NH.any()
    assert not found.logp_N[idle_N].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_that_are_not_finite_are_left_out_and_counted(impl: str) -> None:
    """A stale log-probability of -inf must not poison the step; what an NLL row does not read is not looked at."""
    inputs, terms = case()
    without_N = terms.weight_N.clone()
    without_N[[1, 4]] = 0.0
    clean = fused_mel_loss(*inputs, replace(terms, weight_N=without_N), impl=impl)
    terms.old_logp_N[1], terms.advantage_N[4] = -torch.inf, torch.nan
    terms.old_logp_N[0] = terms.ref_logp_N[3] = terms.advantage_N[6] = torch.nan  # NLL rows
    found = fused_mel_loss(*inputs, terms, impl=impl)
    assert int(found.metrics["rows_not_finite"]) == 2
    assert float(found.loss.detach()) == pytest.approx(float(clean.loss.detach()), rel=1e-6)
    grads = [torch.autograd.grad(each.loss, inputs[0])[0] for each in (found, clean)]
    assert relative(grads[0], grads[1]) < 1e-5


def test_nan_from_the_model_is_not_hidden() -> None:
    inputs, terms = case()
    with torch.no_grad():
        inputs[0][1] = torch.nan
    assert fused_mel_loss(*inputs, terms).loss.isnan()


def test_metrics_by_hand() -> None:
    """Five rows of a two-token vocabulary: logp is log 0.5 in each, so every ratio is what `old` makes it."""
    log_half = math.log(0.5)
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 1.0])
    terms = LossTerms(
        is_nll_N=torch.tensor([False, False, False, False, True]),
        weight_N=torch.tensor([1.0, 1, 1, 1, 2]),
        advantage_N=torch.tensor([1.0, 1, -1, -1, 0]),
        old_logp_N=log_half - ratios.log(),
        ref_logp_N=torch.full((5,), log_half + math.log(2)),
        clip_low=0.2,
        clip_high=0.3,
        kl_weight=0.1,
    )
    found = fused_mel_loss(torch.zeros(5, 3), torch.ones(2, 3), torch.tensor([0, 1, 0, 1, 0]), terms)
    kl = 2 - math.log(2) - 1
    expected = {
        "policy_loss": -1.0 - 1.3 + 1.5 + 0.8 + 4 * 0.1 * kl,
        "nll_loss": 2 * math.log(2),
        "nll_mean": math.log(2),
        "entropy_mean": math.log(2),
        "kl_mean": kl,
        "ratio_mean": (1 + 1.5 + 1.5 + 0.5) / 4,
        "ratio_max": 1.5,
        "clip_low_fraction": 0.25,
        "clip_high_fraction": 0.25,
        "policy_rows": 4,
        "nll_rows": 1,
        "rows_dropped": 0,
        "rows_not_finite": 0,
    }
    assert {name: float(value) for name, value in found.metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert float(found.loss) == pytest.approx(expected["policy_loss"] + expected["nll_loss"], rel=1e-6)


def test_on_policy_ratio_is_exactly_one() -> None:
    inputs, terms = case()
    old_logp_N = fused_logprobs(*inputs, compute_u=False)[0]
    found = fused_mel_loss(*inputs, replace(terms, old_logp_N=old_logp_N, ref_logp_N=old_logp_N))
    assert float(found.metrics["ratio_max"]) == 1.0
    assert float(found.metrics["kl_mean"]) == 0.0


def test_gradient_is_rounded_once() -> None:
    """c u is formed in float32 and rounded to bfloat16 at the end; then only what comes from outside rounds again."""
    inputs, terms = case(600, torch.bfloat16)
    truth = true_head(*inputs)
    logp_N = truth.logp_N.float().requires_grad_()
    (c_N,) = torch.autograd.grad(row_losses(logp_N, terms).sum(), logp_N)
    # A gradient of 1/3 from outside, as accumulation over three steps gives, must not be rounded to bfloat16 either.
    (grad_NH,) = torch.autograd.grad(fused_mel_loss(*inputs, terms).loss / 3, inputs[0])
    exact_NH = c_N.double()[:, None] * truth.u_NH / 3
    stored_NH = (exact_NH * 3).to(torch.bfloat16).double() / 3
    assert relative(grad_NH, exact_NH) < 1.05 * relative(stored_NH.to(torch.bfloat16), exact_NH)


def test_stale_rows_stay_finite() -> None:
    """A log-ratio of hundreds is cut at e^20 before exp can overflow."""
    inputs, terms = case()
    found = fused_mel_loss(*inputs, replace(terms, old_logp_N=torch.full_like(terms.weight_N, -300.0)))
    (grad_NH,) = torch.autograd.grad(found.loss, inputs[0])
    assert found.loss.isfinite() and grad_NH.isfinite().all()
    assert float(found.metrics["ratio_max"]) == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"is_nll_N": torch.zeros(60)}, TypeError, "terms.is_nll_N is float32: expected one of bool"),
        ({"weight_N": torch.ones(59)}, ValueError, "terms.weight_N has 59 entries: expected 60"),
        ({"advantage_N": 1.0}, TypeError, "terms.advantage_N is a float: expected a torch.Tensor"),
        ({"old_logp_N": torch.ones(60, 1)}, ValueError, r"terms.old_logp_N has shape \(60, 1\): expected 1 dim"),
        ({"clip_low": -0.1}, ValueError, "terms.clip_low is -0.1: expected a finite number of at least 0"),
        ({"clip_high": torch.ones(3)}, ValueError, "terms.clip_high has 3 entries: expected 60"),
        ({"ref_logp_N": None}, ValueError, "terms.kl_weight is 0.04 and terms.ref_logp_N None: expected both"),
    ],
)
def test_bad_terms_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    inputs, terms = case()
    change = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=text):
        fused_mel_loss(*inputs, replace(terms, **change))
    with pytest.raises(TypeError, match="terms is a dict: expected LossTerms"):
        fused_mel_loss(*inputs, {})
