"""Experience store: a SQLite file per run with every meta-experience, kept or dropped, its inputs and its results.

One process writes (the trainer, one transaction per step); any number of processes may read at the same time (WAL).
Text is always bound as a parameter, never formatted into SQL. NUL characters and lone surrogates, which SQLite tools
and Parquet cannot represent, are stored as U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from mel_lite.errors import StoreError
from mel_lite.files import replacing
from mel_lite.lessons.store import credit
from mel_lite.lessons.store.credit import TokenCredit
from mel_lite.lessons.store.rows import (
    ADDED,
    COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    SEARCHED,
    ExperienceRow,
    Outline,
    clean,
    finite,
    to_outline,
    to_record,
    to_row,
    write_jsonl,
    write_parquet,
)
from mel_lite.text import first_line
from mel_lite.types import Experience, Status

FILE_NAME = "experiences.sqlite"
BUSY_TIMEOUT_S = 30.0

Rows = list[ExperienceRow]
Outlines = list[Outline]
Credits = list[TokenCredit]
Ids = list[int]


class ExperienceStore:
    """Experience store of one run.

    Raises: StoreError, from every method, when the file is missing (read-only), not a store, of another schema
    version, locked by another writer for longer than `BUSY_TIMEOUT_S`, or cannot be written.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        """Open the file. Create it if it is missing and `read_only` is False."""
        self.path = Path(path)
        self.read_only = read_only
        with self._errors():
            self._db = self._connect()
        try:
            with self._errors():
                self._open_schema()
        except BaseException:
            self._db.close()
            raise

    def _connect(self) -> sqlite3.Connection:
        if self.read_only and not self.path.is_file():
            raise StoreError(
                f"experience store {self.path}: there is no such file. `mel-lite train --output-dir "
                f"{self.path.parent}` writes it; pass the folder of a run that has reached its first step."
            )
        uri = self.path.resolve().as_uri()
        if not self.read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        else:
            # A reader of a WAL file creates files next to it, which read-only media reject. There is no writer there.
            log = Path(f"{self.path}-wal")
            frozen = not os.access(self.path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
            uri += "?mode=ro&immutable=1" if frozen else "?mode=ro"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        db.execute("PRAGMA trusted_schema = OFF")  # untrusted file: its views and triggers may not call functions
        db.create_function("fold", 1, str.casefold, deterministic=True)
        return db

    def _open_schema(self) -> None:
        if not self.read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            # With one commit per step, fsync costs little, and a checkpoint can rely on the earlier rows.
            self._db.execute("PRAGMA synchronous = FULL")
            with self._transaction():
                if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    self._db.execute(SCHEMA)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                while (version := self._version()) in ADDED:
                    for column in ADDED[version]:
                        self._db.execute(f"ALTER TABLE experiences ADD COLUMN {column}")
                    self._db.execute(f"PRAGMA user_version = {version + 1}")
                self._db.execute(credit.SCHEMA)
        version = self._version()
        if version not in (*ADDED, SCHEMA_VERSION):
            raise StoreError(
                f"experience store {self.path}: its schema version is {version}, but this release of mel-lite reads "
                f"{SCHEMA_VERSION}. Use the release that wrote it, or another output folder."
            )
        # A reader cannot add the columns and the table that the file of an older release lacks.
        self._has_credit = bool(self._db.execute("SELECT * FROM sqlite_master WHERE name = 'token_credit'").fetchone())
        found = {name for _, name, *_ in self._db.execute("PRAGMA table_info(experiences)")}
        self._columns = {name: name if name in found else f"NULL AS {name}" for name in COLUMNS}

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"experience store {self.path}: {error}. Check that mel-lite wrote this file, that no other run "
                "writes to this folder, and that the disk has free space."
            ) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Like `_errors`, and for rows whose values cannot be what a writer wrote."""
        with self._errors():
            try:
                yield
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"experience store {self.path}: a row is damaged ({first_line(error)}). Restore the file from a "
                    "copy."
                ) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Commit all statements of the block or none, even if the process is killed inside."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def add(self, experiences: Sequence[Experience]) -> Ids:
        """Append rows in one transaction. Returns: their ids, in order."""
        written_at = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [to_record(experience) | {"written_at": written_at} for experience in experiences]
        names = [name for name in COLUMNS if name not in ("id", "nll_before", "nll_after", "trained_tokens")]
        sql = f"INSERT INTO experiences ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)})"
        with self._errors(), self._transaction():
            return [int(self._db.execute(sql, row).lastrowid or 0) for row in rows]

    def set_nll(
        self, ids: Sequence[int], *, before: Sequence[float] | None = None, after: Sequence[float] | None = None
    ) -> None:
        """Set each row's mean NLL in nats per token before and/or after the update. Non-finite values become NULL.

        Raises: StoreError for an id that is not in the store; then no row is changed.
        """
        given = {"nll_before": before, "nll_after": after}
        self._update(ids, {name: [finite(x) for x in values] for name, values in given.items() if values is not None})

    def set_trained(self, ids: Sequence[int], tokens: Sequence[int]) -> None:
        """Set the number of tokens of each row that entered the NLL term.

        Raises: StoreError for an id that is not in the store; then no row is changed.
        """
        self._update(ids, {"trained_tokens": [int(n) for n in tokens]})

    def _update(self, ids: Sequence[int], columns: dict[str, Sequence[float | int | None]]) -> None:
        with self._errors(), self._transaction():
            for column, values in columns.items():
                sql = f"UPDATE experiences SET {column} = ? WHERE id = ?"
                for id_, value in zip(ids, values, strict=True):
                    if self._db.execute(sql, (value, id_)).rowcount != 1:
                        raise self._no_such_row(id_)

    def add_credit(self, rows: Sequence[TokenCredit]) -> None:
        """Write the token credit of rollouts in one transaction. It replaces that of the same step, rollout and way."""
        marks = ", ".join("?" * len(credit.COLUMNS))
        with self._errors(), self._transaction():
            self._db.executemany(f"INSERT OR REPLACE INTO token_credit VALUES ({marks})", map(credit.to_values, rows))

    def credit(self, step: int, rollouts: Sequence[int]) -> Credits:
        """Return the token credit of some rollouts of a step, counted from 1, in their order and by name of the way."""
        if not self._has_credit:
            return []
        sql = f"SELECT {', '.join(credit.COLUMNS)} FROM token_credit WHERE step = ? AND rollout_index = ? ORDER BY way"
        with self._reading():
            found = [values for index in rollouts for values in self._db.execute(sql, (step - 1, index))]
            return [credit.to_credit(values) for values in found]

    def truncate_after(self, id_: int, *, steps: int | None = None) -> int:
        """Delete the rows after `id_` (0 = all), which a resumed run writes again. Returns: the number of deleted rows.

        Also deletes the token credit of all steps after the first `steps`; None deletes none.

        Raises: StoreError when the store ends before `id_`, so that rows of the checkpoint are missing.
        """
        last = self.last_id()
        if id_ > last:
            raise StoreError(
                f"experience store {self.path}: the checkpoint was saved after experience {id_}, but the store ends at "
                f"{last}. Restore the store of that run, or start a new run in another output folder."
            )
        with self._errors(), self._transaction():
            if steps is not None:
                self._db.execute("DELETE FROM token_credit WHERE step >= ?", (steps,))
            return self._db.execute("DELETE FROM experiences WHERE id > ?", (id_,)).rowcount

    def last_id(self) -> int:
        """Return the id of the newest row, or 0 when there is none."""
        with self._errors():
            return int(self._db.execute("SELECT coalesce(max(id), 0) FROM experiences").fetchone()[0])

    def get(self, id_: int) -> ExperienceRow:
        """Return the row with this id. Raises: StoreError when there is none."""
        found = self._select("WHERE id = ?", (id_,))
        if not found:
            raise self._no_such_row(id_)
        return found[0]

    def sample(self) -> ExperienceRow | None:
        """Return the newest row, a kept one of the newest step if there is one; None when there is no row."""
        newest = self.list(limit=1)
        kept = self.list(status=Status.KEPT, step=newest[0].step, limit=1) if newest else []
        return next(iter(kept + newest), None)

    def list(self, *, status: Status | str | None = None, step: int | None = None, limit: int | None = None) -> Rows:
        """Return the newest `limit` rows (default: all) with this status and step, oldest first."""
        where, values = "WHERE true", []
        before = None if step is None else step - 1
        for column, value in (("status", None if status is None else Status(status).value), ("step", before)):
            if value is not None:
                where += f" AND {column} = ?"
                values.append(value)
        return self._newest(where, values, limit)

    def search(self, text: str, *, limit: int | None = None) -> Rows:
        """Return the newest `limit` rows, oldest first, that contain every word of `text`, ignoring case.

        Searches prompt, answer, analysis, its parts, and the reason for dropping it. A word is any run of characters
        without white space; `text` has no special syntax. This is a full scan of about 0.2 s per 10,000 rows: an index
        would double the file and would not find parts of words.
        """
        words = clean(text).casefold().split()
        where = "WHERE true" + f" AND instr(fold({SEARCHED}), ?) > 0" * len(words)
        return self._newest(where, words, limit)

    def funnel(self) -> dict[Status, int]:
        """Return the number of rows for every status, in the order of the funnel."""
        with self._errors():
            counts = dict(self._db.execute("SELECT status, count(*) FROM experiences GROUP BY status"))
        return {status: counts.get(status.value, 0) for status in Status}

    def digest(self) -> str:
        """Return the SHA-256 of all rows without `written_at`, and of the token credit.

        It is equal for an uninterrupted and a resumed run.
        """
        names = ", ".join(selected for name, selected in self._columns.items() if name != "written_at")
        sha = hashlib.sha256()
        with self._errors():
            for row in self._db.execute(f"SELECT {names} FROM experiences ORDER BY id"):
                sha.update(json.dumps(row).encode() + b"\n")
            if self._has_credit:
                for row in self._db.execute("SELECT * FROM token_credit ORDER BY step, rollout_index, way"):
                    sha.update(json.dumps(row).encode() + b"\n")
        return sha.hexdigest()

    def export(self, path: str | Path, *, status: Status | str | None = None) -> int:
        """Write the rows to a .jsonl or .parquet file, replaced atomically. Returns: the number of rows.

        In Parquet, where a column has one type, `prompt` is JSON text. Raises: StoreError for another suffix.
        """
        path = Path(path)
        if path.suffix not in (".jsonl", ".parquet"):
            raise StoreError(
                f"export path {path}: the store cannot write files with the suffix {path.suffix!r}; use .jsonl or "
                ".parquet."
            )
        rows = [asdict(row) for row in self.list(status=status)]
        try:
            with replacing(path) as staged:
                (write_jsonl if path.suffix == ".jsonl" else write_parquet)(staged, rows)
        except OSError as error:
            raise StoreError(f"export path {path}: cannot be written ({error}); choose another folder.") from error
        return len(rows)

    def _newest(self, where: str, values: Sequence[object], limit: int | None) -> Rows:
        if limit is None:
            return self._select(where, values)
        return self._select(f"{where} ORDER BY id DESC LIMIT ?", (*values, max(0, limit)))

    def _select(self, where: str, values: Sequence[object]) -> Rows:
        sql = f"SELECT * FROM (SELECT {', '.join(self._columns.values())} FROM experiences {where}) ORDER BY id"
        with self._reading():
            return [to_row(values) for values in self._db.execute(sql, tuple(values))]

    def outline(self, *, after: int = 0) -> Outlines:
        """Return the short columns of the rows after an id, oldest first."""
        sql = "SELECT id, step, status, prompt, heuristic, reason FROM experiences WHERE id > ? ORDER BY id"
        with self._reading():
            return [to_outline(values) for values in self._db.execute(sql, (after,))]

    def _no_such_row(self, id_: int) -> StoreError:
        last = self.last_id()
        has = f"its ids go from 1 to {last}" if last else "it is empty"
        return StoreError(f"experience store {self.path}: there is no experience {id_}; {has}.")

    def close(self) -> None:
        """Close the file. Safe to repeat."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = ["FILE_NAME", "ExperienceStore"]
