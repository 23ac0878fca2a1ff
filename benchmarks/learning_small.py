"""Small model of the learning study: a Llama with 701,312 weights, trained from scratch on one CPU core.

`python benchmarks/learning_small.py FOLDER` draws examples from `demo_warmup` (worked sums, analyses of two solutions,
sums solved with notes in the prompt). It trains a tokenizer and then the model on them, and stops while the model still
solves only about half of the tasks. FOLDER then holds the model, the prompts (`templates.yaml`) and the settings
(`recipe.json`). The same seeds on the same machine give the same model.

The tokenizer separates digits and line ends and merges the words between them freely. A line of a solution is about ten
tokens and an analysis about forty, so a hundred optimizer steps take a minute.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from demo_warmup.examples import make_examples, test_expressions
from demo_warmup.problems import draw_problem
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, Templates
from mel_lite.warmup.examples import Example, tokenize
from mel_lite.warmup.train import in_batches

SEED = 20261123
TERMS = (3, 4)
TASKS = {"train": 2000, "test": 200}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: dict[str, str] = {
    "version": "learning-small",
    "analysis_system": "You compare two solutions.",
    "analysis_user": "{question}\n\nIncorrect:\n{wrong}\n\nCorrect:\n{right}",
    "replay_user": "{experience}\n\n{question}",
}
"""Shortest possible prompts: a model trained from scratch needs no explanation, only a format it has seen."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass of training."""

    examples: dict[str, int]
    """Number of examples of each kind."""
    learning_rate: float
    """Peak; a cosine falls to zero over all examples."""
    stop_at: int
    """Step after which training stops, before the schedule ends."""


STAGES = (
    Stage({"solve": 24_000, "chain": 0, "analyse": 5_000, "replay": 2_500}, 2e-3, 1050),
    Stage({"solve": 2_000, "analyse": 8_000, "replay": 2_500}, 1e-3, 400),
)
"""First arithmetic, stopped when a third of the tasks is solved; then mostly analyses and solving with notes."""
BATCH = 16
VOCABULARY = 768
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": BATCH, "lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.01,
    "adam_beta2": 0.98,
}  # fmt: skip


def _question(expression: str) -> str:
    return f"What is {expression}?"


def shorter(example: dict[str, Any]) -> dict[str, Any]:
    """Remove the instruction after the question from an example; all solutions follow it in any case."""
    prompt = [
        {**message, "content": re.sub(r"(What is [^?]*\?)[^\n]*", r"\1", message["content"])}
        for message in example["prompt"]
    ]
    return {**example, "prompt": prompt}


def held_out() -> frozenset[str]:
    """Return the expressions of the test tasks, which no example and no training task uses."""
    return frozenset(row["expression"] for row in _draw("test", frozenset()))


def tasks(split: str) -> datasets.Dataset:
    """Return the `train` or `test` tasks with the columns `prompt` (a conversation) and `answer`."""
    rows = _draw(split, frozenset() if split == "test" else held_out())
    return datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": _question(r["expression"])}], "answer": r["answer"]} for r in rows]
    )


def _draw(split: str, forbidden: frozenset[str]) -> Iterator[dict[str, str]]:
    rng, seen = random.Random(f"{SEED} {split}"), set(forbidden)
    found = 0
    while found < TASKS[split]:
        problem = draw_problem(rng, TERMS)
        if problem.expression not in seen:
            seen.add(problem.expression)
            found += 1
            yield {"expression": problem.expression, "answer": str(problem.answer)}


def examples(counts: dict[str, int]) -> list[dict[str, Any]]:
    """Return warm-up examples, without those whose question is a test task."""
    made = make_examples(counts, seed=SEED, templates=replace(DEFAULT_TEMPLATES, **TEMPLATES))
    asked = re.compile(r"What is ([^?]*)\?")
    forbidden = held_out() | test_expressions()
    return [
        shorter(each)
        for each in made
        if not forbidden.intersection(match for turn in each["prompt"] for match in asked.findall(turn["content"]))
    ]


def make_tokenizer(texts: Sequence[dict[str, Any]], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the examples; digits and runs of line ends are separate tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    corpus = [part for each in texts for part in (*(m["content"] for m in each["prompt"]), each["completion"])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*corpus, *["user", "assistant", "system"] * len(texts)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        model_max_length=SIZE["max_position_embeddings"],
    )  # fmt: skip


def make_model(tokenizer: Any, seed: int = SEED) -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZE, **ids))


class StopAt(TrainerCallback):
    """Callback that stops training after `steps`, before the schedule ends."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self._steps


def train(model: Any, tokenizer: Any, made: Sequence[dict[str, Any]], folder: Path, stage: Stage) -> int:
    """Train on the NLL of the completions, for one pass or up to `stage.stop_at`. Returns: number of steps."""
    pairs = [Example(each["prompt"], each["completion"]) for each in made]
    rows, _ = tokenize(pairs, tokenizer, max_length_tokens=512, turn_end=tokenizer.eos_token_id)
    args = TrainingArguments(
        str(folder), num_train_epochs=1, logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential", seed=SEED,
        learning_rate=stage.learning_rate, **TRAINING,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=datasets.Dataset.from_list(in_batches(rows, BATCH, SEED)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True), callbacks=[StopAt(stage.stop_at)],
    )  # fmt: skip
    trainer.train()
    return int(trainer.state.global_step)


def of_second_stage(made: Sequence[dict[str, Any]], counts: dict[str, int]) -> list[dict[str, Any]]:
    """Return `counts` examples per kind, shuffled: the last solutions, the first analyses and replays (repeated)."""
    by_kind = {kind: [each for each in made if each["kind"] == kind] for kind in counts}
    picked = by_kind["solve"][-counts["solve"] :]
    for kind in ("analyse", "replay"):
        repeated = by_kind[kind] * (counts[kind] // max(1, len(by_kind[kind])) + 1)
        picked = picked + repeated[: counts[kind]]
    random.Random(1).shuffle(picked)
    return picked


def make(folder: Path, stages: tuple[Stage, Stage] = STAGES) -> Path:
    """Write tokenizer, model, prompts and recipe to `folder`, and return it."""
    started_s = time.monotonic()
    made = examples(stages[0].examples)
    tokenizer = make_tokenizer(made)
    model = make_model(tokenizer)
    print(f"{len(made)} examples, vocabulary {len(tokenizer)}, {model.num_parameters():,} weights", flush=True)
    steps = [train(model, tokenizer, made, folder, stages[0])]
    steps.append(train(model, tokenizer, of_second_stage(made, stages[1].examples), folder, stages[1]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "templates.yaml").write_text(json.dumps(TEMPLATES, indent=1) + "\n", encoding="utf-8")
    recipe = {
        "weights": model.num_parameters(), "vocabulary": len(tokenizer), "size": SIZE, "seed": SEED,
        "training": TRAINING, "stages": [asdict(stage) for stage in stages], "steps": steps,
        "took_s": round(time.monotonic() - started_s),
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return folder


def templates() -> Templates:
    """Return the prompts that the model was trained with."""
    return replace(DEFAULT_TEMPLATES, **TEMPLATES)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/learning_small.py FOLDER")
    make(Path(sys.argv[1]))
