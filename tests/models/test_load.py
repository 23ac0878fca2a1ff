"""Base models, tokenizers and adapters: loading, settings, and errors for what cannot be used."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.adapters import (
    LoraSpec,
    adapter_base,
    attach_adapter,
    base_fingerprint,
    lora_config,
    same_base,
    write_fingerprint,
)
from mel_lite.models.load import ModelSpec, context_length, load_base, load_config, load_tokenizer, turn_end_id
from tiny_models import save_tiny, set_lora, tiny_config, tiny_tokenizer

IDS_BT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "qwen3", tied=True)


def _adapter(base_dir: Path, out: Path, spec: LoraSpec | None = None, **model_options) -> Path:
    model = get_peft_model(load_base(ModelSpec(str(base_dir), **model_options)), lora_config(spec or LoraSpec(r=4)))
    set_lora(model, 0.1)
    model.save_pretrained(out)
    write_fingerprint(out, model)
    return out


# --- specs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (LoraSpec(target_modules=["q_proj", "model.lm_head"]), "lm_head"),
        (LoraSpec(target_modules="q_proj"), "target_modules"),
        (LoraSpec(target_modules=[]), "target_modules"),
        (LoraSpec(r=0), "r=0"),
        (LoraSpec(dropout=1.0), "dropout=1.0"),
        (LoraSpec(init="pissa"), "pissa"),
    ],
)
def test_a_lora_spec_that_cannot_work_is_rejected(spec: LoraSpec, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        lora_config(spec)


def test_all_linear_reaches_every_linear_layer_but_the_head(tmp_path: Path) -> None:
    model = get_peft_model(load_base(ModelSpec(str(save_tiny(tmp_path, tied=False)))), lora_config(LoraSpec(r=2)))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("options", "field"), [({"name": ""}, "name"), ({"name": "x", "dtype": "fp16"}, "fp16")])
def test_a_model_spec_that_cannot_work_is_rejected(options: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelSpec(**options)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("./nowhere", "no such folder"),
        ("/no/such/place", "no such folder"),
        ("owner/never-cached", "demo model"),
        ("a b c", "spelling"),
    ],
)
def test_a_model_that_cannot_be_found_has_an_error_with_the_fix(name: str, advice: str) -> None:
    for load in (load_base, load_tokenizer):
        with pytest.raises(ModelError, match=advice) as caught:
            load(ModelSpec(name))
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (hub.GatedRepoError, "gated"),
        (hub.RepositoryNotFoundError, "no such repository"),
        (hub.RevisionNotFoundError, "no such revision"),
    ],
)
def test_errors_of_the_hub_have_a_fix(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], advice: str) -> None:
    """Fakes the Hub's error as transformers wraps it, since tests do not use the network."""
    request = httpx.Request("GET", "https://huggingface.co/owner/name")

    def refuse(*_: object, **__: object) -> None:
        try:
            raise kind("refused", response=httpx.Response(403, request=request))
        except Exception as error:
            raise OSError("wrapped") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=advice):
        load_config(ModelSpec("owner/name"))


def test_an_adapter_is_not_a_base(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a LoRA adapter"):
        load_base(ModelSpec(str(_adapter(base_dir, tmp_path))))


def test_pickled_weights_are_not_opened(base_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_base(ModelSpec(str(folder)))


def test_repository_code_is_never_run(base_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "custom")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(ModelError, match="never runs"):
        load_base(ModelSpec(str(folder)))
    assert not (tmp_path / "canary").exists()


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eos", "pad", "expected"),
    [
        ("<|im_end|>", "<|endoftext|>", "<|endoftext|>"),  # already distinct: kept
        ("<|endoftext|>", "<|endoftext|>", "<|fim_pad|>"),  # Qwen3-Base ships pad = eos
        ("<|im_end|>", None, "<|fim_pad|>"),
    ],
)
def test_pad_token_differs_from_eos(tmp_path: Path, eos: str, pad: str | None, expected: str) -> None:
    tiny_tokenizer(eos=eos, pad=pad).save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSpec(str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (expected, eos, "left")
    assert len(tokenizer) == 260  # no token was added


def test_template_that_ends_a_turn_with_another_token_is_reported(tmp_path: Path, caplog) -> None:
    tiny_config().save_pretrained(tmp_path)
    tiny_tokenizer(eos="<|endoftext|>", pad="<|fim_pad|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSpec(str(tmp_path)))
    assert turn_end_id(tokenizer) == 2
    assert "ends a turn with <|im_end|> but eos is <|endoftext|>" in caplog.text


def test_a_missing_chat_template_is_reported_and_a_missing_eos_rejected(tmp_path: Path, caplog) -> None:
    tiny_config().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert turn_end_id(load_tokenizer(ModelSpec(str(tmp_path)))) is None
    assert "no chat template" in caplog.text
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(ModelSpec(str(tmp_path)))


def test_context_length_is_read_from_model_or_config(base_dir: Path) -> None:
    assert context_length(tiny_config()) == 512
    assert context_length(load_base(ModelSpec(str(base_dir)))) == 512
    assert context_length(load_config(ModelSpec(str(base_dir)))) == 512
    with pytest.raises(ModelError, match="context length"):
        context_length(transformers.MambaConfig())


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_ignores_adapter_dtype_and_quantization(base_dir: Path) -> None:
    name = str(base_dir)
    plain = base_fingerprint(load_base(ModelSpec(name)))
    wrapped = get_peft_model(load_base(ModelSpec(name)), lora_config(LoraSpec(r=4)))
    set_lora(wrapped, 1.0)
    assert base_fingerprint(wrapped) == plain
    for dtype in ("bfloat16", "float16"):
        assert base_fingerprint(load_base(ModelSpec(name, dtype=dtype))) == plain
    four_bit = base_fingerprint(load_base(ModelSpec(name, load_in_4bit=True)))
    assert four_bit != plain
    assert same_base(four_bit, plain)


def test_the_fingerprint_distinguishes_models(base_dir: Path, tmp_path: Path) -> None:
    plain = base_fingerprint(load_base(ModelSpec(str(base_dir))))
    other_seed = base_fingerprint(load_base(ModelSpec(str(save_tiny(tmp_path / "a", "qwen3", seed=9)))))
    untied = base_fingerprint(load_base(ModelSpec(str(save_tiny(tmp_path / "b", "qwen3", tied=False)))))
    model = load_base(ModelSpec(str(base_dir)))
    with torch.no_grad():  # a light fine-tune of one kind of layer
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            weight.add_(torch.randn(weight.shape, generator=torch.manual_seed(0)) * weight.std() * 0.02)
    fine_tuned = base_fingerprint(model)
    assert [same_base(plain, other) for other in (plain, other_seed, untied, fine_tuned)] == [True, False, False, False]


# --- attaching an adapter --------------------------------------------------------------------------------------------


def test_attached_adapter_gives_the_saved_models_logits(base_dir: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_base(ModelSpec(str(base_dir))), lora_config(LoraSpec(r=4, use_rslora=True)))
    set_lora(model, 0.1)
    model.save_pretrained(tmp_path)
    write_fingerprint(tmp_path, model)
    with torch.no_grad():
        expected = model.eval()(IDS_BT).logits
        bare = load_base(ModelSpec(str(base_dir)))(IDS_BT).logits
        attached = attach_adapter(load_base(adapter_base(tmp_path)), tmp_path)
        assert torch.equal(attached(IDS_BT).logits, expected)
    assert (expected - bare).abs().max() > 0.1
    assert not any(weight.requires_grad for weight in attached.parameters())
    trainable = attach_adapter(load_base(adapter_base(tmp_path)), tmp_path, trainable=True)
    assert {name.split(".")[-3] for name, w in trainable.named_parameters() if w.requires_grad} == {"lora_A", "lora_B"}


def test_the_record_holds_how_the_base_was_loaded(base_dir: Path, tmp_path: Path) -> None:
    plain = _adapter(base_dir, tmp_path / "plain", dtype="bfloat16")
    assert adapter_base(plain) == ModelSpec(str(base_dir), dtype="bfloat16")
    four_bit = _adapter(base_dir, tmp_path / "four_bit", load_in_4bit=True, double_quant=False)
    assert adapter_base(four_bit) == ModelSpec(
        str(base_dir), dtype="float32", load_in_4bit=True, quant_type="nf4", double_quant=False
    )


def test_an_adapter_of_another_base_is_rejected_naming_both(base_dir: Path, tmp_path: Path) -> None:
    adapter = _adapter(base_dir, tmp_path / "adapter")
    other = save_tiny(tmp_path / "other", "qwen3", seed=5)
    with pytest.raises(ModelError) as caught:
        attach_adapter(load_base(ModelSpec(str(other))), adapter)
    assert str(base_dir) in str(caught.value)
    assert str(other) in str(caught.value)


def test_an_adapter_without_record_is_checked_by_name_and_shape(base_dir: Path, tmp_path: Path, caplog) -> None:
    adapter = _adapter(base_dir, tmp_path / "adapter")
    (adapter / "mel_lite.json").unlink()
    attach_adapter(load_base(ModelSpec(str(base_dir))), adapter)
    assert "was trained on" not in caplog.text
    same_shape = save_tiny(tmp_path / "same_shape", "qwen3", seed=5)
    with caplog.at_level(logging.WARNING):
        attach_adapter(load_base(ModelSpec(str(same_shape))), adapter)
    assert f"was trained on {str(base_dir)!r}" in caplog.text
    wider = save_tiny(tmp_path / "wider", "qwen3", hidden=128)
    with pytest.raises(ModelError, match="does not fit"):
        attach_adapter(load_base(ModelSpec(str(wider))), adapter)
    shallower = save_tiny(tmp_path / "shallower", "qwen3", layers=1)
    with pytest.raises(ModelError, match="no layer for"):
        attach_adapter(load_base(ModelSpec(str(shallower))), adapter)


def test_damaged_adapters_are_rejected(base_dir: Path, tmp_path: Path) -> None:
    adapter = _adapter(base_dir, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")

    def changed(name: str, keep: dict[str, torch.Tensor]) -> Path:
        folder = shutil.copytree(adapter, tmp_path / name)
        save_file(keep, folder / "adapter_model.safetensors")
        return folder

    first = sorted(weights)[0]
    cases = {
        "is missing": changed("missing", {k: v for k, v in weights.items() if k != first}),
        "no layer for": changed("extra", weights | {first.replace("layers.0", "layers.7"): weights[first].clone()}),
        "does not fit": changed(
            "rank", {k: v[:2].clone() if "lora_A" in k else v[:, :2].clone() for k, v in weights.items()}
        ),
    }
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cases["never loaded"] = pickled
    unreadable = shutil.copytree(adapter, tmp_path / "unreadable")
    (unreadable / "mel_lite.json").write_text("{")
    cases["unreadable"] = unreadable
    cases["no adapter_config.json"] = base_dir
    for message, folder in cases.items():
        with pytest.raises(ModelError, match=message):
            attach_adapter(load_base(ModelSpec(str(base_dir))), folder)


def test_adapted_head_can_be_used_but_not_trained(tmp_path: Path) -> None:
    from peft import LoraConfig

    base = ModelSpec(str(save_tiny(tmp_path / "base", tied=False)))
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    set_lora(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    attached = attach_adapter(load_base(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(attached(IDS_BT).logits, model.eval()(IDS_BT).logits)
    with pytest.raises(ModelError, match="output head"):
        attach_adapter(load_base(base), tmp_path / "adapter", trainable=True)


# --- 4-bit -----------------------------------------------------------------------------------------------------------


def test_four_bit_quantizes_only_the_linear_layers(base_dir: Path) -> None:
    model = load_base(ModelSpec(str(base_dir), load_in_4bit=True))
    kinds = {type(model.model.layers[0].mlp.up_proj).__name__, type(model.lm_head).__name__}
    assert kinds == {"Linear4bit", "Linear"}
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "nf4"
    with torch.no_grad():
        full = load_base(ModelSpec(str(base_dir)))(IDS_BT).logits
        error = (model(IDS_BT).logits - full).norm() / full.norm()
    assert 0.001 < error < 0.5  # quantized, and still the same model


def test_a_four_bit_model_has_gradients_after_generation(base_dir: Path) -> None:
    """On AVX512-BF16 machines, bitsandbytes repacks weights in evaluation mode for a kernel without a backward pass.

    Without `keep_four_bit_layout`, only the LoRA weights of the last layers would get a gradient afterwards.
    """
    model = get_peft_model(load_base(ModelSpec(str(base_dir), load_in_4bit=True)), lora_config(LoraSpec(r=4)))
    set_lora(model, 0.1)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.train()
        model.zero_grad()
        loss = model(IDS_BT, labels=IDS_BT).loss
        loss.backward()
        return loss.item(), {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}

    loss, before = gradients()
    model.eval()
    with torch.no_grad():
        evaluated = model(IDS_BT, labels=IDS_BT).loss.item()
    loss_after, after = gradients()
    assert evaluated == loss == loss_after
    assert before.keys() == after.keys() == weights.keys()
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert min(g.abs().max() for g in before.values()) > 0
