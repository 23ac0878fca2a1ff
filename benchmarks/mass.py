"""Number of tokens that hold most of the probability mass in the second product, on rollouts of a real model.

`python benchmarks/mass.py MODEL TASKS.jsonl` samples answers to the tasks' prompts. It prints how many tokens per row
must be kept so that u = d logp / d hidden loses at most a given share of the other tokens' probability, and the
resulting error of u. N rows, V vocabulary, H hidden size. docs/kernels.md discusses the numbers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from states import read_prompts, rollout_states

KEPT = (8, 32, 128, 512, 2048)
DROPPED = (1e-1, 1e-2, 1e-3, 1e-4)


@torch.no_grad()
def mass_curve(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, temperature: float) -> dict[str, Any]:
    """Measure the distribution over the tokens that are not the target, which u averages; return the figures."""
    z_NV = hidden_NH @ weight_VH.T / temperature
    p_t_N = z_NV.softmax(1).gather(1, target_N[:, None])[:, 0]
    q_NV = z_NV.scatter(1, target_N[:, None], -torch.inf).softmax(1)
    exact_NH = (1 - p_t_N)[:, None] * (weight_VH[target_N] - q_NV @ weight_VH)
    sorted_NV, order_NV = q_NV.sort(1, descending=True)
    mass_NV = sorted_NV.cumsum(1)
    kept, lost = [], []
    for count in KEPT:
        left_N = 1 - mass_NV[:, count - 1]
        top_NV = torch.zeros_like(q_NV).scatter(1, order_NV[:, :count], sorted_NV[:, :count])
        sparse_NH = (1 - p_t_N)[:, None] * (weight_VH[target_N] - (top_NV / top_NV.sum(1, keepdim=True)) @ weight_VH)
        row_N = (sparse_NH - exact_NH).norm(dim=1) / exact_NH.norm(dim=1)
        kept.append({
            "tokens": count,
            "mass_dropped_mean": left_N.mean().item(),
            "rows_losing_over_1_percent": (left_N > 0.01).float().mean().item(),
            "u_error_all_rows": ((sparse_NH - exact_NH).norm() / exact_NH.norm()).item(),
            "u_error_median_row": row_N.median().item(),
            "u_error_p90_row": row_N.quantile(0.9).item(),
        })  # fmt: skip
    for share in DROPPED:
        needed_N = (mass_NV < 1 - share).sum(1).add(1).float()
        quartiles = needed_N.quantile(torch.tensor([0.25, 0.5, 0.75, 0.9])).int().tolist()
        lost.append({"share": share, "tokens_quartiles_and_p90": quartiles, "tokens_mean": needed_N.mean().item()})
    return {
        "temperature": temperature,
        "rows": len(target_N),
        "p_of_sampled_quartiles": p_t_N.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist(),
        "keep": kept,
        "lose": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "mass.json")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.tasks, arguments.prompts)
    curves = []
    for temperature in (1.0, 0.7):
        states = rollout_states(arguments.model, prompts, tokens=arguments.tokens, temperature=temperature)
        curves.append(mass_curve(*states, temperature))
        print(json.dumps(curves[-1], indent=1))
    report = {"model": Path(arguments.model).name, "tasks": arguments.tasks.name, "torch": torch.__version__}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report | {"curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
