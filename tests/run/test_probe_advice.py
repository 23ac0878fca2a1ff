"""The probe's advice follows from its figures, and its tables show them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mel_lite.intervals import Estimate
from mel_lite.run.probe.advice import NO_HELP, advise
from mel_lite.run.probe.result import Attempts, Lessons, ProbeResult, WayGradient, read_result

GOOD_LESSONS = Lessons(
    pairs=20, written=20, cut_off=0, parsed=20, quoted=18, leaked=1, kept=15, replayed=19, solved=0.6, resampled=0.4,
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
    "at a lower lambda": (replace(RESULT, mel_weight=0.3), "distill own lesson", ["Choose distill own lesson"]),
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
        ["No way to train on lessons", "Train without lessons", "analysis only adds noise"],
    ),
    "no gradient": (but(OWN, cosine=None), "distill right sibling", ["distill own lesson: no gradient"]),
    "halves that do not agree": (
        replace(RESULT, halves=Estimate(0.1, -0.2, 0.3)),
        None,
        ["two halves", "Raise --prompts", "--algorithm grpo"],
    ),
    "halves that do not agree where GRPO learns little": (
        replace(RESULT, halves=None, attempts=Attempts(0.04, 0.2, 0.8, 0.0)),
        None,
        ["4.0% is too low", "two halves", "Change the pass rate first, and probe again"],
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
    "no pair": (lessons(pairs=0, written=0, parsed=0), "distill right sibling", [NO_HELP, "Raise --prompts"]),
    "no pair that fits": (
        lessons(pairs=3, written=0, parsed=0),
        "distill right sibling",
        [NO_HELP, "none of the 3 pairs", "Raise train.max_context_tokens"],
    ),
    "too hard": (
        replace(RESULT, attempts=Attempts(0.04, 0.2, 0.8, 0.0)),
        "distill own lesson",
        ["4.0% is too low for GRPO: 20% of the groups", "num_generations"],
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
    found = advise(result)
    text = " ".join((*found.advice, found.options))
    assert found.choice == choice, text
    if choice is None:
        assert found.options == ("" if "probe again" in text else "--algorithm grpo")
    for word in words:
        assert word in text, text
    if case == "at a lower lambda":
        assert "mel_weight" not in text, "0.3 x 2 is below the policy's"


def shown_lines(result: ProbeResult) -> list[str]:
    """What is printed on 80 columns, one string per line with single spaces."""
    console = Console(width=80, record=True, file=io.StringIO())
    result.show(console)
    return [" ".join(line.split()).strip("│ ") for line in console.export_text().splitlines()]


def test_the_tables_show_the_figures() -> None:
    lines = shown_lines(advise(RESULT))
    for line in (
        "groups: mixed / all wrong / all right │ 80% / 10% / 10%",
        "quote a wrong step │ 18 (90% of the parsed)",
        "name the answer (leaked) │ 1 (5.0% of the parsed)",
        "solved with / without │ 60% / 40%",
        "uplift over plain resampling │ +20.0 [+10.0, +30.0] points",
        "share of the shift from the fork on │ 80% (50% of the tokens)",
        "distill own lesson │ +0.40 [+0.20, +0.50] │ 2 │ +1.50 │ 12",
        "two halves of the reference with each other: +0.60 [+0.40, +0.80]",
        "the true policy gradient with the reference: +0.87",
    ):
        assert line in lines, lines
    assert "- Lessons lift replays over plain resampling (+20.0 [+10.0, +30.0] points)." in lines
    assert lines[-1] == (
        "--set train.internalisation=distill --set 'train.internalisation_options={context: own}' "
        "--set train.mel_weight=0.5"
    ), "one line, to be copied"


def test_figures_that_do_not_exist_are_not_shown() -> None:
    without = replace(GOOD_LESSONS, pairs=3, written=0, parsed=0, replayed=0, uplift=None, shift_nats=None)
    no_gradient = replace(OWN, cosine=None, ratio=0.0, teacher_shift_nats=None, prompts=0)
    result = replace(RESULT, attempts=Attempts(0.046, 0.2, 0.8, 0.0), lessons=without, ways=(POLICY, no_gradient))
    lines = shown_lines(result)
    assert "completions that are right │ 4.6%" in lines, "advice calls below 5 % too low"
    assert "analyses written │ 0 (3 pairs, 3 too long)" in lines
    assert not any("parsed" in line or "replayed" in line or "uplift" in line for line in lines)
    assert "distill own lesson │ - │ - │ - │ 0" in lines


def test_a_result_is_read_as_it_was_written() -> None:
    """With and without every optional figure."""
    empty = replace(RESULT, lessons=replace(GOOD_LESSONS, uplift=None, shift_nats=None), halves=None, notes=("a", "b"))
    for result in (RESULT, advise(RESULT), empty):
        assert read_result(result.to_json()) == result
