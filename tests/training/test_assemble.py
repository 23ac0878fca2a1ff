"""Arguments and datasets of MELTrainer are checked before training, by the rules for files."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from trl import GRPOConfig

from mel_lite import MELConfig, MELTrainer
from mel_lite.data.cells import IMAGE_COLUMNS, REWARD_ARGUMENTS
from mel_lite.errors import ConfigError, DataError, ModelError
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from trainers import assert_learned, build, even_ids, sums, tiny_model


def rows(second: Any) -> Dataset:
    """A dataset whose second prompt is `second`; for a number, all are."""
    first = second if isinstance(second, int) else "1 + 1?"
    return Dataset.from_dict({"prompt": [first, second, first], "answer": ["2", "2", "2"]})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_dataset": Dataset.from_list([])}, DataError, "train_dataset is empty"),
        ({"train_dataset": sums().remove_columns("answer")}, DataError, "needs a reference answer"),
        (
            {"train_dataset": [{"prompt": "x", "answer": "1"}]},
            DataError,
            "is a list. Pass a Dataset: Dataset.from_list",
        ),
        ({"train_dataset": "tasks.jsonl"}, DataError, "is a str. Pass a Dataset"),
        ({"train_dataset": sums().rename_column("prompt", "q")}, DataError, "no column 'prompt', only 'q', 'answer'"),
        ({"train_dataset": rows(7)}, DataError, "row 1, column 'prompt': 7 is neither text nor messages"),
        ({"train_dataset": rows(None)}, DataError, "row 2, column 'prompt': None is empty"),
        ({"train_dataset": rows(" ")}, DataError, "row 2, column 'prompt': ' ' is empty"),
        ({"train_dataset": rows("[{'role': 'user', 'content': 'x'}]")}, DataError, "row 2.*messages written as text"),
        ({"use_vllm": True}, ConfigError, "use_vllm=.*from one engine"),
        (
            {"use_transformers_continuous_batching": True},
            ConfigError,
            "use_transformers_continuous_batching=.*from one engine",
        ),
        (
            {"grad_norm_every": 1, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            ConfigError,
            "use_reentrant",
        ),
        ({"num_generations": 1}, ValueError, "at least 2 generations"),
        ({"max_context_tokens": 9000}, ConfigError, "exceeds the context of 8192 tokens"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, **options)


def test_options_of_trls_generation_are_followed_with_lessons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"do_sample": True, "top_k": 50, "num_beams": 2, "length_penalty": -0.1}
    judged = {"reward_funcs": even_ids, "verifier": None, "verifier_threshold": 0.7}
    rows = sums().remove_columns("answer")
    with caplog.at_level(logging.WARNING, "mel_lite.training.assemble"):
        trainer = build(tmp_path, generation_kwargs=options, train_dataset=rows, max_steps=1, **judged)
    assert "'num_beams': 2" in caplog.text and "TRL's generation samples the rollouts" in caplog.text
    trainer.train()
    assert_learned(trainer)
    assert trainer.generation_config.num_beams == 2
    assert trainer.state.log_history[0]["mel/pairs"] == len(trainer.store.list()) > 0


def rows_with(**columns: Any) -> Dataset:
    return Dataset.from_list([{**row, **columns} for row in sums()])


SYSTEM_ONLY = [{"role": "system", "content": "What is 3 plus 2?"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(train=sums(), test=sums()), r"is a DatasetDict with the splits train, test. .*data\['train'\]"),
        (rows_with(answer=["5", "five"]), r"train_dataset, row 1, column 'answer': \['5', 'five'\] is a list of 2"),
        (rows_with(prompt=SYSTEM_ONLY), r"train_dataset, row 1, column 'prompt': .* has no user turn"),
    ],
    ids=["DatasetDict", "answers", "no user turn"],
)
def test_datasets_are_checked_by_the_rules_for_files(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(tmp_path, train_dataset=data)


def test_answers_in_a_list_of_one_are_that_answer(tmp_path: Path) -> None:
    lists = Dataset.from_list([{**row, "answer": [row["answer"]]} for row in sums()])
    rewards = []
    for data in (sums(), lists):
        trainer = build(tmp_path, train_dataset=data, output_dir=tmp_path / str(len(rewards)), max_steps=1)
        trainer.train()
        rewards.append(next(log["reward"] for log in trainer.state.log_history if "reward" in log))
    assert rewards[0] == rewards[1] and 0 < rewards[0] < 1


def test_a_dataset_that_fills_no_batch_is_refused(tmp_path: Path) -> None:
    """4 rows fill one batch of 16 completions in groups of 4; TRL trains 0 steps on 3, without an error."""
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "algorithm": "grpo", "max_steps": 1}
    trainer = build(tmp_path, train_dataset=sums(4), **batch)
    trainer.train()
    assert trainer.state.global_step == 1
    for rows, found in ((3, "has 3 rows"), (1, "has 1 row")):
        with pytest.raises(DataError, match=rf"^train_dataset {found}: one step needs 4 different prompts \(.*=16 / "):
            build(tmp_path, train_dataset=sums(rows), **batch)


def test_a_stream_that_fills_no_batch_is_an_error(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator_config": {"dispatch_batches": False}, "max_steps": 1}
    with pytest.raises(DataError, match="^train_dataset ended too early: one step needs 2 different prompts"):
        build(tmp_path, train_dataset=sums(1).to_iterable_dataset(), **options).train()
    trainer = build(tmp_path, train_dataset=sums(2).to_iterable_dataset(), **options)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_streamed_prompt_without_a_user_turn_trains_without_lessons(tmp_path: Path) -> None:
    rows = rows_with(prompt=SYSTEM_ONLY, answer="5").to_iterable_dataset()
    trainer = build(tmp_path, train_dataset=rows, max_steps=1, accelerator_config={"dispatch_batches": False})
    trainer.train()
    log = next(log for log in trainer.state.log_history if "reward" in log)
    assert 0 < log["reward"] < 1 and log["mel/unfit_pairs"] == 2 and len(trainer.store.list()) == 0


@pytest.mark.parametrize("name", [*REWARD_ARGUMENTS, *IMAGE_COLUMNS, "completion", "completion_ids"])
def test_a_column_with_the_name_of_an_argument_changes_nothing(tmp_path: Path, name: str) -> None:
    dropped = name not in ("completion", "completion_ids")
    with pytest.warns(UserWarning, match=f"columns '{name}' are left out") if dropped else nullcontext():
        trainer = build(tmp_path, train_dataset=rows_with(**{name: "x"}), max_steps=1)
    assert (name in trainer.train_dataset.column_names) is not dropped
    trainer.train()
    assert 0 < next(log["reward"] for log in trainer.state.log_history if "reward" in log) < 1


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != loop.index0 is even %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)


def test_a_conversation_that_the_template_rejects_is_named_at_construction(tmp_path: Path) -> None:
    rows = sums(4).to_list()
    rows[2]["prompt"] *= 2
    bad, options = Dataset.from_list(rows), {"chat_template_kwargs": {"chat_template": ALTERNATE}}
    message = "row 3, column 'prompt': The tokenizer's chat template rejects the conversation: roles must alternate"
    with pytest.raises(ModelError, match=f"^train_dataset, {message}"):
        build(tmp_path, train_dataset=bad, **options)
    for data, name in ((bad, "eval_dataset"), ({"hard": bad}, r"eval_dataset\['hard'\]")):
        with pytest.raises(ModelError, match=f"^{name}, {message}"):
            build(tmp_path, eval_dataset=data, **options)
    streamed = bad.select([2]).to_iterable_dataset().repeat(2)
    trainer = build(tmp_path, train_dataset=streamed, accelerator_config={"dispatch_batches": False}, **options)
    with pytest.raises(
        ModelError, match=r"^The prompt 'User: What is 5 plus 4\?.*rejects the conversation: roles must"
    ):
        trainer.train()


def test_a_config_of_trls_is_refused(tmp_path: Path) -> None:
    model, args = tiny_model(tmp_path / "base"), GRPOConfig(str(tmp_path / "x"), use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match="needs a MELConfig"):
        MELTrainer(model, args=args, train_dataset=sums(), processing_class=tiny_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "ppo"}, "algorithm='ppo' is not one of mel, grpo"),
        ({"pairs_per_group": 0}, "pairs_per_group=0 must be 1 or more, or -1"),
        ({"mel_weight": -1.0}, "mel_weight=-1.0 must be 0 or more"),
        ({"mel_weight": float("nan")}, "mel_weight=nan"),
        ({"replay_attempts": 0}, "replay_attempts=0 must be at least 1"),
        ({"verifier_deadline_s": 0.0}, "verifier_deadline_s=0.0 must be positive"),
    ],
)
def test_config_names_field_value_reason_and_fix(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        MELConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert message in str(error.value)


def test_an_empty_prompt_of_a_stream_is_named(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "", "answer": "5"}] * 2).to_iterable_dataset()
    trainer = build(tmp_path, train_dataset=rows)
    with pytest.raises(DataError, match="prompt without tokens. Remove prompts that are empty"):
        trainer.train()
