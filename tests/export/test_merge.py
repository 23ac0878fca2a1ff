"""A merged model equals the adapter model, rounded once. An unfinished export is never visible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mel_lite.export.merge as export_module
from mel_lite.errors import ConfigError, ExportError, ModelError
from mel_lite.export.merge import CHECK_PROMPTS, _exact_on_cpu, export, merge
from mel_lite.models.adapters import LoraSpec, adapter_base, attach_adapter, lora_config, write_fingerprint
from mel_lite.models.load import ModelSpec, load_base, load_tokenizer
from tiny_adapters import make_adapter
from tiny_models import save_tiny

IDS_BT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140]])
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), "llama", tied=True)


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(ModelSpec(str(base_dir)), tmp_path_factory.mktemp("adapter"))


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS_BT).logits[0].double().log_softmax(-1)


def mean_kl(model: Any, other: Any) -> float:
    p, q = logps(model), logps(other)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def adapter_model(adapter_dir: Path) -> Any:
    return attach_adapter(load_base(adapter_base(adapter_dir)), adapter_dir)


def plain(folder: Path) -> Any:
    """Load a model like a user without MEL-Lite."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# --- faithful --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tied", "stored"),
    [
        ("llama", True, "float32"),
        ("llama", False, "float16"),
        ("qwen3", True, "bfloat16"),
        ("qwen3", False, "float32"),
    ],
)
def test_merged_model_is_the_adapter_model(tmp_path: Path, kind: str, tied: bool, stored: str) -> None:
    base = ModelSpec(str(save_tiny(tmp_path / "base", kind, tied=tied, dtype=stored)))
    adapter = make_adapter(base, tmp_path / "adapter")
    report = export(adapter, tmp_path / "merged")
    assert report.dtype == ("bfloat16" if stored == "bfloat16" else "float16")  # the checkpoint's own 16-bit type
    merged, original = plain(tmp_path / "merged"), load_base(base)
    assert mean_kl(adapter_model(adapter), original) > 0.05  # the update is large
    assert mean_kl(adapter_model(adapter), merged) < (1e-3 if stored == "bfloat16" else 1e-4)
    stored_names = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored_names) is not tied
    assert {weight.dtype for weight in stored_names.values()} == {getattr(torch, report.dtype)}
    fidelity = report.fidelity
    assert fidelity is not None
    assert fidelity.tokens >= 200
    assert fidelity.is_faithful or stored == "bfloat16"  # 8 bits cannot separate all near-ties of a random model
    assert len(fidelity.greedy_equal) == len(CHECK_PROMPTS)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_host_without_memory_for_float32_computes_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, with bit-identical results. The weights in memory stay in 16 bits."""
    spec = ModelSpec(str(save_tiny(tmp_path / "base", kind, tied=kind == "llama", dtype="bfloat16")), dtype="bfloat16")
    whole = _exact_on_cpu(load_base(spec))
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}
    monkeypatch.setattr("mel_lite.export.merge._free_host_bytes", lambda: 1000)
    layered = _exact_on_cpu(load_base(spec))
    assert torch.equal(logps(layered), logps(whole)) and not torch.equal(logps(load_base(spec)), logps(whole))
    assert {weight.dtype for weight in layered.parameters()} == {torch.bfloat16}

    adapter = make_adapter(spec, tmp_path / "adapter")
    report = export(adapter, tmp_path / "merged")
    monkeypatch.undo()
    assert report.fidelity == export(adapter, tmp_path / "again").fidelity


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "modules_to_save"])
def test_merged_weights_follow_the_variant(base_dir: Path, tmp_path: Path, variant: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["norm"]},
    }
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **options.get(variant, {}))
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter", config)
    assert mean_kl(adapter_model(adapter), merge(adapter, ModelSpec(str(base_dir)), "float16").float()) < 1e-4


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
def test_each_weight_is_rounded_once(
    base_dir: Path, tmp_path: Path, rslora: bool, scaling: float, trained_in: str
) -> None:
    """trl#3466: an update added in bfloat16 is mostly lost. Here the sum is float32 even with a bfloat16 base."""
    spec = ModelSpec(str(base_dir), dtype=trained_in)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora)
    adapter = make_adapter(spec, tmp_path / "adapter", config, scale=1e-3)
    saved = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model." + WEIGHT.removesuffix(".weight")
    update = saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"] * scaling
    base_weight = load_file(base_dir / "model.safetensors")[WEIGHT].to(getattr(torch, trained_in)).float()
    merged_weight = merge(adapter, spec, "float16").state_dict()[WEIGHT]
    assert torch.equal(merged_weight, (base_weight + update).half())
    assert not torch.equal(merged_weight, base_weight.half())


def test_four_bit_base_is_merged_as_the_adapter_saw_it(base_dir: Path, tmp_path: Path) -> None:
    """unsloth-zoo#810: an update learned on dequantized weights does not fit the original ones."""
    four_bit = ModelSpec(str(base_dir), load_in_4bit=True)
    adapter = make_adapter(four_bit, tmp_path / "adapter", scale=0.02)
    report = export(adapter, tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    faithful = mean_kl(adapter_model(adapter), merged)
    naive = mean_kl(adapter_model(adapter), merge(adapter, ModelSpec(str(base_dir)), "float16").float())
    assert faithful < 1e-4
    assert naive > 100 * faithful
    assert report.fidelity is not None
    assert report.fidelity.is_faithful
    assert report.base.load_in_4bit
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_reported_figures_are_the_measured_ones(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Recomputes the figures in float64 from the folders, on the same tokens: prompts and the adapter's answers."""
    report = export(adapter_dir, tmp_path / "merged", dtype="bfloat16")
    fidelity = report.fidelity
    assert fidelity is not None
    model, merged, tokenizer = (
        adapter_model(adapter_dir),
        plain(tmp_path / "merged"),
        load_tokenizer(ModelSpec(str(base_dir))),
    )
    kls, same, equal = [], [], []
    for text in CHECK_PROMPTS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        outputs = [m.generate(**prompt, max_new_tokens=32, do_sample=False)[0] for m in (model, merged)]
        equal.append(outputs[0].tolist() == outputs[1].tolist())
        with torch.no_grad():
            p, q = (m(outputs[0][None]).logits[0].double().log_softmax(-1) for m in (model, merged))
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert fidelity.tokens == len(kls)
    assert fidelity.mean_kl_nats == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert fidelity.max_kl_nats == pytest.approx(max(kls), rel=1e-3)
    assert fidelity.top1_agreement == pytest.approx(sum(same) / len(same))
    assert fidelity.greedy_equal == tuple(equal)
    saved = json.loads((tmp_path / "merged" / "export_report.json").read_text())
    assert saved["fidelity"]["mean_kl_nats"] == fidelity.mean_kl_nats
    assert (saved["dtype"], saved["format"], saved["base"]["dtype"]) == ("bfloat16", "merged-16bit", "float32")


def test_a_lossy_merge_is_reported(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.merge

    def spoiled(*args: Any) -> Any:
        model = real(*args)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.3)
        return model

    monkeypatch.setattr(export_module, "merge", spoiled)
    report = export(adapter_dir, tmp_path / "merged", dtype="bfloat16")
    assert report.fidelity is not None
    assert not report.fidelity.is_faithful
    assert report.fidelity.mean_kl_nats > 1e-3
    assert "Serve the adapter on its base" in caplog.text
    assert "dtype float16" in caplog.text
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(report.as_table())
    text = console.export_text()
    assert f"{report.fidelity.mean_kl_nats:.1e} nats/token" in text
    assert "differs: serve the adapter" in text


def test_an_adapted_tied_embedding_does_not_change_the_head(base_dir: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(load_base(ModelSpec(str(base_dir))), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.manual_seed(0)) * 0.3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    write_fingerprint(tmp_path / "adapter", model)
    export(tmp_path / "adapter", tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    assert mean_kl(model, merged) < 1e-4
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_tokenizer_and_stop_tokens_are_exported_with_the_model(
    base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapter_dir, tmp_path / "adapter")
    tokenizer = load_tokenizer(ModelSpec(str(base_dir)))
    tokenizer.chat_template = "changed for training {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    export(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2], 0)


# --- the adapter alone -----------------------------------------------------------------------------------------------


def test_adapter_export_is_the_adapter_and_nothing_else(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter_dir, run / "adapter")
    (run / "adapter" / "optimizer.safetensors").write_text("not for serving")
    report = export(run, tmp_path / "out", format="adapter")
    assert report.fidelity is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export_report.json",
        "mel_lite.json",
    ]
    with torch.no_grad():
        assert torch.equal(logps(adapter_model(tmp_path / "out")), logps(adapter_model(adapter_dir)))


def test_newest_whole_checkpoint_of_a_run_is_found(adapter_dir: Path, tmp_path: Path) -> None:
    for step, whole in ((9, True), (10, True), (100, False)):
        folder = shutil.copytree(adapter_dir, tmp_path / f"checkpoint-{step}")
        if whole:
            (folder / "manifest.json").write_text("{}")
    for aside in ("checkpoint-11.corrupt", "checkpoint-12.superseded"):
        (shutil.copytree(adapter_dir, tmp_path / aside) / "manifest.json").write_text("{}")
    assert export(tmp_path, tmp_path / "out", format="adapter").adapter.name == "checkpoint-10"
    with pytest.raises(ModelError, match="holds no adapter"):
        export(tmp_path / "nowhere", tmp_path / "out2")


def test_a_moved_base_is_loaded_as_it_was_in_training(base_dir: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base_dir, tmp_path / "first")
    adapter = make_adapter(ModelSpec(str(moved), load_in_4bit=True, double_quant=False), tmp_path / "adapter")
    moved.rename(tmp_path / "second")
    with pytest.raises(ModelError, match="no such folder"):
        export(adapter, tmp_path / "out")
    report = export(adapter, tmp_path / "out", base=ModelSpec(str(tmp_path / "second")))
    assert (report.base.load_in_4bit, report.base.double_quant, report.base.dtype) == (True, False, "float32")
    assert report.base.name == str(tmp_path / "second")


# --- errors ----------------------------------------------------------------------------------------------------------


def nothing_left(folder: Path, expected: set[str]) -> bool:
    return {path.name for path in folder.iterdir()} == expected


def test_untrained_adapter_is_rejected_unless_allowed(base_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(ModelSpec(str(base_dir)), tmp_path / "adapter", scale=0.0)
    for format in ("adapter", "merged-16bit"):
        with pytest.raises(ExportError, match="learned nothing"):
            export(adapter, tmp_path / "out", format=format)
    assert nothing_left(tmp_path, {"adapter"})
    export(adapter, tmp_path / "out", allow_untrained=True)
    assert mean_kl(load_base(ModelSpec(str(base_dir))), plain(tmp_path / "out")) < 1e-4


def test_adapter_with_nan_is_rejected(adapter_dir: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(adapter_dir, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="NaN"):
        export(adapter, tmp_path / "out", allow_untrained=True)


def test_existing_output_is_not_touched(adapter_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("out", "file"):
        with pytest.raises(ExportError, match="exists"):
            export(adapter_dir, tmp_path / target, format="adapter")
    assert (tmp_path / "out" / "precious").read_text() == (tmp_path / "file").read_text() == "mine"
    assert nothing_left(tmp_path, {"out", "file"})
    (tmp_path / "out" / "precious").unlink()
    export(adapter_dir, tmp_path / "out", format="adapter")  # an empty folder is fine
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("options", "message"), [({"format": "gguf"}, "gguf"), ({"dtype": "float32"}, "float32")])
def test_unknown_format_and_dtype_are_rejected(adapter_dir: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(adapter_dir, tmp_path / "out", **options)


def test_wrong_base_short_disk_and_overflow_leave_nothing_behind(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModelSpec(str(save_tiny(tmp_path / "other", seed=7)))
    with pytest.raises(ModelError, match="was trained on"):
        export(adapter_dir, tmp_path / "out", base=other)
    with monkeypatch.context() as patch:
        patch.setattr(export_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**7))
        with pytest.raises(ExportError, match=r"needs 0\.1 GB"):
            export(adapter_dir, tmp_path / "out")
    large = make_adapter(ModelSpec(str(base_dir)), tmp_path / "large", scale=1e6)
    with pytest.raises(ExportError, match="range of float16"):
        export(large, tmp_path / "out", dtype="float16")
    assert nothing_left(tmp_path, {"other", "large"})


def test_an_interrupted_export_is_never_visible(
    adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        assert next(tmp_path.glob(".out.*.partial/model.safetensors"))  # written, not yet checked
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(adapter_dir, tmp_path / "out")
    assert nothing_left(tmp_path, set())


@pytest.mark.slow
def test_a_killed_export_is_never_visible_and_is_deleted(adapter_dir: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; import mel_lite.export.merge as e\n"
        "e._compare = lambda *a: os._exit(9)\n"
        "e.export(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    target = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-P", "-c", script, str(adapter_dir), str(target)], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    (remains,) = tmp_path.iterdir()
    assert remains.name.endswith(".partial")
    assert (remains / "model.safetensors").is_file()
    alive = tmp_path / f".out.{os.getppid()}.partial"  # another export, still running
    alive.mkdir()
    export(adapter_dir, target, format="adapter")
    assert nothing_left(tmp_path, {"out", alive.name})


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_model_merges_faithfully(tmp_path: Path) -> None:
    adapter = make_adapter(ModelSpec("demo"), tmp_path / "adapter", lora_config(LoraSpec(r=8)), scale=0.02)
    report = export(adapter, tmp_path / "merged")
    fidelity = report.fidelity
    assert fidelity is not None
    assert report.dtype == "float16"
    assert fidelity.mean_kl_nats < 1e-4
    assert fidelity.top1_agreement >= 0.995
    assert sum(fidelity.greedy_equal) >= 7  # a near-tie may be decided differently
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    chat = [{"role": "user", "content": "What is 3 + 4? Answer with the number only."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    trained, base, merged = adapter_model(adapter), load_base(ModelSpec("demo")), plain(tmp_path / "merged")
    answers = [model.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist() for model in (trained, merged)]
    assert answers[0] == answers[1]
    assert mean_kl(trained, base) > 0.01
