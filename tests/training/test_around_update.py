"""A budget of generated tokens: where a run stops, and that a resumed run stops at the same place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mel_lite.errors import ConfigError
from trainers import assert_learned, build, step_log


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
