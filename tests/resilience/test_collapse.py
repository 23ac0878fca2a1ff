"""Collapse checks: each warns on its own metric, none on a healthy run, and `on_collapse` decides the response."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mel_lite.errors import ConfigError, DivergedError
from mel_lite.resilience import collapse
from mel_lite.resilience.checkpoint_files import read_state
from mel_lite.resilience.collapse import AGAIN, WINDOW, CollapseChecks, CollapseWatch
from mel_lite.types import Finish
from scripted import ScriptedEngine
from tiny_models import set_lora, tiny_tokenizer
from trainers import assert_learned, build, digest, trainable


def feed(logs: Iterable[dict[str, float]], **options: Any) -> list[str]:
    checks = CollapseChecks()
    return [warning for log in logs for warning in checks.look(log, **options)]


def healthy(steps: int, rng: random.Random) -> Iterable[dict[str, float]]:
    """Noisy logs of a run that improves slowly and writes a little less."""
    for step in range(steps):
        share = step / steps
        yield {
            "reward": 0.4 + 0.3 * share + rng.uniform(-0.15, 0.15),
            "completions/mean_length": 300 - 60 * share + rng.uniform(-60, 60),
            "mel/nll": 0.6 - 0.3 * share + rng.uniform(-0.1, 0.1),
            "mel/retention_ratio": rng.uniform(0.2, 0.8),
            "mel/leak_rate": rng.uniform(0, 0.3),
            "mel/written": 4,
            "mel/replay_valid": rng.choice([1, 2, 3]),
        } | ({"eval_reward": 0.5 + rng.uniform(-0.03, 0.03)} if step % 20 == 0 else {})


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_causes_no_warning(seed: int) -> None:
    assert feed(healthy(400, random.Random(seed))) == []


def then(before: dict[str, float], after: dict[str, float]) -> list[dict[str, float]]:
    return [before] * WINDOW + [after] * WINDOW


@pytest.mark.parametrize(
    ("logs", "figures"),
    [
        (then({"reward": 0.6}, {"reward": 0.1}), ["The reward fell to 0.25", "from 0.6"]),
        ([{"eval_reward": v} for v in (0.5, 0.5, 0.4, 0.3)], ["The evaluation fell to 0.35", "from 0.5"]),
        (
            then({"reward": 0.5, "completions/mean_length": 200}, {"reward": 0.5, "completions/mean_length": 20}),
            ["Completions shrank to 56 tokens", "from 200"],
        ),
        (then({"mel/nll": 0.5}, {"mel/nll": 0.01}), ["NLL of 0.01 nats per token"]),
        (
            then(
                {"mel/retention_ratio": 0.5, "mel/leak_rate": 0.0},
                {"mel/retention_ratio": 0.65, "mel/leak_rate": 0.35},
            ),
            ["rose to 35% from 0%", "% of the meta-experiences were kept"],
        ),
        ([{"mel/written": 3.0, "mel/replay_valid": 0.0}] * WINDOW, ["None of the 30 meta-experiences"]),
    ],
)
def test_each_check_warns_with_its_figures(logs: list[dict[str, float]], figures: list[str]) -> None:
    warnings = feed(logs)
    assert len(warnings) == 1
    for figure in figures:
        assert figure in warnings[0]


def test_shorter_and_better_is_no_collapse() -> None:
    logs = then({"reward": 0.3, "completions/mean_length": 200}, {"reward": 0.6, "completions/mean_length": 20})
    assert feed(logs) == []


def test_missing_and_nan_values_are_no_values() -> None:
    assert feed([{"reward": float("nan"), "mel/nll": float("nan")}, {}] * 100) == []


def test_a_warning_comes_back_while_it_lasts_and_after_it_was_over() -> None:
    low, high = {"mel/nll": 0.01}, {"mel/nll": 0.9}
    assert len(feed([low] * (WINDOW - 1))) == 0
    assert len(feed([low] * (WINDOW + AGAIN - 1))) == 1
    assert len(feed([low] * (WINDOW + AGAIN))) == 2
    assert len(feed([low] * WINDOW + [high] * WINDOW + [low] * WINDOW)) == 2


def test_a_state_goes_through_json_and_decides_the_same() -> None:
    logs = [*healthy(30, random.Random(1)), *[{"reward": 0.01, "mel/nll": 0.0}] * 40]
    whole, first = CollapseChecks(), CollapseChecks()
    expected = [whole.look(log) for log in logs]
    got = [first.look(log) for log in logs[:33]]
    second = CollapseChecks()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), configured_weight=1.0)
    assert got + [second.look(log) for log in logs[33:]] == expected
    assert sum(map(len, expected)) >= 3


def _reciting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the check for memorized meta-experiences warn after two steps."""
    monkeypatch.setattr(collapse, "MEMORIZED_NATS", 1e9)
    monkeypatch.setattr(collapse, "WINDOW", 2)
    monkeypatch.setattr(collapse.Means.__init__, "__defaults__", (2,))


def test_warning_is_all_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _reciting(monkeypatch)
    trainer = build(tmp_path, max_steps=3)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        trainer.train()
    assert caplog.text.count("the model recites one text") == 1 and "Step 2: New" in caplog.text
    assert trainer.args.mel_weight == 1.0
    assert_learned(trainer)


@pytest.mark.slow
def test_a_lowered_lambda_weighs_less_and_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _reciting(monkeypatch)
    common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "on_collapse": "lower_lambda"}
    whole = build(tmp_path, **common)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        whole.train()
    assert "mel_weight was lowered from 1 to 0.5" in caplog.text
    assert whole.args.mel_weight == 0.5
    saved = [read_state(tmp_path / "run" / f"checkpoint-{n}")["tripwires"]["mel_weight"] for n in range(1, 6)]
    assert saved[0] is None and saved[-1] == 0.5
    unlowered = build(tmp_path, output_dir=tmp_path / "other", **common | {"on_collapse": "warn"})
    unlowered.train()
    assert digest(trainable(unlowered)) != digest(trainable(whole)), "the lower weight reached the loss"

    resumed = build(tmp_path, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert digest(trainable(resumed)) == digest(trainable(whole)) and resumed.args.mel_weight == 0.5
    assert_learned(resumed)


def test_stop_ends_the_run_with_the_figures_and_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reciting(monkeypatch)
    trainer = build(tmp_path, max_steps=9, save_strategy="steps", save_steps=1, on_collapse="stop")
    with pytest.raises(DivergedError, match="recites one text.*Checkpoints: checkpoint-1\\.") as error:
        trainer.train()
    assert error.value.exit_code == 5 and trainer.state.global_step == 2


def test_a_run_whose_groups_are_all_equal_says_early_that_nothing_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _reciting(monkeypatch)
    engine = ScriptedEngine(tiny_tokenizer(), answer=lambda question, rng: "Answer: -1")
    trainer = build(tmp_path, max_steps=3, engine=engine)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        trainer.train()
    assert caplog.text.count("every LoRA-B is still zero") == 1
    with pytest.raises(AssertionError, match="still zero"):
        assert_learned(trainer)


# ---- F16: runs that learn nothing ----


def _always(answer: str) -> ScriptedEngine:
    return ScriptedEngine(tiny_tokenizer(), answer=lambda question, rng: answer)


NOTHING: dict[str, dict[str, Any]] = {
    "all wrong": {},
    "all wrong, grpo": {"algorithm": "grpo"},
    "no reward at all": {"algorithm": "grpo", "reward_funcs": lambda completions, **_: [None] * len(completions)},
    "none to imitate": {"algorithm": "rft"},
    "one batch, two updates": {"algorithm": "grpo", "num_iterations": 2},
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_run_without_anything_to_learn_warns_and_then_stops(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_steps": 20, "max_idle_steps": 10, "save_strategy": "steps", "save_steps": 4} | NOTHING[case]
    trainer = build(tmp_path, engine=_always("Answer: -1"), **options)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"), pytest.raises(DivergedError) as error:
        trainer.train()
    assert caplog.text.count("Step 2: The last 2 steps had nothing to learn from") == 1
    assert "The run stops after 10." in caplog.text
    assert trainer.state.global_step == 10 and error.value.exit_code == 5
    assert "max_idle_steps=10; 0 never stops" in str(error.value) and "checkpoint-4, checkpoint-8" in str(error.value)
    with pytest.raises(AssertionError, match="still zero"):
        assert_learned(trainer)


def test_an_idle_run_only_warns_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, engine=_always("Answer: -1"), algorithm="grpo", max_steps=12)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        trainer.train()
    assert trainer.state.global_step == 12
    assert caplog.text.count("Step 10: The last 10 steps had nothing to learn from") == 1
    assert "Set max_idle_steps to stop such a run." in caplog.text


def test_max_idle_steps_of_zero_never_stops_or_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, engine=_always("Answer: -1"), algorithm="grpo", max_steps=4, max_idle_steps=0)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        trainer.train()
    assert trainer.state.global_step == 4 and "nothing to learn from" not in caplog.text


def test_a_step_with_a_signal_resets_the_idle_count_and_a_resume_continues_it(tmp_path: Path) -> None:
    """Steps 0 and 3 teach; the run of idle ones before its end is 4, 5, 6."""

    def answers(trainer: Any) -> Any:
        def reward(completions: Any, **_: Any) -> list[float]:
            return [float(i % 2) if trainer[0].state.global_step in (0, 3) else 1.0 for i in range(len(completions))]

        return reward

    common = {"algorithm": "grpo", "max_steps": 9, "max_idle_steps": 3, "save_strategy": "steps", "save_steps": 1}
    holder: list[Any] = []
    holder.append(build(tmp_path, reward_funcs=answers(holder), **common))
    with pytest.raises(DivergedError, match="at step 7"):
        holder[0].train()
    assert_learned(holder[0])
    resumed: list[Any] = []
    resumed.append(build(tmp_path, reward_funcs=answers(resumed), **common))
    assert read_state(tmp_path / "run" / "checkpoint-5")["tripwires"]["idle_steps"] == 1
    with pytest.raises(DivergedError, match="at step 7"):
        resumed[0].train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))


@pytest.mark.parametrize("algorithm", ["mel", "grpo", "reinforce++", "rft"])
def test_a_run_that_learns_is_never_idle(tmp_path: Path, algorithm: str) -> None:
    trainer = build(tmp_path, algorithm=algorithm, max_steps=3, max_idle_steps=1)
    trainer.train()
    assert trainer.collapse.checks.idle_steps == 0
    assert_learned(trainer)


def test_a_run_with_a_teacher_is_not_idle_where_all_are_wrong(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, engine=_always("Answer: -1"), max_steps=3, max_idle_steps=1, internalisation="distill",
        internalisation_options={"context": "none", "reader": "frozen", "sign": False},
    )  # fmt: skip
    set_lora(trainer.model, 0.2)  # the policy is no longer that of the start
    before = digest(trainable(trainer))
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.collapse.checks.idle_steps == 0
    assert digest(trainable(trainer)) != before


def test_the_choice_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_collapse='ignore' is not one of warn, lower_lambda, stop"):
        build(tmp_path, on_collapse="ignore")


@pytest.mark.parametrize(("cut_off", "advised"), [(8, True), (4, True), (3, False)])
def test_analyses_cut_off_at_the_limit_give_advice(
    caplog: pytest.LogCaptureFixture, cut_off: int, advised: bool
) -> None:
    args = SimpleNamespace(mel_weight=1.0, analysis_max_tokens=600)
    watch = CollapseWatch(SimpleNamespace(args=args, accelerator=SimpleNamespace(is_main_process=True)))
    finishes = [Finish.LENGTH] * cut_off + [Finish.STOP] * (8 - cut_off)
    analyses = [SimpleNamespace(analysis=SimpleNamespace(finish=finish)) for finish in finishes]
    watch.saw_analyses(analyses[:5])
    assert caplog.text == ""
    watch.saw_analyses(analyses[5:])
    assert (f"{cut_off} of the last 8 analyses" in caplog.text) is advised
    assert ("train.analysis_max_tokens=1200" in caplog.text) is advised
