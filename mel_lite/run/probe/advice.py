"""Advice from the figures of a probe: which way to choose and why. The rules are listed in docs/probe.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mel_lite.run.probe.result import Lessons, ProbeResult, WayGradient, percent, points, signed

HARD, EASY = 0.05, 0.95
"""Pass rates below and above which most groups teach GRPO nothing."""
LEAST_PARSED, MOST_LEAKED, CUT_OFF = 0.5, 0.5, 0.5
"""Share of analyses that must parse, share of parsed ones that may leak, and share cut off that explains a failure."""
NO_HELP = "Lessons will not help here"
WITHOUT_LESSONS = "--algorithm grpo"


def advise(result: ProbeResult) -> ProbeResult:
    """Return the result with its choice, the options for it, and the reasons, one sentence or two each."""
    stop = _nothing_to_learn(result)
    if stop is not None:
        return replace(result, choice=None, options="", advice=(stop, "Change that first, and probe again."))
    regime = tuple(_regime(result))
    reasons = [*regime]
    helps, about = _lessons(result.lessons)
    reasons += about
    if result.halves is None or result.halves.low <= 0:
        reasons.append(
            f"The two halves of the policy gradient do not agree (cosine {signed(result.halves)}), so no loss can be "
            "compared with it. Raise --prompts."
        )
        if regime:
            return replace(
                result, choice=None, options="", advice=(*reasons, "Change the pass rate first, and probe again.")
            )
        reasons.append("Choose nothing by this probe. Until then train without lessons:")
        return replace(result, choice=None, options=WITHOUT_LESSONS, advice=tuple(reasons))
    candidates = []
    for way in result.ways[1:]:
        refusal = _refusal(way, helps=helps)
        if refusal is None:
            candidates.append(way)
        elif refusal:
            reasons.append(refusal)
    best = max(candidates, key=lambda way: way.cosine.value if way.cosine else -1.0, default=None)
    if best is None:
        reasons.append("No way to train on lessons points where the policy gradient does. Train without lessons:")
        return replace(result, choice=None, options=WITHOUT_LESSONS, advice=tuple(reasons))
    why, options = _choice(best, result)
    return replace(result, choice=best.name, options=options, advice=(*reasons, why))


def _nothing_to_learn(result: ProbeResult) -> str | None:
    """Return why neither GRPO nor lessons can learn, and the knob; None when some group is mixed."""
    rate = result.attempts.pass_rate
    if rate is None:
        return (
            f"The verifier abstained on every completion. {NO_HELP}, and neither will GRPO: check train.verifier and "
            "the answer column (--answer-column)."
        )
    if result.attempts.mixed_share > 0:
        return None
    if rate > 0.5:
        why, knob = "too easy", "use harder tasks, or raise train.temperature"
    else:
        why = "too hard, or answers are not found"
        knob = "use easier tasks, warm the model up (mel-lite warmup), or raise train.num_generations"
    return (
        f"No group has both a right and a wrong completion ({rate:.0%} right): the tasks are {why}. {NO_HELP}, and "
        f"neither will GRPO: {knob}."
    )


def _regime(result: ProbeResult) -> Iterator[str]:
    rate, mixed = result.attempts.pass_rate, percent(result.attempts.mixed_share)
    assert rate is not None, "some group is mixed"
    if rate < HARD:
        yield (
            f"The pass rate of {percent(rate)} is too low for GRPO: {mixed} of the groups teach it something. "
            "Use easier tasks, warm the model up (mel-lite warmup), or raise train.num_generations."
        )
    elif rate > EASY:
        yield (
            f"The pass rate of {percent(rate)} is too high for GRPO: {mixed} of the groups teach it something. "
            "Use harder tasks, or raise train.temperature."
        )


def _lessons(lessons: Lessons) -> tuple[bool, list[str]]:
    """Return False when lessons cannot help, and what was found about them."""
    if not lessons.pairs:
        return False, [f"{NO_HELP}: no lesson prompt had a right and a wrong completion. Raise --prompts."]
    if not lessons.written:
        return False, [
            f"{NO_HELP}: none of the {lessons.pairs} pairs of a right and a wrong completion fits the analysis prompt. "
            "Raise train.max_context_tokens."
        ]
    if lessons.parsed < LEAST_PARSED * lessons.written:
        knob = "Warm the model up with analyses (mel-lite warmup)"
        if lessons.cut_off >= CUT_OFF * lessons.written:
            knob = f"{lessons.cut_off} were cut off: raise train.analysis_max_tokens, or {knob[0].lower()}{knob[1:]}"
        return False, [f"{NO_HELP}: {lessons.parsed} of {lessons.written} analyses have the three parts. {knob}."]
    found = []
    if lessons.leaked > MOST_LEAKED * lessons.parsed:
        found.append(
            f"{lessons.leaked} of {lessons.parsed} parsed analyses name the answer and are dropped. Set "
            "train.leak_policy=redact."
        )
    if lessons.uplift is None:
        return False, [*found, f"{NO_HELP}: none was left to replay."]
    uplift = points(lessons.uplift)
    if lessons.uplift.value <= 0:
        return False, [
            *found,
            f"{NO_HELP}: they do not lift replays over plain resampling ({uplift}). Warm the model up with better "
            "analyses (mel-lite warmup), mark the fork (train.mark_fork=true), or use a larger model.",
        ]
    if lessons.uplift.low <= 0:
        found.append(f"Lessons may lift replays over plain resampling ({uplift}). Raise --prompts to be sure.")
    else:
        found.append(f"Lessons lift replays over plain resampling ({uplift}).")
    if lessons.shift_nats is not None and lessons.shift_nats.value <= 0:
        found.append(
            f"They do not favor the right rollouts of their groups ({signed(lessons.shift_nats)} nats). Set "
            "train.replay_criterion=scored+solved, which drops such lessons for no tokens."
        )
    return True, found


def _refusal(way: WayGradient, *, helps: bool) -> str | None:
    """Return why a way is not chosen; None when it may be, empty when an earlier reason says it."""
    if way.cosine is None:
        return f"{way.name}: no gradient on these prompts, so nothing to choose."
    if way.needs_lessons and not helps:
        return ""
    if way.teacher_shift_nats is not None and way.teacher_shift_nats <= 0:
        return (
            f"Do not choose {way.name}: its teacher is no better than the student "
            f"({way.teacher_shift_nats:+.2f} nats for right over wrong rollouts)."
        )
    if way.cosine.high < 0:
        return f"Do not choose {way.name}: it pulls against the policy gradient (cosine {signed(way.cosine)})."
    if way.cosine.low <= 0:
        return f"{way.name} only adds noise: its cosine with the policy gradient is {signed(way.cosine)}."
    return None


def _choice(way: WayGradient, result: ProbeResult) -> tuple[str, str]:
    """Return why a way is chosen, and the options for it."""
    assert way.cosine is not None, "only a way with a gradient is chosen"
    options = [f"--set train.internalisation={_yaml(way.internalisation)}"]
    if way.options:
        options.append(f"--set 'train.internalisation_options={_yaml(way.options)}'")
    limit = "" if result.highest_cosine is None else f", of at most {result.highest_cosine:.2f}"
    why = f"Choose {way.name}: of all it points most the policy's way (cosine {signed(way.cosine)}{limit})."
    if way.ratio is not None and way.ratio * result.mel_weight > 1:
        options.append(f"--set train.mel_weight={_two_digits(1 / way.ratio):g}")
        why += f" At mel_weight={result.mel_weight:g} its gradient would be {way.ratio * result.mel_weight:.1f} times"
        why += " the policy's."
    return f"{why} Options of mel-lite train:", " ".join(options)


def _two_digits(value: float) -> float:
    """Round down to two significant digits."""
    scale = 10 ** (1 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale


def _yaml(value: object) -> str:
    """Return a name, or a mapping in the flow form that --set takes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


__all__ = ["advise"]
