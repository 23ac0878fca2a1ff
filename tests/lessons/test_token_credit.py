"""Token credit as it is stored: its numbers against full logits, its texts, its bounds, and a resumed run."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from experiences import experience
from mel_lite.errors import ConfigError, StoreError
from mel_lite.lessons.internalise import token_credit
from mel_lite.lessons.internalise.token_credit import token_texts
from mel_lite.lessons.store import Effect, ExperienceStore, TokenCredit
from mel_lite.types import Verdict
from scripted import ScriptedEngine
from teaching import Caught, catch, note_of, shuffled_note, varied
from tiny_models import save_tiny
from trainers import assert_learned, build

OWN = {"context": "own", "rows": "all"}


def stored(caught: Caught) -> list[TokenCredit]:
    store = caught.trainer.store
    return [each for rollout in sorted(r.index for _, r in caught.rows) for each in store.credit(1, [rollout])]


def shift(caught: Caught, row: int, *, shuffled: bool) -> torch.Tensor:
    """log pi with the notes minus log pi without them (with another question's if `shuffled`), from full logits."""
    note = note_of(caught, row, context="own", per_prompt="all")
    other = shuffled_note(caught, row, context="own", per_prompt="all") if shuffled else None
    with torch.no_grad():
        return caught.picked(row, note) - caught.picked(row, other)


def test_stored_credit_is_that_of_the_step(tmp_path: Path) -> None:
    caught = catch(
        tmp_path, analysis=varied, internalisation="credit", internalisation_options=OWN, token_credit_rollouts=99
    )
    tokenizer = caught.trainer.lesson_context.tokenizer
    found = {each.rollout_index: each for each in stored(caught)}
    rows = {rollout.index: (row, rollout) for row, (_, rollout) in enumerate(caught.rows)}
    assert len(found) == caught.logged["mel/credited_rows"][-1] > 2
    for index, credit in found.items():
        row, rollout = rows[index]
        assert (credit.way, credit.verdict, credit.effect) == ("credit", rollout.verdict, Effect.FACTOR)
        assert credit.all_tokens == len(credit.tokens) == len(rollout.completion_ids)
        text = "".join(credit.tokens).removesuffix(tokenizer.eos_token)
        assert text == rollout.text and len(credit.tokens) > 3
        assert credit.shift_nats == pytest.approx(shift(caught, row, shuffled=True).tolist(), rel=1e-3, abs=1e-4)
        factors = caught.after["advantages"][row] / caught.before["advantages"][row]
        if caught.before["advantages"][row] != 0:
            assert credit.effects == pytest.approx(factors[: len(credit.effects)].tolist(), rel=1e-3)
    assert max(abs(value) for each in found.values() for value in each.shift_nats) > 0.01


@pytest.mark.parametrize("form", ["kl", "sampled"])
def test_distilled_tokens_are_stored(tmp_path: Path, form: str) -> None:
    options = {"context": "own", "form": form, "per_prompt": "all"}
    caught = catch(tmp_path, analysis=varied, internalisation="distill", internalisation_options=options)
    found = stored(caught)
    assert found and {each.way for each in found} == {"distill"}
    rows = {rollout.index: row for row, (_, rollout) in enumerate(caught.rows)}
    for credit in found:
        row, count = rows[credit.rollout_index], len(credit.tokens)
        assert credit.shift_nats == pytest.approx(shift(caught, row, shuffled=False).tolist(), rel=1e-3, abs=1e-4)
        if form == "kl":
            assert credit.effect is Effect.TAUGHT
            assert credit.effects == tuple(caught.after["teacher_mask"][row, :count].float().tolist())
        else:
            assert credit.effect is Effect.ADDED
            added = caught.after["advantages"][row, :count] - caught.before["advantages"][row]
            assert credit.effects == pytest.approx(added.tolist(), rel=1e-2, abs=1e-4)


def test_the_rollouts_of_kept_lessons_come_first_on_any_number_of_ranks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"internalisation": "credit", "internalisation_options": OWN}
    caught = catch(tmp_path, analysis=varied, token_credit_rollouts=2, **options)
    assert caught.drawn is not None
    kept = [each.analysis.pair for _, each in caught.drawn.kept]
    pairs = list(dict.fromkeys(r.index for pair in kept for r in (pair.wrong, pair.right)))
    assert len(pairs) > 2
    assert {each.rollout_index for each in stored(caught)} == set(pairs[:2])

    class Way:
        """Tells what one rank of two would."""

        reads_tokens = True

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def token_readings(self) -> list[Any]:
            return caught.trainer.internalisation.token_readings()[self.rank :: 2]

    class Rows:
        rows = tuple(caught.rows)

    sent: list[Any] = []
    for rank in (0, 1):
        given: Any = (Way(rank), caught.drawn, Rows())
        token_credit(*given, step=0, most=2, gather=lambda local: sent.extend(local) or [])  # type: ignore[func-returns-value]
    last: Any = (Way(0), caught.drawn, Rows())
    assert token_credit(*last, step=0, most=2, gather=lambda _: sent) == sorted(
        stored(caught), key=lambda each: pairs.index(each.rollout_index)
    )
    assert token_credit(*last, step=0, most=0, gather=lambda _: sent) == []


@pytest.mark.slow
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")

    def trainer(folder: str, steps: int) -> Any:
        engine = ScriptedEngine(AutoTokenizer.from_pretrained(tmp_path / "base"), analysis=varied)
        return build(
            tmp_path, engine=engine, output_dir=tmp_path / folder, max_steps=steps, save_strategy="steps",
            save_steps=2, internalisation={"credit": 1.0, "distill": 1.0},
            internalisation_options={"distill": {"context": "own"}},
        )  # fmt: skip

    whole = trainer("whole", 5)
    whole.train()
    assert_learned(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")  # its store has the rows of all five steps
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-5", ignore_errors=True)
    resumed = trainer("resumed", 5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.store.digest() == whole.store.digest()
    assert rows_of(whole.store) == rows_of(resumed.store)
    steps = {step for step, *_ in rows_of(whole.store)}
    assert {0, 1, 2} <= steps and {way for *_, way in rows_of(whole.store)} == {"credit", "distill"}
    shorter = trainer("resumed", 2)
    shorter.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    left = [row for row in rows_of(whole.store) if row[0] < 2]
    assert rows_of(shorter.store) == left, "no row of a later step is left"


def rows_of(store: ExperienceStore) -> list[tuple[int, int, str]]:
    with sqlite3.connect(store.path) as db:
        rows = "SELECT step, rollout_index, way FROM token_credit ORDER BY step, rollout_index, way"
        return [tuple(row) for row in db.execute(rows)]


def test_the_papers_way_has_no_teacher_and_no_credit(tmp_path: Path) -> None:
    caught = catch(tmp_path, analysis=varied)
    assert caught.drawn is not None and len(caught.drawn.kept) > 0
    assert rows_of(caught.trainer.store) == []


def test_an_option_that_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_credit_rollouts=-1 must be at least 0"):
        build(tmp_path, token_credit_rollouts=-1)


TEXTS = (
    "So 3 + 8 = 11.\n  Then \u00fcber \U0001f600\U0001f600 \u4f60\u597d!",
    "",
    " a",
    "\U0001f9d1\u200d\U0001f680 done",
)


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_tokens_are_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "base"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(token_texts([*ids, tokenizer.eos_token_id], tokenizer))
    assert len(pieces) == len(ids) + 1 and pieces[-1] == tokenizer.eos_token
    assert "".join(pieces[:-1]) == tokenizer.decode(ids)
    assert sum(len(piece) > 1 for piece in pieces) >= bool(text)


def credit(step: int, rollout: int = 0, **changes: Any) -> TokenCredit:
    values: dict[str, Any] = {
        "step": step, "rollout_index": rollout, "way": "credit", "verdict": Verdict.WRONG, "effect": Effect.FACTOR,
        "tokens": ("a\x00", "b"), "shift_nats": (0.5, -1.25), "effects": (1.0, 0.1), "all_tokens": 7,
    }  # fmt: skip
    return TokenCredit(**values | changes)


def test_a_store_keeps_credit_and_takes_it_back_with_its_step(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        store.add([experience(0), experience(1)])
        empty = store.digest()
        store.add_credit([credit(1), credit(1, 3), credit(1, 3, way="a")])
        first = store.digest()
        store.add_credit([credit(2), credit(3)])
        assert store.credit(1, [3, 0, 9]) == [
            credit(1, 3, way="a", tokens=("a\ufffd", "b")), credit(1, 3, tokens=("a\ufffd", "b")),
            credit(1, tokens=("a\ufffd", "b")),
        ]  # fmt: skip
        store.add_credit([credit(2, all_tokens=8)])
        assert [each.all_tokens for each in store.credit(2, [0])] == [8], "a repeated step replaces its rows"
        assert store.digest() != first != empty
        store.truncate_after(2)
        assert len(store.credit(3, [0])) == 1
        assert store.truncate_after(2, steps=1) == 0
        assert store.digest() == first and store.credit(2, [0]) == []


def test_a_store_of_schema_3_has_no_credit_until_it_is_written_to(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        store.add([experience(0)])
        digest = store.digest()
    with sqlite3.connect(tmp_path / "s.sqlite") as older:
        older.execute("DROP TABLE token_credit")
        for column in ("staleness_steps", "staleness_versions"):
            older.execute(f"ALTER TABLE experiences DROP COLUMN {column}")
        older.execute("PRAGMA user_version = 3")
    with ExperienceStore(tmp_path / "s.sqlite", read_only=True) as reader:
        assert reader.credit(1, [0]) == [] and reader.digest() != digest  # it lacks the columns
        assert reader.get(1).staleness_steps == 0
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        store.add_credit([credit(1)])
        assert len(store.credit(1, [0])) == 1


@pytest.mark.parametrize(
    "change", ["shift_nats = '[1.0]'", "tokens = '['", "verdict = 'good'", "effects = '[\"x\", 1]'"]
)
def test_damaged_credit_is_an_error_with_one_line(tmp_path: Path, change: str) -> None:
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        store.add_credit([credit(1)])
    with sqlite3.connect(tmp_path / "s.sqlite") as db:
        db.execute(f"UPDATE token_credit SET {change}")
    with ExperienceStore(tmp_path / "s.sqlite", read_only=True) as store, pytest.raises(StoreError) as caught:
        store.credit(1, [0])
    assert "a row is damaged" in str(caught.value) and len(str(caught.value).splitlines()) == 1
