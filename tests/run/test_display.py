"""Text for the terminal: contents, and that model text cannot control the terminal."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mel_lite.lessons.store import ExperienceStore
from mel_lite.memory.formulas import GIB
from mel_lite.report import figures
from mel_lite.report.terminal import experience_page
from mel_lite.run.display import (
    comparison_table,
    flowed,
    funnel_table,
    phase_text,
    plan_view,
    progress_bar,
    sample_panel,
    step_parts,
)
from mel_lite.training.metrics import funnel
from mel_lite.types import (
    Analysis,
    Experience,
    Finish,
    Group,
    LeakReport,
    MetaExperience,
    Pair,
    Replay,
    Rollout,
    Span,
    Status,
    Verdict,
)
from plans import planned, with_vllm
from run_folders import evaluation

R, W, A = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN


def group(*verdicts: Verdict) -> Group:
    rollouts = tuple(Rollout(i, (i, 2), f"[bold]rollout[/] {i}", v) for i, v in enumerate(verdicts))
    return Group([{"role": "user", "content": "What is 1 + 1?"}], "ab" * 8, rollouts, "2")


def experience(status: Status, *, replay: Replay | None = None, text: str = "see \x1b[2J\x07 here") -> Experience:
    mixed = group(R, W)
    pair = Pair(mixed, mixed.rollouts[0], mixed.rollouts[1], 0)
    parsed = None if status is Status.UNPARSED else MetaExperience(text, "[red]why[/]", "If a, then b.")
    reason = "" if status is Status.KEPT else "because"
    return Experience(
        0, Analysis(pair, (1, 2), (3,), text, Finish.STOP, 1.5), status, reason, parsed, LeakReport(), replay
    )


def shown(renderable: Any) -> str:
    console = Console(file=StringIO(), width=100, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_funnel_counts_what_is_left_after_each_stage() -> None:
    groups = [group(R, W, W), group(W, W, A), group(R, R, R), group(W, R, R)]
    experiences = [
        experience(Status.UNPARSED),
        experience(Status.LEAKED),
        experience(Status.REPLAY_FAILED, replay=Replay((W, W), ("", ""), (R, W))),
        experience(Status.KEPT, replay=Replay((R, R), ("", ""), (R, W))),
    ]
    experiences[1:3] = [replace(each, quote=Span(0, 2)) for each in experiences[1:3]]
    metrics = funnel(groups, 4, experiences, 120)
    assert metrics["mel/quoted"] == 2
    stages = ("groups", "mixed_groups", "pairs", "written", "parsed", "leak_free", "replay_valid", "trained_tokens")
    assert [metrics[f"mel/{stage}"] for stage in stages] == [4, 2, 4, 4, 3, 2, 1, 120]
    assert metrics["mel/pass_rate"] == pytest.approx(6 / 11) and metrics["mel/abstain_rate"] == pytest.approx(1 / 12)
    assert metrics["mel/retention_ratio"] == 0.25 and metrics["mel/leak_rate"] == pytest.approx(1 / 3)
    assert metrics["mel/replay_solved"] == 0.5 and metrics["mel/replay_uplift"] == pytest.approx((-0.5 + 0.5) / 2)


def test_ratios_without_a_denominator_are_left_out() -> None:
    metrics = funnel([group(A, A)], 0, [], 0)
    assert not {"mel/pass_rate", "mel/retention_ratio", "mel/leak_rate", "mel/replay_uplift"} & set(metrics)


def test_a_step_is_one_line_with_every_figure() -> None:
    logs = funnel([group(R, W)], 1, [experience(Status.KEPT, replay=Replay((R,), ("",), (W,)))], 33)
    logs |= {"reward": 0.5, "mel/policy_loss": -0.0125, "mel/nll": 1.2345, "mel/nll_after": 1.1}
    logs |= {
        "mel/grad_norm_policy": 0.2,
        "mel/grad_norm_nll": 0.4,
        "mel/tokens_per_s": 88.4,
        "mel/peak_memory_gib": 2.5,
    }
    line = " | ".join(step_parts(3, 120, logs))
    assert line == (
        "step   3/120 | 50% right, reward 0.50 | 1 of 1 lessons kept, 1 of 1 groups mixed, uplift +100 points | "
        "policy loss -0.0125, lessons' NLL 1.234 to 1.100 | gradient policy 0.200, lessons 0.400 | "
        "88 tokens/s, peak 2.5 GiB"
    )
    assert step_parts(1, 9, {"reward": 0.0, "loss": 0.5, "grad_norm": 1.0}) == [
        "step 1/9", "reward 0.00", "loss +0.5000", "gradient 1.000"
    ]  # fmt: skip


def test_a_line_is_broken_between_its_parts() -> None:
    parts = ["step 1/9", "", "50% right, reward 0.50", "peak 2.5 GiB", "lessons " * 6 + "x" * 50]
    assert flowed(parts[:4], 200, " | ", indent=4) == ["step 1/9 | 50% right, reward 0.50 | peak 2.5 GiB"]
    broken = ["step 1/9 | 50% right, reward 0.50", "    peak 2.5 GiB"]
    broken += ["    lessons lessons lessons lessons", "    lessons lessons", "    " + "x" * 50]
    assert flowed(parts, 40, " | ", indent=4) == broken
    assert flowed([], 40, " | ", indent=4) == []
    assert (
        phase_text("rollout", 64, 24) == "rollout 24/64 completions"
        and phase_text("scored", 0, 0) == "scoring of lessons"
    )
    assert phase_text("replay", 4) == "replay: 4 replays" and progress_bar(0.25, 8) == "━━──────"


def test_model_text_has_neither_markup_nor_control_characters(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        store.add([experience(Status.KEPT, replay=Replay((R,), ("\x1b]0;title\x07",)))])
        row = store.get(1)
    for text in (shown(sample_panel(row)), shown(experience_page(row))):
        assert "\x1b" not in text and "\x07" not in text
        assert "[red]why[/]" in text and "[bold]rollout[/] 1" in text


def test_the_funnel_table_shows_what_each_stage_left() -> None:
    text = shown(funnel_table({"mel/groups": 8, "mel/mixed_groups": 4, "mel/pairs": 4, "mel/parsed": 1}))
    assert "50%" in text and "25%" in text and "groups of rollouts" in text and "kept" in text
    assert "0% of parsed" in text
    assert "67% of parsed" in shown(funnel_table({"mel/parsed": 3, "mel/quoted": 2}))


def test_the_view_shows_every_phase_and_the_card() -> None:
    _, made = planned("24gb", model__name="Qwen/Qwen3-14B-Base")
    text = shown(plan_view(made))
    for phase in made.phases:
        assert f"{phase.bytes / GIB:.1f} GiB" in next(line for line in text.splitlines() if phase.name in line)
    assert "max_cache_tokens=" in text and "CUDA_VISIBLE_DEVICES= mel-lite export" in text
    _, made = with_vllm("24gb")
    assert "the export runs on the CPU, in a separate process" in shown(plan_view(made))


def test_before_and_after_are_shown_with_their_paired_difference() -> None:
    """All 12 tasks are never solved before; afterwards 9 of them are, 3 with every sample."""
    before, after = evaluation([0] * 12), evaluation([4] * 3 + [2] * 6 + [0] * 3)
    text = shown(comparison_table(before, after))
    rows = {line.split("\u2502")[1].strip(): line for line in text.splitlines() if "\u2502" in line}
    assert "0.0% [0.0%, 24.2%]" in rows["Avg@4"], "Wilson's interval of 0 of 12 tasks"
    change = figures.evaluation(before, after)[0][1].change
    assert change is not None and change.value == 0.5 and 0.2 < change.low < 0.4 and 0.6 < change.high < 0.8
    assert change.as_points() in rows["Avg@4"]
    fewer = shown(comparison_table(before, evaluation([0] * 11)))
    assert "Only the 11 tasks that both evaluations judged are compared." in " ".join(fewer.split())
