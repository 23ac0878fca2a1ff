"""An experiment: the same training with one thing changed per arm, over seeds, at equal generated tokens.

Every run is one `mel-lite train --auto-resume` in a process of its own, with a folder `<arm>-<seed>`. Finished runs are
not repeated, and a run that was stopped is resumed from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError, DivergedError
from mel_lite.files import atomic_write_text
from mel_lite.recipe import Recipe, packaged_options, parse_set
from mel_lite.report.arms import Arm
from mel_lite.report.conclusions import Control
from mel_lite.report.runs import read_run
from mel_lite.text import suggest

MEL = {"train.algorithm": "mel"}
TWICE = "twice the recipe's"
"""Value of `train.num_generations` in an arm with groups twice as large."""
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"train.algorithm": "grpo"},
    "rft": {"train.algorithm": "rft"},
    "reinforce++": {"train.algorithm": "reinforce++"},
    "resampling": {"train.algorithm": "grpo", "train.num_generations": TWICE},
    "mel": MEL,
    "mel-shuffled": MEL | {"train.internalisation": "analysis", "train.internalisation_options": {"shuffled": True}},
    "prompt-only": MEL | {"train.learning_rate": 0.0, "train.on_collapse": "warn", "eval.with_lessons": True},
    "bank": packaged_options("bank"),
    "distill": MEL | {"train.internalisation": "distill"},
    "distill-shuffled": MEL | {
        "train.internalisation": "distill", "train.internalisation_options": {"shuffled": True},
    },
    "distill-sibling": MEL | {
        "train.internalisation": "distill", "train.internalisation_options": {"context": "sibling"},
    },
    "distill-none": MEL | {
        "train.internalisation": "distill", "train.internalisation_options": {"context": "none"},
    },
    "credit": MEL | {"train.internalisation": "credit"},
}  # fmt: skip
"""Built-in arms by name, with what they change in the recipe."""
_POLICY_TERMS = ("rft", "reinforce++")
_CONTENT = ("what the lessons of {arm} say matters", "nothing shows that it matters what the lessons of {arm} say")
_NOTES = ("the notes of {arm} teach", "nothing shows that the notes of {arm} teach anything")
CONTROLS = {
    "grpo": Control(
        "the lessons of {arm} were worth more than the rollouts that they cost",
        "nothing shows that the lessons of {arm} are worth the rollouts that they cost",
        but=_POLICY_TERMS,
    ),
    "resampling": Control(
        "the lessons of {arm} were worth more than as many tokens of further attempts at the same questions",
        "nothing shows that the lessons of {arm} are worth more than further attempts at the same questions",
        but=_POLICY_TERMS,
    ),
    "mel-shuffled": Control(*_CONTENT, of=("mel",)),
    "prompt-only": Control(
        "training as in {arm} does more than the same kind of lessons in the prompt of an untrained model",
        "nothing shows that training as in {arm} does more than lessons in the prompt of an untrained model",
        but=_POLICY_TERMS,
    ),
    "distill-shuffled": Control(*_CONTENT, of=("distill",)),
    "distill-none": Control(*_NOTES, of=("distill", "distill-sibling")),
    "distill-sibling": Control(
        "a written lesson teaches more than another right answer of the group",
        "nothing shows that a written lesson teaches more than another right answer of the group",
        of=("distill",),
    ),
}
"""Arms that are controls, with what a difference to them shows."""
UNTUNED = (
    "The command tuned no option for any arm. Another learning rate, or another number of updates per batch "
    "(num_iterations), can reverse the order."
)
"""A limit of every experiment."""
MANY_STEPS = 1_000_000
"""The token budget ends a run, not its steps."""
STOPPED = (130, 143, -2, -15)
"""Exit codes of a run that a signal ended after it saved."""

Launch = Callable[[Sequence[str], Path], int]
"""Run `mel-lite` with arguments, write its output to a file, and return the exit code."""


@dataclass(frozen=True, slots=True)
class ExperimentArm:
    """An arm: what it changes in the recipe."""

    name: str
    changes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Experiment:
    """Arms, seeds and token budget of an experiment, and its folder."""

    folder: Path
    arms: tuple[ExperimentArm, ...]
    seeds: Sequence[int]
    """The same for all arms."""
    budget_tokens: int
    """Tokens that each run generates: rollouts, analyses and replays; evaluations do not count."""
    base: tuple[str, ...] = ()
    """Options of `mel-lite train` that all arms share, such as ("--gpu", "cpu")."""
    recipe: Recipe | None = field(default=None, compare=False)
    """The recipe that `base` gives, to check it before anything is trained."""

    def run_folder(self, arm: ExperimentArm, seed: int) -> Path:
        """Return the folder of one run."""
        return self.folder / f"{arm.name}-{seed}"

    def arguments(self, arm: ExperimentArm, seed: int) -> list[str]:
        """Return the arguments of `mel-lite` that start or resume one run."""
        settings = {
            "train.lr_scheduler_type": "constant", "export.format": None, **arm.changes, "train.seed": seed,
            "train.max_steps": MANY_STEPS, "train.max_generated_tokens": self.budget_tokens,
        }  # fmt: skip
        folder = str(self.run_folder(arm, seed))
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        return ["train", "--auto-resume", "--output-dir", folder, *self.base, *sets]


def parse_arms(names: Sequence[str], own: Sequence[str], *, group_size: int | None = None) -> tuple[ExperimentArm, ...]:
    """Return the arms with these names, the first of which is the reference.

    Args:
        own: further arms as `NAME:section.key=value`; several options of one arm repeat its name.
        group_size: `train.num_generations` of the recipe; None = unknown.
    Raises: ConfigError for an unknown name, a name twice, fewer than two arms, or an option that is not an assignment.
    """
    known: dict[str, dict[str, Any]] = {}
    for text in own:
        name, colon, setting = text.partition(":")
        if not colon or not name or "/" in name or name in ARMS:
            taken = f" {name!r} is a built-in arm." if name in ARMS else ""
            raise ConfigError(f"--arm {text}: write NAME:section.key=value, with a new name.{taken}")
        key, value = parse_set(setting)
        known.setdefault(name, {})[key] = value
    known = ARMS | known
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--arms {name!r} is no arm.{suggest(name, known)} Define one with --arm {name}:key=value."
            )
    if unnamed := [text for text in own if text.partition(":")[0] not in names]:
        raise ConfigError(f"--arm {unnamed[0]}: --arms does not name this arm. Add it there.")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(f"--arms {','.join(names)}: name at least two different arms; the first is the reference.")
    return tuple(ExperimentArm(name, _settled(name, known[name], group_size)) for name in names)


def _settled(name: str, changes: dict[str, Any], group_size: int | None) -> dict[str, Any]:
    if changes.get("train.num_generations") != TWICE:
        return changes
    if group_size is None:
        raise ConfigError(
            f"--arms {name}: its groups are twice as large as the recipe's, whose train.num_generations is not known. "
            "Set it with --set, or name a preset."
        )
    return changes | {"train.num_generations": 2 * group_size}


def run_experiment(experiment: Experiment, *, launch: Launch, say: Callable[[str], None]) -> None:
    """Train every arm with every seed.

    One seed after another, so that a stopped experiment has all arms of as many seeds as possible. A run that diverged
    is skipped here and named in the comparison.

    Raises: ConfigError for a recipe without held-out tasks, a folder of another experiment, an arm whose options or
        data are refused, or a run that failed, with its log; KeyboardInterrupt when a signal stopped a run.
    """
    _check(experiment)
    _check_arms(experiment, launch, say)
    total = len(experiment.arms) * len(experiment.seeds)
    runs = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    for number, (arm, seed) in enumerate(runs, start=1):
        folder = experiment.run_folder(arm, seed)
        if is_done(folder):
            say(f"run {number}/{total}: {folder.name} is there already")
            continue
        log = experiment.folder / "logs" / f"{folder.name}.log"
        say(f"run {number}/{total}: {folder.name}, output in {log}")
        log.parent.mkdir(parents=True, exist_ok=True)
        code = launch(experiment.arguments(arm, seed), log)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code == DivergedError.exit_code:
            say(f"{folder.name} diverged (see {log})")
        elif code:
            raise ConfigError(f"run {folder.name} failed with exit code {code}: {_last_line(log)} See {log}.")
        elif not is_done(folder):
            raise ConfigError(
                f"run {folder.name} ended without an evaluation, so there is nothing to compare: its tasks are too few "
                "to hold some out. Name others with --set data.eval=... and choose another --output."
            )


def arms_of(experiment: Experiment) -> tuple[list[Arm], list[str]]:
    """Return the finished runs of each arm, and a sentence on each run that is left out.

    Raises: ConfigError when an arm has no finished run.
    """
    arms, left_out = [], []
    for arm in experiment.arms:
        folders = [experiment.run_folder(arm, seed) for seed in experiment.seeds]
        done = [folder for folder in folders if is_done(folder)]
        left_out += [
            f"{folder.name} did not end and is left out, which favors its arm."
            for folder in folders
            if folder not in done
        ]
        if not done:
            raise ConfigError(f"No run of arm {arm.name} ended. See the logs in {experiment.folder / 'logs'}.")
        arms.append(Arm(arm.name, tuple(read_run(folder, lessons=False) for folder in done)))
    return arms, left_out


def is_done(folder: Path) -> bool:
    """Return True when a run was trained to its end and evaluated."""
    return (folder / "eval" / "after.json").is_file() and any((folder / name).is_dir() for name in ("adapter", "model"))


def in_subprocess(arguments: Sequence[str], log: Path) -> int:
    """Run `mel-lite` in a process of its own, whose output goes to the end of a file. Returns: the exit code."""
    command = [sys.executable, "-m", "mel_lite", *arguments]
    # A Jupyter kernel sets these, and every turn of a spinner would be written to the file.
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    with (
        log.open("ab") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # the run has it from the terminal, too, and commits a checkpoint
                continue


def _check_arms(experiment: Experiment, launch: Launch, say: Callable[[str], None]) -> None:
    """Check options and data of every arm before the first run, which can take hours, by a dry run of its own."""
    for arm in experiment.arms:
        seed = next((seed for seed in experiment.seeds if not is_done(experiment.run_folder(arm, seed))), None)
        if seed is None:
            continue
        log = experiment.folder / "logs" / f"check-{arm.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"checking options and data of arm {arm.name}")
        code = launch([*experiment.arguments(arm, seed), "--dry-run"], log)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code:
            said = _last_line(log).removeprefix("error: ")
            raise ConfigError(f"arm {arm.name} cannot be trained: {said} Nothing was trained. See {log}.")
        log.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]


def _began(file: Path) -> dict[str, Any]:
    """Return the plan with which the experiment began. Raises: ConfigError when the file is damaged."""
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        if {"budget_tokens", "base", "arms"} <= plan.keys() and isinstance(plan["arms"], dict):
            return dict(plan)
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"{file} is damaged, so its options are not known. Choose another --output.")


def _check(experiment: Experiment) -> None:
    """Check the recipe, and that the folder holds this experiment or none; more seeds or arms may join."""
    if experiment.recipe is not None and experiment.recipe.data.eval is None:
        raise ConfigError(
            "compare --arms needs held-out tasks: with data.eval unset there is nothing to compare. Add --set "
            "data.eval=... (a file, a Hub id, demo:test, reasoning-gym:<task>, or held-out for a part of the training "
            "tasks)."
        )
    file = experiment.folder / "experiment.json"
    plan: dict[str, Any] = {
        "budget_tokens": experiment.budget_tokens,
        "base": list(experiment.base),
        "arms": {arm.name: arm.changes for arm in experiment.arms},
    }
    if file.is_file():
        began = _began(file)
        for key in ("budget_tokens", "base"):
            if began[key] != plan[key]:
                raise ConfigError(
                    f"{experiment.folder} holds an experiment with {key}={began[key]!r}, now it is {plan[key]!r}. "
                    "Runs of both could not be compared. Choose another --output."
                )
        changed = [arm.name for arm in experiment.arms if began["arms"].get(arm.name, arm.changes) != arm.changes]
        if changed:
            raise ConfigError(
                f"{experiment.folder}: arm {changed[0]} has other options than before. Choose another --output."
            )
        plan["arms"] = began["arms"] | plan["arms"]
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, json.dumps(plan, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--output {experiment.folder}: it cannot be written ({error.strerror or error}). Choose another folder."
        ) from error
