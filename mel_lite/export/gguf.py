"""Write GGUF files for llama.cpp, Ollama and LM Studio with llama.cpp's own tools."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mel_lite.errors import ExportError
from mel_lite.recipe import GgufType

GGUF_TYPES: tuple[str, ...] = get_args(GgufType)
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
FOLDER = "LLAMA_CPP"
"""Environment variable with the path of a checkout of llama.cpp."""
PLACES = ("", "build/bin", "bin")
"""Subfolders of a checkout that may hold the tools."""


@dataclass(frozen=True, slots=True)
class Tools:
    """llama.cpp's programs for one GGUF type."""

    converter: Path
    quantizer: Path | None


def find_tools(kind: str, source: Path, options: Sequence[str] = ()) -> Tools:
    """Find the programs that write a GGUF file of this type, in $LLAMA_CPP or on $PATH.

    Raises: ExportError when one is missing, with the commands that install it and export `source` again with `options`.
    """
    converter, quantizer = _find(CONVERTER), _find(QUANTIZER)
    needs_quantizer = kind == "q4_k_m"
    if converter is None or (needs_quantizer and quantizer is None):
        missing = CONVERTER if converter is None else QUANTIZER
        build = " && cmake -B llama.cpp/build llama.cpp && cmake --build llama.cpp/build -t llama-quantize"
        raise ExportError(
            f"format {kind} needs llama.cpp's {missing}, which is neither in ${FOLDER} nor on $PATH. Install it and "
            "export again:\n"
            f"  git clone --depth 1 https://github.com/ggml-org/llama.cpp{build if needs_quantizer else ''}\n"
            f"  {sys.executable} -m pip install gguf sentencepiece\n"
            f"  {FOLDER}=llama.cpp {shlex.join(['mel-lite', 'export', str(source), '--format', kind, *options])}"
        )
    return Tools(converter, quantizer if needs_quantizer else None)


def _find(name: str) -> Path | None:
    if folder := os.environ.get(FOLDER):
        for place in PLACES:
            if (path := Path(folder).expanduser() / place / name).is_file():
                return path
    found = shutil.which(name)
    return Path(found) if found else None


def write_gguf(tools: Tools, merged: Path, file: Path, kind: str) -> None:
    """Convert the model in folder `merged` to `file`. Raises: ExportError with the tool's own message."""
    first = file.with_suffix(".f16") if kind == "q4_k_m" else file
    outtype = "f16" if kind == "q4_k_m" else kind
    _run([sys.executable, tools.converter, merged, "--outfile", first, "--outtype", outtype], first)
    if tools.quantizer is not None:
        _run([tools.quantizer, first, file, kind.upper()], file)
        first.unlink()


def _run(command: list[str | Path], output: Path) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0 and output.is_file() and output.open("rb").read(4) == b"GGUF":
        return
    said = " / ".join((done.stderr.strip() or done.stdout.strip() or "it wrote no GGUF file").splitlines()[-3:])
    raise ExportError(f"llama.cpp failed with exit code {done.returncode}: {said}\nThe command was: {' '.join(words)}")
