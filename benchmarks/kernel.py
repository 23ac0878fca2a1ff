"""Measure the fused log-prob operator against its peers: `python benchmarks/kernel.py`, on a GPU or a CPU.

Needs torch (and triton on a GPU); measures whichever of trl, unsloth_zoo, liger-kernel and cut-cross-entropy are there
(`pip install --no-deps` of each is enough). Prints a table and writes every time to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mel_lite.kernels.bench import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="times each is measured (default: 15 on a GPU, 3 on a CPU)")
    parser.add_argument("--json", type=Path, help="where to write (default: benchmarks/results/kernel-DEVICE.json)")
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results"
    run(
        arguments.device,
        rounds=arguments.rounds,
        json_path=arguments.json or results / f"kernel-{torch.device(arguments.device).type}.json",
    )


if __name__ == "__main__":
    main()
