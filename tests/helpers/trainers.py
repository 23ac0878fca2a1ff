"""MELTrainer on a tiny random model with a scripted policy, built like a user would."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from mel_lite import MELConfig, MELTrainer
from mel_lite.models.placeholders import gathered as whole
from mel_lite.resilience.whole_states import gathered
from mel_lite.types import Group, Rollout
from scripted import ScriptedEngine
from tiny_models import save_tiny
from warm_pool import warm_verifiers

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@functools.cache
def sums(n: int = 24) -> Dataset:
    """Return `n` conversational addition tasks."""
    pairs = [(3 + i % 7, 2 + i % 5 + i // 7) for i in range(n)]
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}], "answer": str(a + b), "level": i % 3}
            for i, (a, b) in enumerate(pairs)
        ]
    )


def tiny_model(folder: Path, **config: Any) -> Any:
    """Load a new copy each time, since the trainer writes the tokenizer's special ids into the model's config."""
    if not folder.exists():
        save_tiny(folder, **config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(tmp_path: Path, *, engine: Any = None, model: Any = None, **options: Any) -> MELTrainer:
    """Build the trainer of most tests: 2 prompts x 4 completions per step, LoRA, on a tiny model.

    `engine="hf"`: the trainer's own engine, which samples from the model.
    """
    base = tmp_path / "base"
    defaults: dict[str, Any] = {
        "output_dir": str(options.pop("output_dir", tmp_path / "run")),
        "verifier": "numeric",
        "verifier_deadline_s": 60.0,  # a busy machine must not turn a verdict into an abstention
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "analysis_max_tokens": 600,
        "templates": str(Path(__file__).with_name("short_templates.yaml")),
        "max_steps": 2,
        "probe_max_diff": None,  # the scripted engine does not sample from the model
        "skip_zero_advantage": False,  # tests watch the loss, which a micro-batch without rows takes once more
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 7,
    }
    extras = {
        key: options.pop(key)
        for key in ("reward_funcs", "train_dataset", "eval_dataset", "callbacks")
        if key in options
    }
    extras.setdefault("train_dataset", sums())
    if extras.get("reward_funcs") == "even_ids":
        extras["reward_funcs"] = even_ids
    peft_config = LoraConfig(**LORA) if options.pop("lora", True) else None
    model = tiny_model(base) if model is None else model
    model.config.max_position_embeddings = 8192
    tokenizer = AutoTokenizer.from_pretrained(base)
    with warm_verifiers():
        return MELTrainer(
            model,
            args=MELConfig(**{**defaults, **options}),
            processing_class=tokenizer,
            peft_config=peft_config,
            engine=None if "engine_url" in options or engine == "hf" else engine or ScriptedEngine(tokenizer),
            **extras,
        )


def judged_rollouts(trainer: MELTrainer) -> list[tuple[Group, Rollout]]:
    """The judged completions of the trainer's newest generation batch, filled in while it trains."""
    original, seen = trainer._estimated, []

    def spy(batch: Any, scored: Any) -> Any:
        seen[:] = scored.rollouts
        return original(batch, scored)

    trainer._estimated = spy
    return seen


def even_ids(completion_ids: Any, **_: Any) -> list[float]:
    """Reward the share of even ids, which differs within a group of a random model, so that there are advantages."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def trainable(trainer: MELTrainer) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights by name, whole where FSDP2 or ZeRO-3 spreads them."""
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    return {n: gathered(whole(p).detach()).clone() for n, p in named}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].contiguous().numpy().tobytes())
    return sha.hexdigest()


def assert_learned(trainer: MELTrainer) -> None:
    """Check that training changed the adapter: LoRA-B, which starts at zero, is no longer zero."""
    norm = sum(w.abs().sum().item() for n, w in trainable(trainer).items() if "lora_B" in n)
    assert norm > 0, "LoRA-B is still zero"


def run_state(trainer: MELTrainer) -> dict[str, str]:
    """Hash the whole state of a run: weights, optimizer moments, scheduler, experiences, bank."""
    moments = {
        f"{i}.{key}": value
        for i, state in trainer.optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }
    return {
        "weights": digest(trainable(trainer)),
        "moments": digest(moments),
        "scheduler": json.dumps(trainer.lr_scheduler.state_dict(), default=str, sort_keys=True),
        "experiences": trainer.store.digest(),
        "tokens": str(trainer.engine.total_generated_tokens),
        "bank": "" if trainer.bank is None else json.dumps(trainer.bank.state_dict()),
    }


def step_log(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run's steps without those of time and memory."""
    timed = ("time", "_per_second", "peak_memory")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward" in row]
    return [
        {k: v for k, v in row.items() if not k.endswith("_s") and not any(part in k for part in timed)} for row in steps
    ]
