"""Scripts with tools or environments run with the default options: they train the policy term, without lessons."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from mel_lite import MELConfig, MELTrainer
from tiny_models import set_lora
from trainers import LORA, assert_learned, digest, even_ids, judged_rollouts, tiny_model, trainable

TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 2}}\n</tool_call>'
ROW = {"prompt": [{"role": "user", "content": "What is 3 plus 2?"}], "answer": "5"}


class Adder:
    """An environment with one tool, which counts its calls."""

    calls = 0

    def reset(self, **_: Any) -> str | None:
        return None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        type(self).calls += 1
        return a + b


class Asker(Adder):
    """An environment that writes the prompt."""

    def reset(self, **_: Any) -> str | None:
        return "What is 3 plus 2?"


def run(folder: Path, row: dict[str, Any] = ROW, **options: Any) -> MELTrainer:
    """Train for a step, in which half of the completions of 8 call a tool."""
    extras = {name: options.pop(name) for name in ("tools", "environment_factory") if name in options}
    model = tiny_model(folder / "base")
    model.config.max_position_embeddings = 8192
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", chat_template=TEMPLATE.read_text())
    args = MELConfig(
        tempfile.mkdtemp(dir=folder), use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=256, max_steps=1, save_strategy="no", learning_rate=1e-2,
        report_to="none", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    rows = Dataset.from_list(8 * [row])
    trainer = MELTrainer(
        model, even_ids, args, rows, processing_class=tokenizer, peft_config=LoraConfig(**LORA), **extras
    )
    set_lora(trainer.model, 0.2)
    answers = [tokenizer(text + "<|im_end|>")["input_ids"] for text in (CALL, "5", CALL, "It is 5.", "5", "five")]
    width = max(map(len, answers))
    padded = torch.tensor([ids + (width - len(ids)) * [tokenizer.pad_token_id] for ids in answers])

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [0, 1, 2, 3, 0, 1, 2, 3] if len(input_ids) == 8 else len(input_ids) * [4]
        return torch.cat([input_ids, padded[rows]], dim=1)

    seen = judged_rollouts(trainer)
    with patch.object(trainer.model, "generate", side_effect=generate):
        trainer.train()
    # The model answers "5" after a call of the tool; the last completion of four is "It is 5.".
    assert [rollout.text for _, rollout in seen] == 2 * ["5", "5", "5", "It is 5."]
    assert {rollout.verdict for _, rollout in seen} == {"right"}
    assert {group.prompt[-1]["content"] for group, _ in seen} == {ROW["prompt"][0]["content"]}
    assert trainer.args is not args or args.algorithm == "grpo"
    assert args.algorithm == options.get("algorithm", "mel"), "the caller's own options stay as they are"
    return trainer


@pytest.mark.parametrize("use", ["tools", "environment_factory"])
def test_the_default_algorithm_trains_as_grpo(tmp_path: Path, caplog: pytest.LogCaptureFixture, use: str) -> None:
    given: dict[str, Any] = {"tools": [Adder().add]} if use == "tools" else {"environment_factory": Adder}
    Adder.calls = 0
    with caplog.at_level(logging.WARNING, logger="mel_lite"):
        default = run(tmp_path, **given)
        said = [record.getMessage() for record in caplog.records if "without lessons" in record.getMessage()]
        assert len(said) == 1 and said[0].startswith(f"{use} with algorithm='mel': ") and "algorithm='grpo'" in said[0]
        caplog.clear()
        plain = run(tmp_path, algorithm="grpo", **given)
        assert not any("without lessons" in record.getMessage() for record in caplog.records)
    assert Adder.calls == 8, "four calls in each of the two runs"
    assert default.state.log_history[0]["tools/call_frequency"] == pytest.approx(0.5)
    assert default.args.algorithm == "grpo" and len(default.store.list()) == 0
    assert digest(trainable(default)) == digest(trainable(plain))
    assert default.state.log_history[0]["grad_norm"] > 1e-3
    assert_learned(default)


def test_meta_experience_of_another_algorithm_is_dropped_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, algorithm="reinforce++", meta_experience=True, tools=[Adder().add])
    assert trainer.args.estimator == "reinforce++" and not trainer.args.with_meta_experience
    assert "tools with meta_experience=True: training with algorithm='reinforce++' alone" in caplog.text


def test_environments_may_write_the_prompts(tmp_path: Path) -> None:
    """The update is that of the same prompt in the dataset."""
    asked = run(tmp_path, row={"environment": "sums", "answer": "5"}, environment_factory={"sums": Asker})
    given = run(tmp_path, environment_factory=Adder)
    ours, theirs = (trainer.state.log_history[0]["grad_norm"] for trainer in (asked, given))
    assert ours == theirs > 1e-3
