"""From a model's last hidden state to its logits: the transform in the config, and heads that cannot be fused.

Reads configs and modules by name and imports no model code. N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import Impl, fused_logprobs, reference_logprobs
from .backends import warn_once
from .checks import FLOATS, check_number, check_pair, check_tensor, check_transform
from .kl import fused_kl
from .reference import reference_head, reference_kl_head
from .rows import kept_rows, live_rows, spread, take

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)  # Granite and its relatives divide by it


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Arguments of `fused_logprobs` that depend on the model, not on the training run."""

    logit_scale: float = 1.0
    softcap: float | None = None


def head_spec(model: Any) -> HeadSpec:
    """Read logit scale and softcap from the config of a causal language model (or from a config itself).

    `check_head_spec` checks that the model applies no other transform.

    Raises: TypeError or ValueError for a value that is not a number above 0.
    """
    config = getattr(model, "config", model)
    config = getattr(config, "text_config", None) or config
    scale, softcap = 1.0, None
    for name in _FACTORS:
        if (factor := getattr(config, name, None)) is not None:
            scale *= check_number(f"config.{name}", factor)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        scaling = check_number("config.logits_scaling", scaling)
        scale *= scaling if getattr(config, "model_type", "") in _MULTIPLIES_BY_LOGITS_SCALING else 1.0 / scaling
    for name in _SOFTCAPS:
        if (cap := getattr(config, name, None)) is not None:
            softcap = check_number(f"config.{name}", cap)
    return HeadSpec(scale, softcap)


def why_not_fused(head: Any) -> str | None:
    """Return why this head does not compute or train exactly hidden @ weight.T + bias, or None if it does.

    Reasons are LoRA or another wrapper, a quantized or sharded weight, hooks, or a custom class.
    """
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        return f"it is wrapped by an adapter ({type(head).__name__})"
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        return f"it has no weight tensor ({type(head).__name__})"
    if weight.dtype not in FLOATS or type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is quantized or sharded ({type(weight).__name__}, {weight.dtype})"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"it is a {type(head).__name__}, not an nn.Linear"
    # accelerate replaces `forward` to move tensors; only offloading changes the weight.
    offload = getattr(getattr(head, "_hf_hook", None), "offload", None)
    if offload or ("forward" in vars(head) and offload is None):
        return "its forward is replaced (offloaded, or patched)"
    if any(vars(head).get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
        return "it has hooks"
    return None


def head_logprobs(
    head: Any,
    hidden_NH: Tensor,
    target_N: Tensor,
    *,
    spec: HeadSpec,
    temperature: float = 1.0,
    compute_u: bool = True,
    entropy_grad: bool = False,
    impl: Impl = "auto",
    keep_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `fused_logprobs` for a head module: fused where that is exact, else by calling it on blocks of rows.

    The second path is exact for any head (LoRA with its dropout, quantized, hooked) and trains what the head trains. It
    is slower, and warns once. A plain head that is trained uses the reference path without a warning.

    Returns: (logp_N, entropy_N, lse_N); with `entropy_grad` the entropy has a gradient.
    Raises: ValueError if `impl` is "triton" or "torch" and the head cannot be fused; otherwise as `fused_logprobs`.
    """
    problem = why_not_fused(head)
    options: dict[str, Any] = {"temperature": temperature, "logit_scale": spec.logit_scale, "softcap": spec.softcap}
    if problem is None:
        options |= {"bias_V": head.bias, "keep_N": keep_N}
        if entropy_grad:
            return reference_logprobs(hidden_NH, head.weight, target_N, entropy_grad=True, **options)
        return fused_logprobs(hidden_NH, head.weight, target_N, compute_u=compute_u, impl=impl, **options)
    _warn_of_calls(impl, "log-probabilities use", problem)
    transform = check_transform(**options)
    check_tensor("hidden_NH", hidden_NH, "NH", FLOATS)
    check_tensor("target_N", target_N, "N", (torch.int64, torch.int32))
    with torch.set_grad_enabled(torch.is_grad_enabled() and compute_u):
        vocab = _vocab(head, hidden_NH)
        index_K = live_rows(target_N, vocab, keep_N)
        hidden_KH, target_K = take(hidden_NH, index_K), take(target_N, index_K)
        scored = reference_head(head, vocab, hidden_KH, target_K, transform, keep_rng=True)
        logp_N, entropy_N, lse_N = (spread(part_K, index_K, len(target_N)) for part_K in scored)
    return logp_N, entropy_N if entropy_grad else entropy_N.detach(), lse_N.detach()


def head_kl(
    head: Any,
    student_NH: Tensor,
    teacher_NH: Tensor,
    *,
    spec: HeadSpec,
    temperature: float = 1.0,
    compute_u: bool = True,
    impl: Impl = "auto",
    keep_N: Tensor | None = None,
) -> Tensor:
    """Compute `fused_kl` for a head module, fused or by calling it on blocks of rows, exactly as `head_logprobs`.

    The teacher's distribution is a constant, also where the head is trained.

    Returns: kl_N, KL(student || teacher) of every row in nats.
    Raises: ValueError if `impl` is "triton" or "torch" and the head cannot be fused; otherwise as `fused_kl`.
    """
    problem = why_not_fused(head)
    options: dict[str, Any] = {"temperature": temperature, "logit_scale": spec.logit_scale, "softcap": spec.softcap}
    if problem is None:
        options |= {"bias_V": head.bias, "keep_N": keep_N, "compute_u": compute_u, "impl": impl}
        return fused_kl(student_NH, teacher_NH, head.weight, **options)
    _warn_of_calls(impl, "KL divergences use", problem)
    transform = check_transform(**options)
    check_pair(student_NH, teacher_NH)
    with torch.set_grad_enabled(torch.is_grad_enabled() and compute_u):
        vocab = _vocab(head, student_NH)
        index_K = kept_rows(keep_N, student_NH, "student_NH")
        student_KH, teacher_KH = take(student_NH, index_K), take(teacher_NH, index_K)
        kl_K = reference_kl_head(head, vocab, student_KH, teacher_KH, transform, keep_rng=True)
        return spread(kl_K, index_K, len(student_NH))


def _warn_of_calls(impl: str, results: str, problem: str) -> None:
    if impl in ("triton", "torch"):
        raise ValueError(f'impl is {impl!r} but this head cannot be fused: {problem}; expected "auto" or "reference"')
    warn_once(f"{results} the slower reference path, because of the model's head: {problem}")


def _vocab(head: Any, hidden_NH: Tensor) -> int:
    sized = getattr(head, "original_module", head)  # PEFT swaps the sizes of a tied head's copy
    return getattr(sized, "out_features", None) or head(hidden_NH[:1]).shape[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _logits_and_hidden(model: Any, ids_1T: Tensor) -> tuple[Tensor, Tensor]:
    """Return a model's own logits (T, V) in float32, and the last hidden state (T, H) that its backbone gives alone.

    A model that calls its backbone with the ids and nothing else has computed that state on the way.
    """
    calls: list[tuple[Any, Any, Any]] = []
    hook = model.base_model.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    try:
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    states = [output for args, options, output in calls if _gives_ids_alone(args, options, ids_1T)]
    backbone = states[0] if states else model.base_model(input_ids=ids_1T, use_cache=False)
    return logits_TV, backbone.last_hidden_state[0]


def _gives_ids_alone(args: tuple[Any, ...], options: dict[str, Any], ids_1T: Tensor) -> bool:
    given = {name: value for name, value in options.items() if value is not None}
    return not args and given.pop("input_ids", None) is ids_1T and given == {"use_cache": False}


@torch.no_grad()
def check_head_spec(model: Any, spec: HeadSpec, token_ids: list[int] | None = None) -> None:
    """Compare a model's own log-probabilities on a few tokens with those of its last hidden state under `spec`.

    Detects what no config contains: a custom logit transform, a hidden state scaled or normalized before the head. Runs
    in evaluation mode, since dropout would make two forwards differ, and restores the mode of every module.

    Raises: ValueError with the largest difference, if it is larger than rounding explains.
    """
    head = model.get_output_embeddings()
    ids_1T = torch.tensor([token_ids or list(range(1, 9))], device=head.weight.device)
    with _evaluating(model):
        logits_TV, hidden_TH = _logits_and_hidden(model, ids_1T)
        top_T = logits_TV.argmax(1)
        expected_T = logits_TV.log_softmax(1).gather(1, top_T[:, None])[:, 0]
        found_T, _, _ = head_logprobs(head, hidden_TH, top_T, spec=spec, compute_u=False, impl="reference")
    # The model rounds its logits to its own dtype: a few units in the last place of the largest.
    allowed = 8 * torch.finfo(head.weight.dtype).eps * float(logits_TV.abs().max()) + 1e-4
    difference = float((found_T - expected_T).abs().max())
    if not difference <= allowed:
        raise ValueError(
            f"model {type(model).__name__} does not compute its logits as {spec}: its log-probabilities differ by "
            f"{difference:.3g}, expected at most {allowed:.3g}; its logit transform is unknown here"
        )
