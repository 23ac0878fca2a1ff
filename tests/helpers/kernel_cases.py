"""Inputs for the operator tests, with rows from improbable to certain, and the error bounds of all implementations.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from mel_lite.kernels.tiles import Divergence, Scored

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
"""True in the runs that `test_triton.py` starts: the real kernels on CPU tensors."""

BLOCK_ROWS = 64 if INTERPRETED else 1024
"""Rows of one block on a CPU; more rows need several blocks."""

FROZEN = ("torch", "triton") if DEVICE == "cuda" or INTERPRETED else ("torch",)
IMPLS = (*FROZEN, "reference")
HALVES = [
    (impl, dtype)
    for impl in FROZEN
    for dtype in (torch.bfloat16, torch.float16)
    if not (INTERPRETED and impl == "triton" and dtype == torch.bfloat16)  # not supported by the interpreter
]
DTYPES = [*((impl, torch.float32) for impl in FROZEN), *HALVES]


def head_case(rows: int, vocab: int, width: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden_NH, weight_VH, target_N): target logits from -8 to 40 over the rows, the others about N(0, 3)."""
    generator = torch.Generator().manual_seed(seed)
    weight_VH = torch.randn(vocab, width, generator=generator)
    target_N = torch.randint(vocab, (rows,), generator=generator)
    target_N[:1] = vocab - 1  # the last, ragged tile
    noise_NH = torch.randn(rows, width, generator=generator) * (3.0 / width**0.5)
    direction_NH = weight_VH[target_N]
    direction_NH = direction_NH / direction_NH.square().sum(1, keepdim=True)
    hidden_NH = noise_NH + torch.linspace(-8, 40, rows)[:, None] * direction_NH
    return hidden_NH.to(dtype), weight_VH.to(dtype), target_N


def pair_case(rows: int, vocab: int, width: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (student_NH, teacher_NH, weight_VH), students from open to certain, KL from about 1e-20 to 3, row 0 equal.

    Teachers of neighboring rows are at very different distances.
    """
    student_NH, weight_VH, _ = head_case(rows, vocab, width, torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    distance_N = 10 ** torch.linspace(-7, 0.5, rows)[torch.randperm(rows, generator=generator)]
    distance_N[:1] = 0.0
    noise_NH = torch.randn(rows, width, generator=generator) / width**0.5
    return student_NH.to(dtype), (student_NH + distance_N[:, None] * noise_NH).to(dtype), weight_VH.to(dtype)


def naive_head(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Scored:
    """Score like most training loops: logits in the model's dtype, log_softmax in float32, autograd."""
    hidden_NH = hidden_NH.detach().requires_grad_()
    z_NV = (hidden_NH @ weight_VH.T).float()
    log_p_NV = z_NV.log_softmax(1)
    logp_N = log_p_NV.gather(1, target_N[:, None])[:, 0]
    (u_NH,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    log_p_NV = log_p_NV.detach()
    return Scored(logp_N.detach(), -(log_p_NV.exp() * log_p_NV).sum(1), z_NV.detach().logsumexp(1), u_NH)


def naive_kl(student_NH: Tensor, teacher_NH: Tensor, weight_VH: Tensor) -> Divergence:
    """Compute the divergence like most training loops: both logits in the model's dtype, float32, autograd."""
    student_NH = student_NH.detach().requires_grad_()
    log_p_NV = (student_NH @ weight_VH.T).float().log_softmax(1)
    log_q_NV = (teacher_NH.detach() @ weight_VH.T).float().log_softmax(1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)
    (u_NH,) = torch.autograd.grad(kl_N.sum(), student_NH)
    return Divergence(kl_N.detach(), u_NH)


def relative(found: Tensor, truth: Tensor) -> float:
    """Return |found - truth| / |truth| in Frobenius norm, or |found| if the truth is 0."""
    scale = float(truth.double().norm())
    return float((found.double() - truth.double()).norm()) / (scale or 1.0)


def worst(found: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Return the largest |found - truth| / max(|truth|, floor) over the rows; 0 where both are 0."""
    scale_N = truth.double().abs().clamp(min=floor or 1e-300)
    return float(((found.double() - truth.double()).abs() / scale_N).max()) if len(truth) else 0.0


def assert_exact(found: Scored, truth: Scored, *, u_bound: float = 1e-5, bound: float | None = None) -> None:
    """Assert that the errors are at most those of a float32 logit.

    A float32 logit z has an error of a few eps |z|. This is the relative error of logp and 1 - p in a row whose target
    is certain. The bound of logp and u is therefore 1e-5, and larger only for |z| above 10. The entropy of such a row
    is exact to 2e-7 nats.
    """
    if bound is None:
        reach = float(torch.cat([truth.lse_N.abs(), (truth.lse_N + truth.logp_N).abs()]).max())
        bound = max(1e-5, 8 * torch.finfo(torch.float32).eps * reach)
    errors = {
        "logp": (worst(found.logp_N, truth.logp_N), bound),
        "entropy": (worst(found.entropy_N, truth.entropy_N, floor=1e-2), 2 * bound),
        "lse": (worst(found.lse_N, truth.lse_N, floor=1.0), 1e-6),
    }
    if found.u_NH is not None and truth.u_NH is not None:
        errors["u"] = (relative(found.u_NH, truth.u_NH), max(u_bound, bound))
    too_large = {name: pair for name, pair in errors.items() if not pair[0] < pair[1]}
    assert not too_large, f"(error, bound) of {too_large}"


def assert_kl_exact(
    found: Divergence, truth: Divergence, *, u_bound: float = 1e-5, bound: float = 3e-5, logit_error: float = 0.0
) -> None:
    """Assert that every KL is exact to `bound`, relative to itself, and that none is negative.

    `logit_error` is the error of a difference of logits, in nats: eps times the largest logit where the teacher's
    logits are subtracted from the student's, 0 where the difference of the states enters the product. It adds
    logit_error sqrt(2 KL) to the error of a KL, and as much, relative to itself, to that of its gradient.
    """
    found_N, truth_N = found.kl_N.double(), truth.kl_N
    allowed_N = bound * truth_N + logit_error * (2 * truth_N).sqrt() + logit_error**2 + 1e-18
    wrong_N = (found_N - truth_N).abs()
    assert bool((wrong_N <= allowed_N).all()), f"{wrong_N / allowed_N} times the bound at KL {truth_N}"
    assert bool((found_N >= 0).all())
    if found.u_NH is not None and truth.u_NH is not None:
        assert relative(found.u_NH, truth.u_NH) < u_bound
