"""Pytest plugin: the class under test, stand-ins for the Hub, and what the installed TRL lacks on a CPU."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import trl

from peer_suite.stand_ins import fill_cache, load_dataset
from peer_suite.suite import SUITE


class TorchLogProbs:
    """TRL's `ChunkedLogProbFunction` in torch, with all logits at once: TRL has it for GPUs only.

    MELTrainer never calls it.
    """

    @staticmethod
    def apply(
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-prob, entropy, log sum p^2, mean logit and argmax hit (N,); None for those not in `outputs`."""
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH.to(hidden_NH), bias_V).float() * scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        logp_NV = (logits_NV / temperature).log_softmax(-1)
        values = {
            "entropy": -(logp_NV.exp() * logp_NV).sum(-1),
            "log_sum_sq_probs": (2 * logp_NV).logsumexp(-1),
            "mean_logits": logits_NV.mean(-1),
            "is_top1": logp_NV.argmax(-1) == target_N,
        }
        taken_N = logp_NV.gather(-1, target_N[:, None])[:, 0]
        return (taken_N, *(value if name in outputs else None for name, value in values.items()))


def _absent(name: str) -> Any:
    """Stand for a check `is_..._available` that the installed TRL no longer has."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def _patch() -> None:
    fill_cache(Path(os.environ["HF_HOME"]) / "hub", Path(SUITE).read_text())
    datasets.load_dataset = load_dataset
    importlib.import_module("trl.import_utils").__getattr__ = _absent  # type: ignore[method-assign]
    if not torch.cuda.is_available():
        importlib.import_module("trl.trainer.utils")._ChunkedLogProbFunction = TorchLogProbs
    if os.environ["PEER_SUITE_CLASS"] == "MELTrainer":
        from mel_lite import MELConfig, MELTrainer

        trl.GRPOTrainer, trl.GRPOConfig = MELTrainer, MELConfig


_patch()
