import random
import re
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import ConfigError
from mel_lite.seeds import prompt_hash
from scripted import ScriptedEngine
from tiny_models import tiny_tokenizer
from trainers import assert_learned, build, digest, judged_rollouts, step_log, sums, trainable


def by_level(question: str, rng: random.Random) -> str:
    """Answer a + b: always right where a is 3 or 4, never where a is 5 or 6, else right two times in three."""
    a, b = map(int, re.findall(r"\d+", question)[-2:])
    wrong = {3: 0, 4: 0, 5: 1, 6: 1}.get(a, int(rng.random() < 1 / 3))
    return f"Answer: {a + b + wrong}"


def engine() -> ScriptedEngine:
    return ScriptedEngine(tiny_tokenizer(), answer=by_level)


def flat_shares(folder: Path) -> list[float]:
    return [row["frac_reward_zero_std"] for row in step_log(folder)]


def test_flat_groups_give_way_to_other_prompts(tmp_path: Path) -> None:
    """Only questions whose first number is 7, 8 or 9 have groups with variance: 3 in 7."""
    plain = build(tmp_path / "plain", engine=engine(), algorithm="grpo", max_steps=5)
    plain.train()
    trainer = build(tmp_path / "dynamic", engine=engine(), algorithm="grpo", max_steps=5, dynamic_sampling_rounds=12)
    seen = judged_rollouts(trainer)
    trainer.train()
    assert_learned(trainer)
    before, after = flat_shares(tmp_path / "plain" / "run"), flat_shares(tmp_path / "dynamic" / "run")
    assert max(before) > 0 and after == [0.0] * 5
    assert all(rollout.index == i for i, (_, rollout) in enumerate(seen))
    rows = step_log(tmp_path / "dynamic" / "run")
    for row in rows:
        assert row["sampling/varied_groups"] >= 2 and row["sampling/filled_with_flat"] == 0
        assert 0 < row["sampling/drawn_reward"] < 1 and 0 < row["reward"] < 1
    drawn = sum(row["sampling/drawn_tokens"] for row in rows)
    assert drawn == trainer.engine.total_generated_tokens, "every drawn token counts"
    assert max(row["sampling/rounds"] for row in rows) > 1


@pytest.mark.slow
def test_a_batch_without_flat_groups_is_what_it_is_without_the_option(tmp_path: Path) -> None:
    """Equal weights to the last bit: the option changes nothing where there is nothing to replace."""
    ends = []
    for rounds in (0, 3):
        varied = ScriptedEngine(tiny_tokenizer(), answer=_always_mixed())
        trainer = build(
            tmp_path / str(rounds), engine=varied, algorithm="grpo", max_steps=3, dynamic_sampling_rounds=rounds
        )
        trainer.train()
        assert_learned(trainer)
        ends.append(digest(trainable(trainer)))
    assert ends[0] == ends[1]


def _always_mixed() -> Any:
    count = iter(range(10**6))

    def answer(question: str, rng: random.Random) -> str:
        a, b = map(int, re.findall(r"\d+", question)[-2:])
        return f"Answer: {a + b + next(count) % 2}"

    return answer


def test_after_the_last_round_flat_groups_fill_the_batch(tmp_path: Path) -> None:
    hopeless = ScriptedEngine(tiny_tokenizer(), answer=lambda question, rng: "Answer: -1")
    trainer = build(tmp_path, engine=hopeless, algorithm="grpo", max_steps=1, dynamic_sampling_rounds=2)
    seen = judged_rollouts(trainer)
    trainer.train()
    (row,) = step_log(tmp_path / "run")
    assert (row["sampling/rounds"], row["sampling/drawn_groups"]) == (3, 6)
    assert (row["sampling/varied_groups"], row["sampling/filled_with_flat"]) == (0, 2)
    assert len(seen) == 8 and row["frac_reward_zero_std"] == 1.0


@pytest.mark.slow
def test_lessons_come_from_the_groups_that_are_trained(tmp_path: Path) -> None:
    trainer = build(tmp_path, engine=engine(), max_steps=3, dynamic_sampling_rounds=12)
    trainer.train()
    assert_learned(trainer)
    rows = step_log(tmp_path / "run")
    assert all(row["mel/mixed_groups"] == row["mel/groups"] == 2 for row in rows)
    assert len(trainer.store.list()) == 6


@pytest.mark.slow
def test_what_reward_functions_log_belongs_to_the_trained_completions(tmp_path: Path) -> None:
    def logged(completions: Any, answer: Any, log_extra: Any, **_: Any) -> list[float]:
        texts = [each[0]["content"] for each in completions]
        log_extra("read", [text[8:] for text in texts])
        return [float(text == f"Answer: {want}") for text, want in zip(texts, answer, strict=True)]

    trainer = build(
        tmp_path, engine=engine(), algorithm="grpo", max_steps=2, dynamic_sampling_rounds=12, reward_funcs=logged,
    )  # fmt: skip
    trainer.train()
    texts = [each[0]["content"] if isinstance(each, list) else each for each in trainer._logs["completion"]]
    assert len(texts) == 8 and [f"Answer: {each}" for each in trainer._logs["extra"]["read"]] == texts


@pytest.mark.slow
def test_prompts_at_rest_are_not_asked(tmp_path: Path) -> None:
    """Of 8 questions, 5 are always flat; the other 3 never are."""
    mixed = _always_mixed()

    def answer(question: str, rng: random.Random) -> str:
        varies = int(re.findall(r"\d+", question)[-2]) >= 7
        return (mixed if varies else by_level)(question, rng)

    trainer = build(
        tmp_path, engine=ScriptedEngine(tiny_tokenizer(), answer=answer), algorithm="grpo", max_steps=8, rest_after=1,
        rest_batches=50, train_dataset=sums(8),
    )  # fmt: skip
    batches: list[set[str]] = []
    original = trainer.dynamic_sampling._draw

    def spy(asked: Any, *, first: int) -> Any:
        batches.append({prompt_hash(row["prompt"]) for row in asked})
        return original(asked, first=first)

    trainer.dynamic_sampling._draw = spy
    trainer.train()
    flat = {key for key, row in trainer.dynamic_sampling.memory._streaks.items() if row[3]}
    assert len(flat) == 5
    assert all(sum(key in asked for asked in batches) == 1 for key in flat)
    assert len(batches) == 8 and all(len(asked) == 2 for asked in batches)


@pytest.mark.slow
def test_a_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "algorithm": "grpo", "dynamic_sampling_rounds": 4, "rest_after": 1, "rest_batches": 1, "save_strategy": "steps",
        "save_steps": 2, "max_steps": 6,
    }  # fmt: skip
    whole = build(tmp_path / "whole", engine=engine(), **options)
    whole.train()
    assert_learned(whole)
    again = build(tmp_path / "whole", engine=engine(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / "checkpoint-2"))
    assert digest(trainable(again)) == digest(trainable(whole))
    assert again.dynamic_sampling.memory.state_dict() == whole.dynamic_sampling.memory.state_dict()
    assert again.engine.total_generated_tokens == whole.engine.total_generated_tokens


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds=-1 must be at least 0"),
        ({"rest_batches": 0}, "rest_batches=0 must be at least 1"),
        ({"dynamic_sampling_rounds": 1, "algorithm": "reinforce++"}, "its groups without variance train, too"),
        ({"rest_after": 1, "train_dataset": sums(2)}, "rest_after=1 with 2 rows: a batch asks 2 prompts"),
        ({"rest_after": 1, "train_dataset": sums(9).to_iterable_dataset()}, "rest_after=1 with a streamed dataset"),
        ({"rest_after": 1, "algorithm": "grpo", "cache_implementation": "static"}, "generation options of TRL's own"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(tmp_path, engine=engine(), **options)
