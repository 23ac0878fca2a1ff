"""Exact log-probabilities and KL divergences of a language-model head, computed without holding its logits.

    from mel_lite.kernels import fused_kl, fused_logprobs
    logp_N, entropy_N, lse_N = fused_logprobs(hidden_NH, weight_VH, target_N, temperature=0.8)
    kl_N = fused_kl(student_NH, teacher_NH, weight_VH, temperature=0.8)

One pass over the head gives, for every row, the log-probability of its target, the entropy, the log-normalizer and
u = d logp / d hidden; or KL(student || teacher) and u = d kl / d student. The backward pass only scales u. This package
imports nothing from MEL-Lite and works with torch alone (and Triton on a GPU).
"""

from __future__ import annotations

if __name__ == "kernels":
    # The repository root is on sys.path, and a library (transformers, bitsandbytes) imports Hugging Face's package of
    # this name. Load that package, or return an empty module if it is not installed: the library then treats it as
    # absent. transformers 5.17 does not handle an ImportError here.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec("kernels", [path for path in sys.path if Path(path or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])

    def __getattr__(name: str) -> object:
        raise AttributeError(f"no {name!r} here: this folder is the package mel_lite.kernels, import it by that name")

else:
    from .api import fused_logprobs, reference_logprobs
    from .head import HeadSpec, check_head_spec, head_kl, head_logprobs, head_spec, why_not_fused
    from .kl import fused_kl, reference_kl

    __all__ = [
        "HeadSpec",
        "check_head_spec",
        "fused_kl",
        "fused_logprobs",
        "head_kl",
        "head_logprobs",
        "head_spec",
        "reference_kl",
        "reference_logprobs",
        "why_not_fused",
    ]
