"""Does a lesson teach? GRPO, MEL and its rivals from one start model, at equal generated tokens.

    python benchmarks/learning/study.py FOLDER --regime starved --arms grpo sibling bank-frozen --first-seed 8 --seeds 8
    python benchmarks/learning/study.py FOLDER --regime starved --split tune --first-seed 100 \\
        --arms grpo,num_iterations=3,learning_rate=1e-4 grpo,num_iterations=4,learning_rate=1e-4

Runs `mel-lite compare --arms` on the tasks of a regime; the first arm is the reference. The same command continues
after a stop. On `test` tasks an arm takes the settings chosen for it (learning_arms.py), on `tune` tasks those that
follow its name. Writes a JSON file per run in benchmarks/results/learning/REGIME/ (`tune` tasks: REGIME/tune/).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import learning_subject
import wide_subject
import yaml
from learning_arms import ARMS, CHOSEN

from mel_lite.report.runs import Run, generated_tokens, read_run, training_seconds
from mel_lite.resilience.saved_bank import saved_lessons
from mel_lite.types import BankLesson, BankOptions

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "learning"
COMMON: dict[str, Any] = {
    "num_generations": 8, "per_device_train_batch_size": 64, "temperature": 1.0,
    "weight_decay": 0.0, "logging_steps": 1, "save_steps": 1000, "report_to": "none", "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "probe_max_diff": None, "max_idle_steps": 0, "analysis_max_tokens": 64,
    "bank_settled_nats": None, "learning_rate": 3e-4,
}  # fmt: skip
REGIMES: dict[str, dict[str, Any]] = {
    "plenty": {"budget_tokens": 40_000, "max_completion_length": 48},
    "starved": {"budget_tokens": 60_000, "max_completion_length": 80},
    "wide-plenty": {"budget_tokens": 40_000, "max_completion_length": 48},
    "wide-starved": {"budget_tokens": 60_000, "max_completion_length": 80},
}
SUBJECTS: dict[str, Any] = {
    regime: subject for subject in (learning_subject, wide_subject) for regime in subject.REGIMES
}
"""Module of the tasks and the start model by regime."""
BATCHES_PER_POINT = 9
"""Batches between two evaluations, which makes three to four points per run."""
NAMED = ("num_iterations", "learning_rate", "mel_weight")
"""Settings that every arm's name in the comparison has."""
LOGGED = (
    "reward", "completions/mean_length", "frac_reward_zero_std", "grad_norm", "entropy", "clip_ratio/region_mean",
    "mel/mixed_groups", "mel/written", "mel/parsed",
    "mel/leak_free", "mel/replay_valid", "mel/quoted", "mel/score_shift", "mel/teacher_shift", "mel/taught_rows",
    "mel/taught_tokens", "mel/without_notes", "mel/nll", "mel/nll_after", "mel/bank_active", "mel/bank_retired",
)  # fmt: skip
LINES = ("points", "steps", "lessons")
"""Lists in the file of a run, one line per entry."""


def recipe(options: argparse.Namespace, tasks: Path) -> dict[str, Any]:
    """Return the recipe that all arms share."""
    model = SUBJECTS[options.regime].MODEL
    of_regime = {
        "verifier": verifier(options), "templates": str(model / "templates.yaml"),
        "max_completion_length": REGIMES[options.regime]["max_completion_length"],
    }  # fmt: skip
    return {
        "model": {"name": str(model), "dtype": "float32", "engine": "hf", "freeze_head": True},
        "lora": None,
        "data": {"train": str(tasks / "train.jsonl"), "eval": str(tasks / f"{options.split}.jsonl")},
        "eval": {"k": options.samples, "temperature": 1.0, "limit": options.tasks},
        "train": COMMON | of_regime,
    }


def verifier(options: argparse.Namespace) -> str:
    """Return the dotted path of the regime's verifier."""
    return f"{SUBJECTS[options.regime].__name__}:strict"


def settings_of(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what an arm changes in the recipe's `train`, with the settings in its label or those chosen for it."""
    arm, *given = label.split(",")
    chosen = CHOSEN[options.regime]
    tuned = {} if given or options.split == "tune" else chosen.get(arm, chosen["grpo"])
    own = {name: yaml.safe_load(value) for name, value in (each.split("=") for each in given)}
    kept = {"lessons_from": str(options.lessons_from)} if options.lessons_from and arm.startswith("bank-kept") else {}
    return ARMS[arm] | tuned | own | kept


def run_label(label: str, options: argparse.Namespace) -> str:
    """Return the arm's name in the comparison. Its settings follow: `grpo` alone is an arm of the command."""
    arm, *given = label.split(",")
    settings = {"num_iterations": 1, "learning_rate": COMMON["learning_rate"]} | settings_of(label, options)
    weight = f"-{settings['mel_weight']:g}" if "mel_weight" in settings else ""
    others = [f"-{each}" for each in given if each.partition("=")[0] not in NAMED]
    return f"{arm}-{settings['num_iterations']}x{float(settings['learning_rate']):g}{weight}{''.join(others)}"


def train(options: argparse.Namespace) -> None:
    """Train what is missing of the arms."""
    tasks = options.folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for split in ("train", "longer", options.split):
        SUBJECTS[options.regime].tasks(options.regime, split).to_json(tasks / f"{split}.jsonl")
    config = options.folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe(options, tasks)), encoding="utf-8")
    changes = []
    for label in options.arms:
        settings = settings_of(label, options)
        every = BATCHES_PER_POINT * settings.get("num_iterations", 1)
        arm = {f"train.{name}": value for name, value in settings.items()} | {"eval.every_steps": every}
        name = run_label(label, options)
        changes += [part for key, value in arm.items() for part in ("--arm", f"{name}:{key}={json.dumps(value)}")]
    mel_lite(
        "compare", "--config", str(config), "--arms", ",".join(run_label(label, options) for label in options.arms),
        "--seeds", str(options.seeds), "--first-seed", str(options.first_seed), "--budget-tokens",
        str(options.budget_tokens), "--output", str(options.folder), *changes,
    )  # fmt: skip


def mel_lite(*arguments: str) -> None:
    """Run the command, with the verifier importable."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    if code := subprocess.run([sys.executable, "-m", "mel_lite", *arguments], env=environment).returncode:
        sys.exit(code)


def result(folder: Path, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a finished run."""
    found = read_run(folder, lessons=False)
    lessons = saved_lessons(folder) if "bank" in arm else []
    bank = rules_of(lessons, SUBJECTS[options.regime]) if "bank" in arm else None
    # The regime decides the templates, and their path names the machine.
    settings = {name: value for name, value in found.config["train"].items() if name != "templates"}
    return {
        "arm": arm, "seed": seed, "regime": options.regime, "split": options.split, "tokens": options.budget_tokens,
        "settings": settings, "torch": found.record["packages"]["torch"],
        "bank": bank, "lessons": [asdict(lesson) for lesson in lessons],
        "points": points(found, options), "steps": steps(found),
    }  # fmt: skip


def points(run: Run, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the evaluations before, during and after training, with the tokens and seconds of training until then."""
    costs = zip(generated_tokens(run.rows), training_seconds(run.rows), strict=True)
    at = {0: (0.0, 0.0)} | dict(zip((row["step"] for row in run.rows), costs, strict=True))
    rows = [(0, {options.split: counts(run.folder / "eval" / "before.json")})]
    rows += [(int(row["step"]), {"avg_at_k": row["eval_avg_at_k"]}) for row in run.eval_rows]
    last = {options.split: counts(run.folder / "eval" / "after.json"), "longer": counts(longer(run, options))}
    return [
        {"tokens": int(at[step][0]), "step": step, "took_s": round(at[step][1], 1)} | measured
        for step, measured in [*rows, (run.steps, last)]
    ]


def counts(file: Path) -> dict[str, list[int]]:
    """Return the right greedy answers and samples of each task."""
    scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
    return {
        "greedy_right": [int(score["greedy_right"]) for score in scores],
        "samples_right": [score["samples_right"] for score in scores],
    }


def longer(run: Run, options: argparse.Namespace) -> Path:
    """Evaluate the trained model on longer questions than it was trained on. Returns: the file of the result."""
    file = run.folder / "eval" / "longer.json"
    if not file.exists():
        mel_lite(
            "eval", "--model", str(run.folder / "model"), "--dataset", str(options.folder / "tasks" / "longer.jsonl"),
            "--verifier", verifier(options), "--k", str(options.samples), "--temperature", "1",
            "--limit", str(options.tasks), "--seed", str(run.option("train.seed")), "--output", str(file),
            "--max-new-tokens", str(REGIMES[options.regime]["max_completion_length"]),
        )  # fmt: skip
    return file


def steps(run: Run) -> list[dict[str, Any]]:
    """Return the logged figures of each step."""
    return [
        {"step": row["step"], "tokens": int(tokens)}
        | {name: float(f"{float(row[name]):.4g}") for name in LOGGED if row.get(name) is not None}
        for row, tokens in zip(run.rows, generated_tokens(run.rows), strict=True)
    ]


def rules_of(lessons: list[BankLesson], subject: Any) -> dict[str, int]:
    """Return how many rules a bank teaches, and how many of them are true of a subject."""
    taught = [lesson for lesson in lessons if lesson.score >= BankOptions().teach_from]
    rules = {rule for lesson in taught for rule in subject.rules_in(lesson.heuristic)}
    truth = subject.truth()
    return {"rules": len(rules), "true": sum(truth.get(operator) == reading for operator, reading in rules)}


def save(found: dict[str, Any], file: Path) -> None:
    """Write one line per point, step and lesson, so that a run and a change of it are readable."""
    head = json.dumps({name: value for name, value in found.items() if name not in LINES})
    rows = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in found[name]) + "\n]"
        for name in LINES
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head[:-1] + ",\n" + ",\n".join(rows) + "}\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--regime", choices=list(REGIMES), default="starved")
    parser.add_argument("--arms", nargs="+", default=["grpo", "mel"], metavar="ARM[,OPTION=VALUE...]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--split", choices=("tune", "test"), default="test")
    parser.add_argument("--lessons-from", type=Path, help="run that the `bank-kept` arms take their first lessons from")
    parser.add_argument("--budget-tokens", type=int, help="generated per run")
    parser.add_argument("--tasks", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for label in options.arms:
        if label.split(",")[0] not in ARMS:
            parser.error(f"--arms {label}: name one of {', '.join(ARMS)}")
    options.budget_tokens = options.budget_tokens or REGIMES[options.regime]["budget_tokens"]
    return options


def main() -> None:
    options = _options()
    train(options)
    home = options.results / options.regime / ("tune" if options.split == "tune" else ".")
    for label in options.arms:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            folder = options.folder / f"{run_label(label, options)}-{seed}"
            save(result(folder, label.split(",")[0], seed, options), home / f"{label}-{seed}.json")


if __name__ == "__main__":
    main()
