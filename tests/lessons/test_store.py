"""The experience store: what goes in comes out, in any text. Its files: test_store_files.py."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import fields, replace
from pathlib import Path

import pytest

from experiences import CHAT, PARSED, experience
from mel_lite.errors import StoreError
from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.types import (
    LeakReport,
    Replay,
    Span,
    Status,
    Verdict,
)


@pytest.fixture
def store(tmp_path: Path):
    with ExperienceStore(tmp_path / "experiences.sqlite") as opened:
        yield opened


def test_columns_are_the_fields_of_a_row(store: ExperienceStore) -> None:
    columns = [name for _, name, *_ in sqlite3.connect(store.path).execute("PRAGMA table_info(experiences)")]
    assert columns == [field.name for field in fields(ExperienceRow)]


def test_a_row_holds_the_whole_experience(store: ExperienceStore) -> None:
    redacted = replace(PARSED, heuristic="If asked to count, then [...].")
    full = replace(
        experience(step=7),
        quote=Span(6, 8),
        shift_nats=-0.75,
        leak=LeakReport(("answer: '10' in heuristic",), redacted),
        replay=Replay(
            (Verdict.RIGHT, Verdict.WRONG), ("10", "12"), (Verdict.WRONG, Verdict.ABSTAIN, Verdict.WRONG, Verdict.RIGHT)
        ),
    )
    full = replace(full, analysis=replace(full.analysis, templates_version="1+fork"))
    assert store.add([full]) == [1]
    row = store.get(1)
    assert row.quoted_step == "11"
    expected = {
        "id": 1,
        "step": 8,
        "prompt_hash": "00c0ffee00c0ffee",
        "prompt": CHAT,
        "answer": "10",
        "right_text": "so the answer is \\boxed{10}",
        "wrong_text": "hence 11",
        "right_index": 4,
        "wrong_index": 6,
        "pair_index": 2,
        "common_prefix_tokens": 1,
        "analysis": "raw",
        "analysis_tokens": 3,
        "bifurcation": "Counted 1 as a prime.",
        "critique": "The definition was not checked.",
        "heuristic": "If asked to count, then [...].",
        "status": Status.KEPT,
        "reason": "",
        "leak_reasons": ("answer: '10' in heuristic",),
        "redacted": True,
        "replay_verdicts": (Verdict.RIGHT, Verdict.WRONG),
        "replay_texts": ("10", "12"),
        "control_verdicts": (Verdict.WRONG, Verdict.ABSTAIN, Verdict.WRONG, Verdict.RIGHT),
        "uplift": 0.25,
        "nll_written": 1.25,
        "nll_before": None,
        "nll_after": None,
        "trained_tokens": 0,
        "written_at": row.written_at,
        "quote_start": 6,
        "quote_end": 8,
        "templates_version": "1+fork",
        "shift_nats": -0.75,
        "staleness_steps": 0,
        "staleness_versions": 0,
    }
    assert {field.name: getattr(row, field.name) for field in fields(ExperienceRow)} == expected
    assert row.written_at.endswith("+00:00")


def test_a_dropped_experience_has_only_what_was_reached(store: ExperienceStore) -> None:
    dropped = experience(status=Status.UNPARSED, prompt="plain text")
    store.add([replace(dropped, analysis=replace(dropped.analysis, nll_nats=float("nan")))])
    row = store.get(1)
    assert (row.prompt, row.status, row.reason) == ("plain text", Status.UNPARSED, "dropped: unparsed")
    assert (row.bifurcation, row.critique, row.heuristic, row.uplift, row.nll_written) == (None,) * 5
    assert (row.leak_reasons, row.replay_verdicts, row.redacted) == ((), (), False)
    assert (row.quote_start, row.quoted_step, row.templates_version, row.shift_nats) == (None,) * 4


def test_ids_count_from_one_and_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "run" / "experiences.sqlite"
    with ExperienceStore(path) as store:
        assert store.last_id() == 0
        assert store.add([experience(), experience()]) == [1, 2]
    with ExperienceStore(path) as store:
        assert store.add([experience(2)]) == [3]
        assert store.add([]) == []
        assert (store.last_id(), [row.step for row in store.list()]) == (3, [2, 2, 3])


def test_training_figures_are_noted_all_or_none(store: ExperienceStore) -> None:
    ids = store.add([experience(), experience(), experience()])
    store.set_trained(ids[1:], [30, 40])
    store.set_nll(ids[1:], before=[2.5, 1.5])
    store.set_nll(ids[1:], after=[2.0, float("inf")])
    figures = [(row.trained_tokens, row.nll_before, row.nll_after) for row in store.list()]
    assert figures == [(0, None, None), (30, 2.5, 2.0), (40, 1.5, None)]
    with pytest.raises(StoreError, match=r"no experience 9; its ids go from 1 to 3"):
        store.set_trained([1, 9], [5, 5])
    with pytest.raises(StoreError, match=r"no experience 9"):
        store.set_nll([1, 9], before=[1.0, 1.0], after=[1.0, 1.0])
    assert (store.get(1).trained_tokens, store.get(1).nll_before) == (0, None)


def test_truncation_makes_a_resumed_run_equal_to_the_uninterrupted_one(tmp_path: Path) -> None:
    steps = [[experience(1), experience(1, Status.LEAKED)], [experience(2)], [experience(3), experience(3)]]
    with ExperienceStore(tmp_path / "whole.sqlite") as whole:
        for step in steps:
            whole.add(step)
        expected = whole.digest()
    path = tmp_path / "resumed.sqlite"
    with ExperienceStore(path) as store:
        store.add(steps[0])
        saved = store.last_id()
        store.add([experience(2, text="not in the checkpoint")] * 3)
    with ExperienceStore(path) as store:
        assert store.truncate_after(saved) == 3
        assert store.truncate_after(saved) == 0
        assert store.add(steps[1]) == [3]
        store.add(steps[2])
        assert store.digest() == expected
        store.truncate_after(0)
        assert store.add([experience()]) == [1]


def test_truncation_refuses_a_store_that_ends_before_the_checkpoint(store: ExperienceStore) -> None:
    store.add([experience()])
    with pytest.raises(StoreError, match=r"saved after experience 5, but the store ends at 1"):
        store.truncate_after(5)
    assert store.last_id() == 1


def test_digest_sees_every_column_but_the_time(store: ExperienceStore) -> None:
    ids = store.add([experience()])
    seen = {store.digest()}
    database = sqlite3.connect(store.path, isolation_level=None)
    database.execute("UPDATE experiences SET written_at = '1999-01-01T00:00:00+00:00'")
    assert store.digest() in seen
    store.set_nll(ids, before=[1.0])
    seen.add(store.digest())
    store.set_nll(ids, before=[1.0 + 2**-52])
    seen.add(store.digest())
    store.add([experience()])
    seen.add(store.digest())
    assert len(seen) == 4


def test_list_filters_and_keeps_the_newest(store: ExperienceStore) -> None:
    store.add([experience(step, status) for step in (1, 2, 3) for status in (Status.KEPT, Status.LEAKED)])
    assert [row.id for row in store.list(status=Status.KEPT)] == [1, 3, 5]
    assert [row.id for row in store.list(status="leaked", step=3)] == [4]
    assert [row.id for row in store.list(limit=2)] == [5, 6]
    assert [row.id for row in store.list(status=Status.KEPT, limit=2)] == [3, 5]
    assert store.list(limit=0) == []
    with pytest.raises(StoreError, match=r"no experience 7; its ids go from 1 to 6"):
        store.get(7)


def test_funnel_counts_every_status(store: ExperienceStore) -> None:
    store.add([experience(status=status) for status in (Status.KEPT, Status.LEAKED, Status.KEPT)])
    assert store.funnel() == {
        Status.UNPARSED: 0,
        Status.LEAKED: 1,
        Status.NOT_LIFTING: 0,
        Status.REPLAY_FAILED: 0,
        Status.KEPT: 2,
    }


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("moduli", [1]),
        ("MODULI small", [1]),
        ("odul", [1]),  # parts of words
        ("moduli straße", []),  # every word must occur
        ("STRASSE", [2]),  # Unicode case folding
        ("素数", [3]),
        ("primes", [1, 2, 3]),  # in the prompt
        ("100%_", [2]),  # no wildcards ...
        ("%", [2]),
        ("_", [2]),
        ("\"quoted' OR 1=1 --", []),  # ... no operators, no SQL
        ("NEAR(", []),
        ("*", []),
        ("\x00\ud800", [3]),  # as it is stored
        ("", [1, 2, 3]),
    ],
)
def test_search_takes_any_text_literally(store: ExperienceStore, query: str, found: list[int]) -> None:
    texts = ("Try small moduli first.", "Die Straße ist 100%_ lang.", "素数を数える \x00\ud800")
    store.add([experience(text=text) for text in texts])
    assert [row.id for row in store.search(query)] == found


def test_search_keeps_the_newest(store: ExperienceStore) -> None:
    store.add([experience() for _ in range(4)])
    assert [row.id for row in store.search("primes", limit=2)] == [3, 4]


def test_text_that_sqlite_tools_cannot_carry_is_replaced(store: ExperienceStore) -> None:
    bad = "a\x00b\ud800c\U0001f600\u202e"
    full = experience(prompt=[{"role": "user", "content": bad}], text=bad)
    store.add([replace(full, replay=Replay((Verdict.WRONG,), (bad,)), leak=LeakReport((bad,)))])
    row, good = store.get(1), "a\ufffdb\ufffdc\U0001f600\u202e"
    assert (row.analysis, row.replay_texts, row.leak_reasons) == (good, (good,), (good,))
    assert row.prompt == [{"role": "user", "content": good}]
    for suffix in ("jsonl", "parquet"):
        assert store.export(store.path.with_suffix(f".{suffix}")) == 1
    assert good in store.path.with_suffix(".jsonl").read_text(encoding="utf-8")


def test_exports_hold_what_the_store_holds(store: ExperienceStore, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    replayed = replace(experience(2), replay=Replay((Verdict.RIGHT,), ("10",), (Verdict.WRONG,)))
    store.add([experience(1, Status.UNPARSED, prompt="plain"), replayed])
    assert store.export(tmp_path / "all.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["plain", CHAT]
    assert [line["replay_verdicts"] for line in lines] == [[], ["right"]]

    assert store.export(tmp_path / "all.parquet") == 2
    table = pq.read_table(tmp_path / "all.parquet")
    rows = table.to_pylist()
    assert table.schema.field("replay_texts").type == pa.list_(pa.string())
    assert [json.loads(row.pop("prompt")) for row in rows] == [line.pop("prompt") for line in lines]
    assert rows == lines

    assert store.export(tmp_path / "kept.parquet", status=Status.LEAKED) == 0
    assert pq.read_table(tmp_path / "kept.parquet").schema == table.schema


def test_export_refuses_other_formats_and_keeps_the_old_file(store: ExperienceStore, tmp_path: Path) -> None:
    store.add([experience()])
    with pytest.raises(StoreError, match=r"suffix '.csv'; use .jsonl or .parquet"):
        store.export(tmp_path / "rows.csv")
    with pytest.raises(StoreError, match=r"cannot be written"):
        store.export(tmp_path / "missing" / "rows.jsonl")
    target = tmp_path / "rows.jsonl"
    target.mkdir()
    with pytest.raises(StoreError, match=r"cannot be written"):
        store.export(target)
    assert not list(tmp_path.glob(".*tmp"))
