"""The bank in training: ranks share the examinations, settled forks get no lesson, and a resume is exact."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from fault_runs import farm
from lesson_banks import bank_of, rule, write_checkpoint
from mel_lite.lessons.bank.updates import Ranks, open_forks, spread
from mel_lite.lessons.pairs import select_pairs
from mel_lite.lessons.prompts import replay_prompt
from mel_lite.lessons.scored import score_shifts
from mel_lite.models.chat import question_text
from mel_lite.resilience import saved_bank
from mel_lite.types import BankLesson, Finish, Group, Pair, Rollout, Status, Verdict
from scripted import ANALYSIS, ScriptedEngine
from tiny_models import tiny_tokenizer
from trainers import assert_learned, build, run_state, step_log

PLUS = "- If I see plus, then I count up."
WAYS = ("add the first number twice", "name both numbers", "add from the larger one", "read it again")


def varied(rng: random.Random) -> str:
    """An analysis with one of four rules of the same condition."""
    return ANALYSIS.replace("name the operation before computing anything", rng.choice(WAYS))


def with_bank(folder: Path, **options: Any) -> Any:
    """A run that distills from its bank, on a scripted policy of varied analyses."""
    defaults: dict[str, Any] = {
        "internalisation": "distill", "internalisation_options": {"form": "sampled", "context": "bank"},
        "engine": ScriptedEngine(tiny_tokenizer(), analysis=varied), "max_steps": 4, "save_strategy": "steps",
        "save_steps": 1, "bank_settled": None, "bank_settled_nats": None, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return build(folder, **defaults | options)


def earlier(folder: Path) -> Path:
    """A run whose bank has one well-known lesson that teaches every question."""
    bank = bank_of()
    bank.extend([BankLesson(1, PLUS, "What is 1 plus 1?", 9.0, 9, False, 0)])
    write_checkpoint(folder / "earlier", bank)
    return folder / "earlier"


@pytest.mark.parametrize("world", [1, 3])
def test_ranks_share_the_examinations_and_all_get_all_results(world: int) -> None:
    items = [(Group(f"q{i}", "", ()), str(i)) for i in range(7)]
    scored: list[list[str]] = [[] for _ in range(world)]
    parts: list[list[Any]] = []

    def shifts(rank: int) -> Any:
        def score(mine: Sequence[tuple[Group, str]]) -> list[float | None]:
            scored[rank] += [text for _, text in mine]
            return [None if text == "4" else float(text) for _, text in mine]

        return score

    for rank in range(world):  # each rank's share, as it would be sent
        spread(shifts(rank), Ranks(rank, world, lambda local: parts.append(local) or local))(items)
    assert sorted(chain.from_iterable(scored)) == [str(i) for i in range(7)]
    everything = list(chain.from_iterable(parts))
    for rank in range(world):
        found = spread(shifts(rank), Ranks(rank, world, lambda _: everything))(items)
        assert found == [0.0, 1.0, 2.0, 3.0, None, 5.0, 6.0]


def test_a_step_examines_with_the_models_own_shifts_and_then_adds(tmp_path: Path) -> None:
    trainer = with_bank(tmp_path, max_steps=1)
    seed = BankLesson(1, "- If a question joins numbers, then add.", "What is 1 plus 1?", 0.75, 1, False, 0)
    trainer.bank.adopt([seed])
    expected: list[float] = []
    original = trainer._internalise

    def checked(drawn: Any, *rest: Any) -> Any:
        notes = f"## Heuristics\n{seed.heuristic}"
        mixed = [(group, notes) for group in drawn.groups if group.is_mixed]
        expected.extend(score_shifts(mixed, drawn.context))
        assert drawn.bank is trainer.bank
        return original(drawn, *rest)

    trainer._internalise = checked
    trainer.train()
    assert expected and all(shift != 0 for shift in expected)
    clipped = [max(-1.0, min(1.0, shift)) for shift in expected]
    (old, *new) = trainer.bank.lessons
    assert (old.id, old.votes) == (-1, 1 + len(clipped))
    assert old.score == pytest.approx(0.75 + sum(clipped), abs=1e-5)
    kept = trainer.store.list(status=Status.KEPT)
    assert kept and {each.id for each in new} <= {row.id for row in kept}
    assert sum(each.score for each in new) == len(kept), "a new lesson is not examined by its own group"
    assert {each.heuristic for each in new} == {row.heuristic for row in kept}
    (row,) = step_log(tmp_path / "run")
    assert row["mel/bank_size"] == len(trainer.bank) and row["mel/bank_examinations"] == len(clipped)
    assert row["mel/bank_unmatched_groups"] + 2 * row["mel/bank_taught_share"] == 2


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bank_and_weights(tmp_path: Path) -> None:
    whole = with_bank(tmp_path / "whole")
    whole.train()
    assert_learned(whole)
    assert len(whole.bank) > 1 and whole.bank.counts["examined"] > 2
    assert len({lesson.score for lesson in whole.bank.lessons}) > 1
    begun = with_bank(tmp_path / "cut", max_steps=2)
    begun.train()
    at_two = begun.bank.state_dict()
    resumed = with_bank(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert run_state(resumed) == run_state(whole)
    assert step_log(tmp_path / "cut" / "run") == step_log(tmp_path / "whole" / "run")
    assert resumed.bank.state_dict() != at_two
    saved = saved_bank.saved_lessons(tmp_path / "whole" / "run")
    assert saved == whole.bank.lessons
    assert saved_bank.saved_lessons(tmp_path / "cut" / "run" / "checkpoint-2") == begun.bank.lessons


def test_a_run_resumed_in_another_folder_keeps_its_lessons(tmp_path: Path) -> None:
    first = with_bank(tmp_path, max_steps=2)
    first.train()
    moved = with_bank(tmp_path, output_dir=tmp_path / "other")
    moved.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    old = {lesson.heuristic for lesson in first.bank.lessons}
    assert old <= {lesson.heuristic for lesson in moved.bank.lessons}
    rows = {row.id: row.heuristic for row in moved.store.list(status=Status.KEPT)}
    new = [lesson for lesson in moved.bank.lessons if lesson.id > 0 and lesson.heuristic not in old]
    assert all(rows[lesson.id] == lesson.heuristic for lesson in new)
    assert len({lesson.id for lesson in moved.bank.lessons}) == len(moved.bank)


def test_no_lesson_is_written_for_a_settled_question(tmp_path: Path) -> None:
    options = {"max_steps": 1, "lessons_from": str(earlier(tmp_path))}
    settled = with_bank(tmp_path / "a", bank_settled=1.0, **options)
    settled.train()
    assert settled.store.list() == [] and settled.bank.lessons[0].votes > 9
    (row,) = step_log(tmp_path / "a" / "run")
    assert row["mel/bank_settled_groups"] == 2 and row["mel/pairs"] == 0
    always = with_bank(tmp_path / "b", **options)
    always.train()
    assert always.store.list() != []
    (row,) = step_log(tmp_path / "b" / "run")
    assert row["mel/bank_settled_groups"] == 0 and row["mel/pairs"] > 0


def fork_preferences(trainer: Any, pairs: Sequence[Pair], notes: str) -> list[float]:
    """log pi(a+) - log pi(a-) at each pair's fork with notes in the prompt, from the model's own logits."""
    context, found = trainer.lesson_context, []
    for pair in pairs:
        fork = pair.common_prefix_tokens
        prompt = replay_prompt(pair.group, notes, context.tokenizer, context.templates)
        with torch.no_grad():
            ids = torch.tensor([prompt + pair.right.completion_ids[:fork]])
            logits_V = trainer.model.eval()(input_ids=ids).logits[0, -1].double() / trainer.policy_temperature
        found.append(float(logits_V[pair.right.completion_ids[fork]] - logits_V[pair.wrong.completion_ids[fork]]))
    return found


def test_pairs_whose_fork_the_bank_settles_get_no_lesson(tmp_path: Path) -> None:
    trainer = with_bank(tmp_path, max_steps=1, lessons_from=str(earlier(tmp_path)), pairs_per_group=4)
    ranks = Ranks(0, 1, lambda local: local)
    original, seen = trainer._draw, []

    def before(groups: list[Group]) -> Any:
        pairs = select_pairs(groups, per_group=4, strategy="longest_prefix", run_seed=1, step=0)
        preferences = fork_preferences(trainer, pairs, f"## Heuristics\n{PLUS}")
        least = sorted(preferences)[len(pairs) // 2]
        bank = bank_of(settled_nats=least - 1e-4 if least > 0 else 1e-4)
        bank.extend(trainer.bank.lessons)
        still = open_forks(bank, pairs, trainer.lesson_context, ranks)
        seen.append((pairs, preferences, bank.options.settled_nats, still))
        halves = [
            len(open_forks(bank, pairs, trainer.lesson_context, Ranks(rank, 2, lambda local: local))) for rank in (0, 1)
        ]
        assert sum(halves) == len(pairs) + len(still), "each rank reads its share"
        assert open_forks(bank_of(settled_nats=1e-4), pairs, trainer.lesson_context, ranks) == pairs, "no lesson"
        assert open_forks(trainer.bank, pairs, trainer.lesson_context, ranks) == pairs, "the option is None"
        return original(groups)

    trainer._draw = before
    trainer.train()
    (pairs, preferences, least, still) = seen[0]
    expected = [pair for pair, preference in zip(pairs, preferences, strict=True) if preference < least]
    assert still == expected and 0 < len(still) < len(pairs), "both kinds were met"


def test_a_solution_that_ends_at_the_fork_is_never_settled(tmp_path: Path) -> None:
    trainer = with_bank(tmp_path, lessons_from=str(earlier(tmp_path)))
    question = "What is 3 plus 4?"
    right = Rollout(0, (20, 21, 22, 23), "Answer: 7", Verdict.RIGHT)
    cut = Rollout(1, (20, 21, 22), "Answer:", Verdict.WRONG, Finish.LENGTH)
    pair = Pair(Group(question, "7", (right, cut)), right, cut, 3)
    bank = bank_of(settled_nats=1e-9)
    bank.extend(trainer.bank.lessons)
    assert bank.retrieve(question)
    assert open_forks(bank, [pair], trainer.lesson_context, Ranks(0, 1, lambda local: local)) == [pair]


def test_a_step_counts_settled_forks_and_writes_no_lesson_for_them(tmp_path: Path) -> None:
    trainer = with_bank(tmp_path, max_steps=1, lessons_from=str(earlier(tmp_path)), bank_settled_nats=1e-9)
    trainer.scorer.logps = lambda texts, **_: [torch.tensor([-float(i % 2)]) for i in range(len(texts))]  # all settled
    trainer.train()
    assert trainer.store.list() == [] and trainer.bank.lessons[0].votes > 9
    (row,) = step_log(tmp_path / "run")
    assert row["mel/bank_settled_pairs"] == 2 and row["mel/pairs"] == 0


def test_lessons_of_another_run_teach_from_the_first_step(tmp_path: Path) -> None:
    first = with_bank(tmp_path, max_steps=2)
    first.train()
    seeded = with_bank(tmp_path, output_dir=tmp_path / "next", lessons_from=str(tmp_path / "run"), max_steps=1)
    assert [lesson.heuristic for lesson in seeded.bank.lessons] == [each.heuristic for each in first.bank.lessons]
    assert [lesson.score for lesson in seeded.bank.lessons] == [each.score for each in first.bank.lessons]
    asked: list[list[int]] = []
    original = seeded._draw

    def before(groups: list[Group]) -> Any:
        asked.extend([each.id for each in seeded.bank.retrieve(question_text(group.prompt))] for group in groups)
        return original(groups)

    seeded._draw = before
    seeded.train()
    assert asked and all(ids and ids[0] < 0 for ids in asked)


def test_without_a_use_for_it_there_is_no_bank(tmp_path: Path) -> None:
    plain = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    assert plain.bank is None and not any("bank" in name for name in step_log(tmp_path / "run")[0])
    state = (tmp_path / "run" / "checkpoint-1" / "mel_state.json").read_text()
    assert "lesson_bank" not in state
    kept = plain.store.list(status=Status.KEPT)
    assert [each.heuristic for each in saved_bank.saved_lessons(tmp_path / "run")] == [kept[0].heuristic]
    assert rule("zap", "add") not in kept[0].heuristic


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bank(tmp_path: Path) -> None:
    options = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "internalisation": "distill",
        "internalisation_options": {"form": "sampled", "context": "bank"}, "bank_settled": None,
        "bank_settled_nats": None,
    }  # fmt: skip
    with farm() as runs:
        assert runs.run(tmp_path / "whole", **options) == 0, (tmp_path / "whole" / "output.txt").read_text()
        run = runs.start(tmp_path / "cut", **options, slow_s=0.2)
        run.wait_for("forward", 2)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert runs.run(tmp_path / "cut", **options, resume=True) == 0, (tmp_path / "cut" / "output.txt").read_text()
    whole, cut = (json.loads((tmp_path / name / "state.json").read_text()) for name in ("whole", "cut"))
    assert cut == whole and json.loads(whole["bank"])["lesson_bank"]["counts"]["examined"] > 2
    assert step_log(tmp_path / "cut" / "run") == step_log(tmp_path / "whole" / "run")
