"""Measure the fused operators against other implementations: `python benchmarks/kernel.py`, on a GPU or a CPU.

Each size is measured with log-probabilities and with the KL divergence from a teacher. Needs torch (and triton on a
GPU). Also measures trl, unsloth_zoo, liger-kernel and cut-cross-entropy if they are installed (`pip install --no-deps`
of each is enough). Prints a table and writes every time to benchmarks/results/. With --model and --tasks, a further
shape uses the hidden states of that model's own rollouts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from mel_lite.kernels.bench import Inputs, Shape, default_shapes, run
from states import read_prompts, rollout_states

ROWS = 8192


def real(model: str, tasks: Path, device: str) -> dict[Shape, Inputs]:
    """Return 8192 rows of a real model: its rollouts at temperature 1, repeated until there are enough."""
    states = rollout_states(model, read_prompts(tasks, 32), tokens=64, temperature=1.0, samples=4, device=device)
    hidden_NH, weight_VH, target_N = states
    again_N = torch.arange(ROWS, device=hidden_NH.device) % len(target_N)
    dtype = default_shapes(torch.device(device))[0].dtype
    to = getattr(torch, dtype)
    inputs = hidden_NH[again_N].to(to).requires_grad_(), weight_VH.to(to), target_N[again_N]
    return {Shape(ROWS, hidden_NH.shape[1], len(weight_VH), dtype, Path(model).name): inputs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="times per contender (default: 15 on a GPU, 3 on a CPU)")
    parser.add_argument("--operator", choices=["logprobs", "kl"], help="measure this one only (default: both)")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each size (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="output file (default: benchmarks/results/kernel[-kl]-DEVICE.json)")
    parser.add_argument("--model", help="local model folder or Hub id; its rollouts give one more shape")
    parser.add_argument("--tasks", type=Path, help="JSONL file with the questions for those rollouts")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.tasks is None):
        parser.error("--model and --tasks must be given together")
    results = Path(__file__).parent / "results"
    kl = "-kl" if arguments.operator == "kl" else ""
    shapes = [
        replace(shape, rows=arguments.rows)
        for shape in default_shapes(torch.device(arguments.device))
        if arguments.operator in (None, shape.operator)
    ]
    run(
        arguments.device,
        shapes=shapes,
        given=real(arguments.model, arguments.tasks, arguments.device) if arguments.model else None,
        rounds=arguments.rounds,
        json_path=arguments.json or results / f"kernel{kl}-{torch.device(arguments.device).type}.json",
    )


if __name__ == "__main__":
    main()
