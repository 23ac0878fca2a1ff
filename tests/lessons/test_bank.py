"""The lesson bank: scores, retirement, rivals, the cap, what is settled, and its state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lesson_banks import bank_of, kept, rule
from mel_lite.config import MELConfig
from mel_lite.errors import ConfigError
from mel_lite.lessons.bank import LessonBank, examine, lessons_of_state, notes_text
from mel_lite.types import BankLesson, BankOptions, Group, LeakReport, MetaExperience, Rollout, Verdict


def group(question: str, *verdicts: Verdict) -> Group:
    rollouts = tuple(Rollout(i, (1, 2), "x", verdict) for i, verdict in enumerate(verdicts))
    return Group([{"role": "system", "content": "Read."}, {"role": "user", "content": question}], "h", rollouts)


R, W = Verdict.RIGHT, Verdict.WRONG


def ids(lessons: Sequence[BankLesson]) -> list[int]:
    return [lesson.id for lesson in lessons]


def scores(bank: LessonBank) -> dict[int, float]:
    return {lesson.id: lesson.score for lesson in bank.lessons}


def test_a_kept_lesson_enters_with_its_score_and_its_redacted_rule() -> None:
    bank = LessonBank()
    bank.add(7, kept("- If I see zap, then zap is from.", "3 zap 7?"))
    leaking = kept("If zap gives 4, then stop.", "3 zap 4?", step=5)
    redacted = MetaExperience("b", "c", "If zap gives [...], then stop.")
    bank.add(9, replace(leaking, leak=LeakReport(("answer",), redacted)), score=7.5)
    bank.add(10, kept("- If I see dax, then dax is add.", "3 dax 7?"), score=-0.25)
    assert bank.lessons == [
        BankLesson(7, "- If I see zap, then zap is from.", "3 zap 7?", 1.0, 1, False, 4),
        BankLesson(9, "If zap gives [...], then stop.", "3 zap 4?", 1.0, 1, False, 6),
        BankLesson(10, "- If I see dax, then dax is add.", "3 dax 7?", -0.25, 1, True, 4),
    ]


@pytest.mark.parametrize(
    "again",
    ["if I see zap then zap is from", "* **If** I see `zap`,  then zap is from.", "1. If I see zap, then zap is from!"],
)
def test_near_duplicates_add_their_scores_and_votes(again: str) -> None:
    bank = bank_of(("zap", "from"))
    bank.reexamine([(1, 0.25)])
    bank.add(2, kept(again, "9 zap 2 dax 1?"), score=0.5)
    assert bank.lessons == [BankLesson(1, rule("zap", "from"), "3 zap 7?", 1.75, 3, False, 4)]
    assert bank.counts == {"merged": 1, "examined": 1, "contradictions": 0}
    bank.add(3, kept("- If I see zap, then zap is -from.", "3 zap 7?"))
    assert len(bank) == 2, "a sign makes another rule"


def test_a_lesson_teaches_from_the_threshold_on_and_is_examined_below_it() -> None:
    bank = bank_of(("zap", "from"), teach_from=0.5, retire_below=0.0)
    taught, examined = [], []
    for delta in (-0.5, -0.25, -0.25, -0.01):
        bank.reexamine([(1, delta)])
        taught.append(ids(bank.retrieve("2 zap 4?")))
        examined.append(ids(bank.matching("2 zap 4?")))
    assert taught == [[1], [], [], []]
    assert examined == [[1], [1], [1], []], "retired below 0, not at 0"
    assert (bank.lessons[0].retired, bank.lessons[0].votes, bank.counts["retired"]) == (True, 5, 1)
    bank.add(8, kept(rule("zap", "from"), "1 zap 1?"))
    assert ids(bank.retrieve("2 zap 4?")) == [1], "the same rule kept again brings it back"


def test_examinations_are_clipped_and_what_cannot_be_scored_is_skipped() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"))
    bank.reexamine([(1, 40.0), (2, None), (2, float("nan")), (1, 0.5), (2, -3.0)])
    assert scores(bank) == {1: 2.5, 2: 0.0}
    assert [lesson.votes for lesson in bank.lessons] == [3, 2]


def test_of_rules_with_the_same_condition_only_the_better_one_is_returned() -> None:
    bank = bank_of(("zap", "from"), ("zap", "add"), ("dax", "add"))
    assert bank.counts["contradictions"] == 1
    assert set(ids(bank.retrieve("1 zap 2 dax 3?"))) == {1, 3}, "of equal scores the older one"
    bank.reexamine([(1, -0.25)])
    assert set(ids(bank.retrieve("1 zap 2 dax 3?"))) == {2, 3}
    bank.reexamine([(2, -0.75), (1, -0.5)])
    assert (scores(bank)[1], scores(bank)[2]) == (0.25, 0.25)
    assert set(ids(bank.matching("1 zap 2 dax 3?"))) == {1, 3}


def test_every_mixed_group_examines_what_matches_it_in_one_call() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"), ("lor", "take"))
    groups = [
        group("1 zap 2 dax 3?", R, W),
        group("4 dax 4?", W, W),
        group("1 wix 2?", R, W),
        group("9 lor 9 dax 2?", W, R),
    ]
    calls: list[list[tuple[str, str]]] = []

    def score_shift(items: Sequence[tuple[Group, str]]) -> list[float | None]:
        calls.append([(str(g.prompt[1]["content"]), notes) for g, notes in items])  # type: ignore[index]
        return [{"zap": 0.5, "dax": -0.25, "lor": None}[notes.split("see ")[1][:3]] for _, notes in items]

    assert examine(bank, groups, score_shift) == 4
    (call,) = calls
    assert sorted(call) == sorted(
        (question, f"## Heuristics\n{rule(op, reading)}")
        for question, op, reading in (
            ("1 zap 2 dax 3?", "zap", "from"),
            ("1 zap 2 dax 3?", "dax", "add"),
            ("9 lor 9 dax 2?", "dax", "add"),
            ("9 lor 9 dax 2?", "lor", "take"),
        )
    )
    assert scores(bank) == {1: 1.5, 2: 0.5, 3: 1.0}
    assert examine(bank, groups[1:3], score_shift) == 0 and len(calls) == 1, "nothing to score, no call"


def test_at_most_limit_lessons_are_examined_and_returned() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"), ("lor", "take"), limit=2)
    question = "1 zap 2 dax 3 lor 4?"
    assert len(bank.retrieve(question)) == 2 and len(bank.retrieve(question, limit=3)) == 3
    assert examine(bank, [group(question, R, W)], lambda items: [0.0] * len(items)) == 2


def test_the_cap_drops_the_lowest_score_then_the_oldest() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"), ("lor", "take"), size=3)
    bank.reexamine([(2, 0.5), (1, 0.25)])
    bank.add(4, kept(rule("wix", "add"), "1 wix 2?"))
    assert ids(bank.lessons) == [1, 2, 4] and bank.counts["evicted"] == 1, "3 and 4 have 1.0, 3 is older"
    bank.add(5, kept(rule("bli", "add"), "1 bli 2?"), score=0.9)
    assert ids(bank.lessons) == [1, 2, 4], "a new lesson of the lowest score leaves itself"
    bank.add(6, kept(rule("lor", "take"), "1 lor 2?"))
    assert ids(bank.lessons) == [1, 2, 6], "a dropped rule can be learned anew"


def test_a_question_is_settled_when_known_rules_name_all_its_words() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"))
    assert bank.settled("1 zap 2 dax 3?") and bank.settled("1 zap 2?")
    assert not bank.settled("1 zap 2 lor 3?"), "lor has no rule"
    assert not bank.settled("12?"), "there is no word to know"
    bank.reexamine([(2, -0.25)])
    assert bank.retrieve("1 dax 3?") and not bank.settled("1 zap 2 dax 3?"), "a rule below 1 is written again"
    half = bank_of(("zap", "from"), settled=0.5)
    assert half.settled("1 zap 2 lor 3?") and not half.settled("1 zap 2 lor 3 bli 4?")
    assert not bank_of(("zap", "from"), settled=None).settled("1 zap 2?")


def test_words_of_an_instruction_need_no_rule() -> None:
    bank, task = LessonBank(BankOptions()), "Write one step per line, then Answer."
    for id_, op in enumerate(("zap", "dax", "lor"), start=1):
        assert not bank.settled(f"What is 1 zap 2? {task}"), "fewer than three questions do not show an instruction"
        bank.add(id_, kept(f"- If a line has {op}, then {op} adds.", f"What is 3 {op} 7? {task}"))
    assert bank.settled(f"What is 1 zap 2 dax 3? {task}") and not bank.settled(f"What is 1 zap 2 wix 3? {task}")
    assert not bank.settled(f"What is 1 zap 2? {task} Hurry."), "not a word of every question"


def test_the_state_restores_an_equal_bank_that_continues_alike() -> None:
    bank = bank_of(("zap", "from"), ("zap", "add"), ("dax", "add"), size=4)
    bank.reexamine([(1, 0.1), (1, 0.2), (2, -1.0), (2, -0.7), (3, 0.3)])
    state = json.loads(json.dumps({"step": 4} | bank.state_dict()))
    other = LessonBank(bank.options)
    other.load_state_dict(state)
    assert (other.lessons, other.counts) == (bank.lessons, bank.counts)
    assert bank.lessons[0].score == 1.0 + 0.1 + 0.2, "exact, not rounded"
    for each in (bank, other):
        each.add(4, kept("- If I see DAX, then dax is add", "2 dax 2?"))
        each.add(5, kept(rule("lor", "take"), "2 lor 2?"))
        each.add(6, kept(rule("wix", "take"), "2 wix 2?"))
        each.reexamine([(6, 0.7)])
    assert other.state_dict() == bank.state_dict() and ids(bank.lessons) == [1, 3, 5, 6]
    other.load_state_dict({"step": 1})
    assert len(other) == 0 and not other.counts, "a checkpoint of a run without a bank"


def test_lessons_of_another_run_get_ids_of_their_own() -> None:
    source = bank_of(("zap", "from"), ("dax", "add"))
    source.reexamine([(2, 0.5)])
    bank = LessonBank()
    bank.adopt(lessons_of_state(source.state_dict()) or [])
    bank.add(1, kept(rule("lor", "take"), "1 lor 2?"))
    assert scores(bank) == {-1: 1.0, -2: 1.5, 1: 1.0}
    bank.add(2, kept(rule("zap", "from"), "1 zap 2?"))
    assert scores(bank) == {-1: 2.0, -2: 1.5, 1: 1.0}
    assert lessons_of_state({"step": 3}) is None


def test_an_id_of_another_folders_store_is_given_up() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"))
    bank.adopt([BankLesson(5, rule("gud", "take"), "1 gud 2?", 1.0, 1, False, 9)])
    bank.add(2, kept(rule("lor", "take"), "1 lor 2?"))
    named = {lesson.id: lesson.heuristic.split()[4] for lesson in bank.lessons}
    assert list(named.items()) == [(1, "zap,"), (-2, "dax,"), (-1, "gud,"), (2, "lor,")], "the order of age stays"
    bank.add(3, kept(rule("dax", "add"), "1 dax 2?"))
    assert scores(bank) == {1: 1.0, -2: 2.0, -1: 1.0, 2: 1.0}


def test_the_metrics_count_lessons_events_and_taught_groups() -> None:
    bank = bank_of(("zap", "from"), ("zap", "add"), ("dax", "add"))
    bank.reexamine([(2, -1.0), (2, -1.0), (3, -0.75)])
    groups = [group("1 zap 2?", R, W), group("1 dax 2?", W, W), group("1 lor 2?", W, W), group("2 zap 5?", R, R)]
    assert bank.metrics(groups) == {
        "mel/bank_size": 3,
        "mel/bank_active": 2,
        "mel/bank_retired": 1,
        "mel/bank_merged": 0,
        "mel/bank_contradictions": 1,
        "mel/bank_examined": 3,
        "mel/bank_evicted": 0,
        "mel/bank_unmatched_groups": 2,
        "mel/bank_taught_share": 0.5,
    }
    assert "mel/bank_taught_share" not in bank.metrics([])


def test_notes_list_every_rule_once_under_the_heading() -> None:
    first = BankLesson(1, "* If a.\n\n2) When b.", "q", 1.0, 1, False, 0)
    second = replace(first, id=2, heuristic="Unless c, d.")
    assert notes_text([first, second]) == "## Heuristics\n- If a.\n- When b.\n- Unless c, d."


def test_an_empty_rule_is_no_lesson() -> None:
    bank = LessonBank()
    bank.add(1, kept("- \n*", "3 zap 7?"))
    assert len(bank) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "bank_size=0 must be at least 1. Raise bank_size."),
        ({"limit": -1}, "bank_limit=-1 must be at least 1"),
        ({"teach_from": float("nan")}, "bank_teach_from=nan is no finite number"),
        ({"retire_below": 0.75}, "bank_retire_below=0.75 is above bank_teach_from=0.5: .* Lower bank_retire_below"),
        ({"settled": 0.0}, r"bank_settled=0.0 must be a share in \(0, 1\], or null"),
        ({"settled_nats": 0.0}, "bank_settled_nats=0.0 must be above 0, or null"),
        ({"retrieval": "lexcal"}, "bank_retrieval='lexcal' is unknown. Did you mean 'lexical'"),
        ({"retrieval": "no_such:thing"}, "bank_retrieval = 'no_such:thing': importing 'no_such' failed"),
        ({"retrieval": "experiences:QUESTION"}, "bank_retrieval='experiences:QUESTION' is a str. Name a function"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bank_of(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank_size": 0}, "bank_size=0 must be at least 1"),
        ({"bank_settled": 1.5}, r"bank_settled=1.5 must be a share in \(0, 1\]"),
        ({"bank_settled_nats": -1.0}, "bank_settled_nats=-1.0 must be above 0, or null"),
        ({"algorithm": "grpo", "lessons_from": "run"}, "lessons_from='run' with algorithm='grpo', which uses no less"),
    ],
)
def test_a_config_refuses_them_too(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MELConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_the_bank_of_a_config_has_its_options(tmp_path: Path) -> None:
    options = {"size": 3, "retrieval": "a.b", "limit": 2, "teach_from": 0.75, "retire_below": -1.0, "settled": 0.5}
    named = {f"bank_{name}": value for name, value in options.items()}
    assert MELConfig(str(tmp_path), use_cpu=True, bf16=False, **named).bank_options == BankOptions(**options)
    assert MELConfig(str(tmp_path), use_cpu=True, bf16=False).bank_options == BankOptions()


def newest_first(question: str, lessons: Sequence[BankLesson]) -> list[BankLesson]:
    """A user's retrieval: everything, the newest first, each twice."""
    return [lesson for lesson in reversed(lessons) for _ in range(2)]


def foreign(question: str, lessons: Sequence[BankLesson]) -> list[BankLesson]:
    """A user's retrieval that makes lessons up."""
    return [replace(lessons[0], id=99)]


def nothing(question: str, lessons: Sequence[BankLesson]) -> None:
    """A user's retrieval without a return."""


def test_a_users_retrieval_gets_the_active_lessons_and_orders_them() -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"), ("lor", "take"), retrieval=f"{__name__}:newest_first")
    bank.reexamine([(2, -1.0), (2, -1.0)])
    assert ids(bank.retrieve("anything")) == [3, 1]
    bank.add(4, kept(rule("lor", "from"), "1 lor 2?"), score=0.75)
    assert ids(bank.retrieve("anything")) == [3, 1], "the rival of the higher score, wherever it is ranked"


@pytest.mark.parametrize("name", ["foreign", "nothing"])
def test_a_users_retrieval_must_return_lessons_of_the_bank(name: str) -> None:
    bank = bank_of(("zap", "from"), retrieval=f"{__name__}:{name}")
    with pytest.raises(ConfigError, match=f":{name}' returned .* Return a list of some of the lessons it was given"):
        bank.retrieve("1 zap 2?")
