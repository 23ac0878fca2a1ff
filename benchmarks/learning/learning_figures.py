"""Tables of the learning study from its run files: every arm against GRPO on the same seeds and tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mel_lite.report.statistics import Estimate, interval, measures

RUNS = Path(__file__).resolve().parents[1] / "results" / "learning"
REFERENCE, PEER = "grpo", "sibling"
WITH_BANK = ("bank", "bank-frozen", "bank-forks", "bank-open", "bank-kept", "sibling+bank-open")
SUBJECTS = {
    "first": {"plenty": "reward is plentiful", "starved": "reward is starved"},
    "second": {"wide-plenty": "reward is plentiful", "wide-starved": "reward is starved"},
}
"""Headings by subject and regime."""
REGIMES = {
    regime: f"{words}, {subject} subject" for subject, regimes in SUBJECTS.items() for regime, words in regimes.items()
}
NOT_RUN = "Not run yet."
EARLIER = ("first", "second", "fifth")
"""Folders of the rounds but the third (starved) and the second (plentiful), which lie above them."""
LEAST_SEEDS = 3
"""Fewer common seeds get no verdict."""
ROLLOUTS = 64
"""Completions per generation batch of every run."""
USUAL = {"bank_teach_from": None, "pairs_per_group": 4}
"""Options that were tried on an arm, with the value of the others."""
MEANINGS = {
    "grpo": "GRPO",
    "grpo-dynamic": "GRPO with dynamic sampling: other prompts for groups without variance, in up to four rounds",
    "grpo-rest": "GRPO whose prompts rest after two groups in a row that were all right or all wrong",
    "mel": "MEL as in the paper: NLL of the whole analysis, lambda 1, kept when the replay is solved",
    "mel-tenth": "the same with lambda 0.1",
    "replay": "NLL of the right replay as an answer to the question alone",
    "own": "distill with the group's own lesson as notes",
    "bank": "distill with one lesson of the bank as notes, sign rule",
    "bank-frozen": "distill with all matching lessons, read by the start policy, where they change its mind",
    "bank-frozen-shuffled": "control: the same with the lessons of another question",
    "bank-forks": "`bank-frozen` with up to four lessons per group, one for every place where its rollouts part",
    "bank-open": "`bank-forks` without lessons for forks that its notes settle",
    "bank-open-shuffled": "control: `bank-open` with the lessons of another question",
    "bank-kept": "`bank-forks` that starts with the lessons of an earlier run, whose tokens are not counted",
    "bank-kept-shuffled": "control: `bank-kept` with the lessons of another question",
    "bank-shuffled": "control: `bank` with the lessons of another question",
    "sibling": "distill with a right rollout of the group as notes, sign rule; no lesson is written",
    "sibling-frozen": "`sibling` as `bank-frozen` reads: the start policy, where the notes change its mind",
    "sibling-sampled": "`sibling`, as an addition to the sampled tokens' advantages",
    "sibling+bank": "a sibling where there is one, else the bank",
    "sibling+bank-open": "`bank-open`, with a sibling as notes where there is one",
    "no-notes": "control: KL to the start policy without notes",
    "credit": "GRPO's advantage scaled per token by the group's own lesson against another one",
}


def runs(regime: str, folder: str = ".") -> dict[str, list[dict[str, Any]]]:
    """Return a regime's finished runs by arm, in the order of MEANINGS, with ascending seeds."""
    read = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RUNS / regime / folder).glob("*.json"))]
    found = {arm: sorted((run for run in read if run["arm"] == arm), key=lambda run: run["seed"]) for arm in MEANINGS}
    return {arm: group for arm, group in found.items() if group}


def avg_RP(group: Sequence[dict[str, Any]], point: int = -1, split: str = "test") -> np.ndarray:
    """Return the share of right samples of each run and task at one measurement."""
    points = [run["points"][point][split] for run in group]
    greedy, right = ([each[name] for each in points] for name in ("greedy_right", "samples_right"))
    return measures(greedy, right, 8)["avg_at_k"]


def mean_avg(run: dict[str, Any], point: int) -> float:
    """Return the mean of `avg_RP` of one run. A point between the first and the last may hold only that."""
    measured = run["points"][point]
    return measured["avg_at_k"] if "avg_at_k" in measured else float(avg_RP([run], point).mean())


def lead(group: Sequence[dict[str, Any]], rival: Sequence[dict[str, Any]], split: str = "test") -> tuple[Estimate, str]:
    """Return Avg@8 of an arm minus that of a rival over their common seeds, and the seeds ahead, as `5 of 8`."""
    seeds = sorted({run["seed"] for run in group} & {run["seed"] for run in rival})
    one, other = (avg_RP([run for run in each if run["seed"] in seeds], split=split) for each in (group, rival))
    ahead = int(((one - other).mean(1) > 0).sum())
    return interval(one - other), f"{ahead} of {len(seeds)}"


def verdict(estimate: Estimate, ahead: str) -> str:
    """Return the decision rule's word for a difference; `ahead` as `lead` returns it."""
    if int(ahead.split()[-1]) < LEAST_SEEDS:
        return "too few seeds"
    return "tie" if not estimate.excludes_zero else "wins" if estimate.value > 0 else "loses"


def results(regime: str, folder: str = ".") -> str:
    """Return the results of a regime: the end of every arm against GRPO's, paired by seed and task."""
    found = runs(regime, folder)
    if REFERENCE not in found:
        return NOT_RUN
    lines = [
        "| arm | seeds | batches | lesson tokens | train time, s | Avg@8 | minus GRPO, points | seeds ahead | "
        "rule | best point | unseen longer, minus GRPO |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    start = interval(avg_RP(found[REFERENCE], 0))
    lines.append(f"| start | | | | | {start.value:.1%} | | | | | |")
    for arm, group in found.items():
        last = [run["points"][-1] for run in group]
        batches = np.mean(
            [p["step"] / run["settings"].get("num_iterations", 1) for p, run in zip(last, group, strict=True)]
        )
        best = np.mean([max(mean_avg(run, i) for i in range(len(run["points"]))) for run in group])
        cells = [
            arm,
            len(group),
            f"{batches:.0f}",
            f"{lesson_share(group):.0%}",
            f"{np.mean([p['took_s'] for p in last]):.0f}",
        ]
        cells += [f"{avg_RP(group).mean():.1%}"]
        if arm == REFERENCE:
            cells += ["", "", "", f"{best:.1%}", ""]
        else:
            against, ahead = lead(group, found[REFERENCE])
            longer, _ = lead(group, found[REFERENCE], "longer")
            cells += [against.as_points(), ahead, verdict(against, ahead), f"{best:.1%}", longer.as_points()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", *against_peer(found), *(f"- `{arm}`: {MEANINGS[arm]}." for arm in found)])


def against_peer(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a paragraph on the arms with lessons against the right sibling, which costs no lesson."""
    if PEER not in found:
        return []
    leads = {arm: lead(group, found[PEER]) for arm, group in found.items() if arm in WITH_BANK}
    said = [
        f"`{arm}` {estimate.as_points()} ({verdict(estimate, ahead)}, ahead on {ahead} seeds)"
        for arm, (estimate, ahead) in leads.items()
    ]
    return [f"Minus `{PEER}`, in points: {'; '.join(said)}.", ""] if said else []


def lesson_share(group: Sequence[dict[str, Any]]) -> float:
    """Return the share of generated tokens that are not rollouts: analyses and replays."""
    total = sum(run["points"][-1]["tokens"] for run in group)
    rollouts = sum(ROLLOUTS * step.get("completions/mean_length", 0.0) for run in group for step in run["steps"])
    return max(0.0, 1 - rollouts / total)


def per_seed(regime: str, folder: str = ".") -> str:
    """Return Avg@8 at the end of every run."""
    found = runs(regime, folder)
    if REFERENCE not in found:
        return NOT_RUN
    seeds = sorted({run["seed"] for group in found.values() for run in group})
    lines = ["| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---|" + "---|" * len(seeds)]
    for arm, group in found.items():
        by_seed = {run["seed"]: f"{avg_RP([run]).mean():.1%}" for run in group}
        lines.append(f"| {arm} | " + " | ".join(by_seed.get(seed, "") for seed in seeds) + " |")
    return "\n".join(lines)


def curve(regime: str, folder: str = ".") -> str:
    """Return mean Avg@8 of every arm at each measurement."""
    found = runs(regime, folder)
    if REFERENCE not in found:
        return NOT_RUN
    count = min(len(run["points"]) for group in found.values() for run in group)
    tokens = [np.mean([run["points"][i]["tokens"] for run in found[REFERENCE]]) for i in range(count)]
    lines = [
        "| arm | " + " | ".join(f"{round(each, -3):,.0f} tokens" for each in tokens) + " |",
        "|---|" + "---|" * count,
    ]
    for arm, group in found.items():
        lines.append(
            f"| {arm} | "
            + " | ".join(f"{np.mean([mean_avg(run, i) for run in group]):.1%}" for i in range(count))
            + " |"
        )
    return "\n".join(lines)


def tuning(regime: str) -> str:
    """Return the settings that were tried, on seeds and tasks that are not reported above."""
    columns = (
        "arm", "updates per batch", "learning rate", "lambda", "seeds", "Avg@8: start → end",
        "reward of the last five batches", "entropy", "tokens clipped", "train time, s",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, group in runs(regime, "tune").items():
        keyed: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for run in group:
            s = run["settings"]
            weight = s.get("mel_weight", 1.0) if arm != REFERENCE else ""
            tried = "".join(f", {name} {s[name]:g}" for name, usual in USUAL.items() if s.get(name, usual) != usual)
            keyed.setdefault((s.get("num_iterations", 1), float(s["learning_rate"]), weight, tried), []).append(run)
        for (updates, rate, weight, tried), same in sorted(keyed.items(), key=lambda item: str(item[0])):
            seeds = ", ".join(str(run["seed"]) for run in same)
            last = [step for run in same for step in run["steps"][-5 * updates :]]
            entropy, clipped, reward = (
                np.mean([step[name] for step in last if name in step] or [np.nan])
                for name in ("entropy", "clip_ratio/region_mean", "reward")
            )
            took = np.mean([run["points"][-1]["took_s"] for run in same])
            lines.append(
                f"| {arm}{tried} | {updates} | {rate:g} | {weight} | {seeds} | {avg_RP(same, 0, 'tune').mean():.1%} → "
                f"{avg_RP(same, -1, 'tune').mean():.1%} | {reward:.2f} | {entropy:.2f} | {clipped:.1%} | {took:.0f} |"
            )
    return "\n".join(lines)


def lessons(regime: str, folder: str = ".") -> str:
    """Return counts of lessons, and how good the teachers were, over all steps of every arm."""
    lines = ["| arm | written | parsed | quoted | kept | rules in the bank at the end: true / all | "
             "groups without a right or a wrong rollout | rows taught | tokens of them taught | teacher shift, nats |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm, group in runs(regime, folder).items():
        steps = [step for run in group for step in run["steps"] if "reward" in step]

        def total(name: str, rows: list[dict[str, Any]] = steps) -> float:
            return sum(step.get(name, 0.0) for step in rows)

        def mean(name: str, spec: str, rows: list[dict[str, Any]] = steps) -> str:
            values = [step[name] for step in rows if name in step]
            return f"{np.mean(values):{spec}}" if values else ""

        written = total("mel/written")
        shares = [
            f"{total(name) / written:.0%}" if written else ""
            for name in ("mel/parsed", "mel/quoted", "mel/replay_valid")
        ]
        banks = [run["bank"] for run in group if run.get("bank")]
        bank = (
            f"{np.mean([b['true'] for b in banks]):.0f} / {np.mean([b['rules'] for b in banks]):.0f}" if banks else ""
        )
        lines.append(
            f"| {arm} | {written:.0f} | {' | '.join(shares)} | {bank} | {mean('frac_reward_zero_std', '.0%')} | "
            f"{mean('mel/taught_rows', '.0f')} | {mean('mel/taught_tokens', '.0%')} | "
            f"{mean('mel/teacher_shift', '+.1f')} |"
        )
    return "\n".join(lines)


def subject(name: str) -> str:
    """Return how often a start model is right, with and without notes."""
    report = json.loads((RUNS / "subject.json").read_text(encoding="utf-8"))
    right = {words: report["right"][regime] for regime, words in SUBJECTS[name].items()}
    lines = ["| notes in the prompt | " + " | ".join(right) + " |", "|---" * (1 + len(right)) + "|"]
    lines += [
        f"| {notes} | " + " | ".join(f"{each[notes]:.0%}" for each in right.values()) + " |"
        for notes in next(iter(right.values()))
    ]
    return "\n".join([*lines, "", f"{report['questions']} questions x {report['samples']} samples, temperature 1."])


SUMMARY = {
    "bank-forks": "bank of lessons, several per group, distilled",
    "bank-open": "several per group, but none for forks that its notes settle",
    "bank-open-shuffled": "control: several per group, of other questions",
    "sibling+bank-open": "a right solution where there is one, else the bank of lessons, distilled",
    "bank-kept": "several per group, starting with an earlier run's lessons",
    "bank-kept-shuffled": "control: it starts with the lessons of other questions",
    "bank": "bank of lessons, one per prompt, distilled",
    "bank-shuffled": "control: one per prompt, of other questions",
    "bank-frozen": "bank of lessons, all in the prompt, distilled",
    "bank-frozen-shuffled": "control: the same with the lessons of other questions",
    "sibling": "a right solution in place of lessons, distilled",
    "sibling-sampled": "the same, added to the sampled tokens' advantages",
    "mel": "MEL as in the paper",
    "credit": "lessons that scale the advantages (`credit`)",
    "own": "a group's own lesson, distilled",
    "replay": "training on replays with a lesson (`replay`)",
    "no-notes": "control: a teacher without notes",
    "grpo-dynamic": "GRPO with dynamic sampling",
    "grpo-rest": "GRPO with a memory for difficulty",
}
"""Arms of the short table, in its order."""
OUTCOMES = {"wins": "a win by the rule", "loses": "a loss by the rule", "tie": "a tie by the rule"} | {
    "too few seeds": "too few seeds to say"
}
ROUNDS = (".", "fifth", "second")
"""Folders whose runs the short table shows; of an arm with runs in several, the first counts. `first` is left out: its
settings rest on one tuning seed."""
DOUBLE = "double"
"""Folder of GRPO with twice the tokens: as many as an earlier run and the run that takes its lessons have together."""


ITSELF, TWICE = "(tuned GRPO itself: start, end)", "tuned GRPO with twice the tokens"
MINUS_PEER = ", minus a right solution"


def top() -> str:
    """Return the result in two sentences, for the first lines of the README."""
    said = {}
    for regime, words in SUBJECTS["second"].items():
        against, ahead = lead(*(runs(regime)[arm] for arm in ("bank-open", REFERENCE)))
        said[regime] = f"{against.as_points()} points where {words}, ahead on {ahead} seeds"
    first, ahead = lead(*(runs("starved", "fifth")[arm] for arm in ("bank-open", REFERENCE)))
    return (
        "Measured on a small model that obeys its lessons: with the lessons that a run writes, distilled, it scores, "
        f"against tuned GRPO at the same number of tokens, {said['wide-starved']}, and {said['wide-plenty']}. On one "
        f"that obeys them less, and writes some false ones: {first.as_points()}, {OUTCOMES[verdict(first, ahead)]}."
    )


def summary(subject: str) -> str:
    """Return the short table: each arm in its newest round against tuned GRPO, a bank also against a right solution."""
    columns: dict[str, dict[str, str]] = {}
    for regime, words in SUBJECTS[subject].items():
        cells: dict[str, str] = {}
        for folder in ROUNDS:
            found = runs(regime, folder)
            if REFERENCE not in found:
                continue
            start, end = (interval(avg_RP(found[REFERENCE], point)).value for point in (0, -1))
            cells.setdefault(ITSELF, f"{start:.0%}, {end:.1%}")
            if folder == "." and (twice := runs(regime, DOUBLE).get(REFERENCE)):
                cells.setdefault(TWICE, _cell(twice, found[REFERENCE]))
            for arm, label in SUMMARY.items():
                if arm in found:
                    cells.setdefault(label, _cell(found[arm], found[REFERENCE]))
                if arm in WITH_BANK and arm in found and PEER in found:
                    cells.setdefault(label + MINUS_PEER, _cell(found[arm], found[PEER]))
        columns[words] = cells
    order = [ITSELF, TWICE, *(f"{label}{end}" for label in SUMMARY.values() for end in ("", MINUS_PEER))]
    rows = [row for row in order if any(row in cells for cells in columns.values())]
    lines = [
        "| Avg@8 minus that of tuned GRPO, points | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    lines += ["| " + " | ".join([row, *(cells.get(row, "") for cells in columns.values())]) + " |" for row in rows]
    return "\n".join(lines)


def _cell(group: Sequence[dict[str, Any]], rival: Sequence[dict[str, Any]]) -> str:
    against, ahead = lead(group, rival)
    word = verdict(against, ahead)
    text = f"{against.as_points()}, {ahead} seeds"
    if word == "too few seeds":
        return f"{text} (too few for a verdict)"
    return f"**{text}**" if word in ("wins", "loses") else text


TABLES = {
    "tuning": tuning,
    "results": results,
    "seeds": per_seed,
    "curve": curve,
    "lessons": lessons,
} | {
    f"{folder}-{name}": partial(table, folder=folder)
    for folder in EARLIER
    for name, table in (("results", results), ("seeds", per_seed), ("curve", curve), ("lessons", lessons))
}
"""Tables of one regime, by name."""
