"""How much of the vocabulary carries the probability that the second product multiplies, on a real model's rollouts.

`python benchmarks/mass.py MODEL TASKS.jsonl`: samples answers to the tasks' prompts, and prints how many tokens of each
row must be kept for u = d logp / d hidden to lose no more than a given share of the others' probability, with the error
that makes. N rows, V vocabulary, H hidden size. The numbers are discussed in docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEPT = (8, 32, 128, 512, 2048)
DROPPED = (1e-1, 1e-2, 1e-3, 1e-4)


@torch.no_grad()
def rollout_states(folder: str, prompts: list[str], *, tokens: int, temperature: float) -> tuple[Any, Tensor, Tensor]:
    """(model, hidden_NH, target_N) of tokens the model sampled itself; h predicts the token beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    ids = model.generate(
        **batch, max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    start = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, start:])], 1)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
    target = ids[:, start:]
    after_end = (target == tokenizer.eos_token_id).cumsum(1) - (target == tokenizer.eos_token_id).long() > 0
    return model, hidden[~after_end], target[~after_end]


@torch.no_grad()
def report(model: Any, hidden_NH: Tensor, target_N: Tensor, temperature: float) -> None:
    """Print the mass curves of the distribution over the tokens that are not the target, which is what u averages."""
    weight_VH = model.get_output_embeddings().weight
    z_NV = hidden_NH @ weight_VH.T / temperature
    p_t_N = z_NV.softmax(1).gather(1, target_N[:, None])[:, 0]
    q_NV = z_NV.scatter(1, target_N[:, None], -torch.inf).softmax(1)
    exact_NH = (1 - p_t_N)[:, None] * (weight_VH[target_N] - q_NV @ weight_VH)
    print(f"temperature {temperature}: {len(target_N)} rows; p of the sampled token: quartiles "
          + ", ".join(f"{x:.3f}" for x in p_t_N.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()))  # fmt: skip
    sorted_NV, order_NV = q_NV.sort(1, descending=True)
    mass_NV = sorted_NV.cumsum(1)
    for count in KEPT:
        left_N = 1 - mass_NV[:, count - 1]
        error = _error(q_NV, order_NV, count, exact_NH, p_t_N, target_N, weight_VH)
        losers = (left_N > 0.01).float().mean()
        print(f"  keep {count:5}: mass dropped, mean {left_N.mean():.3f}; rows losing over 1 %: {losers:.2f}; {error}")
    for share in DROPPED:
        needed_N = (mass_NV < 1 - share).sum(1).add(1).float()
        quartiles = needed_N.quantile(torch.tensor([0.25, 0.5, 0.75, 0.9])).int().tolist()
        print(f"  lose {share:g}: tokens needed, quartiles and p90 {quartiles}, mean {needed_N.mean():.0f}")


def _error(
    q_NV: Tensor, order_NV: Tensor, count: int, exact_NH: Tensor, p_t_N: Tensor, target_N: Tensor, weight_VH: Tensor
) -> str:
    kept_NV = torch.zeros_like(q_NV).scatter(1, order_NV[:, :count], q_NV.gather(1, order_NV[:, :count]))
    sparse_NH = (1 - p_t_N)[:, None] * (weight_VH[target_N] - (kept_NV / kept_NV.sum(1, keepdim=True)) @ weight_VH)
    total = (sparse_NH - exact_NH).norm() / exact_NH.norm()
    row_N = (sparse_NH - exact_NH).norm(dim=1) / exact_NH.norm(dim=1)
    return f"error of u: whole {total:.1e}, median row {row_N.median():.1e}, p90 row {row_N.quantile(0.9):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.tasks.read_text().splitlines()[: arguments.prompts]]
    prompts = [line.get("prompt") or line.get("question") or line["problem"] for line in lines]
    for temperature in (1.0, 0.7):
        report(*rollout_states(arguments.model, prompts, tokens=arguments.tokens, temperature=temperature), temperature)


if __name__ == "__main__":
    main()
