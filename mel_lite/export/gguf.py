"""GGUF files for llama.cpp, Ollama and LM Studio, written by llama.cpp's own tools where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from mel_lite.errors import ExportError
from mel_lite.recipe import GgufType

GGUF_TYPES = get_args(GgufType)
CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
FOLDER = "LLAMA_CPP"
"""Environment variable that names a checkout of llama.cpp."""
PLACES = ("", "build/bin", "bin")
"""Where the tools are in a checkout."""


@dataclass(frozen=True, slots=True)
class Tools:
    """llama.cpp's programs for one quantisation."""

    converter: Path
    quantiser: Path | None


def find_tools(kind: str, source: Path) -> Tools:
    """The programs that write a GGUF file of this type, from $LLAMA_CPP or $PATH.

    Raises: ExportError when one is missing, with the commands that get it and export `source` again.
    """
    converter, quantiser = _find(CONVERTER), _find(QUANTISER)
    lacks_quantiser = kind == "q4_k_m" and quantiser is None
    if converter is None or lacks_quantiser:
        missing = CONVERTER if converter is None else QUANTISER
        build = " && cmake -B llama.cpp/build llama.cpp && cmake --build llama.cpp/build -t llama-quantize"
        raise ExportError(
            f"format {kind} needs llama.cpp's {missing}, which is neither in ${FOLDER} nor on $PATH. Get it and export "
            "again:\n"
            f"  git clone --depth 1 https://github.com/ggml-org/llama.cpp{build if kind == 'q4_k_m' else ''}\n"
            f"  {sys.executable} -m pip install gguf sentencepiece\n"
            f"  {FOLDER}=llama.cpp mel-lite export {source} --format {kind}"
        )
    return Tools(converter, quantiser if kind == "q4_k_m" else None)


def _find(name: str) -> Path | None:
    if folder := os.environ.get(FOLDER):
        for place in PLACES:
            if (path := Path(folder).expanduser() / place / name).is_file():
                return path
    found = shutil.which(name)
    return Path(found) if found else None


def write_gguf(tools: Tools, merged: Path, file: Path, kind: str) -> None:
    """Convert the model in folder `merged` to `file`. Raises ExportError with what the tool said."""
    first = file.with_suffix(".f16") if kind == "q4_k_m" else file
    outtype = "f16" if kind == "q4_k_m" else kind
    _run([sys.executable, tools.converter, merged, "--outfile", first, "--outtype", outtype], first)
    if tools.quantiser is not None:
        _run([tools.quantiser, first, file, kind.upper()], file)
        first.unlink()


def _run(command: list[str | Path], made: Path) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0 and made.is_file() and made.open("rb").read(4) == b"GGUF":
        return
    said = " / ".join((done.stderr.strip() or done.stdout.strip() or "it wrote no GGUF file").splitlines()[-3:])
    raise ExportError(f"llama.cpp failed with exit code {done.returncode}: {said}\nThe command was: {' '.join(words)}")
