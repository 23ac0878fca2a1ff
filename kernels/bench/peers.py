"""Other implementations of the same log-probabilities, or KL divergences, and their gradient in hidden.

A peer that is not installed, or does not run on a device, is reported with the reason.
N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_NH, weight_VH, target_N) -> logp_N, or their sum."""


def naive(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """Compute full logits in the model's dtype and log-softmax in float32, as most training loops do."""
    return (hidden_NH @ weight_VH.T).float().log_softmax(1).gather(1, target_N[:, None])[:, 0]


def naive_kl(student_NH: Tensor, weight_VH: Tensor, teacher_NH: Tensor) -> Tensor:
    """Compute both full logits in the model's dtype, and the divergence in float32, as most training loops do."""
    log_p_NV = (student_NH @ weight_VH.T).float().log_softmax(1)
    log_q_NV = (teacher_NH @ weight_VH.T).float().log_softmax(1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(1)


def _torch() -> Peer:
    """Return the chunked linear cross entropy of torch, available from 2.13."""
    options = nn.LinearCrossEntropyOptions()
    return lambda h, w, t: -F.linear_cross_entropy(h, w, t, reduction="none", options=options)


def _trl() -> Peer:
    """Return TRL's chunked log-prob with the entropy that GRPO logs, at TRL's chunk size."""
    function = _file_of("trl", "kernels/chunked_logprob.py").ChunkedLogProbFunction
    return lambda h, w, t: function.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("entropy",))[0]


def _unsloth() -> Peer:
    function = _file_of("unsloth_zoo", "fused_losses/fused_linear.py").fused_linear_logprobs
    return lambda h, w, t: function(h, w, t, return_entropy=True, entropy_requires_grad=False)[0]


def _liger() -> Peer:
    """Return Liger's fused linear cross entropy, summed: then it computes the gradient in the forward pass."""
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda h, w, t: -loss(w, h, t)


def _cut_cross_entropy() -> Peer:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, t: -function(h, w, t, reduction="none")


PEERS: dict[str, Callable[[], Peer]] = {
    "naive log-softmax": lambda: naive,
    "torch linear_cross_entropy": _torch,
    "TRL chunked log-prob": _trl,
    "Unsloth fused_linear": _unsloth,
    "Liger FLCE": _liger,
    "cut_cross_entropy": _cut_cross_entropy,
}
"""Name -> function that returns the peer, or raises if it is not installed."""
KL_PEERS: dict[str, Callable[[], Peer]] = {"naive KL of two logits": lambda: naive_kl}


def _file_of(package: str, path: str) -> Any:
    """Load one file of an installed package, without importing the rest of the package and its dependencies."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    file = Path(found.submodule_search_locations[0]) / path
    if not file.is_file():
        raise ImportError(f"this version of {package} has no {path}")
    spec = importlib.util.spec_from_file_location(f"bench_peer_{package}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
