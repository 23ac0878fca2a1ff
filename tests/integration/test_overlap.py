"""`mel_schedule: overlap`: what shares an engine call, when lessons join, and that nothing else differs from strict."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from mel_lite import MELConfig
from mel_lite.engines.base import Engine
from mel_lite.errors import ConfigError, DataError
from mel_lite.types import Status
from scripted import ANALYSIS, ScriptedEngine
from tiny_models import save_tiny
from trainers import assert_learned, build, run_state, step_log, sums, trainable

OVERLAP: dict[str, Any] = {
    "mel_schedule": "overlap",
    "max_steps": 6,
    "max_completion_length": 32,
    "pairs_per_group": 2,
}


def scripts(folder: Path, **scripted: Any) -> ScriptedEngine:
    save_tiny(folder / "base")
    return ScriptedEngine(AutoTokenizer.from_pretrained(folder / "base"), **scripted)


def some_fail(rng: random.Random) -> str:
    return "I do not know." if rng.random() < 0.3 else ANALYSIS


def stored(trainer: Any) -> list[tuple[Any, ...]]:
    """What led to each meta-experience and what came of it, by the step of its rollouts and its pair."""
    return sorted(
        (row.rollouts_step, row.pair_index, row.prompt_hash, row.right_index, row.wrong_index, row.analysis,
         row.replay_texts, row.status)
        for row in trainer.store.list()
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A strict and an overlapped run of a policy whose texts depend on the seeds alone."""
    runs = []
    for schedule in ("strict", "overlap"):
        folder = tmp_path_factory.mktemp(schedule)
        engine = scripts(folder, analysis=some_fail)
        trainer = build(folder, engine=engine, **OVERLAP | {"mel_schedule": schedule, "learning_rate": 1e-3})
        trainer.train()
        runs.append(trainer)
    return runs[0], runs[1]


def test_each_lesson_is_the_strict_one_but_for_when_it_joins(both: tuple[Any, Any]) -> None:
    """Prompts and seeds are equal, so a policy that ignores the weights writes the same texts."""
    strict, overlap = both
    begun = [row for row in stored(strict) if row[0] <= 4]
    assert len(begun) > 3 and {row[-1] for row in begun} >= {Status.KEPT, Status.UNPARSED}
    assert [row for row in stored(overlap) if row[0] <= 4] == begun
    late = {row[-1] for row in stored(overlap) if row[0] > 4}
    assert late <= {Status.UNPARSED}, "step 5's replays would come with step 7"


def test_one_call_samples_a_step_and_lessons_come_one_and_two_steps_later(both: tuple[Any, Any]) -> None:
    strict, overlap = both
    assert len(overlap.engine.unmetered.calls) == 6 < len(strict.engine.unmetered.calls)
    for row in overlap.store.list():
        late = 1 if row.status is Status.UNPARSED else 2
        assert (row.staleness_steps, row.staleness_versions) == (late, late)
    assert {row.staleness_steps for row in strict.store.list()} == {0}
    prompts = [requests for requests, _ in overlap.engine.unmetered.calls]
    kinds = [Counter(r.sampling.max_new_tokens if r.sampling else 0 for r in requests) for requests in prompts]
    assert kinds[0] == {0: 8} and kinds[1].keys() == {0, 600} and kinds[2].keys() == {0, 600, 32}


def test_the_log_counts_them_where_they_are_complete(both: tuple[Any, Any]) -> None:
    strict, overlap = both
    log = step_log(Path(overlap.args.output_dir))
    rows = overlap.store.list()
    for step, logged in enumerate(log, start=1):
        joined = [row for row in rows if row.step == step]
        assert logged["mel/written"] == len(joined)
        assert logged.get("mel/staleness") == (sum(r.staleness_steps for r in joined) / len(joined) if joined else None)
    assert log[0]["mel/written"] == 0 and log[0]["mel/in_flight"] == log[0]["mel/pairs"] > 0
    entered = sum(logged["mel/pairs"] for logged in log)
    assert entered == len(rows) + log[-1]["mel/in_flight"], "every pair is stored or in flight"
    assert "mel/in_flight" not in step_log(Path(strict.args.output_dir))[0]


def test_overheads_are_of_the_lessons_tokens(both: tuple[Any, Any]) -> None:
    for trainer in both:
        calls = trainer.engine.unmetered.calls
        tokenizer = trainer.processing_class
        lines = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
        logs = [row for row in map(json.loads, lines) if "reward" in row]
        of_rollouts = of_lessons = 0
        for requests, sampling in calls:
            for request in requests:
                tokens = len(trainer.engine.unmetered._complete(request, request.options(sampling)).ids)
                text = tokenizer.decode(request.prompt_ids)
                if request.sampling is None:
                    of_rollouts += tokens
                else:
                    assert "Bifurcation" in text or "notes" in text.lower(), "a prompt of lessons"
                    of_lessons += tokens
        each = [row["mel/generated_tokens"] for row in logs]
        assert sum(each) == of_rollouts + of_lessons == trainer.engine.total_generated_tokens
        found = sum(n - n / (1 + row["mel/token_overhead"]) for n, row in zip(each, logs, strict=True))
        assert found == pytest.approx(of_lessons) and of_lessons > 100
        assert all(row["mel/time_overhead_s"] >= 0 for row in logs) and logs[2]["mel/time_overhead_s"] > 0


def test_both_learn(both: tuple[Any, Any]) -> None:
    for trainer in both:
        assert_learned(trainer)
        taught = [row for row in trainer.store.list() if row.nll_before is not None]
        assert taught and {row.status for row in taught} == {Status.KEPT}
        assert sum(row.nll_after < row.nll_before for row in taught) > len(taught) / 2


def test_lessons_in_flight_alone_change_the_weights(tmp_path: Path) -> None:
    """With no policy gradient in the third step, its update is that of the lessons of step 1."""
    trainers = []
    for weight in (0.0, 1.0):
        engine = scripts(tmp_path)
        trainer = build(tmp_path, engine=engine, output_dir=tmp_path / f"{weight}", **OVERLAP | {"max_steps": 3},
                        mel_weight=weight)  # fmt: skip
        seen: list[dict[str, Any]] = []

        class See(TrainerCallback):
            def on_step_end(self, *_: Any, seen: Any = seen, trainer: Any = trainer, **__: Any) -> None:
                seen.append(trainable(trainer))

        trainer.add_callback(See())
        trainer.train()
        trainers.append(seen)
    for step, differs in enumerate((False, False, True)):
        pairs = [(trainers[0][step][name], trainers[1][step][name]) for name in trainers[0][step]]
        assert any((a != b).any() for a, b in pairs) is differs, f"step {step + 1}"


# ---- resume ----


@pytest.mark.parametrize("stop", [1, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (2, 3))])
def test_a_resumed_run_equals_one_without_interruption(tmp_path: Path, stop: int) -> None:
    """Checkpoints 1 to 3 hold lessons that wait for an analysis, for a replay, and for a further attempt."""
    options: dict[str, Any] = OVERLAP | {
        "save_strategy": "steps", "save_steps": 1, "replay_criterion": "solved_once", "replay_attempts": 3,
        "pairs_per_group": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = build(tmp_path, engine=scripts(tmp_path, analysis=some_fail), output_dir=tmp_path / "whole", **options)
    whole.train()
    state = json.loads((tmp_path / "whole" / f"checkpoint-{stop}" / "mel_state.json").read_text())["in_flight"]
    lessons = json.loads(state["lessons"])["lessons"]
    stages = {"analysis" if "experience" not in each else each["experience"]["replay"] is not None for each in lessons}
    assert stages == {1: {"analysis"}, 2: {"analysis", False}, 3: {"analysis", False, True}}[stop]
    first = build(tmp_path, engine=scripts(tmp_path, analysis=some_fail), **options | {"max_steps": stop})
    first.train()
    again = build(tmp_path, engine=scripts(tmp_path, analysis=some_fail), **options)
    again.train(resume_from_checkpoint=True)
    assert run_state(again) == run_state(whole)
    assert again.in_flight.waiting == whole.in_flight.waiting and again.in_flight.version == 6
    assert step_log(tmp_path / "run") == step_log(tmp_path / "whole")
    assert_learned(again)


def test_a_checkpoint_inside_a_batch_counts_no_pair_twice(tmp_path: Path) -> None:
    """Two updates per batch: a resume in between samples the batch again, and its pairs enter once."""
    options: dict[str, Any] = OVERLAP | {
        "steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 1,
    }  # fmt: skip
    first = build(tmp_path, engine=scripts(tmp_path), **options | {"max_steps": 1})
    first.train()
    again = build(tmp_path, engine=scripts(tmp_path), **options)
    again.train(resume_from_checkpoint=True)
    keys = [(row.rollouts_step, row.pair_index) for row in again.store.list()]
    assert len(keys) == len(set(keys)) > 1
    assert {row.staleness_steps for row in again.store.list()} <= {2, 3, 4}


# ---- bad input ----


class OneKind(Engine):
    name = "one-kind"

    def generate(self, requests: Any, sampling: Any) -> Any: ...

    def wake(self) -> None: ...

    def sleep(self) -> None: ...


def test_what_contradicts_it_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    bad: dict[str, dict[str, Any]] = {
        r"max_staleness_steps=1 with mel_schedule='overlap'.*Set max_staleness_steps to 2 or more": {
            "max_staleness_steps": 1
        },
        r"max_staleness_steps=0 must be at least 1": {"max_staleness_steps": 0},
        r"mel_schedule='late' is not one of strict, overlap": {"mel_schedule": "late"},
        r"end_hopeless_analyses='soon' is not one of never, certain, likely": {"end_hopeless_analyses": "soon"},
        r"engine 'one-kind'.*Let it follow Request.sampling": {"engine": OneKind()},
        r"internalisation='credit'.*Set its context to 'bank', or mel_schedule='strict'": {"internalisation": "credit"},
        r"with a rollout_func.*Unset these, or mel_schedule='strict'": {"generation_kwargs": {"num_beams": 2}},
    }
    save_tiny(tmp_path / "base")
    for message, options in bad.items():
        with pytest.raises(ConfigError, match=message):
            build(tmp_path, **{"engine": scripts(tmp_path), "model": NoModel()} | OVERLAP | options)
    with pytest.warns(UserWarning, match=r"no effect with algorithm='grpo'"):
        args = MELConfig(str(tmp_path), algorithm="grpo", mel_schedule="overlap", use_cpu=True, bf16=False)
    assert not args.overlaps
    scored = MELConfig(str(tmp_path), mel_schedule="overlap", replay_criterion="scored", max_staleness_steps=1,
                       use_cpu=True, bf16=False)  # fmt: skip
    assert scored.overlaps
    dates = Dataset.from_list([row | {"level": date(2026, 1, 1)} for row in sums(8)])
    with pytest.raises(DataError, match=r"as JSON.*date.*Remove or convert that column, or mel_schedule='strict'"):
        build(tmp_path, train_dataset=dates, engine=scripts(tmp_path), model=NoModel(), **OVERLAP)


class NoModel:
    """Stands where the model is; whoever touches more than its config has loaded too early."""

    class config:
        max_position_embeddings = 0
