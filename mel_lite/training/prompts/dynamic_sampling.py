"""Dynamic sampling: groups without variance give way to other prompts before anything is trained.

    TRL's prompts                    those at rest are replaced (`difficulty.py`)
    round 0                          sampled, judged, rewarded
    rounds 1, 2, ...                 as many other prompts as groups with variance are missing
    batch                            groups with variance in drawing order; flat ones fill what is still missing

All ranks see all completions and decide alike. The prompts of later rounds depend on run seed and batch alone, so a
resumed run draws the same.

W completions of a generation batch over all ranks, G of one prompt, F reward functions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from mel_lite.errors import ConfigError
from mel_lite.seeds import prompt_hash, seed_for
from mel_lite.training.prompts.difficulty import DifficultyMemory
from mel_lite.training.rewards import GenerationBatch, groups_of
from mel_lite.types import Algorithm, Group, Rollout

MOST_LOOKED_AT = 4096
"""Rows of the dataset that one batch looks at to find other prompts."""


class Generated(NamedTuple):
    """Return value of TRL's `_generate`: lists with one item per completion, and what only other rollouts have."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: None
    completions: list[Any]
    logprobs: list[list[float]]
    extra_fields: dict[str, Any]
    images: None
    tool_images: list[Any]


@dataclass(frozen=True)
class Candidate:
    """One sampled, judged and rewarded completion, in the form that ranks exchange."""

    row: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logprobs: list[float]
    question: Group
    rollout: Rollout
    rewards: list[float]
    """By reward function; NaN where it abstained."""
    extras: dict[str, Any]
    """Columns that reward functions logged about the completion."""


class DynamicSampling:
    """Fills generation batches of one trainer. All ranks must call `fill` together."""

    def __init__(self, trainer: Any) -> None:
        """Raises: ConfigError for a trainer whose rollouts or prompts cannot be drawn again."""
        args = trainer.args
        self._trainer = trainer
        self._rounds = args.dynamic_sampling_rounds
        self.memory = DifficultyMemory(args.rest_after, args.rest_batches) if args.rest_after else None
        self.first_index = 0
        """Index of this rank's first completion among those drawn for the batch, from which its seed counts."""
        self._ready: Generated | None = None
        _check(trainer)

    def fill(self, scored: GenerationBatch) -> None:
        """Replace the rows of the batch by those of the groups that are trained on, sampled and rewarded already."""
        trainer = self._trainer
        size, batch = trainer.num_generations, trainer._batch
        asked = gather_object(list(scored))[::size]
        needed = len(asked)
        others = self._others(asked, batch)
        if self.memory is not None:
            rests = [self.memory.rests(prompt_hash(row["prompt"]), batch) for row in asked]
            asked = [next(others, row) if resting else row for row, resting in zip(asked, rests, strict=True)]
        drawn: list[list[Candidate]] = []
        rounds = 0
        while asked and rounds <= self._rounds:
            drawn += self._draw(asked, first=len(drawn) * size)
            rounds += 1
            missing = needed - sum(map(_varies, drawn))
            asked = self._share_out(list(islice(others, self._rounded(missing)))) if missing > 0 else []
        groups = groups_of([(each.question, each.rollout) for group in drawn for each in group], size)
        if self.memory is not None:
            for group in groups:
                self.memory.saw(group, batch)
        chosen = sorted(drawn, key=_varies, reverse=True)[:needed]  # stable: in drawing order
        self._hand_over(scored, [each for group in chosen for each in group])
        trainer.add_metrics(self._counts(drawn, needed, rounds, batch))

    def take(self) -> Generated | None:
        """Return what the batch being filled has sampled already, once; None when TRL is to generate."""
        ready, self._ready = self._ready, None
        return ready

    def _others(self, asked: Sequence[dict[str, Any]], batch: int) -> Iterator[dict[str, Any]]:
        """Yield rows of prompts that are not in the batch yet and do not rest, in an order of its own per batch."""
        trainer = self._trainer
        dataset = trainer.train_dataset
        seed = seed_for(trainer.args.seed, step=batch, prompt_hash="", index=0, purpose="dynamic_sampling")
        seen = {prompt_hash(row["prompt"]) for row in asked}
        for index in random.Random(seed).sample(range(len(dataset)), min(len(dataset), MOST_LOOKED_AT)):
            row = dataset[index]
            key = prompt_hash(row["prompt"])
            if key not in seen and not (self.memory is not None and self.memory.rests(key, batch)):
                seen.add(key)
                yield row

    def _fewest(self) -> int:
        """Return the least number of groups whose completions divide evenly among ranks."""
        world: int = self._trainer.accelerator.num_processes
        return world // math.gcd(world, self._trainer.num_generations)

    def _rounded(self, groups: int) -> int:
        return -(-groups // self._fewest()) * self._fewest()

    def _share_out(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return as many of the rows as divide evenly among ranks."""
        return rows[: len(rows) // self._fewest() * self._fewest()]

    def _draw(self, asked: Sequence[dict[str, Any]], *, first: int) -> list[list[Candidate]]:
        """Sample, judge and reward G completions of each row; returns the groups of all ranks."""
        trainer = self._trainer
        size, world, rank = (
            trainer.num_generations,
            trainer.accelerator.num_processes,
            trainer.accelerator.process_index,
        )
        rows = [row for row in asked for _ in range(size)]
        share = len(rows) // world
        self.first_index = first + rank * share
        part = GenerationBatch(rows[rank * share : (rank + 1) * share])
        generated = Generated(*trainer._generate([row["prompt"] for row in part]))
        rewards_WF, extras = trainer.reward(part, generated.completions, generated.completion_ids)
        candidates = [
            Candidate(
                row,
                list(generated.prompt_ids[i]),
                list(generated.completion_ids[i]),
                generated.completions[i],
                list(generated.logprobs[i]),
                *part.rollouts[i],
                rewards_WF[rank * share + i].tolist(),
                {name: values[i] for name, values in extras.items()},
            )
            for i, row in enumerate(part)
        ]
        everywhere = gather_object(candidates)
        return [everywhere[i : i + size] for i in range(0, len(everywhere), size)]

    def _hand_over(self, scored: GenerationBatch, chosen: Sequence[Candidate]) -> None:
        """Put this rank's share of the chosen completions where TRL asks for them."""
        trainer = self._trainer
        share = len(scored)
        first = trainer.accelerator.process_index * share
        mine = chosen[first : first + share]
        scored[:] = [each.row for each in mine]
        scored.rollouts = [(each.question, replace(each.rollout, index=first + i)) for i, each in enumerate(mine)]
        scored.rewards_WF = torch.tensor([each.rewards for each in chosen], device=trainer.accelerator.device)
        scored.extras = {name: [each.extras[name] for each in mine] for name in (mine[0].extras if mine else ())}
        self._ready = Generated(
            [each.prompt_ids for each in mine],
            [each.completion_ids for each in mine],
            None,
            [each.completion for each in mine],
            [each.logprobs for each in mine],
            {},
            None,
            [],
        )

    def _counts(self, drawn: Sequence[Sequence[Candidate]], needed: int, rounds: int, batch: int) -> dict[str, float]:
        everything = [each for group in drawn for each in group]
        rewards = [each.rollout.reward for each in everything if not math.isnan(each.rollout.reward)]
        varied = sum(map(_varies, drawn))
        metrics: dict[str, float] = {
            "sampling/rounds": rounds,
            "sampling/drawn_groups": len(drawn),
            "sampling/varied_groups": varied,
            "sampling/filled_with_flat": max(0, needed - varied),
            "sampling/drawn_tokens": sum(len(each.completion_ids) for each in everything),
        }
        if rewards:
            metrics["sampling/drawn_reward"] = sum(rewards) / len(rewards)
        if self.memory is not None:
            metrics["sampling/resting_prompts"] = self.memory.resting(batch + 1)
        return metrics


def _varies(group: Sequence[Candidate]) -> bool:
    """Return True when the rewards of a group differ, so that its completions get an advantage."""
    rewards = [each.rollout.reward for each in group if not math.isnan(each.rollout.reward)]
    return bool(rewards) and max(rewards) - min(rewards) > 1e-6


def build_dynamic_sampling(trainer: Any) -> DynamicSampling | None:
    """Return the trainer's dynamic sampling; None when no option asks for it. Raises: ConfigError."""
    wanted = trainer.args.dynamic_sampling_rounds or trainer.args.rest_after
    return DynamicSampling(trainer) if wanted else None


def _check(trainer: Any) -> None:
    args = trainer.args
    option = "dynamic_sampling_rounds" if args.dynamic_sampling_rounds else "rest_after"
    named = f"{option}={getattr(args, option)}"
    if args.estimator in (Algorithm.REINFORCE_PP, Algorithm.RFT):
        raise ConfigError(
            f"{named} with algorithm={args.algorithm!r}: its groups without variance train, too. Unset {option}, or "
            "set algorithm='grpo' or 'mel'."
        )
    if trainer.rollout_func != trainer._roll_out:
        raise ConfigError(
            f"{named} with tools, environments, images or generation options of TRL's own: their rollouts cannot be "
            f"drawn again. Unset {option}."
        )
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ConfigError(f"{named} with a streamed dataset: other prompts cannot be looked up. Unset {option}.")
    prompts = args.generation_batch_size // args.num_generations
    if len(trainer.train_dataset) <= prompts:
        raise ConfigError(
            f"{named} with {len(trainer.train_dataset)} rows: a batch asks {prompts} prompts, so no other is left to "
            f"draw. Add rows, lower per_device_train_batch_size or gradient_accumulation_steps, or unset {option}."
        )
