"""Shapes and inputs of the benchmark. N rows, C candidates of a row, V vocabulary, H hidden size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]
"""(hidden_NH, weight_VH, target_N), or (student_NH, weight_VH, teacher_NH) for the KL divergence."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem: rows, hidden size, vocabulary and dtype."""

    rows: int
    width: int
    vocab: int
    dtype: str
    states: str = "synthetic"
    """Source of hidden states, head and targets: "synthetic" for `model_like`, otherwise the name of a model."""
    operator: str = "logprobs"
    """"logprobs", or "kl" for the KL divergence from a teacher."""

    def __str__(self) -> str:
        what = ", KL from a teacher" if self.operator == "kl" else ""
        return f"N {self.rows}, H {self.width}, V {self.vocab}, {self.dtype}, {self.states} states{what}"


def default_shapes(device: torch.device) -> list[Shape]:
    """Return the shapes of 8B, 4B and 0.5B models and of the demo's 135M model; only the last one on a CPU.

    Each with log-probabilities and with the KL divergence.
    """
    if device.type == "cpu":
        dtype, sizes = "float32", [(576, 49152)]
    else:
        dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        sizes = [(4096, 151936), (2560, 151936), (896, 151936), (576, 49152)]
    return [Shape(8192, *size, dtype, operator=operator) for size in sizes for operator in ("logprobs", "kl")]


def model_like(shape: Shape, device: torch.device, *, seed: int = 0) -> Inputs:
    """Return random inputs whose distributions resemble those of a language model on its own samples.

    Most logits are about N(0, 2). A few candidates per row exceed them in steps, so that about half the rows are
    certain (p > 0.9) and a tenth are open. This affects speed: some contenders filter by probability, and power draw
    depends on the values. A teacher's logits differ from the student's by about N(0, 0.3).
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    weight_VH = torch.randn(shape.vocab, shape.width, device=device, generator=generator)
    rows, candidates = shape.rows, 8
    hidden_NH = torch.randn(rows, shape.width, device=device, generator=generator) * (2.0 / shape.width**0.5)
    picked_NC = torch.randint(shape.vocab, (rows, candidates), device=device, generator=generator)
    lead_N = 4.0 + 24.0 * torch.rand(rows, device=device, generator=generator)
    for rank in range(candidates):
        direction_NH = weight_VH[picked_NC[:, rank]]
        lift_N = lead_N * 0.8**rank / direction_NH.square().sum(1)
        hidden_NH += lift_N[:, None] * direction_NH
    if shape.operator == "kl":
        apart_NH = torch.randn(rows, shape.width, device=device, generator=generator) * (0.3 / shape.width**0.5)
        teacher_NH = (hidden_NH + apart_NH).to(dtype)
        return hidden_NH.to(dtype).requires_grad_(), weight_VH.to(dtype), teacher_NH
    choice_N1 = torch.rand(rows, 1, device=device, generator=generator).pow(3).mul(candidates).long()
    target_N = picked_NC.gather(1, choice_N1)[:, 0]
    return hidden_NH.to(dtype).requires_grad_(), weight_VH.to(dtype), target_N
