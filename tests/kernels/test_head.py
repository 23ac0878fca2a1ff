"""Heads of tiny random models, compared with the models' own log-probabilities. N rows, H hidden size."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from kernel_cases import relative
from mel_lite.kernels import (
    HeadSpec,
    backends,
    check_head_spec,
    fused_kl,
    fused_logprobs,
    head_kl,
    head_logprobs,
    head_spec,
    why_not_fused,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[PretrainedConfig, HeadSpec]] = {
    "llama": (LlamaConfig(**SIZES), HeadSpec()),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=4.0), HeadSpec(softcap=4.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.25), HeadSpec(logit_scale=0.25)),
    "granite": (GraniteConfig(**SIZES, logits_scaling=8.0), HeadSpec(logit_scale=0.125)),
    "hyperclovax": (HyperCLOVAXConfig(**SIZES, logits_scaling=0.5), HeadSpec(logit_scale=0.5)),
}


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    """Emit warnings once per test instead of once per process."""
    backends.warn_once.cache_clear()


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][0]).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.mul_(8)  # larger logits, so that caps and scales have an effect
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scale_and_softcap_are_read_and_are_the_models_own(family: str) -> None:
    model = tiny(family)
    spec = head_spec(model)
    assert spec == FAMILIES[family][1]
    check_head_spec(model, spec)
    wrong = HeadSpec(spec.logit_scale * 1.1, spec.softcap)
    with pytest.raises(ValueError, match=r"does not compute its logits as .* its logit transform is unknown"):
        check_head_spec(model, wrong)


def test_a_transform_no_config_names_is_found() -> None:
    model = tiny("llama")
    original = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute its logits as HeadSpec"):
        check_head_spec(model, head_spec(model))


def test_the_backbone_runs_once_if_the_model_gives_it_the_ids_alone() -> None:
    model, runs = tiny("llama"), []
    model.model.norm.register_forward_hook(lambda *_: runs.append(1))
    check_head_spec(model, head_spec(model))
    assert len(runs) == 1
    original = model.forward

    def shifted(input_ids: Tensor, **options: Any) -> Any:
        embeds = model.get_input_embeddings()(input_ids)
        embeds[:, 0] += 1
        return original(inputs_embeds=embeds, **options)

    model.forward = shifted
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute its logits as HeadSpec"):
        check_head_spec(model, head_spec(model))
    assert len(runs) == 3, "the backbone is also run on the ids"


def test_unusable_config_value() -> None:
    with pytest.raises(ValueError, match=r"config.logits_scaling is 0.0: expected a finite number above 0"):
        head_spec(GraniteConfig(**SIZES, logits_scaling=0.0))


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(9, 32, requires_grad=True), torch.randint(96, (9,))


def lora_head(dropout: float = 0.0) -> Any:
    config = LoraConfig(target_modules=["lm_head"], r=4, lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(tiny("llama"), config).get_base_model().lm_head


def saved_head() -> Any:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny("llama"), config).get_base_model().lm_head


def quantized_head() -> Any:
    import bitsandbytes as bnb

    head = bnb.nn.Linear4bit(32, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.weight = bnb.nn.Params4bit(torch.randn(96, 32), requires_grad=False, quant_type="nf4")
    return head.to("cpu")


def hooked_head() -> Any:
    head = nn.Linear(32, 96, bias=False)
    head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    return head.requires_grad_(False)


def patched_head() -> Any:
    head = nn.Linear(32, 96, bias=False).requires_grad_(False)
    head.forward = lambda hidden: hidden @ head.weight.T + 0.5 * hidden.sum(-1, keepdim=True).expand(-1, 96)
    return head


class OwnHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.tanh())


REFUSED = {
    "lora": (lora_head, "wrapped by an adapter"),
    "modules_to_save": (saved_head, "wrapped by an adapter"),
    "quantized": (quantized_head, "quantized or sharded"),
    "hooked": (hooked_head, "it has hooks"),
    "patched": (patched_head, "its forward is replaced"),
    "own class": (lambda: OwnHead(32, 96).requires_grad_(False), "it is a OwnHead, not an nn.Linear"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_heads_that_cannot_be_fused_take_the_reference(name: str) -> None:
    """One warning, the head's own logits, gradients for everything the head trains; an error if Triton is requested."""
    make, reason = REFUSED[name]
    head, (hidden_NH, target_N) = make(), rows()
    assert reason in why_not_fused(head)
    with pytest.raises(ValueError, match=f"impl is 'triton' but this head cannot be fused: .*{reason}"):
        head_logprobs(head, hidden_NH, target_N, spec=HeadSpec(), impl="triton")
    spec = HeadSpec(logit_scale=0.5, softcap=6.0)
    with pytest.warns(RuntimeWarning, match=f"slower reference path.*{reason}") as caught:
        logp_N, entropy_N, lse_N = head_logprobs(head, hidden_NH, target_N, spec=spec, temperature=0.8)
        head_logprobs(head, hidden_NH, target_N, spec=spec, compute_u=False)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    z_NV = 6 * torch.tanh(0.5 * head(hidden_NH).float() / 6) / 0.8
    log_p_NV = z_NV.log_softmax(1)
    expected_N = log_p_NV.gather(1, target_N[:, None])[:, 0]
    assert relative(logp_N.detach(), expected_N.detach()) < 1e-6
    assert relative(lse_N, z_NV.logsumexp(1).detach()) < 1e-6
    assert relative(entropy_N, -(log_p_NV.exp() * log_p_NV).sum(1).detach()) < 1e-6
    trained = [hidden_NH, *(p for p in head.parameters() if p.requires_grad)]
    assert len(trained) == {"lora": 3, "modules_to_save": 2}.get(name, 1)
    found, truth = (torch.autograd.grad(t.sum(), trained, allow_unused=True) for t in (logp_N, expected_N))
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < 1e-5 and other.abs().sum() > 0


@pytest.mark.parametrize("name", list(REFUSED))
def test_kl_of_heads_that_cannot_be_fused(name: str) -> None:
    """The KL of the head's own logits, with gradients for student and head; skipped rows do not reach the head."""
    make, reason = REFUSED[name]
    head, (student_NH, _) = make(), rows()
    teacher_NH = student_NH.detach() + 0.2 * torch.randn(9, 32)
    spec, keep_N = HeadSpec(logit_scale=0.5, softcap=6.0), torch.arange(9) != 4
    with pytest.raises(ValueError, match=f"impl is 'torch' but this head cannot be fused: .*{reason}"):
        head_kl(head, student_NH, teacher_NH, spec=spec, impl="torch")
    with pytest.warns(RuntimeWarning, match=f"KL divergences use the slower reference path.*{reason}") as caught:
        kl_N = head_kl(head, student_NH, teacher_NH, spec=spec, temperature=0.8, keep_N=keep_N)
        assert not head_kl(head, student_NH, teacher_NH, spec=spec, compute_u=False).requires_grad
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1

    def log_p(hidden_NH: Tensor) -> Tensor:
        return (6 * torch.tanh(0.5 * head(hidden_NH).double() / 6) / 0.8).log_softmax(1)

    log_p_NV, log_q_NV = log_p(student_NH), log_p(teacher_NH).detach()
    expected_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1) * keep_N
    assert relative(kl_N.detach(), expected_N.detach()) < 1e-5 and kl_N[4] == 0 < expected_N.sum()
    trained = [student_NH, *(p for p in head.parameters() if p.requires_grad)]
    found, truth = (torch.autograd.grad(t.sum(), trained, allow_unused=True) for t in (kl_N, expected_N))
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < 1e-4 and other.abs().sum() > 0


def test_kl_refuses_states_that_do_not_match_before_the_head_runs() -> None:
    with pytest.raises(ValueError, match=r"teacher_NH has shape \(8, 32\) and student_NH \(9, 32\)"):
        head_kl(patched_head(), torch.ones(9, 32), torch.ones(8, 32), spec=HeadSpec())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kl_of_the_models_own_heads(family: str) -> None:
    """Against the logits of two prompts that end in the same tokens."""
    model = tiny(family)
    ids_2T = torch.tensor([[5, 7, 11, 13, 17], [6, 7, 11, 13, 17]])
    hidden_2TH = model.base_model(input_ids=ids_2T).last_hidden_state
    log_p_TV, log_q_TV = model(input_ids=ids_2T).logits.float().log_softmax(-1)
    kl_T = head_kl(model.get_output_embeddings(), *hidden_2TH, spec=head_spec(model))
    expected_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1)
    assert relative(kl_T, expected_T) < 1e-4 and expected_T.sum() > 1e-3


def test_dropout_in_the_head_is_the_same_when_recomputed() -> None:
    """The gradient must belong to the log-probabilities that were returned."""
    head, (hidden_NH, target_N) = lora_head(dropout=0.5).train(), rows()
    torch.manual_seed(7)
    logp_N, _, _ = head_logprobs(head, hidden_NH, target_N, spec=HeadSpec())
    (found,) = torch.autograd.grad(logp_N.sum(), hidden_NH)
    torch.manual_seed(7)
    expected_N = head(hidden_NH).log_softmax(1).gather(1, target_N[:, None])[:, 0]
    (truth,) = torch.autograd.grad(expected_N.sum(), hidden_NH)
    assert relative(logp_N.detach(), expected_N.detach()) < 1e-6 and relative(found, truth) < 1e-5
    torch.manual_seed(7)
    kl_N = head_kl(head, hidden_NH, hidden_NH.detach() + 0.3, spec=HeadSpec())
    (found,) = torch.autograd.grad(kl_N.sum(), hidden_NH)
    torch.manual_seed(7)
    log_p_NV, log_q_NV = head(hidden_NH).log_softmax(1), head(hidden_NH.detach() + 0.3).log_softmax(1)
    expected_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1)
    (truth,) = torch.autograd.grad(expected_N.sum(), hidden_NH)
    assert relative(kl_N.detach(), expected_N.detach()) < 1e-5 and relative(found, truth) < 1e-4


def test_plain_heads_are_fused_in_silence() -> None:
    """A frozen head, a trained one, and one that accelerate hooked only to move its inputs."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    head, (hidden_NH, target_N) = nn.Linear(32, 96).requires_grad_(False), rows()
    expected = fused_logprobs(hidden_NH, head.weight, target_N, bias_V=head.bias)
    expected_N = fused_kl(hidden_NH, hidden_NH * 2, head.weight, bias_V=head.bias)
    hooked = add_hook_to_module(nn.Linear(32, 96).requires_grad_(False), AlignDevicesHook(execution_device="cpu"))
    assert why_not_fused(head) is None and why_not_fused(hooked) is None
    offloaded = add_hook_to_module(nn.Linear(32, 96), AlignDevicesHook(execution_device="cpu", offload=True))
    assert "offloaded" in why_not_fused(offloaded) or "sharded" in why_not_fused(offloaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = head_logprobs(head, hidden_NH, target_N, spec=HeadSpec())
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(head_kl(head, hidden_NH, hidden_NH * 2, spec=HeadSpec()), expected_N)
        head.requires_grad_(True)
        kl_N = head_kl(head, hidden_NH, hidden_NH * 2, spec=HeadSpec())
        logp_N, entropy_N, _ = head_logprobs(head, hidden_NH, target_N, spec=HeadSpec(), entropy_grad=True)
    for value_N in (logp_N, entropy_N, kl_N):
        assert torch.autograd.grad(value_N.sum(), head.weight, retain_graph=True)[0].abs().sum() > 0
