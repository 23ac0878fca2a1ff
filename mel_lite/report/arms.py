"""Arms of a comparison, read from run folders: runs whose options differ in their seeds alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.intervals import Estimate
from mel_lite.report.page import flat
from mel_lite.report.runs import Run, generated_tokens, read_run, training_seconds
from mel_lite.text import printable

MEASURES = {"pass_at_1": "Pass@1", "avg_at_k": "Avg@{k}", "pass_at_k": "Pass@{k}"}
IGNORED = (
    "train.seed", "train.data_seed", "train.output_dir", "train.run_name", "train.max_steps", "train.max_cache_tokens",
    "train.max_micro_batch_tokens", "train.gradient_checkpointing",
)  # fmt: skip
"""Options that do not make another arm: seeds, names, and what a plan for the free memory sets, at the same result."""
LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs with the same options but for their seeds."""

    name: str
    runs: tuple[Run, ...]
    """In the order of their seeds."""

    @property
    def seeds(self) -> list[Any]:
        """Seed of each run; None where its config is missing."""
        return [run.option("train.seed") for run in self.runs]

    @property
    def tokens(self) -> float:
        """Mean number of generated tokens of a run: rollouts, analyses and replays."""
        return sum((generated_tokens(run.rows) or [0.0])[-1] for run in self.runs) / len(self.runs)

    @property
    def seconds(self) -> float:
        """Mean seconds in the phases of the training steps."""
        return sum((training_seconds(run.rows) or [0.0])[-1] for run in self.runs) / len(self.runs)

    @property
    def steps(self) -> float:
        """Mean number of optimizer steps."""
        return sum(run.steps for run in self.runs) / len(self.runs)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """Figures of an arm after training."""

    name: str
    folders: tuple[str, ...]
    seeds: tuple[Any, ...]
    steps: float
    tokens: float
    seconds: float
    after: dict[str, Estimate]
    """Pass@1, Avg@k and Pass@k over the tasks that all runs share; empty without evaluations."""
    difference: dict[str, Estimate]
    """The same minus those of the first arm; empty for the first arm."""
    paired_seeds: int
    """Number of seeds that both arms have; 0 = the runs are compared as independent ones."""
    seeds_ahead: int
    """Of these, how many end with a higher Avg@k."""


@dataclass(frozen=True, slots=True)
class Against:
    """An arm against a control that is not the first arm."""

    arm: str
    control: str
    difference: dict[str, Estimate]
    paired_seeds: int
    seeds_ahead: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms, the first of which is the reference, and sentences on what follows."""

    arms: tuple[ArmResult, ...]
    tasks: int
    """Number of tasks that all runs were evaluated on."""
    samples: int
    against: tuple[Against, ...]
    conclusions: tuple[str, ...]
    limits: tuple[str, ...]
    """Limits of this comparison, with their reasons."""

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=1)


def names_of(found: Comparison) -> dict[str, str]:
    """Return the measures' names for readers."""
    return {name: text.format(k=found.samples) for name, text in MEASURES.items()}


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the name of each run for readers: its folder's name, or the whole path where two have one name."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else printable(str(run.folder)) for run, name in zip(runs, names, strict=True)
    ]


def read_arms(folders: Sequence[Path]) -> list[Arm]:
    """Read runs and group those that differ in their seed alone, in the order given.

    Raises: ConfigError for fewer than two runs, the same folder twice, or a folder without a run.
    """
    if len(folders) < 2:
        raise ConfigError("compare needs at least two runs, or --arms to train some. Pass the folders of two runs.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("compare: a run is named twice. Pass each folder once.")
    return group([read_run(folder, lessons=False) for folder in folders])


def group(runs: Sequence[Run]) -> list[Arm]:
    """Group runs by their options, ignoring seeds. A run without config.yaml is an arm of its own."""
    options = [
        {k: v for k, v in flat(run.config).items() if k not in IGNORED} if run.config else {"folder": str(run.folder)}
        for run in runs
    ]
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run, found in zip(runs, options, strict=True):
        same = next((each for known, each in groups if known == found), None)
        if same is None:
            groups.append((found, [run]))
        else:
            same.append(run)
    names = _names([known for known, _ in groups], labels([each[0] for _, each in groups]))
    return [
        Arm(name, tuple(sorted(each, key=lambda run: str(run.option("train.seed")))))
        for name, (_, each) in zip(names, groups, strict=True)
    ]


def _names(options: list[dict[str, Any]], folders: list[str]) -> list[str]:
    """Name each arm by the options in which the arms differ, or by a folder where these are too many."""
    differing = [key for key in dict.fromkeys(key for each in options for key in each)
                 if len({json.dumps(each.get(key), default=str) for each in options}) > 1]  # fmt: skip
    names = []
    for each, folder in zip(options, folders, strict=True):
        parts = [f"{key.rpartition('.')[2]}={each[key]}" for key in differing if key in each and key != "folder"]
        parts = [part.removeprefix("algorithm=") for part in parts]
        name = ", ".join(parts)
        names.append(name if 0 < len(name) <= LONGEST_NAME else folder)
    return names if len(set(names)) == len(names) else folders
