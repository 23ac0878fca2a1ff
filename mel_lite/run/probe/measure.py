"""Measure, inside `train` and before its first step, what a run and its lessons would learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from mel_lite.lessons.internalise import DrawnBatch, Internalisation, get_internalisation
from mel_lite.resilience.saved_bank import build_bank
from mel_lite.run.probe.advice import advise
from mel_lite.run.probe.gradients import GradientProbe, ProbeBatch
from mel_lite.run.probe.lessons import DrawnLessons, draw, summary
from mel_lite.run.probe.result import Attempts, ProbeResult, WayGradient
from mel_lite.training.rewards import GenerationBatch, groups_of
from mel_lite.types import Experience, Group, Status

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "analysis": ("analysis", {}),
    "experience": ("experience", {}),
    "replay": ("replay", {}),
    "right": ("right", {}),
    "distill own lesson": ("distill", {"context": "own"}),
    "distill right sibling": ("distill", {"context": "sibling"}),
    "distill bank": ("distill", {"context": "bank"}),
    "credit": ("credit", {"context": "own"}),
}
"""Ways that every probe compares, with `internalisation` and `internalisation_options`."""


class _Measured(Exception):
    """Ends `train` before its first step."""


class _MeasureFirst(TrainerCallback):
    """Measure where a run would take its first step: weights on the device, checkpointing on, engine ready."""

    def __init__(self, measurement: Callable[[], ProbeResult]) -> None:
        self._measurement = measurement
        self.result: ProbeResult | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.result = self._measurement()
        raise _Measured


def measure(
    trainer: Any, *, attempts: int = 4, mel_weight: float = 1.0, report: Callable[[str], None] = lambda doing: None
) -> ProbeResult:
    """Return all figures for a MELTrainer built with `probe_options`, whose dataset has one row per probed prompt.

    `mel_weight` is the run's lambda, which the advice is for. The model's weights stay as they are.
    """
    callback = _MeasureFirst(lambda: _Measurement(trainer, attempts, mel_weight, report).result())
    trainer.add_callback(callback)
    try:
        trainer.train()
    except _Measured:
        pass
    finally:
        trainer.remove_callback(callback)
    assert callback.result is not None, "train began"
    return callback.result


class _Measurement:
    """One measurement inside `train`."""

    def __init__(self, trainer: Any, attempts: int, mel_weight: float, report: Callable[[str], None]) -> None:
        self._trainer, self._attempts, self._mel_weight, self._report = trainer, attempts, mel_weight, report
        args = trainer.args
        self._groups = args.generation_batch_size // args.num_generations
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps

    def result(self) -> ProbeResult:
        trainer, args = self._trainer, self._trainer.args
        count = len(trainer.train_dataset) // self._groups
        teaching = max(1, count // 3)
        batches = []
        for number in range(count):
            self._report(f"rollouts {number + 1} of {count}")
            batches.append(self._roll_out(number))
        drawn = []
        for number, batch in enumerate(batches[:teaching]):
            self._report(f"lessons {number + 1} of {teaching}")
            drawn.append(draw(trainer, batch.groups, batch=number, attempts=self._attempts))
        lessons = summary(
            drawn,
            trainer.lesson_context,
            rollout_tokens=sum(len(r.completion_ids) for batch in batches[:teaching] for _, r in batch.rows),
            args=args,
            attempts=self._attempts,
        )
        gradients = GradientProbe(trainer)
        self._report("policy gradient of the other prompts")
        halves = gradients.set_reference(batches[teaching:])
        ways = self._ways(gradients, batches[:teaching], drawn)
        return advise(
            ProbeResult(
                model="",
                dataset="",
                seed=args.seed,
                prompts=count * self._groups,
                lesson_prompts=teaching * self._groups,
                group_size=args.num_generations,
                replay_attempts=self._attempts,
                mel_weight=self._mel_weight,
                attempts=rates([group for batch in batches for group in batch.groups]),
                lessons=lessons,
                halves=halves,
                ways=tuple(ways),
            )
        )

    def _roll_out(self, number: int) -> ProbeBatch:
        trainer, size = self._trainer, self._trainer.args.num_generations
        rows = [trainer.train_dataset[number * self._groups + i] for i in range(self._groups)]
        scored = GenerationBatch(row for row in rows for _ in range(size))
        trainer.model.train()
        entries = trainer.policy_batch(scored)
        return ProbeBatch(tuple(scored.rollouts), tuple(groups_of(scored.rollouts, size)), entries)

    def _ways(
        self, gradients: GradientProbe, batches: Sequence[ProbeBatch], drawn: Sequence[DrawnLessons]
    ) -> list[WayGradient]:
        """Measure the policy loss and every way on the lesson batches."""
        policy = gradients.measure(WayGradient("policy loss", None), [gradients.policy(batch) for batch in batches])
        measured = [policy]
        for name, (internalisation, options) in self._compared().items():
            self._report(f"gradient of {name}")
            way = get_internalisation(internalisation, options)
            found = self._of_way(WayGradient(name, internalisation, options), way, gradients, batches, drawn)
            measured.append(replace(found, ratio=found.norm / policy.norm if policy.norm else None))
        return measured

    def _of_way(
        self,
        found: WayGradient,
        way: Internalisation,
        gradients: GradientProbe,
        batches: Sequence[ProbeBatch],
        drawn: Sequence[DrawnLessons],
    ) -> WayGradient:
        shifts: list[float] = []

        def of_batch(number: int) -> Iterator[torch.Tensor]:
            yield from gradients.of_way(way, self._drawn_batch(way, number, batches, drawn), batches[number])
            shift = way.metrics().get("mel/teacher_shift")
            if shift is not None:
                shifts.append(shift)

        found = gradients.measure(found, [of_batch(number) for number in range(len(batches))])
        return replace(found, teacher_shift_nats=sum(shifts) / len(shifts) if shifts else None)

    def _drawn_batch(
        self, way: Internalisation, number: int, batches: Sequence[ProbeBatch], drawn: Sequence[DrawnLessons]
    ) -> DrawnBatch:
        """Return a batch's lessons at lambda 1; a bank has those of `lessons_from` and of the other batches."""
        bank = build_bank(self._trainer.args, used=way.uses_bank)
        if bank is not None:
            for row_id, each in (each for i, batch in enumerate(drawn) if i != number for each in batch.experiences):
                if each.status is Status.KEPT:
                    bank.add(row_id, each)
        own = drawn[number].experiences
        return DrawnBatch(
            with_right_replay(own) if way.needs_replay else own,
            batches[number].groups,
            self._trainer.lesson_context,
            drawn[number].pairs,
            1.0,
            bank,
        )

    def _compared(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Return the ways to compare: `WAYS`, and the run's own if it is another.

        Under a head that trains, the divergence of `distill` has no common head, so the sampled form is taken.
        """
        trainer, args = self._trainer, self._trainer.args
        head_trains = any(weight.requires_grad for weight in trainer.model.get_output_embeddings().parameters())
        ways: dict[str, tuple[Any, dict[str, Any]]] = {}
        for name, (internalisation, options) in WAYS.items():
            sampled = {"form": "sampled"} if internalisation == "distill" and head_trains else {}
            ways[name] = (internalisation, {**options, **sampled})
        own = (args.internalisation, dict(args.internalisation_options or {}))
        if own not in ways.values():
            ways["the run's own"] = own
        return ways


def rates(groups: Sequence[Group]) -> Attempts:
    """Return pass rate and kinds of groups."""
    right, wrong = sum(len(g.right) for g in groups), sum(len(g.wrong) for g in groups)
    return Attempts(
        pass_rate=right / (right + wrong) if right + wrong else None,
        mixed_share=sum(g.is_mixed for g in groups) / len(groups),
        wrong_share=sum(bool(g.wrong) and not g.right for g in groups) / len(groups),
        right_share=sum(bool(g.right) and not g.wrong for g in groups) / len(groups),
    )


def with_right_replay(experiences: Sequence[tuple[int, Experience]]) -> tuple[tuple[int, Experience], ...]:
    """Leave out kept experiences without a right replay, which a way that trains on replays cannot use."""
    return tuple(
        (row_id, each)
        for row_id, each in experiences
        if each.status is not Status.KEPT or (each.replay is not None and each.replay.solved_rate > 0)
    )


__all__ = ["WAYS", "measure", "rates"]
