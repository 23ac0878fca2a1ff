"""Lessons in flight, without a trainer: stages, bound on staleness, shares of ranks, and the saved state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from experiences import experience, lesson_context
from mel_lite.engines.base import Completion
from mel_lite.lessons.in_flight import InFlight, Waiting
from mel_lite.types import (
    Experience,
    Finish,
    Group,
    LeakReport,
    MetaExperience,
    Pair,
    Replay,
    Rollout,
    Span,
    Status,
    Verdict,
)
from scripted import ANALYSIS
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
R, W = Verdict.RIGHT, Verdict.WRONG


def pairs_of(batch: int, count: int = 2) -> list[Pair]:
    found = []
    for index in range(count):
        rollouts = (
            Rollout(2 * index, (5, 6), "It is 7.", R, reward=1.0),
            Rollout(2 * index + 1, (5, 7), "It is 8.", W, reward=0.0),
        )
        prompt = [{"role": "user", "content": f"Question {index} of batch {batch}?"}]
        found.append(
            Pair(Group(prompt, f"{batch}-{index}", rollouts, answer="7", columns={"n": 1.5}), *rollouts, 1, index)
        )
    return found


def done(text: str) -> Completion:
    ids = (*TOKENIZER(text, add_special_tokens=False)["input_ids"], 2)
    return Completion(ids, (-1.0,) * len(ids), Finish.STOP)


def keep(gathered: list[Waiting], local: list[Waiting]) -> list[Waiting]:
    gathered.extend(local)
    return []  # the ranks get all of them once each has added its own


def run(flights: Sequence[InFlight], batches: int, *, judge: Any, **options: Any) -> list[list[Experience]]:
    """Drive one queue per rank; returns what each batch completes, over all ranks."""
    context = lesson_context(TOKENIZER, judge=judge, replay_criterion="solved_once", **options)
    completed = []
    for batch in range(batches):
        asked = [flight.requests(context, batch=batch) for flight in flights]
        for flight, requests in zip(flights, asked, strict=True):
            is_replay = [request.sampling is context.replay for request in requests]
            flight.answer([done("It is 8." if replay else ANALYSIS) for replay in is_replay])
            assert flight.requests(context, batch=batch) == [], "answered"
        pairs, world, found = pairs_of(batch), len(flights), []
        gathered: list[Waiting] = []
        for rank, flight in enumerate(flights):
            flight._gather = partial(keep, gathered)
            found += flight.advance(pairs[rank::world], context, step=batch, batch=batch)[0]
        for flight in flights:
            flight.waiting = tuple(sorted(gathered, key=lambda each: (each.batch, each.pair.index)))
            flight.version += batch != 1  # the update of batch 1 is skipped
        completed.append(sorted(found, key=lambda each: each.analysis.pair.index))
    return completed


def all_wrong(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
    return [W] * len(texts)


@pytest.mark.parametrize(("most", "made"), [(None, 4), (3, 2), (2, 1)])
def test_attempts_end_at_the_bound_on_staleness(most: int | None, made: int) -> None:
    completed = run([InFlight(most_steps=most)], 7, judge=all_wrong, replay_attempts=4)
    assert [len(each) for each in completed] == [0] * (1 + made) + [2] * (6 - made)
    for each in completed[1 + made]:
        assert (each.status, each.reason) == (Status.REPLAY_FAILED, f"0 of {made} replays right, one needed")
        assert (each.rollouts_step, each.step, each.staleness_steps, each.staleness_versions) == (
            0,
            1 + made,
            1 + made,
            made,
        )
        assert each.replay == Replay((W,) * made, ("It is 8.",) * made)


def test_ranks_share_the_lessons_and_stay_equal() -> None:
    def right_once(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        return [R if group.prompt_hash.endswith("1") else W for group in groups]

    alone = run([InFlight()], 6, judge=right_once, replay_attempts=3)
    two = [InFlight(rank=rank, world=2) for rank in (0, 1)]
    assert run(two, 6, judge=right_once, replay_attempts=3) == alone
    assert two[0].waiting == two[1].waiting and len(two[0].waiting) == 6
    assert {each.status for batch in alone for each in batch} == {Status.KEPT, Status.REPLAY_FAILED}


def test_a_batch_that_is_sampled_again_draws_its_pairs_again() -> None:
    flight, context = InFlight(), lesson_context(TOKENIZER, judge=all_wrong)
    for _ in range(2):
        assert flight.requests(context, batch=0) == []
        flight.answer([])
        flight.advance(pairs_of(0), context, step=0, batch=0)
        assert [(each.batch, each.pair.index) for each in flight.waiting] == [(0, 0), (0, 1)]


def test_the_state_is_json_and_holds_everything() -> None:
    known = experience()
    pair = pairs_of(3)[1]
    redacted = MetaExperience("a", "b", "c")
    whole = replace(
        known,
        analysis=replace(known.analysis, pair=pair, nll_nats=0.1 + 0.2),
        leak=LeakReport(("states the answer",), redacted),
        quote=Span(1, 4),
        replay=Replay((W, R), ("x", "\ud800 y"), ()),
        shift_nats=1e-17,
    )
    waiting = (Waiting(pairs_of(2)[0], 2, 5, 4), Waiting(pair, 3, 6, 5, whole), Waiting(pair, 3, 6, 5))
    flight, other = InFlight(), InFlight()
    flight.waiting, flight.version = waiting, 9
    state = json.loads(json.dumps(flight.state_dict()))
    other.load_state_dict(state)
    assert (other.waiting, other.version) == (waiting, 9)
    assert other.waiting[1].pair.group is other.waiting[2].pair.group, "a group is saved once"
    assert other.state_dict() == flight.state_dict()
    other.load_state_dict({"generated_tokens": 3})
    assert (other.waiting, other.version) == ((), 0), "a checkpoint of an older release"
    rollouts = tuple(replace(each, reward=math.nan) for each in pair.group.rollouts)
    flight.waiting = (Waiting(Pair(replace(pair.group, rollouts=rollouts), *rollouts, 1), 3, 6, 5),)
    flight._saved = None
    other.load_state_dict(json.loads(json.dumps(flight.state_dict())))
    assert math.isnan(other.waiting[0].pair.right.reward)
