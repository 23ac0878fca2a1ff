"""Measure a warm start with MEL's pipeline: `PYTHONPATH=benchmarks python -m demo_warmup.measure ADAPTER [options]`.

Samples rollouts, selects pairs, writes analyses, checks them for leaks, and replays each question with and without the
lesson in the prompt: one training step without the update. `--output FILE` keeps figures and lessons as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from demo_warmup.lessons import SEED, make_examples, rule
from mel_lite.data.demo_tasks.words import MEANINGS, READINGS
from mel_lite.data.tasks import load_tasks
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.evaluate import bootstrap_interval
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.pairs import select_pairs
from mel_lite.lessons.parsing import ParseFailure, parse_analysis
from mel_lite.lessons.pipeline import draw_lessons
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, Templates, load_templates
from mel_lite.models.adapters import attach_adapter
from mel_lite.models.chat import render
from mel_lite.models.load import ModelSpec, eos_ids, load_base, load_tokenizer
from mel_lite.seeds import prompt_hash, seed_for
from mel_lite.text import printable
from mel_lite.types import Experience, Finish, Group, Rollout, Status, Verdict
from mel_lite.verify.judge import AnswerJudge, Judge
from mel_lite.verify.pool import VerifyPool


@dataclass(frozen=True, slots=True)
class Conditions:
    """Settings of the measurement; lengths and temperatures as in the cpu preset."""

    tasks: str = "demo:test"
    prompts: int = 64
    group: int = 8
    pairs_per_group: int = 1
    attempts: int = 4
    made_pairs: int = 100
    made_notes: int = 100
    max_completion_tokens: int = 64
    analysis_max_tokens: int = 120
    temperature: float = 1.0
    analysis_temperature: float = 0.7
    max_context_tokens: int = 1024
    mark_fork: bool = True
    dtype: str = "float32"
    seed: int = 1


def roll_out(engine: Any, tokenizer: Any, tasks: Any, judge: Judge, conditions: Conditions) -> list[Group]:
    """Sample and judge `group` completions of every task."""
    prompts = [render(row["prompt"], tokenizer) for row in tasks]
    hashes = [prompt_hash(row["prompt"]) for row in tasks]
    requests = [
        Request(ids, seed_for(conditions.seed, step=0, prompt_hash=name, index=index, purpose="rollout"))
        for ids, name in zip(prompts, hashes, strict=True)
        for index in range(conditions.group)
    ]
    done = engine.generate(requests, Sampling(conditions.max_completion_tokens, conditions.temperature))
    texts = [str(tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in done]
    bare = [Group(row["prompt"], name, (), row["answer"]) for row, name in zip(tasks, hashes, strict=True)]
    verdicts = judge([group for group in bare for _ in range(conditions.group)], texts)
    rollouts = [
        Rollout(index, each.ids, text, verdict, each.finish)
        for index, (each, text, verdict) in enumerate(zip(done, texts, verdicts, strict=True))
    ]
    size = conditions.group
    return [replace(group, rollouts=tuple(rollouts[i * size : (i + 1) * size])) for i, group in enumerate(bare)]


def measure(adapter: Path | None, conditions: Conditions) -> tuple[dict[str, Any], list[Experience]]:
    """Return the figures of one MEL step of the demo model without its update, and the experiences of that step."""
    spec = ModelSpec("demo", dtype=conditions.dtype)
    tokenizer = load_tokenizer(spec)
    model: Any = load_base(spec)
    stops = eos_ids(model, tokenizer)
    if adapter is not None:
        model = attach_adapter(model, adapter)
    engine = HFEngine(model, eos_ids=stops, pad_id=tokenizer.pad_token_id)
    tasks = load_tasks(conditions.tasks, limit=conditions.prompts, conversational=True)
    made = make_examples({"analyze": conditions.made_pairs}, seed=SEED + conditions.seed)
    notes = make_examples({"replay": conditions.made_notes}, seed=SEED + conditions.seed)
    obeyed = obedience(engine, tokenizer, notes, conditions)
    figures, experiences = measure_engine(engine, tokenizer, tasks, made, conditions, load_templates("demo"))
    return figures | obeyed, experiences


def measure_engine(
    engine: Any,
    tokenizer: Any,
    tasks: Any,
    made: Sequence[dict[str, Any]],
    conditions: Conditions,
    templates: Templates = DEFAULT_TEMPLATES,
) -> tuple[dict[str, Any], list[Experience]]:
    """Return the figures and experiences of `measure` for any policy on `tasks`, with the prompts of `templates`.

    Args:
        made: examples of pairs with a known slip.
    """
    started_s = time.monotonic()
    with VerifyPool("numeric") as pool:
        judge = AnswerJudge(pool)
        groups = roll_out(engine, tokenizer, tasks, judge, conditions)
        pairs = select_pairs(
            groups, per_group=conditions.pairs_per_group, strategy="longest_prefix", run_seed=conditions.seed, step=0
        )
        context = LessonContext(
            engine=engine,
            tokenizer=tokenizer,
            templates=templates,
            judge=judge,
            clock=lambda name: nullcontext(),
            analysis=Sampling(conditions.analysis_max_tokens, conditions.analysis_temperature),
            replay=Sampling(conditions.max_completion_tokens, conditions.analysis_temperature),
            max_context_tokens=conditions.max_context_tokens,
            run_seed=conditions.seed,
            mark_fork=conditions.mark_fork,
            replay_attempts=conditions.attempts,
            control=True,
        )
        experiences, _ = draw_lessons(pairs, context, step=0, batch=0)
    figures = _figures(groups, experiences, conditions, time.monotonic() - started_s)
    return figures | pointing(engine, tokenizer, made, conditions), experiences


def pointing(
    engine: Any, tokenizer: Any, made: Sequence[dict[str, Any]], conditions: Conditions
) -> dict[str, float | str]:
    """Return shares of made pairs, each with a known slip, whose greedy analysis is right.

    `points_right`: it names the same step and quotes the same lines as the reference; `rule_right`: its heuristics are
    those of the reference; `made_parsed`: it parses. The pairs should be drawn with another seed than the warm-up's.
    """
    prefill = DEFAULT_TEMPLATES.analysis_prefill
    requests = [Request(render(each["prompt"], tokenizer, prefill=prefill), seed=0) for each in made]
    done = engine.generate(requests, Sampling(conditions.analysis_max_tokens, temperature=0.0))
    texts = [prefill + str(tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in done]
    wanted = [each["completion"] for each in made]
    parsed = [_parsed(text, each.finish) for text, each in zip(texts, done, strict=True)]
    return {
        "points_right": _share(sum(map(_same, map(_points_to, texts), map(_points_to, wanted))), len(made)),
        "rule_right": _share(sum(map(_same, map(_rules, texts), map(_rules, wanted))), len(made)),
        "made_parsed": _share(sum(parsed), len(made)),
    }


def obedience(engine: Any, tokenizer: Any, made: Sequence[dict[str, Any]], conditions: Conditions) -> dict[str, float]:
    """Return the shares of noted words that a greedy solution reads as noted, with the notes and without them.

    The notes name random readings, so without them about a third agree. `obeyed_wrong` counts wrong rules alone.
    """
    bare = [[{"role": "user", "content": each["prompt"][0]["content"].rpartition("\n\n")[2]}] for each in made]
    solutions = []
    for prompts in ([each["prompt"] for each in made], bare):
        requests = [Request(render(prompt, tokenizer), seed=0) for prompt in prompts]
        done = engine.generate(requests, Sampling(2 * conditions.max_completion_tokens, temperature=0.0))
        solutions.append([str(tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in done])
    counts = Counter[str]()
    for each, question, noted, plain in zip(made, bare, *solutions, strict=True):
        for word, reading in ((word, reading) for word in MEANINGS for reading in READINGS):
            if rule(word, reading) not in each["prompt"][0]["content"] or f" {word} " not in question[0]["content"]:
                continue
            hit, wrong = f" {word} {reading} " in noted, reading != MEANINGS[word]
            counts.update(all=1, wrong=wrong, hit=hit, hit_wrong=wrong and hit, plain=f" {word} {reading} " in plain)
    return {
        "obeyed": _share(counts["hit"], counts["all"]),
        "obeyed_wrong": _share(counts["hit_wrong"], counts["wrong"]),
        "obeyed_without_notes": _share(counts["plain"], counts["all"]),
    }


def miscounted(texts: Sequence[str]) -> float:
    """Return the share of the equations `a + b = c` and `a - b = c` that are false."""
    found = [each for text in texts for each in re.findall(r"(-?\d+) ([-+]) (-?\d+) = (-?\d+)", text)]
    wrong = sum(int(a) + (int(b) if sign == "+" else -int(b)) != int(total) for a, sign, b, total in found)
    return _share(wrong, len(found))


def _same(ours: Any, reference: Any) -> bool:
    return bool(ours == reference)


def _parsed(text: str, finish: Finish) -> bool:
    try:
        parse_analysis(text, finish=finish)
    except ParseFailure:
        return False
    return True


def _points_to(analysis: str) -> tuple[list[str], list[str], list[str]]:
    """Return the named steps, the quotes and the equations of the bifurcation."""
    said = analysis.partition("## Critique")[0]
    return (
        re.findall(r"[Ss]tep (\d+)", said), re.findall(r"`([^`]+)`", said),
        re.findall(r"-?\d+ [-+] -?\d+ = -?\d+", said),
    )  # fmt: skip


def _rules(analysis: str) -> str:
    return analysis.rpartition("## Heuristics")[2].strip()


def _figures(
    groups: Sequence[Group], experiences: Sequence[Experience], conditions: Conditions, took_s: float
) -> dict[str, Any]:
    verdicts = [rollout.verdict for group in groups for rollout in group.rollouts]
    reasons = Counter(each.reason.split(":")[0] for each in experiences if each.status is Status.UNPARSED)
    unparsed = sum(reasons.values())
    leaked = sum(each.status is Status.LEAKED for each in experiences)
    replayed = [each.replay for each in experiences if each.replay is not None]
    written = max(1, len(experiences))
    # Lessons that one attempt (k = 1, as in the paper) would keep, averaged over the attempts.
    kept = sum(replay.solved_rate for replay in replayed)
    uplift = [replay.uplift for replay in replayed if replay.uplift is not None]
    return {
        "prompts": len(groups),
        "rollouts": len(verdicts),
        "pass_rate": _share(sum(verdict is Verdict.RIGHT for verdict in verdicts), len(verdicts)),
        "miscounted_lines": miscounted([rollout.text for group in groups for rollout in group.rollouts]),
        "mixed_groups": _share(sum(group.is_mixed for group in groups), len(groups)),
        "analyses": len(experiences),
        "parsed": _share(len(experiences) - unparsed, written),
        "quoted_of_parsed": _share(sum(each.quote is not None for each in experiences), len(experiences) - unparsed),
        "leaked_of_parsed": _share(leaked, len(experiences) - unparsed),
        "replayed_lessons": len(replayed),
        "attempts_each": conditions.attempts,
        "solved_with_lesson": _mean([replay.solved_rate for replay in replayed]),
        "solved_without": _mean([replay.control_rate or 0.0 for replay in replayed]),
        "uplift": _mean(uplift),
        "retention_k1": round(kept / written, 3),
        "took_s": round(took_s),
        "unparsed_reasons": dict(reasons),
    }


def _share(part: int, whole: int) -> float:
    return round(part / max(1, whole), 3)


def _mean(values: Sequence[float]) -> str:
    """Return the mean over lessons with its 95 % bootstrap interval."""
    if not values:
        return "none"
    interval = bootstrap_interval(values, resamples=2000, seed=0)
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def show(figures: dict[str, Any], experiences: Sequence[Experience], console: Console, samples: int = 3) -> None:
    """Print the figures and a few lessons."""
    console.print_json(json.dumps(figures))
    shown = [each for each in experiences if each.parsed is not None][:samples]
    for each in shown:
        pair = each.analysis.pair
        verdicts = "" if each.replay is None else f", {each.replay.solved_rate:.0%} of replays right"
        console.rule(f"{each.status}{verdicts}")
        for text in (pair.wrong.text, pair.right.text, each.analysis.text):
            console.print(printable(text), markup=False, highlight=False)
            console.print("-" * 20)


def as_json(
    figures: dict[str, Any], experiences: Sequence[Experience], conditions: Conditions, lessons: int = 8
) -> str:
    """Return conditions, figures and the first lessons."""
    shown = [
        {
            "question": str(each.analysis.pair.group.prompt[-1]["content"]),
            "wrong": each.analysis.pair.wrong.text,
            "right": each.analysis.pair.right.text,
            "analysis": each.analysis.text,
            "status": str(each.status),
            "solved_with": None if each.replay is None else each.replay.solved_rate,
            "solved_without": None if each.replay is None else each.replay.control_rate,
        }
        for each in experiences[:lessons]
    ]
    return json.dumps({"conditions": asdict(conditions), "figures": figures, "lessons": shown}, indent=1) + "\n"


def main() -> None:
    """Parse the options, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, nargs="?", help="adapter folder (default: the demo model as it is)")
    defaults = Conditions()
    for name in Conditions.__slots__:
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, help="file for figures and lessons as JSON")
    options = vars(parser.parse_args())
    adapter, output = options.pop("adapter"), options.pop("output")
    conditions = Conditions(**options)
    figures, experiences = measure(adapter, conditions)
    if output is not None:
        output.write_text(as_json(figures, experiences, conditions), encoding="utf-8")
    show(figures, experiences, console=Console())


if __name__ == "__main__":
    main()
