"""One MEL step of the demo with rollouts, analyses and replays sampled by the real vLLM: `python vllm_demo.py FOLDER`.

Prints the step's metrics as one JSON object. Here vLLM has its own weights: only Unsloth, on a GPU, shares them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from fake_vllm import LateEngine
from mel_lite import MELTrainer
from mel_lite.engines.unsloth import adapter_fingerprint
from mel_lite.engines.vllm import VLLMEngine
from mel_lite.models.adapters import adapter_rank, attach_adapter, find_adapter
from mel_lite.models.load import load_base, load_tokenizer
from mel_lite.models.origin import locate
from mel_lite.recipe import resolve
from mel_lite.run import train as run
from trainers import assert_learned, trainable

CONTEXT_TOKENS = 2048


def main(folder: Path) -> dict[str, Any]:
    shorter = [("train.max_steps", 1), ("train.gradient_accumulation_steps", 1), ("train.grad_norm_every", 0)]
    recipe = resolve(preset="cpu", overrides=[*shorter, ("train.probe_max_diff", 0.01)])
    assert recipe.lora is not None and recipe.lora.start_from is not None
    args, tokenizer = run.check(recipe, folder / "run"), load_tokenizer(recipe.model)
    tasks = run.load_run_tasks(recipe, args, tokenizer)
    model = attach_adapter(load_base(recipe.model), find_adapter(recipe.lora.start_from), trainable=True)
    late = LateEngine()
    trainer = MELTrainer(
        model=model, args=args, train_dataset=tasks.train, processing_class=tokenizer, engine=late
    )  # fmt: skip
    llm = LLM(
        locate(recipe.model.name), dtype="float32", enforce_eager=True, max_model_len=CONTEXT_TOKENS, enable_lora=True,
        max_loras=1, max_lora_rank=adapter_rank(recipe.lora), logprobs_mode="processed_logprobs", max_logprobs=0,
        enable_prefix_caching=True, max_num_seqs=64, seed=0,
    )  # fmt: skip
    numbers = iter(range(1, 100))

    def load_adapter() -> LoRARequest:
        number = next(numbers)
        trainer.model.save_pretrained(folder / str(number))
        return LoRARequest(str(number), number, str(folder / str(number)))

    late.inner = VLLMEngine(
        llm, sampling_params=SamplingParams, load_adapter=load_adapter, standby=False,
        fingerprint=lambda: adapter_fingerprint(trainer.model), step=lambda: trainer.state.global_step,
        eos_ids=[tokenizer.eos_token_id], context_tokens=CONTEXT_TOKENS,
    )  # fmt: skip
    before = trainable(trainer)
    trainer.train()
    assert_learned(trainer)
    assert any((before[name] != weight).any() for name, weight in trainable(trainer).items())
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
