"""Probe the demo or a tiny random model, and write the figures: `python benchmarks/probe.py demo` (or `random`).

Writes benchmarks/results/probe-NAME.json. docs/probe.md shows it as `mel-lite probe` prints it.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from mel_lite.run.probe.advice import advise
from mel_lite.run.probe.result import read_result

RESULTS = Path(__file__).resolve().parent / "results"
OPTIONS: dict[str, tuple[str, ...]] = {
    "demo": (),
    # A token is a byte: with short instructions, two solutions fit the context.
    "random": (
        "--model", "./random", "--dataset", "demo", "--set", "train.templates=demo",
        "--set", "train.max_context_tokens=1248",
    ),
}  # fmt: skip
WIDTH = 80


def shown(name: str) -> str:
    """Return what the probe printed after its measurements, as a text block; its advice is that of today's rules."""
    result = advise(read_result((RESULTS / f"probe-{name}.json").read_text(encoding="utf-8")))
    console = Console(width=WIDTH, file=io.StringIO(), record=True)
    result.show(console)
    lines = (line.rstrip() for line in console.export_text().rstrip().splitlines())
    return "\n".join(["```text", *lines, "```"])


def tiny_model(folder: Path) -> None:
    """Write a model of two layers with random weights, whose tokens are bytes."""
    import torch
    from transformers import Qwen3Config

    from random_models import TINY, random_weights

    torch.manual_seed(0)
    folder.mkdir()
    config = Qwen3Config(
        **TINY, tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=None, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    random_weights(folder, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(OPTIONS))
    parser.add_argument("--prompts", default="24")
    arguments = parser.parse_args()
    options = ["--gpu", "cpu", "--prompts", arguments.prompts, "--output-dir", "probe", *OPTIONS[arguments.name]]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.name == "random":
            tiny_model(Path(folder) / "random")
        done = subprocess.run([sys.executable, "-m", "mel_lite", "probe", *options], cwd=folder)
        if done.returncode == 0:
            shutil.copyfile(Path(folder) / "probe" / "probe.json", RESULTS / f"probe-{arguments.name}.json")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
