"""Lesson bank: kept heuristics with running scores, found again for later questions.

    add          a kept lesson enters with its score; the same rule again adds to score and votes
    retrieve     the lessons that teach a question: they match it and have the score to teach
    examine      every mixed group adds to the score of each lesson that matches its question
    state_dict   all of it as JSON, for an exact resume

All methods are deterministic functions of their arguments, so ranks that call them with the same data stay equal.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.lessons.bank.retrieval import get_retrieval, words
from mel_lite.models.chat import question_text
from mel_lite.types import BankLesson, BankOptions, Experience, Group

SETTLED_SCORE = 1.0
"""Score from which a lesson counts as known: that of one lesson that was kept and never contradicted."""
LEAST_QUESTIONS = 3
"""Questions whose shared words are those of an instruction."""
_STATE = "lesson_bank"
_BULLET = re.compile(r"^\s*(?:[-*+\u2022]|\d+[.)])\s+")
_CONDITION = re.compile(r"\b(?:if|when|whenever|once|while|before|after|unless)\b(.+?)(?:,|\bthen\b)", re.I)


class LessonBank:
    """The lessons of one run, at most `size`: the one of lowest score leaves first, of equal scores the oldest."""

    def __init__(self, options: BankOptions | None = None) -> None:
        """Make an empty bank. Raises: ConfigError for a retrieval that does not exist."""
        self.options = options or BankOptions()
        self.counts: Counter[str] = Counter()
        """Events of the run: merged, contradictions, examined, retired, evicted."""
        self._lessons: dict[int, BankLesson] = {}
        self._by_rule: dict[str, int] = {}
        self._retrieval = get_retrieval(self.options.retrieval)

    def __len__(self) -> int:
        return len(self._lessons)

    @property
    def lessons(self) -> list[BankLesson]:
        """All lessons, oldest first, retired ones included."""
        return list(self._lessons.values())

    # ---- for a question ----

    def retrieve(self, question: str, *, limit: int | None = None) -> list[BankLesson]:
        """Return the lessons that teach this question, best first: matches of score `teach_from` and above.

        `limit`: maximum number; None = the option.
        """
        teaching = [lesson for lesson in self.matching(question) if lesson.score >= self.options.teach_from]
        return teaching[: self.options.limit if limit is None else limit]

    def matching(self, question: str) -> list[BankLesson]:
        """Return the lessons that are not retired and match the question, best first, whatever their scores.

        Of lessons with the same condition (`If I see zap, ...`), only the one of the highest score is returned.
        """
        active = [lesson for lesson in self._lessons.values() if not lesson.retired]
        if not active:
            return []
        found = self._checked(self._retrieval(question, active))
        best: dict[tuple[str, ...], BankLesson] = {}
        for lesson in found:
            condition = _conditions(lesson.heuristic)
            if condition and (condition not in best or lesson.score > best[condition].score):
                best[condition] = lesson
        return [each for each in found if best.get(_conditions(each.heuristic), each) is each]

    def settled(self, question: str) -> bool:
        """Return True when no lesson need be written for this question.

        True when matching lessons of score `SETTLED_SCORE` and above mention at least the share `settled` of the
        question's distinct words (`retrieval.words`). Words of an instruction, which are in the question of every
        lesson and in no rule, do not count. Always False when that option is None.
        """
        share = self.options.settled
        asked = set(words(question)) - self._instruction() if share is not None else set()
        if share is None or not asked:
            return False
        known = [lesson.heuristic for lesson in self.matching(question) if lesson.score >= SETTLED_SCORE]
        covered = asked & set(words("\n".join(known)))
        return len(covered) >= share * len(asked)

    def _instruction(self) -> set[str]:
        """Return the words that all lessons' questions have and no rule mentions; none for fewer than three lessons."""
        questions = [set(words(lesson.question_text)) for lesson in self._lessons.values()]
        if len(questions) < LEAST_QUESTIONS:
            return set()
        return set.intersection(*questions).difference(*(words(each.heuristic) for each in self._lessons.values()))

    def _checked(self, found: Any) -> list[BankLesson]:
        """Return what the retrieval found, without repetitions. Raises: ConfigError for anything but active lessons."""
        is_list = isinstance(found, Sequence) and all(isinstance(each, BankLesson) for each in found)
        if not is_list or any(self._lessons.get(each.id) != each or each.retired for each in found):
            raise ConfigError(
                f"bank_retrieval={self.options.retrieval!r} returned {str(found)[:80]!r}. Return a list of some of the "
                "lessons it was given, best first."
            )
        return list({each.id: each for each in found}.values())

    # ---- changes ----

    def add(self, row_id: int, experience: Experience, score: float = 1.0) -> None:
        """Add a kept experience with its score, clipped to [-1, 1]. A rule the bank has gets score and one vote."""
        parsed = (experience.leak.redacted if experience.leak else None) or experience.parsed
        assert parsed is not None, "a kept meta-experience was parsed"
        question = question_text(experience.analysis.pair.group.prompt)
        self.extend([BankLesson(row_id, parsed.heuristic, question, _clip(score), 1, False, experience.step + 1)])

    def extend(self, lessons: Iterable[BankLesson]) -> None:
        """Add lessons of new ids with their scores and votes, in order. A rule the bank has gets their sums."""
        for lesson in lessons:
            self._insert(lesson)
        self._update()

    def adopt(self, lessons: Iterable[BankLesson]) -> None:
        """Add the lessons of another run. Their ids become -1, -2, ... in order, and their step 0."""
        self.extend(replace(lesson, id=-number, step=0) for number, lesson in enumerate(lessons, start=1))

    def reexamine(self, examined: Iterable[tuple[int, float | None]]) -> None:
        """Add clip(delta, -1, 1) to the score of each lesson id, and one vote. A delta of None or NaN is skipped.

        delta = mean over right y of sum_t [log p(y_t | M, x) - log p(y_t | x)] - the same over wrong y, in nats.
        """
        for id_, delta in examined:
            if delta is None or math.isnan(delta):
                continue
            lesson = self._lessons[id_]
            self._lessons[id_] = replace(lesson, score=lesson.score + _clip(delta), votes=lesson.votes + 1)
            self.counts["examined"] += 1
        self._update()

    def _insert(self, new: BankLesson) -> None:
        rule, condition = _normalized(new.heuristic), _conditions(new.heuristic)
        if not rule:
            return
        known = self._lessons.get(self._by_rule.get(rule, 0))
        if known is not None:
            self._lessons[known.id] = replace(known, score=known.score + new.score, votes=known.votes + new.votes)
            self.counts["merged"] += 1
            return
        rivals = (each for each in self._lessons.values() if not each.retired)
        self.counts["contradictions"] += bool(condition) and any(_conditions(e.heuristic) == condition for e in rivals)
        if new.id in self._lessons:
            self._renumber(new.id)
        self._lessons[new.id] = new
        self._by_rule[rule] = new.id

    def _renumber(self, id_: int) -> None:
        """Give a lesson a negative id: the run was resumed in another folder, whose store counts from 1 again."""
        moved = replace(self._lessons[id_], id=min(0, *self._lessons) - 1)
        self._lessons = {each.id: each for each in (moved if old.id == id_ else old for old in self.lessons)}
        self._by_rule[_normalized(moved.heuristic)] = moved.id

    def _update(self) -> None:
        """Retire by score, and drop the lowest scores beyond the size."""
        for id_, lesson in self._lessons.items():
            retired = lesson.score < self.options.retire_below
            if retired != lesson.retired:
                self._lessons[id_] = replace(lesson, retired=retired)
                self.counts["retired"] += retired
        while len(self._lessons) > self.options.size:
            lowest = min(self._lessons.values(), key=lambda lesson: lesson.score)  # the first of equals: the oldest
            del self._lessons[lowest.id], self._by_rule[_normalized(lowest.heuristic)]
            self.counts["evicted"] += 1

    # ---- state and metrics ----

    def state_dict(self) -> dict[str, Any]:
        return {
            _STATE: {"lessons": [asdict(each) for each in self.lessons], "counts": dict(sorted(self.counts.items()))}
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a bank; a checkpoint of a run without one gives an empty bank."""
        saved = state.get(_STATE) or {"lessons": [], "counts": {}}
        lessons = [BankLesson(**values) for values in saved["lessons"]]
        self._lessons = {lesson.id: lesson for lesson in lessons}
        self._by_rule = {_normalized(lesson.heuristic): lesson.id for lesson in lessons}
        self.counts = Counter(saved["counts"])

    def metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return `mel/bank_*`: the bank's size now, its events so far, and how many of the groups it teaches."""
        retired = sum(lesson.retired for lesson in self._lessons.values())
        taught = sum(bool(self.retrieve(question_text(group.prompt))) for group in groups)
        sizes = {"size": len(self), "active": len(self) - retired, "retired": retired}
        events = {name: self.counts[name] for name in ("merged", "contradictions", "examined", "evicted")}
        share = {"taught_share": taught / len(groups)} if groups else {}
        named = sizes | events | {"unmatched_groups": len(groups) - taught} | share
        return {f"mel/bank_{name}": float(value) for name, value in named.items()}


def lessons_of_state(state: Mapping[str, Any]) -> list[BankLesson] | None:
    """Return the lessons in the state of a checkpoint; None for a run without a bank."""
    return [BankLesson(**values) for values in state[_STATE]["lessons"]] if _STATE in state else None


def notes_text(lessons: Sequence[BankLesson]) -> str:
    """Return lessons as notes for a prompt: the heading of H and one `- ` line per rule."""
    return "\n".join(["## Heuristics", *(f"- {line}" for lesson in lessons for line in _rules(lesson.heuristic))])


Shifts = Callable[[Sequence[tuple[Group, str]]], Sequence[float | None]]
"""(group, notes) pairs -> each one's delta of `LessonBank.reexamine`; None where it cannot be scored."""


def examine(bank: LessonBank, groups: Sequence[Group], score_shift: Shifts) -> int:
    """Let every mixed group examine each lesson that matches its question. Returns: the number of examinations.

    One call of `score_shift` scores all of them, each lesson alone in the prompt, at most `limit` lessons per group.
    Groups without a match are skipped.
    """
    items = [
        (lesson, group)
        for group in groups
        if group.is_mixed
        for lesson in bank.matching(question_text(group.prompt))[: bank.options.limit]
    ]
    if not items:
        return 0
    deltas = score_shift([(group, notes_text([lesson])) for lesson, group in items])
    bank.reexamine([(lesson.id, delta) for (lesson, _), delta in zip(items, deltas, strict=True)])
    return len(items)


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, float(value)))


def _rules(heuristic: str) -> list[str]:
    """Return the lines of H without bullets."""
    lines = (_BULLET.sub("", line).strip() for line in heuristic.split("\n"))
    return [line for line in lines if line]


def _normalized(text: str) -> str:
    """Return text by which near-duplicates are equal: letters, digits and symbols, without case, markup and stops."""
    folded = unicodedata.normalize("NFKC", "\n".join(_rules(text))).casefold()
    return " ".join(re.sub(r"[.,;:!?*_`'\"()\u2018\u2019\u201c\u201d]+", " ", folded).split())


def _conditions(heuristic: str) -> tuple[str, ...]:
    """Return the conditions of all rules of H, normalized and sorted; empty when a rule has none."""
    found = [_CONDITION.search(rule) for rule in _rules(heuristic)]
    return tuple(sorted(_normalized(match[1]) for match in found if match)) if all(found) else ()


__all__ = ["BankLesson", "LessonBank", "examine", "lessons_of_state", "notes_text"]
