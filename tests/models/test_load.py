"""Base models and tokenizers: loading, settings, and errors for what cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from peft import get_peft_model
from safetensors.torch import load_file

from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.adapters import (
    LoraSpec,
    lora_config,
)
from mel_lite.models.load import (
    ModelSpec,
    check_weights,
    context_length,
    load_base,
    load_config,
    load_tokenizer,
    turn_end_id,
)
from tiny_adapters import make_adapter
from tiny_models import CHAT_TEMPLATE, save_tiny, set_lora, tiny_config, tiny_tokenizer

IDS_BT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "qwen3", tied=True)


# --- specs -----------------------------------------------------------------------------------------------------------


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
        ("model.gguf", "name of a file"),
        (__file__, "name of a file"),
        ("a b c", "spelling"),
    ],
)
def test_a_model_that_cannot_be_found_has_an_error_with_the_fix(name: str, advice: str) -> None:
    for load in (load_base, load_tokenizer):
        with pytest.raises(ModelError, match=advice) as caught:
            load(ModelSpec(name))
        assert name in str(caught.value)


def test_files_that_are_missing_or_cut_off_are_found_before_a_load(base_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base_dir, tmp_path / "base")
    check_weights(ModelSpec(str(folder)))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="its files are corrupt"):
        check_weights(ModelSpec(str(folder)))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(ModelSpec(str(folder)))


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
        load_base(ModelSpec(str(make_adapter(ModelSpec(str(base_dir)), tmp_path))))


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


def test_the_chat_template_of_an_adapter_is_used(tmp_path: Path) -> None:
    """With a tokenizer saved in the folder, with its template alone, and with a tokenizer that has none."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_config().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter.mkdir()

    def template() -> str:
        return load_tokenizer(ModelSpec(str(base)), saved_in=adapter).chat_template

    assert template() == CHAT_TEMPLATE
    (adapter / "chat_template.jinja").write_text("{{ 'own' }}")
    assert template() == "{{ 'own' }}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'saved' }}"
    tokenizer.save_pretrained(adapter)
    assert template() == "{{ 'saved' }}"
    (adapter / "chat_template.jinja").unlink()
    assert template() == CHAT_TEMPLATE


def test_template_that_ends_a_turn_with_another_token_is_reported(tmp_path: Path, caplog) -> None:
    tiny_config().save_pretrained(tmp_path)
    tiny_tokenizer(eos="<|endoftext|>", pad="<|fim_pad|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSpec(str(tmp_path)))
    assert turn_end_id(tokenizer) == 2
    assert "ends a turn with <|im_end|> but eos is <|endoftext|>" in caplog.text


def test_a_template_that_rejects_an_answered_turn_loads(tmp_path: Path) -> None:
    """Which conversations it rejects is for `render` to say, with their rows."""
    tiny_config().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('one turn') if messages|length > 1 else messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert turn_end_id(load_tokenizer(ModelSpec(str(tmp_path)))) is None


def test_a_missing_chat_template_is_reported_and_a_missing_eos_rejected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
