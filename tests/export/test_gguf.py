"""GGUF export: llama.cpp's tools are called as documented, and their output loads back in transformers.

llama.cpp itself is replaced by a fake with the same command line, which writes a real GGUF file of the merged model
with the `gguf` package. So the file, its tensors and its logits are checked, but not llama.cpp's own conversion.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mel_lite.errors import ExportError
from mel_lite.export.gguf import GGUF_TYPES
from mel_lite.export.merge import export
from mel_lite.models.load import ModelSpec
from mel_lite.recipe import resolve
from mel_lite.run.train import check
from tiny_adapters import make_adapter
from tiny_models import save_tiny

CONVERTER = """
import argparse, json, pathlib, sys
import gguf, numpy as np, torch
from safetensors.torch import load_file
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path, required=True)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0"], required=True)
asked = parser.parse_args()
config = json.loads((asked.model / "config.json").read_text())
writer = gguf.GGUFWriter(asked.outfile, "llama")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_key_length(config["head_dim"])
writer.add_value_length(config["head_dim"])
writer.add_rope_dimension_count(config["head_dim"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
writer.add_tokenizer_model("gpt2")
writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
writer.add_token_merges(["t 0"])
writer.add_eos_token_id(2)
names = {"embed_tokens": "token_embd", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
for name, weight in load_file(asked.model / "model.safetensors").items():
    stem = name.removeprefix("model.").removesuffix(".weight")
    if stem == "norm":
        out = "output_norm"
    elif stem == "embed_tokens":
        out = "token_embd"
    else:
        _, layer, rest = stem.split(".", 2)
        out = f"blk.{layer}.{names[rest]}"
    values = weight.float()
    if stem.endswith(("q_proj", "k_proj")):  # llama.cpp keeps the halves of a head interleaved
        heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    values = values.numpy()
    if weight.ndim == 1:
        writer.add_tensor(out + ".weight", values.astype(np.float32))
    elif asked.outtype == "q8_0":
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(out + ".weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(out + ".weight", values.astype(np.float16))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""
QUANTIZER = '#!/bin/sh\ntest "$3" = Q4_K_M || exit 1\ncp "$1" "$2"\n'
IDS_BT = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 110, 120]])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder with a trained adapter of a tiny Llama."""
    base = save_tiny(tmp_path / "base", "llama", tied=True)
    return make_adapter(ModelSpec(str(base)), tmp_path / "adapter")


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkout of llama.cpp with the fake programs."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    quantizer = folder / "build" / "bin" / "llama-quantize"
    quantizer.write_text(QUANTIZER)
    quantizer.chmod(quantizer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        pytest.param("f16", 2e-3, marks=pytest.mark.slow),
        pytest.param("q8_0", 0.15, marks=pytest.mark.slow),
        ("q4_k_m", 2e-3),  # an f16 file that is quantized
    ],
)
def test_the_file_loads_back_with_the_logits_of_the_model(
    run: Path, llama_cpp: Path, tmp_path: Path, kind: str, tolerance: float
) -> None:
    report = export(run, tmp_path / "out", format=kind)
    assert report.format == kind and report.fidelity is not None and report.fidelity.is_faithful
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", f"base-{kind}.gguf", "export_report.json"]
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["format"] == kind
    assert f"converted to {kind} by llama.cpp" in (tmp_path / "out" / "README.md").read_text()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=names[1], dtype=torch.float32)
    export(run, tmp_path / "merged")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        logits = [model.eval()(IDS_BT).logits for model in (loaded, expected, base)]
    error, change = (logits[0] - logits[1]).abs().max(), (logits[2] - logits[1]).abs().max()
    assert error <= tolerance * logits[1].abs().max() and change > 3 * error


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_without_llama_cpp_the_error_has_the_commands_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError) as error:
        export(run, tmp_path / "out", format=kind)
    said = str(error.value)
    assert "git clone --depth 1 https://github.com/ggml-org/llama.cpp" in said
    assert f"LLAMA_CPP=llama.cpp mel-lite export {run} --format {kind} --output {tmp_path / 'out'}" in said
    assert ("cmake --build" in said) == (kind == "q4_k_m") and not (tmp_path / "out").exists()


def test_the_error_has_the_message_of_the_converter(run: Path, llama_cpp: Path, tmp_path: Path) -> None:
    (llama_cpp / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model Foo is not supported')")
    with pytest.raises(
        ExportError, match=r"exit code 1: Model Foo is not supported\nThe command was: .*--outtype q8_0"
    ):
        export(run, tmp_path / "out", format="q8_0")
    (llama_cpp / "convert_hf_to_gguf.py").write_text("print('done')")
    with pytest.raises(ExportError, match="exit code 0: done"):
        export(run, tmp_path / "out", format="f16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_recipe_with_gguf_is_checked_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve(preset="cpu", overrides=[("export.format", "q8_0")])
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ExportError, match="convert_hf_to_gguf.py"):
        check(recipe, tmp_path / "run")
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert check(recipe, tmp_path / "run").output_dir == str(tmp_path / "run")
