"""Lessons in flight: analyses and replays that are sampled together with later rollouts (`mel_schedule: overlap`).

    batch t      the pairs of its rollouts enter; each waits for an analysis
    batch t+1    the engine samples the analyses with the rollouts; those that are parsed, leak-free and, on request,
                 lift their group's right rollouts wait for a replay, the others are complete
    batch t+2    the engine samples the replays with the rollouts; judged, their lessons are complete

Complete lessons join the update of the batch in which they are. With `solved_once`, each further attempt waits for the
next batch, as long as the lesson would not be older than `most_steps`. Prompts and seeds are those of the strict
schedule, so only the policy that samples differs, by the staleness that each lesson records.

Every rank holds all waiting lessons and samples its share of them; `gather` makes the ranks equal again after each
batch. The state is plain JSON and holds all that a lesson needs, so a resumed run continues exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mel_lite.engines.base import Completion, Request
from mel_lite.lessons.analysis import Unfit, analysis_of, analysis_requests
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.pipeline import checked, prove_by_scores, replayed
from mel_lite.lessons.replay import NOTHING, judge_attempts, next_attempts
from mel_lite.types import (
    Analysis,
    Experience,
    Finish,
    Group,
    LeakReport,
    MetaExperience,
    Pair,
    Replay,
    ReplayCriterion,
    Rollout,
    Span,
    Status,
    Verdict,
)

_STATE = "in_flight"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A lesson between two batches."""

    pair: Pair
    batch: int
    """Generation batch of its rollouts, from which its seeds count."""
    step: int
    """Optimizer steps before that batch."""
    version: int
    """Updates of the weights before it."""
    experience: Experience | None = None
    """What is known of it; None while it waits for its analysis. With the attempts of its replay that are made."""


Answered = tuple[Waiting, list[Request], list[Completion]]
"""A waiting lesson, what it asked the engine, and what came."""


class InFlight:
    """The waiting lessons of a run. `requests`, `answer` and `advance` are called once per batch, in that order.

    Args:
        rank: number of this process of `world`.
        gather: concatenates the lists of all ranks.
        most_steps: largest staleness of a lesson whose replay is attempted again, in optimizer steps; None = any.
        steps_per_batch: optimizer steps of a generation batch.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[list[Any]], list[Any]] = list,
        most_steps: int | None = None,
        steps_per_batch: float = 1,
    ) -> None:
        self._rank, self._world, self._gather = rank, world, gather
        self._most_steps, self._steps_per_batch = most_steps, steps_per_batch
        self.waiting: tuple[Waiting, ...] = ()
        """Lessons of all ranks, oldest first."""
        self.version = 0
        """Updates of the weights so far."""
        self._asked: list[tuple[Waiting, list[Request]]] = []
        self._answers: Iterator[Completion] | None = None
        self._saved: str | None = None

    def requests(self, context: LessonContext, *, batch: int) -> list[Request]:
        """Return what this rank samples with the rollouts of a batch; [] once that is answered."""
        if self._answers is not None:
            return []
        # A batch that is sampled again, after a resume in its middle, draws its own pairs again.
        mine = [each for each in self.waiting if each.batch < batch][self._rank :: self._world]
        # A lesson has none if it resumes with options by which it does not fit; it is dropped.
        self._asked = [(each, requests) for each in mine if (requests := _requests_of(each, context))]
        return [request for _, requests in self._asked for request in requests]

    def answer(self, completions: Sequence[Completion]) -> None:
        """Take the completions of `requests`, in their order."""
        if self._answers is None:
            assert len(completions) == sum(len(requests) for _, requests in self._asked)
            self._answers = iter(completions)

    def advance(
        self, pairs: Sequence[Pair], context: LessonContext, *, step: int, batch: int
    ) -> tuple[list[Experience], Unfit]:
        """Take the waiting lessons one stage further, and let the pairs of this batch enter.

        Args: `pairs` of this rank, `step` the number of optimizer steps before this batch.
        Returns: this rank's complete experiences, oldest first, and its pairs that do not fit the context.
        """
        assert self._answers is not None, "the rollouts of the batch were sampled by our engine"
        done = [(each, requests, [next(self._answers) for _ in requests]) for each, requests in self._asked]
        self._asked, self._answers, self._saved = [], None, None
        stages = self._analyzed(done, context, step) + self._replayed(done, context)
        complete: list[Waiting] = []
        waiting: list[Waiting] = []
        for each in stages:
            assert each.experience is not None
            (waiting if self._goes_on(each, context, step) else complete).append(each)
        fitting, unfit = analysis_requests(pairs, context, batch=batch)
        waiting += [Waiting(pair, batch, step, self.version) for pair, _ in fitting]
        self.waiting = tuple(sorted(self._gather(waiting), key=_age))
        return [self._dated(each, context, step) for each in sorted(complete, key=_age)], unfit

    @staticmethod
    def _analyzed(done: Sequence[Answered], context: LessonContext, step: int) -> list[Waiting]:
        """Parse, check and score the analyses that have come."""
        come = [each for each, _, _ in done if each.experience is None]
        drawn = [
            checked(analysis_of(each.pair, requests[0], sampled[0], context), context, step)
            for each, requests, sampled in done
            if each.experience is None
        ]
        if drawn and ReplayCriterion(context.replay_criterion).scores:
            with context.clock("scored"):
                drawn = prove_by_scores(drawn, context)
        return [replace(each, experience=known) for each, known in zip(come, drawn, strict=True)]

    @staticmethod
    def _replayed(done: Sequence[Answered], context: LessonContext) -> list[Waiting]:
        """Judge the attempts that have come."""
        come = [(each, each.experience, sampled) for each, _, sampled in done if each.experience is not None]
        if not come:
            return []
        with context.clock("replay"):
            replays = judge_attempts([(each.pair, known.replay or NOTHING, s) for each, known, s in come], context)
        return [
            replace(each, experience=replace(known, replay=result))
            for (each, known, _), result in zip(come, replays, strict=True)
        ]

    def _goes_on(self, each: Waiting, context: LessonContext, step: int) -> bool:
        """Return True when a lesson has attempts left to make."""
        known = each.experience
        if known is None or known.status is not Status.KEPT:
            return False
        if not ReplayCriterion(context.replay_criterion).replays or not _requests_of(each, context):
            return False
        too_old = self._most_steps is not None and step + self._steps_per_batch - each.step > self._most_steps
        return known.replay is None or not too_old

    def _dated(self, each: Waiting, context: LessonContext, step: int) -> Experience:
        """Return a complete lesson with the verdict on its replay and its staleness."""
        known, criterion = each.experience, ReplayCriterion(context.replay_criterion)
        assert known is not None
        if known.replay is not None:
            known = replayed(known, known.replay, criterion)
        versions = self.version - each.version
        return replace(known, step=step, staleness_steps=step - each.step, staleness_versions=versions)

    def state_dict(self) -> dict[str, Any]:
        if self._saved is None:
            self._saved = _encoded(self.waiting)
        return {_STATE: {"version": self.version, "lessons": self._saved}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; a checkpoint of a run with the strict schedule has no lesson in flight."""
        saved = state.get(_STATE, {"version": 0, "lessons": _encoded(())})
        self.version, self.waiting = int(saved["version"]), _decoded(saved["lessons"])
        self._asked, self._answers, self._saved = [], None, None


def _age(each: Waiting) -> tuple[int, int]:
    return each.batch, each.pair.index


def _requests_of(each: Waiting, context: LessonContext) -> list[Request]:
    """Return what a lesson waits for: its analysis, or the next attempts of its replay."""
    if each.experience is None:
        fitting, _ = analysis_requests([each.pair], context, batch=each.batch)
        return [request for _, request in fitting]
    done = each.experience.replay or NOTHING
    return next_attempts(each.pair, each.experience.text, done, context, batch=each.batch)


def _encoded(waiting: Sequence[Waiting]) -> str:
    """Return the lessons as one JSON text; the pairs of a group share it."""
    groups: dict[int, int] = {}
    by_id = {id(each.pair.group): each.pair.group for each in waiting}
    for key in by_id:
        groups[key] = len(groups)
    lessons = []
    for each in waiting:
        row: dict[str, Any] = {name: getattr(each, name) for name in ("batch", "step", "version")}
        row["group"] = groups[id(each.pair.group)]
        row["pair"] = {
            "right": each.pair.right.index, "wrong": each.pair.wrong.index, "index": each.pair.index,
            "common_prefix_tokens": each.pair.common_prefix_tokens,
        }  # fmt: skip
        known = each.experience
        if known is not None:
            row["experience"] = asdict(replace(known, analysis=replace(known.analysis, pair=None)))  # type: ignore[arg-type]
        lessons.append(row)
    return json.dumps({"groups": [asdict(group) for group in by_id.values()], "lessons": lessons})


def _decoded(text: str) -> tuple[Waiting, ...]:
    saved = json.loads(text)
    groups = [_group(values) for values in saved["groups"]]
    waiting = []
    for row in saved["lessons"]:
        group, of_pair = groups[row["group"]], row["pair"]
        rollouts = {rollout.index: rollout for rollout in group.rollouts}
        right, wrong = rollouts[of_pair["right"]], rollouts[of_pair["wrong"]]
        pair = Pair(group, right, wrong, of_pair["common_prefix_tokens"], of_pair["index"])
        known = _experience(row["experience"], pair) if "experience" in row else None
        waiting.append(Waiting(pair, row["batch"], row["step"], row["version"], known))
    return tuple(waiting)


def _group(values: dict[str, Any]) -> Group:
    rollouts = tuple(
        Rollout(
            **each | {
                "completion_ids": tuple(each["completion_ids"]),
                "verdict": Verdict(each["verdict"]),
                "finish": Finish(each["finish"]),
            }
        )
        for each in values["rollouts"]
    )  # fmt: skip
    return Group(**values | {"rollouts": rollouts})


def _experience(values: dict[str, Any], pair: Pair) -> Experience:
    analysis, leak, replay = values["analysis"], values["leak"], values["replay"]
    ids = {name: tuple(analysis[name]) for name in ("context_ids", "analysis_ids")}
    if leak is not None:
        leak = LeakReport(tuple(leak["reasons"]), leak["redacted"] and MetaExperience(**leak["redacted"]))
    if replay is not None:
        verdicts = {name: tuple(map(Verdict, replay[name])) for name in ("verdicts", "control_verdicts")}
        replay = Replay(texts=tuple(replay["texts"]), **verdicts)
    return Experience(
        **values | {
            "analysis": Analysis(**analysis | ids | {"pair": pair, "finish": Finish(analysis["finish"])}),
            "status": Status(values["status"]),
            "parsed": values["parsed"] and MetaExperience(**values["parsed"]),
            "quote": values["quote"] and Span(**values["quote"]),
            "leak": leak,
            "replay": replay,
        }
    )  # fmt: skip


__all__ = ["InFlight", "Waiting"]
