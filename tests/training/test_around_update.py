"""A budget of generated tokens: where a run stops, and that a resumed run stops at the same place."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from mel_lite.errors import ConfigError
from trainers import assert_learned, build, digest, step_log, trainable


def test_a_run_stops_after_the_step_that_spends_its_tokens(tmp_path: Path) -> None:
    first = build(tmp_path, output_dir=tmp_path / "one", max_steps=1)
    first.train()
    per_step = first.engine.total_generated_tokens
    assert per_step > 8, "rollouts and analyses"
    trainer = build(tmp_path, max_steps=50, max_generated_tokens=per_step + 1, lr_scheduler_type="constant")
    trainer.train()
    assert_learned(trainer)
    rows = step_log(tmp_path / "run")
    spent = [row["mel/generated_tokens"] for row in rows]
    assert sum(spent) == trainer.engine.total_generated_tokens >= per_step + 1 > sum(spent[:-1])
    assert trainer.state.global_step == len(rows) == 2 and not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_last_batch_gets_all_of_its_updates(tmp_path: Path) -> None:
    options = {"max_steps": 50, "max_generated_tokens": 1, "num_iterations": 3, "lr_scheduler_type": "constant"}
    trainer = build(tmp_path, **options)
    trainer.train()
    assert_learned(trainer)
    assert trainer.state.global_step == 3


def test_a_checkpoint_waits_for_the_last_update_on_its_batch(tmp_path: Path) -> None:
    options = {"max_steps": 8, "num_iterations": 3, "save_strategy": "steps", "save_steps": 2}
    trainer = build(tmp_path, **options)
    trainer.train()
    assert_learned(trainer)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    end, rows = digest(trainable(trainer)), step_log(run)
    again = build(tmp_path, **options)
    again.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert digest(trainable(again)) == end
    assert [row.get("reward") for row in step_log(run)] == [row.get("reward") for row in rows]


def test_a_signal_between_two_updates_on_a_batch_says_what_replaces_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)

    options = {"max_steps": 6, "num_iterations": 3, "save_strategy": "steps", "save_steps": 50}
    trainer = build(tmp_path, callbacks=[Stop()], **options)
    with pytest.raises(SystemExit, match="143"):
        trainer.train()
    assert "Saved checkpoint-4 in" in caplog.text and "had 2 more updates to come: a new batch takes" in caplog.text
    assert_learned(trainer)
    again = build(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert [row["step"] for row in step_log(tmp_path / "run")] == [1, 4, 5], "steps that sampled"


def test_a_resumed_run_takes_no_step_beyond_its_tokens(tmp_path: Path) -> None:
    options = {"max_steps": 50, "max_generated_tokens": 1, "save_strategy": "steps", "save_steps": 10}
    trainer = build(tmp_path, **options)
    trainer.train()
    assert trainer.state.global_step == 1 and (tmp_path / "run" / "checkpoint-1").is_dir(), "saved where it stopped"
    again = build(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1 and len(step_log(tmp_path / "run")) == 1
    assert again.engine.total_generated_tokens == trainer.engine.total_generated_tokens > 1
    longer = build(tmp_path, **options | {"max_steps": 2, "max_generated_tokens": None})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2


def test_a_budget_of_no_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_generated_tokens=0 must be positive"):
        build(tmp_path, max_generated_tokens=0)
