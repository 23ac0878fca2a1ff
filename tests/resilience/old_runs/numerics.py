"""Print, as JSON, what decides the bits of a run on this machine: a hash of a small computation, and versions.

The computation has no random numbers. Machines that print the same hash round matmul, softmax, exp and Adam alike.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json

import torch
import torch.nn.functional as F

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def probe() -> str:
    """Return the SHA-256 over the float32 results of a tiny attention layer, its loss, gradients and two Adam steps."""
    grid = torch.arange(48 * 32, dtype=torch.float64).reshape(48, 32)
    weight = (((grid * 37) % 101 - 50) / 101).float().requires_grad_()
    inputs = (((grid * 53) % 97 - 48) / 97).float()[:32]
    optimizer = torch.optim.AdamW([weight], lr=1e-2, fused=True)
    sha = hashlib.sha256()
    for _ in range(2):
        hidden = inputs @ weight.T
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        heads = hidden.reshape(1, 32, 4, 12).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).reshape(32, 48)
        logps = torch.log_softmax(F.silu(mixed) @ weight, dim=-1)
        loss = -(torch.exp(logps - 1) * logps.detach() + logps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for tensor in (hidden, mixed, logps, weight.grad, weight):
            sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def numerics() -> dict[str, str]:
    """Return the probe's hash and the version of each package that computes, without its build (`+cpu`)."""
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    return {"probe": probe()} | versions


if __name__ == "__main__":
    print(json.dumps(numerics()))
