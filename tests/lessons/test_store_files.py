"""Files of the experience store: foreign ones, older schemas, read-only ones, and several processes at one."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiences import experience
from mel_lite.errors import StoreError
from mel_lite.lessons.store import SCHEMA_VERSION, ExperienceStore
from mel_lite.types import Span


def test_files_that_are_no_store_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "run7" / "experiences.sqlite"
    with pytest.raises(StoreError, match=r"run7/experiences.sqlite: there is no such file. .*mel-lite train"):
        ExperienceStore(missing, read_only=True)
    assert not missing.parent.exists()

    text = tmp_path / "text.sqlite"
    text.write_text("this is not a database, whatever its name says" * 20)
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"text.sqlite: file is not a database"):
            ExperienceStore(text, read_only=read_only)

    newer = tmp_path / "newer.sqlite"
    ExperienceStore(newer).close()
    sqlite3.connect(newer, isolation_level=None).execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"schema version is 6, but this release of mel-lite reads 5"):
            ExperienceStore(newer, read_only=read_only)

    foreign = tmp_path / "foreign.sqlite"
    sqlite3.connect(foreign, isolation_level=None).execute("CREATE TABLE notes (text)")
    with pytest.raises(StoreError, match=r"schema version is 0"):
        ExperienceStore(foreign)


OLD_STORE = Path(__file__).resolve().parents[1] / "resilience" / "old_runs" / "trainer" / "run" / "experiences.sqlite"


def test_a_store_of_schema_1_is_read_as_it_is_and_extended_by_a_writer(tmp_path: Path) -> None:
    path = Path(shutil.copy(OLD_STORE, tmp_path / "experiences.sqlite"))
    (version,) = sqlite3.connect(path).execute("PRAGMA user_version").fetchone()
    assert version == 1
    with ExperienceStore(path, read_only=True) as reader:
        old = reader.list()
        digest = reader.digest()
    assert len(old) > 3 and {row.quote_start for row in old} == {None}
    with ExperienceStore(path) as store:
        assert (store.list(), store.digest()) == (old, digest)
        assert store.add([replace(experience(), quote=Span(0, 5))]) == [len(old) + 1]
        assert store.get(len(old) + 1).quoted_step == "hence"
    with ExperienceStore(path) as again:
        assert again.last_id() == len(old) + 1
    (version,) = sqlite3.connect(path).execute("PRAGMA user_version").fetchone()
    assert version == SCHEMA_VERSION


def test_a_store_of_schema_2_gets_the_score(tmp_path: Path) -> None:
    path = tmp_path / "experiences.sqlite"
    with ExperienceStore(path) as store:
        store.add([replace(experience(), quote=Span(0, 5))])
    older = sqlite3.connect(path, isolation_level=None)
    for column in ("shift_nats", "staleness_steps", "staleness_versions"):
        older.execute(f"ALTER TABLE experiences DROP COLUMN {column}")
    older.execute("PRAGMA user_version = 2")
    older.close()
    with ExperienceStore(path, read_only=True) as reader:
        assert (reader.get(1).quoted_step, reader.get(1).shift_nats) == ("hence", None)
    with ExperienceStore(path) as store:
        store.add([replace(experience(), shift_nats=0.5)])
        assert [row.shift_nats for row in store.list()] == [None, 0.5]


def test_read_only_stores_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a folder?#%" / "experiences.sqlite"
    with ExperienceStore(path) as store:
        store.add([experience()])
    with ExperienceStore(path, read_only=True) as reader:
        with pytest.raises(StoreError, match=r"readonly database"):
            reader.add([experience()])
        assert reader.last_id() == 1
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    # A mounted dataset or archive: the reader must not try to make WAL files next to the store.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with ExperienceStore(path, read_only=True) as reader:
        assert reader.get(1).analysis == "raw"
        assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


WRITER = """
import sys, time
sys.path[:0] = sys.argv[2:]
from mel_lite.lessons.store import ExperienceStore
from experiences import experience
with ExperienceStore(sys.argv[1]) as store:
    print("ready", flush=True)
    for step in range(1, 10_000):
        store.add([experience(step) for _ in range(5)])
        if step == 3:
            print("writing", flush=True)
"""


@pytest.fixture
def writer(tmp_path: Path):
    """A real second process that appends five rows per transaction, as fast as it can."""
    helpers = Path(__file__).resolve().parents[1] / "helpers"
    command = [sys.executable, "-c", WRITER, str(tmp_path / "experiences.sqlite"), str(helpers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "writing\n"]
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_readers_see_whole_steps_while_another_process_writes(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    counts = []
    deadline = time.monotonic() + 20
    with ExperienceStore(tmp_path / "experiences.sqlite", read_only=True) as reader:
        while len(set(counts)) < 10 and time.monotonic() < deadline:
            rows = reader.list()
            assert [row.id for row in rows] == list(range(1, len(rows) + 1))
            counts.append(len(rows))
    assert writer.poll() is None
    assert len(set(counts)) >= 10
    assert counts == sorted(counts)
    assert {count % 5 for count in counts} == {0}


def test_a_reader_in_no_hurry_does_not_hold_up_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mel_lite.lessons.store.store.BUSY_TIMEOUT_S", 0.05)
    with ExperienceStore(tmp_path / "experiences.sqlite") as store:
        store.add([experience(), experience()])
        reader = sqlite3.connect(store.path)
        rows = reader.execute("SELECT id FROM experiences ORDER BY id")
        assert rows.fetchone() == (1,)
        assert store.add([experience()]) == [3]
        assert rows.fetchall() == [(2,)]
        reader.close()


def test_a_killed_writer_leaves_whole_steps(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    time.sleep(0.3)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with ExperienceStore(tmp_path / "experiences.sqlite") as store:
        assert sqlite3.connect(store.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
        last = store.last_id()
        assert last >= 15
        assert last % 5 == 0
        assert store.add([experience()]) == [last + 1]


def test_a_locked_store_is_an_error_a_user_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mel_lite.lessons.store.store.BUSY_TIMEOUT_S", 0.05)
    with ExperienceStore(tmp_path / "experiences.sqlite") as first, ExperienceStore(first.path) as second:
        first._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked. .*no other run writes to this folder"):
            second.add([experience()])
        first._db.execute("ROLLBACK")
        assert second.add([experience()]) == [1]
