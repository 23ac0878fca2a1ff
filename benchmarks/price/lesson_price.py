"""Measure what lessons cost: CPU seconds of a step of plain GRPO, of MEL strict, and of MEL overlapped.

`PYTHONPATH=benchmarks python -m price.lesson_price` trains the three arms in turn, in one process. A small Qwen3 with
random weights really decodes every sequence, in the engine's own batches; texts of fixed lengths replace what it wrote,
so that the verifier, the parser, the leak guard and the replay have real work and every arm has the same completions.
One of the two groups of a step is mixed. The first two steps, in which no overlapped lesson can be complete, are not
measured. Writes benchmarks/results/lesson-price-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.types import Finish

RESULT = Path(__file__).resolve().parents[1] / "results" / "lesson-price-cpu.json"
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "mel strict": {"mel_schedule": "strict"},
    "mel overlap": {"mel_schedule": "overlap"},
}
WARM_UP = 2
"""Steps before the first overlapped lesson is complete."""
STEP = "I take the first number and count up by the second. "
ANALYSIS = (
    "It counts one step too far.\n\n## Critique\nIts end was not checked.\n\n## Heuristics\n"
    "- If numbers are joined, then count back once.\n"
)
TEMPLATES = {
    "analysis_system": "Compare.",
    "analysis_user": "{question}\nWrong: {wrong}\nRight: {right}\nBifurcation, critique, heuristics.",
    "replay_user": "Notes: {experience}\n{question}",
    "fork_note": "",
}
"""Short ones: with a token per byte, the usual instructions would outweigh such short solutions."""


@dataclass(frozen=True)
class Case:
    """One workload. The tokenizer has a token per byte."""

    prompts: int = 2
    group_size: int = 8
    shortest_tokens: int = 150
    longest_tokens: int = 300
    """Completions are near-uniform between these lengths."""
    layers: int = 2
    hidden: int = 512
    key_value_heads: int = 1
    steps: int = 2
    """Measured steps of an arm per round."""
    rounds: int = 1


class Priced(Engine):
    """Decodes with the transformers engine as many tokens as the scripted text has, and returns that text."""

    name = "priced"
    mixes = True

    def __init__(self, tokenizer: Any, case: Case) -> None:
        self._tokenizer, self._case = tokenizer, case
        self.inner: Any = None
        self.cpu_s = 0.0

    def wake(self) -> None: ...

    def sleep(self) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        ids = [self._ids(request) for request in requests]
        own = [
            Request(request.prompt_ids, request.seed, Sampling(len(each)))
            for request, each in zip(requests, ids, strict=True)
        ]
        start_s = time.process_time()
        self.inner.generate(own, sampling)
        self.cpu_s += time.process_time() - start_s
        return [Completion(each, (-0.5,) * len(each), Finish.STOP) for each in ids]

    def _ids(self, request: Request) -> tuple[int, ...]:
        draw, prompt = random.Random(request.seed), self._tokenizer.decode(request.prompt_ids)
        text = ANALYSIS if prompt.rstrip().endswith("## Bifurcation") else self._answer(prompt, draw)
        return (*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id)

    def _answer(self, prompt: str, draw: random.Random) -> str:
        a, b = map(int, re.findall(r"What is (\d+) plus (\d+)", prompt)[-1])
        length = draw.randint(self._case.shortest_tokens, self._case.longest_tokens)
        is_wrong = a % 2 == 0 and draw.random() < 0.5
        end = f"Answer: {a + b + is_wrong}"
        return (STEP * 9)[: length - len(end) - 1] + end


def build(arm: str, case: Case, folder: Path) -> Any:
    """Return the trainer of an arm."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, Qwen3Config

    from mel_lite import MELConfig, MELTrainer
    from mel_lite.engines.hf import HFEngine
    from random_models import byte_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=case.hidden, intermediate_size=3 * case.hidden, num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64, num_key_value_heads=case.key_value_heads, head_dim=64,
        vocab_size=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=2,
        max_position_embeddings=8192,
    )  # fmt: skip
    tokenizer = byte_tokenizer()
    engine = Priced(tokenizer, case)
    rows = [{"prompt": f"What is {4 + i} plus {2 + i % 5}?", "answer": str(6 + i + i % 5)} for i in range(40)]
    (folder / "templates.yaml").write_text(json.dumps(TEMPLATES))  # JSON is YAML
    trainer = MELTrainer(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32),
        args=MELConfig(
            str(folder), verifier="numeric", use_cpu=True, bf16=False, gradient_checkpointing=False,
            num_generations=case.group_size, per_device_train_batch_size=case.prompts * case.group_size,
            max_completion_length=case.longest_tokens + 1, analysis_max_tokens=len(ANALYSIS) + 1,
            templates=str(folder / "templates.yaml"), shuffle_dataset=False,
            max_steps=WARM_UP + case.steps, learning_rate=1e-5, save_strategy="no", logging_steps=1, report_to="none",
            disable_tqdm=True, probe_max_diff=None, seed=1, **ARMS[arm],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        engine=engine,
    )  # fmt: skip
    engine.inner = HFEngine(trainer.model, eos_ids=[], pad_id=tokenizer.pad_token_id)
    return trainer


class Steps(TrainerCallback):
    """Notes seconds and logs of every step after the warm-up."""

    def __init__(self, engine: Priced) -> None:
        self.rows: list[dict[str, float]] = []
        self._engine = engine
        self._start_s = (0.0, 0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start_s = self._now_s()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > WARM_UP:
            took_s = (now - start for now, start in zip(self._now_s(), self._start_s, strict=True))
            self.rows.append(dict(zip(("cpu_s", "wall_s", "sampling_cpu_s"), took_s, strict=True)))

    def _now_s(self) -> tuple[float, float, float]:
        return time.process_time(), time.perf_counter(), self._engine.cpu_s

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        names = ("mel/generated_tokens", "mel/token_overhead", "mel/staleness", "mel/replay_valid")
        if state.global_step > WARM_UP and "reward" in (logs or {}):
            self.rows[-1] |= {name: logs[name] for name in names if logs and name in logs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=Case.rounds)
    parser.add_argument("--steps", type=int, default=Case.steps)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(rounds=arguments.rounds, steps=arguments.steps)
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(case.rounds):
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                trainer = build(arm, case, Path(folder))
                steps = Steps(trainer.engine.unmetered)
                trainer.add_callback(steps)
                trainer.train()
                runs[arm] += steps.rows
                print(arm, steps.rows, flush=True)
            machine = {"processor": platform.processor() or platform.machine(), "threads": 1}
            report = {"machine": machine, "torch": torch.__version__, "case": asdict(case), "runs": runs}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
