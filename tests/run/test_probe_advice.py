"""The probe's advice follows from its figures, and its tables show them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mel_lite.intervals import Estimate
from mel_lite.run.probe.advice import NO_HELP, advise
from mel_lite.run.probe.result import Attempts, Lessons, ProbeResult, WayGradient

GOOD_LESSONS = Lessons(
    written=20, cut_off=0, parsed=20, quoted=18, leaked=1, kept=15, replayed=19, solved=0.6, resampled=0.4,
    uplift=Estimate(0.2, 0.1, 0.3), shift_nats=Estimate(2.0, 1.0, 3.0), shift_from_fork=0.8, tokens_from_fork=0.5,
    token_share=0.2,
)  # fmt: skip
POLICY = WayGradient("policy loss", None, {}, Estimate(0.58, 0.4, 0.7), 0.2, None, 12)
ANALYSIS = WayGradient("analysis", "analysis", {}, Estimate(0.03, -0.02, 0.06), 0.2, 1.0, 12)
OWN = WayGradient("distill own lesson", "distill", {"context": "own"}, Estimate(0.4, 0.2, 0.5), 0.4, 2.0, 12, 1.5)
SIBLING = WayGradient(
    "distill right sibling", "distill", {"context": "sibling"}, Estimate(0.3, 0.1, 0.5), 0.1, 0.5, 12, 2.0
)
RESULT = ProbeResult(
    model="m", dataset="d", seed=1, prompts=36, lesson_prompts=12, group_size=8, replay_attempts=4, mel_weight=1.0,
    attempts=Attempts(0.4, 0.8, 0.1, 0.1), lessons=GOOD_LESSONS, halves=Estimate(0.6, 0.4, 0.8),
    ways=(POLICY, ANALYSIS, OWN, SIBLING),
)  # fmt: skip


def but(way: WayGradient, **changes: Any) -> ProbeResult:
    """RESULT with one way changed."""
    return replace(RESULT, ways=tuple(replace(each, **changes) if each is way else each for each in RESULT.ways))


def lessons(**changes: Any) -> ProbeResult:
    return replace(RESULT, lessons=replace(GOOD_LESSONS, **changes))


CASES: dict[str, tuple[ProbeResult, str | None, list[str]]] = {
    "the highest cosine": (
        RESULT,
        "distill own lesson",
        [
            "Lessons lift replays over plain resampling (+20.0 [+10.0, +30.0] points)",
            "analysis only adds noise: its cosine with the policy gradient is +0.03 [-0.02, +0.06]",
            "--set train.internalisation=distill",
            "train.internalisation_options={context: own}",
            "--set train.mel_weight=0.5",
            "its gradient would be 2.0 times the policy's",
            "of at most 0.87",
        ],
    ),
    "at a lower lambda": (replace(RESULT, mel_weight=0.3), "distill own lesson", ["Choose: distill own lesson"]),
    "no uplift leaves the sibling": (
        lessons(uplift=Estimate(0.0, -0.1, 0.1)),
        "distill right sibling",
        [
            NO_HELP,
            "do not lift replays over plain resampling (+0.0 [-10.0, +10.0] points",
            "train.mark_fork",
            "{context: sibling}",
        ],
    ),
    "an uplift that is not sure": (
        lessons(uplift=Estimate(0.1, -0.1, 0.3)),
        "distill own lesson",
        ["may lift replays", "Raise --prompts"],
    ),
    "a bad teacher": (
        but(OWN, teacher_shift_nats=-0.5),
        "distill right sibling",
        ["Do not choose distill own lesson: its teacher is no better than the student (-0.50 nats"],
    ),
    "a teacher that is equal": (but(OWN, teacher_shift_nats=0.0), "distill right sibling", ["no better"]),
    "one that pulls against": (
        but(OWN, cosine=Estimate(-0.3, -0.4, -0.1)),
        "distill right sibling",
        ["it pulls against the policy gradient"],
    ),
    "nothing points its way": (
        replace(RESULT, ways=(POLICY, ANALYSIS)),
        None,
        ["Choose: --algorithm grpo", "analysis only adds noise"],
    ),
    "no gradient": (but(OWN, cosine=None), "distill right sibling", ["distill own lesson: no gradient"]),
    "halves that do not agree": (
        replace(RESULT, halves=Estimate(0.1, -0.2, 0.3)),
        None,
        ["two halves", "Raise --prompts", "--algorithm grpo"],
    ),
    "no analyses with the parts": (
        lessons(parsed=9, cut_off=2),
        "distill right sibling",
        [NO_HELP, "9 of 20 analyses", "Warm the model up"],
    ),
    "analyses cut off": (lessons(parsed=9, cut_off=11), "distill right sibling", ["raise train.analysis_max_tokens"]),
    "leaks": (lessons(leaked=11), "distill own lesson", ["11 of 20", "train.leak_policy=redact"]),
    "all leak": (
        lessons(leaked=20, replayed=0, uplift=None, shift_nats=None),
        "distill right sibling",
        [NO_HELP, "none was left to replay"],
    ),
    "lessons that favor wrong rollouts": (
        lessons(shift_nats=Estimate(-1.0, -2.0, 0.5)),
        "distill own lesson",
        ["do not favor the right rollouts", "replay_criterion=scored+solved"],
    ),
    "no lesson": (lessons(written=0, parsed=0), "distill right sibling", [NO_HELP, "Raise --prompts"]),
    "too hard": (
        replace(RESULT, attempts=Attempts(0.04, 0.2, 0.8, 0.0)),
        "distill own lesson",
        ["4% is too low for GRPO: 20% of the groups", "num_generations"],
    ),
    "too easy": (replace(RESULT, attempts=Attempts(0.96, 0.2, 0.0, 0.8)), "distill own lesson", ["too high for GRPO"]),
    "all wrong": (
        replace(RESULT, attempts=Attempts(0.0, 0.0, 1.0, 0.0)),
        None,
        [NO_HELP, "too hard, or answers are not found", "easier tasks"],
    ),
    "all right": (
        replace(RESULT, attempts=Attempts(1.0, 0.0, 0.0, 1.0)),
        None,
        [NO_HELP, "too easy", "harder tasks"],
    ),
    "not judged": (
        replace(RESULT, attempts=Attempts(None, 0.0, 0.0, 0.0)),
        None,
        ["abstained on every completion", "--answer-column"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_advice_follows_from_the_figures(case: str) -> None:
    result, choice, words = CASES[case]
    chosen, reasons = advise(result)
    text = " ".join(reasons)
    assert chosen == choice, text
    for word in words:
        assert word in text, text
    if case == "at a lower lambda":
        assert "mel_weight" not in text, "0.3 x 2 is below the policy's"


def test_the_tables_show_the_figures() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    for table in RESULT.tables():
        console.print(table)
    shown = " ".join(console.export_text().split())
    for figure in (
        "80% / 10% / 10%",
        "18 (90%)",
        "+20.0 [+10.0, +30.0] points (solved 60%, without 40%)",
        "80% (50% of",
    ):
        assert figure in shown, shown
    assert "a perfect loss would show +0.87" in shown and "+0.03 [-0.02, +0.06]" in shown
