"""Hidden states, head and sampled tokens of a real model's rollouts, for the benchmarks.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor


def read_prompts(tasks: Path, count: int) -> list[str]:
    """Return the questions in the first `count` lines of a JSONL task file."""
    lines = [json.loads(line) for line in tasks.read_text(encoding="utf-8").splitlines()[:count]]
    return [line.get("prompt") or line.get("question") or line["problem"] for line in lines]


@torch.no_grad()
def rollout_states(
    folder: str, prompts: list[str], *, tokens: int, temperature: float, samples: int = 1, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `samples` answers per prompt.

    Returns: (hidden_NH, weight_VH, target_N) in float32; row i of hidden predicts target i.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ] * samples
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    torch.manual_seed(0)
    ids = model.generate(
        **batch, max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    start = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, start:])], 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, start - 1 : -1]
    target = ids[:, start:]
    is_end = target == tokenizer.eos_token_id
    after_end = is_end.cumsum(1) - is_end.long() > 0
    return hidden[~after_end], model.get_output_embeddings().weight.detach(), target[~after_end]
