"""Adapters that a trainer is given, and the ones it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import trainers
from mel_lite.errors import ConfigError, MelLiteError, ModelError
from mel_lite.export import export
from mel_lite.kernels import check_head_spec, head_spec
from mel_lite.models.adapters import attach_adapter, base_fingerprint, write_fingerprint
from mel_lite.models.load import ModelSpec, load_base
from tiny_models import save_tiny, set_lora

IDS_BT = torch.arange(4, 20)[None]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def adapted(base: Path, **options: Any) -> Any:
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora(**options))


@pytest.mark.parametrize("inside", ["adapter", "model"])
def test_the_head_check_ignores_dropout_and_restores_every_mode(tmp_path: Path, inside: str) -> None:
    if inside == "adapter":
        peft_model = adapted(save_tiny(tmp_path / "base"), lora_dropout=0.5)
        set_lora(peft_model, 0.05)
        model = peft_model.get_base_model()
    else:
        config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.5, resid_pdrop=0.5)
        model = AutoModelForCausalLM.from_config(config)
    model.train()
    model.base_model.get_submodule("layers.0" if inside == "adapter" else "h.0").eval()
    modes = [module.training for module in model.modules()]
    check_head_spec(model, head_spec(model))
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_frozen_adapter_is_refused(tmp_path: Path, beta: float) -> None:
    base = save_tiny(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with pytest.raises(ModelError, match="is_trainable=True"):
        trainers.build(tmp_path, model=frozen, lora=False, beta=beta)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(init_lora_weights="pissa"), "changes the base weights"),
        (lora(init_lora_weights="olora"), "changes the base weights"),
        (lora(inference_mode=True), "freezes the adapter"),
        (lora(target_modules=["lm_head"]), "output head"),
        (lora(target_modules=["nope"]), "PEFT cannot build"),
        (lora(layer_replication=[(0, 1), (0, 2)]), "changed the base model"),
        (lora(lora_alpha=0), "multiplies the adapter by 0"),
        (lora(trainable_token_indices=[-1]), "token ids from 0 on"),
        (lora(trainable_token_indices={"embed_tokens": []}), "token ids from 0 on"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"), "virtual tokens"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "virtual tokens"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, words: str
) -> None:
    monkeypatch.setattr(trainers, "LoraConfig", lambda **_: config)
    with pytest.raises(ConfigError, match=words):
        trainers.build(tmp_path)


def other(model: Any) -> Any:
    model.add_adapter("other", lora())
    model.set_adapter("other")
    return model


def both(model: Any) -> Any:
    other(model).base_model.set_adapter(["default", "other"])
    return model


def merged(model: Any) -> Any:
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other, "active adapter is 'other'"),
        (both, "active adapter is 'default', 'other'"),
        (merged, "merged into the base"),
        (lambda model: model.get_base_model(), "has adapter layers but is no PeftModel"),
    ],
)
def test_an_adapter_that_a_checkpoint_would_not_hold_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    model = change(adapted(save_tiny(tmp_path / "base")))
    with pytest.raises(ConfigError, match=words):
        trainers.build(tmp_path, model=model, lora=False)


def test_what_trl_says_of_adapters_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`PeftModel` instance together with a `peft_config`"):
        trainers.build(tmp_path, model=adapted(save_tiny(tmp_path / "base")))
    with pytest.raises(ConfigError, match="sync_ref_model=True"):
        trainers.build(tmp_path, beta=0.04, sync_ref_model=True)


def test_weights_of_the_base_are_not_trained_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 has biases, which `bias="all"` thaws."""
    save_tiny(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=320, num_key_value_heads=2, **sizes))
    monkeypatch.setattr(trainers, "LoraConfig", lambda **_: lora(bias="all"))
    with pytest.raises(ConfigError, match="3 weights of the base"):
        trainers.build(tmp_path, model=model)


def test_a_vocabulary_resized_in_memory_is_refused(tmp_path: Path) -> None:
    model = trainers.tiny_model(tmp_path / "base")
    model.resize_token_embeddings(330)
    with pytest.raises(ModelError, match="resized from 320 to 330"):
        trainers.build(tmp_path, model=model)


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [5, 9]},
        {"trainable_token_indices": {"lm_head": [5]}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_what_a_tied_model_trains_survives_save_and_export(tmp_path: Path, options: dict[str, Any]) -> None:
    base = save_tiny(tmp_path / "base", tied=True)
    model = adapted(base, **options)
    before = base_fingerprint(load_base(ModelSpec(str(base))))
    set_lora(model, 0.05)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    assert base_fingerprint(model) == before
    model.save_pretrained(tmp_path / "adapter")
    write_fingerprint(tmp_path / "adapter", model)
    expected = model.eval()(input_ids=IDS_BT).logits
    loaded = attach_adapter(load_base(ModelSpec(str(base))), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=IDS_BT).logits, expected)
    report = export(tmp_path / "adapter", tmp_path / "merged")
    assert report.fidelity is not None
    assert report.fidelity.mean_kl_nats < 1e-4


def test_another_kind_of_adapter_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    monkeypatch.setattr(trainers, "LoraConfig", lambda **_: config)
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainers.build(tmp_path, output_dir=tmp_path / "whole", max_steps=2)
    whole.train()
    trainers.build(tmp_path, max_steps=1, lr_scheduler_type="constant", **saving).train()
    second = trainers.build(tmp_path, max_steps=2, lr_scheduler_type="constant", **saving)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2
    with pytest.raises(MelLiteError, match="IA3; only LoRA"):
        export(tmp_path / "run", tmp_path / "merged")


def test_a_checkpoint_of_another_folder_continues_with_a_new_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainers.build(tmp_path, output_dir=tmp_path / "one", max_steps=1, save_strategy="steps", save_steps=1).train()
    second = trainers.build(tmp_path, output_dir=tmp_path / "two", max_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))
    assert second.state.global_step == 2
    assert second.store.last_id() > 0
    assert "earlier lessons stay" in caplog.text
