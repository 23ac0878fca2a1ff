"""What a run shows: plain lines in a file, a live view on a terminal, and warnings with both."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mel_lite.engines.metered import PhaseClock
from mel_lite.run import progress
from mel_lite.run.notices import Notices
from mel_lite.run.progress import LiveDisplay
from train_command import command


def console(*, width: int = 100, terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def trainer_of(clock: PhaseClock, *, budget: int | None = None, tokens: int = 0, steps_per_batch: float = 1.0) -> Any:
    return SimpleNamespace(
        clock=clock,
        engine=SimpleNamespace(total_generated_tokens=tokens),
        args=SimpleNamespace(max_generated_tokens=budget, steps_per_batch=steps_per_batch),
    )


def lines(display: LiveDisplay, width: int = 100) -> list[str]:
    """The live view as text."""
    shown = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    shown.print(display._view())
    return shown.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands still: `now(5)` lets five seconds pass."""
    time_s = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time_s[0])

    def passes(seconds_s: float) -> None:
        time_s[0] += seconds_s

    return passes


def test_the_view_names_step_phase_parts_and_the_time_left(now: Any) -> None:
    clock = PhaseClock()
    display = LiveDisplay(console(), trainer_of(clock), evaluations=2)
    state = SimpleNamespace(global_step=0, max_steps=4)
    with display.evaluating(), clock.untimed("evaluation"):
        clock.expect(12, most_tokens=64)
        clock.saw(3, 15)
        now(30)
        assert lines(display) == ["evaluation 3/12 answers  15 of 64 tokens each  30 s  before training"]
    display._state = state
    display._begin_step()
    with clock("rollout"):
        clock.expect(64)
        now(7)
        assert lines(display) == [
            "step 1 of 4  ────────────────────  time left: known after a step",
            "rollout 0/64 completions  7.0 s",
        ]
    with clock("update"):
        now(3)
    state.global_step = 1
    display.on_step_end(None, state, None)
    with clock("update"):
        clock.expect(4)
        clock.saw(1)
        now(1)
        first, second = lines(display)
    # Three steps of 10 s, of which 1 s has passed, and the last evaluation.
    assert first.startswith("step 2 of 4  ━━━━━───────────────  about 59 s left  peak ") and first.endswith(" GiB")
    assert second == "update 1/4 parts  1.0 s"


def test_with_a_token_budget_the_view_counts_tokens(now: Any) -> None:
    clock = PhaseClock()
    trainer = trainer_of(clock, budget=1000)
    display = LiveDisplay(console(), trainer)
    display._state = state = SimpleNamespace(global_step=0, max_steps=1_000_000)
    display._begin_step()
    assert lines(display)[0].startswith(
        "step 1  ────────────────────  time left: known after a step  0 of 1,000 tokens"
    )
    now(10)
    state.global_step, trainer.engine.total_generated_tokens = 1, 200
    display.on_step_end(None, state, None)
    assert lines(display)[0] == "step 2 of about 5  ━━━━────────────────  about 40 s left  200 of 1,000 tokens"
    trainer.args.steps_per_batch = 3.0
    assert lines(display)[0].startswith("step 2 of about 6 "), "the last batch gets all of its updates"


def test_a_narrow_terminal_gets_more_lines_and_no_bar(now: Any) -> None:
    clock = PhaseClock()
    display = LiveDisplay(console(width=40), trainer_of(clock, budget=1_000_000, tokens=250_000))
    display._state = SimpleNamespace(global_step=3, max_steps=120)
    with clock("analysis"):
        clock.expect(32)
        clock.saw(8, 700)
        shown = lines(display, width=40)
    assert all(len(line) <= 40 for line in shown) and not any("─" in line for line in shown)
    assert "250,000 of 1,000,000 tokens" in "\n".join(shown) and "analysis 8/32 analyses" in "\n".join(shown)


def test_a_step_breaks_between_its_figures_on_a_terminal() -> None:
    made = console(width=60)
    display = LiveDisplay(made)
    logs = {"reward": 0.5, "mel/policy_loss": 0.0125, "mel/tokens_per_s": 88.0, "mel/peak_memory_gib": 2.5}
    display.on_log(None, SimpleNamespace(global_step=2, max_steps=9), None, logs)
    assert made.file.getvalue() == (  # type: ignore[attr-defined]
        "step 2/9 | reward 0.50 | policy loss +0.0125\n    88 tokens/s, peak 2.5 GiB\n"
    )


def test_a_file_has_one_line_for_the_update_of_a_step(now: Any) -> None:
    clock, output = PhaseClock(), console(terminal=False)
    display = LiveDisplay(output, trainer_of(clock))
    display._state = state = SimpleNamespace(global_step=0, max_steps=2)
    for _ in range(2):
        display._begin_step()
        for seconds_s in (3, 5):
            with clock.rest("update"):
                with clock("rollout"):
                    clock.expect(8)
                    clock.generated_tokens += 100
                clock.expect(2)
                now(seconds_s)
        state.global_step += 1
        display.on_step_end(None, state, None)
    rollout = "rollout: 8 completions, 100 tokens, 0.0 s"
    assert output.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        f"step 1/2 {rollout}", f"step 1/2 {rollout}", "step 1/2 update: 4 parts, 8.0 s",
        f"step 2/2 {rollout}", f"step 2/2 {rollout}", "step 2/2 update: 4 parts, 8.0 s",
    ]  # fmt: skip


def test_a_file_has_the_time_left_and_no_bound_that_a_token_budget_makes_meaningless(now: Any) -> None:
    clock, output = PhaseClock(), console(terminal=False)
    trainer = trainer_of(clock, budget=1000)
    trainer.collapse, trainer.latest_sample = SimpleNamespace(first_batches=SimpleNamespace(line="")), lambda: None
    display = LiveDisplay(output, trainer)
    display._state = state = SimpleNamespace(global_step=0, max_steps=1_000_000)
    display._begin_step()
    with clock("rollout"):
        clock.expect(8)
        now(10)
    state.global_step, trainer.engine.total_generated_tokens = 1, 200
    display.on_step_end(None, state, None)
    display.on_log(None, state, None, {"reward": 0.5})
    assert output.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 1 rollout: 8 completions, 10 s", "step 1/5 | reward 0.50 | about 40 s left",
    ]  # fmt: skip


def test_a_run_into_a_file_has_one_plain_line_per_phase_and_step(tmp_path: Path) -> None:
    shown = command(tmp_path, train__max_steps=2, train__learning_rate="1e-3").stdout
    assert "\x1b" not in shown and "\r" not in shown
    for step in (1, 2):
        (rollout,) = re.findall(rf"^step {step}/2 rollout: 8 completions, ([\d,]+) tokens, [\d.]+ s$", shown, re.M)
        assert 8 <= int(rollout) <= 64
        assert len(re.findall(rf"^step {step}/2 verify: 8 answers, [\d.]+ s$", shown, re.M)) == 1
        (line,) = re.findall(rf"^step {step}/2 \| .*$", shown, re.M)
        assert "reward" in line and "gradient" in line and "tokens/s" in line
    assert not re.search("^step 3/", shown, re.M), "the last checkpoint is the last step's"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]


def test_a_closed_file_does_not_stop_the_phases() -> None:
    clock, made = PhaseClock(), console(terminal=False)
    display = LiveDisplay(made, trainer_of(clock))
    display._state = SimpleNamespace(global_step=0, max_steps=2)
    made.file.close()
    with clock("rollout"):
        clock.expect(8)
    assert clock.on_end is None and "rollout" in clock.seconds_s


def test_warnings_are_shown_once_labeled_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (True, False):
        made, logger = console(terminal=terminal), logging.getLogger("mel_lite.resilience.collapse")
        with Notices(made) as notices:
            logger.warning("Step %s: no uplift\x1b[2J", 3)
            logger.warning("Step %s: no uplift\x1b[2J", 3)
            logger.info("not shown")
        logger.warning("after the run")
        text = made.file.getvalue() if terminal else capsys.readouterr().err  # type: ignore[attr-defined]
        assert text == "warning: Step 3: no uplift\ufffd[2J\n" * 2
        assert notices.seen == ["Step 3: no uplift\ufffd[2J"]
        capsys.readouterr()
