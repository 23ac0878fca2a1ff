"""LoRA adapters: settings, the fingerprint of their base, and attaching them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.adapters import (
    LoraSpec,
    adapter_base,
    attach_adapter,
    base_fingerprint,
    hub_id_of,
    lora_config,
    same_base,
    write_fingerprint,
)
from mel_lite.models.load import ModelSpec, load_base
from tiny_adapters import make_adapter
from tiny_models import save_tiny, set_lora

IDS_BT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "qwen3", tied=True)


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
    plain = make_adapter(ModelSpec(str(base_dir), dtype="bfloat16"), tmp_path / "plain")
    assert adapter_base(plain) == ModelSpec(str(base_dir), dtype="bfloat16")
    spec = ModelSpec(str(base_dir), load_in_4bit=True, double_quant=False)
    four_bit = make_adapter(spec, tmp_path / "four_bit")
    assert adapter_base(four_bit) == ModelSpec(
        str(base_dir), dtype="float32", load_in_4bit=True, quant_type="nf4", double_quant=False
    )


def test_an_adapter_of_another_base_is_rejected_naming_both(base_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter")
    other = save_tiny(tmp_path / "other", "qwen3", seed=5)
    with pytest.raises(ModelError) as caught:
        attach_adapter(load_base(ModelSpec(str(other))), adapter)
    assert str(base_dir) in str(caught.value)
    assert str(other) in str(caught.value)


def test_an_adapter_without_record_is_checked_by_name_and_shape(
    base_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter")
    (adapter / "mel_lite.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # a local folder is no name elsewhere
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base_dir)}))
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
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter")
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


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Base"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B-Base/snapshots/0123abcd", "Qwen/Qwen3-4B-Base"),
        ("/data/models/mine", None),
        ("./mine", None),
        ("../models/mine", None),
        ("demo", None),
    ],
)
def test_saved_files_name_a_base_on_the_hub_or_none(name: str, hub_id: str | None) -> None:
    assert hub_id_of(name) == hub_id


def test_a_saved_adapter_is_readable_and_names_no_local_path(base_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter")
    modes = {path.name: path.stat().st_mode & 0o777 for path in adapter.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
    card = (adapter / "README.md").read_text()
    assert str(tmp_path.parent) not in card + (adapter / "adapter_config.json").read_text()
    assert "None" not in card
    assert "base_model" not in card
