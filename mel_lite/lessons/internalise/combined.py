"""Several ways at once, each with its share of lambda."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise.protocol import (
    DrawnBatch,
    Internalisation,
    RolloutBatch,
    ScoredMicroBatch,
    TokenReading,
)
from mel_lite.lessons.reading import Scorer
from mel_lite.types import Lesson

if TYPE_CHECKING:
    from torch import Tensor


class Combined(Internalisation):
    """Weighted sum of ways: way i trains as it does alone with weight_i * lambda, on what the ways before it wrote."""

    def __init__(self, ways: Mapping[str, tuple[Internalisation, float]]) -> None:
        self.names = tuple(ways)
        self.ways = tuple(way for way, _ in ways.values())
        self.weights = tuple(weight for _, weight in ways.values())
        self.writes_lessons = any(way.writes_lessons for way in self.ways)
        self.needs_own_lessons = any(way.needs_own_lessons for way in self.ways)
        self.uses_bank = any(way.uses_bank for way in self.ways)
        self.needs_frozen_head = any(way.needs_frozen_head for way in self.ways)
        self.teacher_states = sum(way.teacher_states for way in self.ways)
        self.needs_frozen_reader = any(way.needs_frozen_reader for way in self.ways)
        self.trains_whole_analysis = any(way.trains_whole_analysis for way in self.ways)
        self.texts_per_experience = sum(way.texts_per_experience for way in self.ways)
        self.needs_every_rollout = any(way.needs_every_rollout for way in self.ways)
        self.needs_replay = any(way.needs_replay for way in self.ways)
        self.reads_tokens = any(way.reads_tokens for way in self.ways)

    def lessons(self, drawn: DrawnBatch) -> list[Lesson]:
        return [replace(lesson, way=i) for i, way in enumerate(self.ways) for lesson in way.lessons(drawn)]

    def batch_entries(self, drawn: DrawnBatch, batch: RolloutBatch, score: Scorer) -> dict[str, Tensor]:
        added: dict[str, Tensor] = {}
        for name, way, weight in zip(self.names, self.ways, self.weights, strict=True):
            seen = RolloutBatch(batch.rows, {**batch.entries, **added})
            entries = way.batch_entries(replace(drawn, weight=weight * drawn.weight), seen, score)
            taken = sorted(set(entries) & set(added) - {"advantages"})
            if taken:
                raise ConfigError(
                    f"internalisation: {name} writes {', '.join(taken)}, as another way of the combination does. "
                    "Remove one of them."
                )
            added |= entries
        return added

    def loss(self, scored: ScoredMicroBatch) -> Tensor | None:
        total = None
        for i, (way, weight) in enumerate(zip(self.ways, self.weights, strict=True)):
            mine = [j for j, lesson in enumerate(scored.lessons) if lesson.way == i]
            scale = scored.lessons[mine[0]].scale if mine else 1.0
            part = way.loss(
                replace(
                    scored,
                    lessons=tuple(scored.lessons[j] for j in mine),
                    lesson_logps=tuple(scored.lesson_logps[j] for j in mine),
                    weight=weight * scored.weight,
                    lesson_weight=weight * scale * scored.lesson_weight,
                    token_weight=weight * scored.token_weight,
                )
            )
            if part is not None:
                total = part if total is None else total + part
        return total

    def metrics(self) -> dict[str, float]:
        return {name: value for way in self.ways for name, value in way.metrics().items()}

    def token_readings(self) -> list[TokenReading]:
        ways = zip(self.names, self.ways, strict=True)
        return [replace(reading, way=name) for name, way in ways for reading in way.token_readings()]
