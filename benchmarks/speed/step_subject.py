"""Measure one GRPO step of one trainer in this process; `step.py` starts it, once per measurement.

Both trainers get the same model, adapter, prompts, completions and rewards, so only the update is measured: rewards,
forward, backward and optimizer. B completions of a step.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mel_lite.run.operations import flop_counter

SCALE_OF_B = 0.02
"""Standard deviation of LoRA-B, so that LoRA-A has a gradient, too."""


@dataclass(frozen=True)
class Case:
    """One workload."""

    model: str = "smollm2-135m"
    """`smollm2-135m` (the demo's model) or `qwen3`, random weights of `layers`, `hidden` and `vocab`."""
    groups: int = 4
    flat_groups: int = 1
    """Groups whose completions all have the same reward."""
    group_size: int = 8
    shortest_tokens: int = 16
    longest_tokens: int = 64
    """Completions are uniform between these lengths."""
    layers: int = 4
    hidden: int = 1024
    vocab: int = 151936
    checkpointing: bool = False
    max_tokens: int | None = 1024
    """`max_micro_batch_tokens` of MEL-Lite."""
    savings: bool = True
    """False: MEL-Lite with its savings off."""
    seed: int = 0

    @property
    def name(self) -> str:
        changed = {k: v for k, v in asdict(self).items() if v != asdict(Case())[k] and k != "model"}
        return " ".join([self.model, *(f"{key}={value}" for key, value in changed.items())])


def load(case: Case) -> tuple[Any, Any, list[Any]]:
    """Return model, tokenizer and prompts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    torch.manual_seed(case.seed)
    if case.model == "smollm2-135m":
        from mel_lite.data.tasks import load_tasks
        from mel_lite.models.demo import demo_model_dir

        folder = demo_model_dir(quiet=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [row["prompt"] for row in load_tasks("demo", limit=case.groups, conversational=True)]
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, prompts
    from random_models import byte_tokenizer

    config = Qwen3Config(
        hidden_size=case.hidden, intermediate_size=3 * case.hidden, num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64), num_key_value_heads=max(1, case.hidden // 128), head_dim=128,
        vocab_size=case.vocab, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    words = random.Random(case.seed)
    prompts = ["".join(words.choices("abcdefgh ", k=words.randint(40, 72))) for _ in range(case.groups)]
    return model, byte_tokenizer(), prompts


def adapted(model: Any, case: Case) -> Any:
    """Return the model with a LoRA adapter whose matrices are all random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(case.seed + 1)
    wrapped = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, SCALE_OF_B)
    return wrapped


def completions_of(case: Case, vocab: int) -> tuple[list[list[int]], list[float]]:
    """Return ragged completions of random ids, and their rewards: mixed but for the first `flat_groups`."""
    draw = random.Random(case.seed + 2)
    ids, rewards = [], []
    for group in range(case.groups):
        for i in range(case.group_size):
            length = draw.randint(case.shortest_tokens, case.longest_tokens)
            ids.append([draw.randrange(10, vocab) for _ in range(length)])
            rewards.append(1.0 if group < case.flat_groups else float(i % 3 == 0))
    return ids, rewards


def options_of(case: Case, out: Path) -> dict[str, Any]:
    """Return the options that both trainers get."""
    return {
        "output_dir": str(out),
        "num_generations": case.group_size,
        "per_device_train_batch_size": case.groups * case.group_size,
        "max_completion_length": case.longest_tokens,
        "gradient_checkpointing": case.checkpointing,
        "max_steps": 1,
        "learning_rate": 1e-6,
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def trl_trainer(case: Case, out: Path) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer, prompts = load(case)
    ids, rewards = completions_of(case, model.config.vocab_size)

    class Given(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            assert len(prompt_ids) == len(ids)
            return ids, None

    return Given(
        adapted(model, case),
        reward_funcs=lambda completions, **_: rewards,
        args=GRPOConfig(**options_of(case, out)),
        train_dataset=Dataset.from_list([{"prompt": each} for each in prompts]),
        processing_class=tokenizer,
    )


def mel_trainer(case: Case, out: Path) -> Any:
    from datasets import Dataset

    from mel_lite import MELConfig, MELTrainer
    from mel_lite.engines.base import Completion, Engine
    from mel_lite.types import Finish

    model, tokenizer, prompts = load(case)
    ids, rewards = completions_of(case, model.config.vocab_size)

    class Given(Engine):
        name = "given"

        def generate(self, requests: Any, sampling: Any) -> list[Completion]:
            assert len(requests) == len(ids)
            return [Completion(tuple(each), (0.0,) * len(each), Finish.LENGTH) for each in ids]

        def wake(self) -> None:
            pass

        sleep = wake

    off = {} if case.savings else {"skip_zero_advantage": False, "share_prompts": False}
    trainer = MELTrainer(
        adapted(model, case),
        reward_funcs=lambda completions, **_: rewards,
        args=MELConfig(
            **options_of(case, out),
            algorithm="grpo",
            max_micro_batch_tokens=case.max_tokens,
            probe_max_diff=None,  # checks the engine at the start of a run, not in a step
            **off,
        ),
        train_dataset=Dataset.from_list([{"prompt": each} for each in prompts]),
        processing_class=tokenizer,
        engine=Given(),
    )
    assert trainer.savings.shares_prompts == case.savings  # compares a few log-probs, once per run
    return trainer


def peak_bytes() -> int:
    """Return this process's peak RSS."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measure(trainer: Any, gradient: Path | None, *, count: bool) -> dict[str, Any]:
    """Take one step; return its operations, CPU and wall seconds, and the peaks before and after."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    kept: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, weight in trainer.model.named_parameters():
                if weight.grad is not None:
                    kept[name] = weight.grad.clone()

    if gradient is not None:
        trainer.add_callback(Keep())
    found: dict[str, Any] = {"idle_bytes": peak_bytes()}
    step = trainer.training_step

    def timed(*args: Any, **kwargs: Any) -> Any:
        counter = flop_counter() if count else nullcontext()
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        with counter:
            loss = step(*args, **kwargs)
        found.update(
            cpu_s=time.process_time() - cpu_s,
            wall_s=time.perf_counter() - wall_s,
            operations=counter.get_total_flops() if count else None,
            loss=loss.item(),
        )
        return loss

    trainer.training_step = timed
    trainer.train()
    if gradient is not None:
        save_file(kept, gradient)
    return found | {"peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=["trl", "mel"])
    parser.add_argument("case", help="JSON object of the fields of Case")
    parser.add_argument("folder", type=Path, help="receives result.json and gradient.safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-count", action="store_true", help="only time the step")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = Case(**json.loads(arguments.case))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trainer = {"trl": trl_trainer, "mel": mel_trainer}[arguments.who](case, arguments.folder / "run")
    found = measure(trainer, arguments.folder / "gradient.safetensors", count=not arguments.no_count)
    import transformers
    import trl

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    (arguments.folder / "result.json").write_text(json.dumps(found | {"versions": versions}))


if __name__ == "__main__":
    main()
