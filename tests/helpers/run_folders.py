"""Run folders with known figures, written by the product's own writers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiences import experience
from mel_lite.evaluate import EvalResult, Interval, PromptScore
from mel_lite.lessons.store import Effect, ExperienceStore, TokenCredit
from mel_lite.recipe import resolve
from mel_lite.types import MetaExperience, Replay, Rollout, Status, Verdict

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></pre></details>"
    "</script><!-- ${7*7} {{ 7*7 }} javascript:alert(1) \u202eabc\x1b[2J\x00"
)
WRONG = "First, 3 + 8 = 11.\nThen, 11 - 2 = 8.\nAnswer: 8"
RIGHT = "First, 3 + 8 = 11.\nThen, 11 - 2 = 9.\nAnswer: 9"


def evaluation(right: list[int], *, samples: int = 4, greedy: list[int] | None = None, first: int = 0) -> EvalResult:
    """An evaluation whose task i has the hash `task<first + i>` and `right[i]` right samples."""
    rates = [count / samples for count in right]
    mean = Interval(sum(rates) / len(rates), 0.0, 1.0)
    scores = tuple(PromptScore(f"task{first + i}", bool((greedy or right)[i]), count) for i, count in enumerate(right))
    return EvalResult(
        mean, mean, mean, k=samples, samples=samples, n=len(right), skipped_long=0, skipped_unjudged=0,
        temperature=0.6, max_new_tokens=64, seed=42, truncation_rate=0.0, abstain_rate=0.0,
        mean_tokens=20.0, scores=scores,
    )  # fmt: skip


def lesson(step: int, *, status: Status = Status.KEPT, hostile: bool = False) -> Any:
    """A meta-experience about `WRONG` and `RIGHT`; a hostile one has markup in every text that a model writes."""
    made = experience(step, status, text="the analysis as sampled")
    pair = made.analysis.pair
    wrong, right = (HOSTILE + WRONG, HOSTILE + RIGHT) if hostile else (WRONG, RIGHT)
    group = replace(pair.group, prompt=HOSTILE if hostile else "What is 3 + 8 - 2?", answer="9")
    pair = replace(
        pair,
        group=group,
        right=Rollout(4, (5, 6), right, Verdict.RIGHT),
        wrong=Rollout(6, (5, 8), wrong, Verdict.WRONG),
    )
    parsed = MetaExperience(
        'It says "then, 11 - 2 = 8", which is the slip.', "The subtraction was not done.", f"Rule-{step}: count down."
    )
    if hostile:
        parsed = MetaExperience(HOSTILE, HOSTILE, HOSTILE)
    replay = Replay((Verdict.RIGHT,), (HOSTILE if hostile else RIGHT,), (Verdict.WRONG,))
    return replace(
        made,
        analysis=replace(made.analysis, pair=pair, text=HOSTILE if hostile else made.analysis.text),
        parsed=None if status is Status.UNPARSED else parsed,
        replay=replay if status in (Status.KEPT, Status.REPLAY_FAILED) else None,
    )


def token_credit(step: int) -> list[TokenCredit]:
    """Token credit of both rollouts of `lesson(step - 1)`: of their first line, and of a hostile token."""
    tokens = ("First", ",", " 3", " +", " 8", " =", " 11", ".", "\n", HOSTILE)
    shift_nats = (0.0, 0.05, 0.2, 0.5, 2.0, 4.0, -0.2, -0.5, -2.0, -4.0)
    effects = (1.0, 1.01, 1.1, 1.25, 1.5, 2.0, 0.9, 0.75, 0.5, 0.1)
    return [
        TokenCredit(step, index, "credit", verdict, Effect.FACTOR, tokens, shift_nats, effects, 20)
        for index, verdict in ((4, Verdict.RIGHT), (6, Verdict.WRONG))
    ]


def metrics(steps: int, *, every: int = 1, tokens: float = 100.0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in which step i has a pass rate of i / steps and takes 3 seconds."""
    return [
        {
            "step": step, "reward": step / steps, "mel/pass_rate": step / steps, "mel/policy_loss": 0.01 * step,
            "mel/groups": 4.0, "mel/mixed_groups": 2.0, "mel/pairs": 2.0, "mel/written": 2.0, "mel/parsed": 1.5,
            "mel/quoted": 1.0, "mel/leak_free": 1.0, "mel/replay_valid": 0.5, "mel/generated_tokens": tokens,
            "mel/tokens_per_s": 50.0,
            "mel/retention_ratio": 0.25, "mel/replay_uplift": 0.5, "mel/nll": 0.4, "mel/nll_after": 0.3,
            "mel/grad_norm_policy": 0.5, "mel/grad_norm_nll": 1.0, "mel/grad_cosine": 0.1, "entropy": 0.7,
            "completions/mean_length": 20.0, "completions/max_length": 30.0, "mel/peak_memory_gib": 2.0,
            "time/rollout_s": 2.0, "time/update_s": 1.0,
        }
        for step in range(every, steps + 1, every)
    ]  # fmt: skip


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    lessons: int = 3,
    hostile: bool = False,
    before: list[int] | None = None,
    after: list[int] | None = None,
    rows: list[dict[str, Any]] | None = None,
    credit: bool = False,
    **options: Any,
) -> Path:
    """A finished run of the preset `cpu` with `options` of its section `train`."""
    folder.mkdir(parents=True)
    overrides = [("train.max_steps", steps), *((f"train.{name}", value) for name, value in options.items())]
    (folder / "config.yaml").write_text(resolve(preset="cpu", overrides=overrides).as_yaml())
    lines = [json.dumps(row) for row in (metrics(steps) if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "eval").mkdir()
    for name, right in (("before", before), ("after", after)):
        if right is not None:
            (folder / "eval" / f"{name}.json").write_text(evaluation(right).to_json())
    if lessons:
        status = [Status.KEPT, Status.REPLAY_FAILED, Status.LEAKED, Status.UNPARSED]
        made = [lesson(i, status=status[i % 4], hostile=hostile and i == 0) for i in range(lessons)]
        with ExperienceStore(folder / "experiences.sqlite") as store:
            ids = store.add(made)
            store.set_nll(ids[:1], before=[0.412], after=[0.387])
            if credit:
                store.add_credit([each for step in range(1, lessons + 1) for each in token_credit(step)])
    (folder / "adapter").mkdir()
    return folder
