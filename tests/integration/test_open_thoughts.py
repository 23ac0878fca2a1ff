"""A chat template may open the thought in the prompt. A completion that is cut before its end has no answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ConfigError
from mel_lite.evaluate import evaluate_model
from mel_lite.models.adapters import LoraSpec
from mel_lite.models.load import ModelSpec
from mel_lite.types import Finish, Verdict
from mel_lite.verify.judge import AnswerJudge
from mel_lite.verify.pool import VerifyPool
from mel_lite.warmup.options import WarmupEval, WarmupOptions
from mel_lite.warmup.train import warmup
from scripted import ScriptedEngine
from tiny_models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer
from trainers import build, judged_rollouts, sums

CUT, DONE = "So 5. The answer is 5", "Is it 9? No.</think>The answer is 5"


def opening(tag: str) -> str:
    """A chat template whose generation prompt ends with `tag`."""
    return CHAT_TEMPLATE.replace("assistant\n'", f"assistant\n{tag}\n'")


def answers_of(trainer: Any) -> dict[str, set[str]]:
    """Train one step; return the verdicts of each text among the rollouts of the question with the answer 5."""
    rollouts, found = judged_rollouts(trainer), dict[str, set[str]]()
    trainer.train()
    for group, rollout in rollouts:
        if group.answer == "5":
            found.setdefault(rollout.text, set()).add(str(rollout.verdict))
    return found


def trainer_with(tmp_path: Path, template: str, texts: Sequence[str], special: Sequence[str] = (), **options: Any):
    tokenizer = tiny_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    save_tiny(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    engine = ScriptedEngine(tokenizer, answer=lambda question, rng: rng.choice(texts))
    options = {"max_completion_length": 64, "max_steps": 1, "train_dataset": sums(2)} | options
    return build(tmp_path, engine=engine, **options)


@pytest.mark.parametrize("prompts", ["conversations", "plain text"])
def test_a_cut_rollout_has_no_answer(tmp_path: Path, prompts: str) -> None:
    rows = sums(2)
    template = opening("<think>")
    if prompts == "plain text":
        rows = rows.map(lambda row: {"prompt": f"{row['prompt'][0]['content']} Assistant: <think>"})
        template = CHAT_TEMPLATE
    found = answers_of(trainer_with(tmp_path, template, (CUT, DONE), train_dataset=rows))
    assert found == {CUT: {"wrong"}, DONE: {"right"}}


def test_a_prompt_that_opens_no_thought_changes_nothing(tmp_path: Path) -> None:
    for name, template in (("closed", opening("<think>\n\n</think>")), ("none", CHAT_TEMPLATE)):
        assert answers_of(trainer_with(tmp_path / name, template, (CUT,))) == {CUT: {"right"}}


def test_tags_that_are_special_tokens_are_in_no_text(tmp_path: Path) -> None:
    """Decoding a completion drops the end of its thought, so that a start in front would leave it without an answer."""
    special = ("[THINK]", "[/THINK]")
    text = "Is it 9? No.[/THINK]The answer is 5"
    found = answers_of(trainer_with(tmp_path, opening("[THINK]"), (text,), special))
    assert found == {"Is it 9? No.The answer is 5": {"right"}}


def test_replays_follow_the_same_rule(tmp_path: Path) -> None:
    """Rollouts are right and wrong, so that lessons are drawn; every replay is cut within its thought."""
    trainer = trainer_with(tmp_path, opening("<think>"), (CUT, DONE), analysis_max_tokens=900, max_steps=2)
    answer = trainer.engine.unmetered._answer
    trainer.engine.unmetered._answer = lambda question, rng: CUT if "notes" in question else answer(question, rng)
    trainer.train()
    rows = trainer.store.list(limit=50)
    assert rows and {row.status for row in rows} == {"replay_failed"}


def test_your_own_verifier_gets_the_completion_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "verbatim_here.py").write_text(
        "def rule(completion, answer):\n    return completion.startswith('So 5')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = answers_of(trainer_with(tmp_path, opening("<think>"), (CUT,), verifier="verbatim_here:rule"))
    assert found == {CUT: {"right"}}


# ---- evaluation and warm-up, with tags of the user


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelSpec, Path]:
    """A model whose template opens `<plan>` and that always samples CUT, and a file of tasks with the answer 5."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = opening("<plan>")
    save_tiny(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids = (*tokenizer(CUT)["input_ids"], tokenizer.eos_token_id)

    def generate(engine: HFEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return [Completion(ids, (0.0,) * len(ids), Finish.STOP) for _ in requests]

    monkeypatch.setattr(HFEngine, "generate", generate)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "2 + 3?", "answer": "5", "completion": "5"}))
    return ModelSpec(str(tmp_path / "base")), tmp_path / "tasks.jsonl"


@pytest.mark.parametrize(("tags", "share"), [(["<plan> </plan>"], 0.0), (None, 1.0), ([], 1.0)])
def test_tags_of_an_evaluation(planner: tuple[ModelSpec, Path], tags: list[str] | None, share: float) -> None:
    spec, tasks = planner
    result = evaluate_model(spec, None, str(tasks), verifier="numeric", think_tags=tags, k=1, max_new_tokens=64)
    assert result.pass_at_1.value == result.avg_at_k.value == share


@pytest.mark.parametrize(("tags", "share"), [(["<plan> </plan>"], 0.0), (None, 1.0)])
def test_tags_of_a_warmups_evaluation(
    planner: tuple[ModelSpec, Path], tmp_path: Path, tags: list[str] | None, share: float
) -> None:
    spec, tasks = planner
    result = warmup(
        tasks,
        tmp_path / "out",
        model=spec,
        lora=LoraSpec(r=4),
        options=WarmupOptions(max_steps=1, batch_size=1),
        evaluation=WarmupEval(str(tasks), "numeric", k=1, max_new_tokens=64, think_tags=tags),
    )
    assert result.before is not None and result.before.pass_at_1.value == share


def test_tags_on_the_command_line(planner: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    spec, tasks = planner
    common = ["--model", spec.name, "--verifier", "numeric", "--output", str(tmp_path / "result.json")]
    for options, share in ((["--think-tags", "<plan> </plan>"], 0.0), ([], 1.0), (["--think-tags", "none"], 1.0)):
        found = CliRunner().invoke(
            app, ["eval", "--dataset", str(tasks), "--k", "1", "--max-new-tokens", "64", *common, *options]
        )
        assert found.exit_code == 0, found.output
        assert json.loads((tmp_path / "result.json").read_text())["pass_at_1"]["value"] == share
    warm = ["warmup", str(tasks), "--output-dir", str(tmp_path / "out"), "--eval-dataset", str(tasks)]
    for command in (["eval"], warm):
        failed = CliRunner().invoke(app, [*command, "--think-tags", "<plan>"])
        assert isinstance(failed.exception, ConfigError) and "think_tags has '<plan>'" in str(failed.exception)


def test_the_tag_is_put_in_front_for_built_in_verifiers_only() -> None:
    from mel_lite.verify.judge import group_of

    group = group_of({"prompt": "q", "answer": "5"}, "answer", "assistant\n<think>\n")
    with VerifyPool("numeric", workers=1) as pool:
        assert AnswerJudge(pool)([group, group], [CUT, DONE]) == [Verdict.WRONG, Verdict.RIGHT]
    with VerifyPool("numeric", workers=1, think_tags=()) as pool:
        assert AnswerJudge(pool)([group], [CUT]) == [Verdict.RIGHT]
