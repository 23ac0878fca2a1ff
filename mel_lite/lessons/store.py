"""Experience store: a SQLite file per run with every meta-experience, kept or dropped, its inputs and its results.

One process writes (the trainer, one transaction per step); any number of processes may read at the same time (WAL).
Text is always bound as a parameter, never formatted into SQL. NUL characters and lone surrogates, which SQLite tools
and Parquet cannot represent, are stored as U+FFFD.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mel_lite.errors import StoreError
from mel_lite.files import replacing
from mel_lite.types import Experience, Prompt, Status, Verdict

FILE_NAME = "experiences.sqlite"
SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0

# Without AUTOINCREMENT, SQLite gives a new row the id max(id) + 1. So after `truncate_after`, a resumed run assigns the
# same ids as the uninterrupted run.
SCHEMA = """
CREATE TABLE experiences (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL,
    prompt_hash TEXT NOT NULL, prompt TEXT NOT NULL, answer TEXT,
    right_text TEXT NOT NULL, wrong_text TEXT NOT NULL, right_index INTEGER NOT NULL, wrong_index INTEGER NOT NULL,
    pair_index INTEGER NOT NULL, common_prefix_tokens INTEGER NOT NULL,
    analysis TEXT NOT NULL, analysis_tokens INTEGER NOT NULL, bifurcation TEXT, critique TEXT, heuristic TEXT,
    status TEXT NOT NULL, reason TEXT NOT NULL, leak_reasons TEXT NOT NULL, redacted INTEGER NOT NULL,
    replay_verdicts TEXT NOT NULL, replay_texts TEXT NOT NULL, control_verdicts TEXT NOT NULL, uplift REAL,
    nll_written REAL, nll_before REAL, nll_after REAL, trained_tokens INTEGER NOT NULL DEFAULT 0,
    written_at TEXT NOT NULL
)
"""
_LIST_COLUMNS = ("leak_reasons", "replay_verdicts", "replay_texts", "control_verdicts")
_JSON_COLUMNS = ("prompt", *_LIST_COLUMNS)
_SEARCHED = " || char(10) || ".join(
    f"coalesce({column}, '')"
    for column in ("prompt", "answer", "analysis", "bifurcation", "critique", "heuristic", "reason")
)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ExperienceRow:
    """Row of the store."""

    id: int
    """Position in the run, from 1, without gaps."""
    step: int
    prompt_hash: str
    prompt: Prompt
    answer: str | None
    right_text: str
    wrong_text: str
    right_index: int
    wrong_index: int
    pair_index: int
    common_prefix_tokens: int
    analysis: str
    """Analysis as sampled from the policy, before parsing and redaction."""
    analysis_tokens: int
    bifurcation: str | None
    critique: str | None
    heuristic: str | None
    """Parsed parts as used in the replay; without the leaking spans if `redacted`."""
    status: Status
    reason: str
    leak_reasons: tuple[str, ...]
    redacted: bool
    replay_verdicts: tuple[Verdict, ...]
    replay_texts: tuple[str, ...]
    control_verdicts: tuple[Verdict, ...]
    uplift: float | None
    """Solved rate with M minus solved rate without, in [-1, 1]; None if no control was run."""
    nll_written: float | None
    """Mean -log pi in nats per token when M was sampled."""
    nll_before: float | None
    nll_after: float | None
    """The same, scored by the trainer before and after the update of this step; None if it was not trained on."""
    trained_tokens: int
    written_at: str
    """Time of writing, UTC, ISO 8601."""


COLUMNS = tuple(field.name for field in fields(ExperienceRow))
Rows = list[ExperienceRow]
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
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"experience store {self.path}: its schema version is {version}, but this release of mel-lite reads "
                f"{SCHEMA_VERSION}. Use the release that wrote it, or another output folder."
            )

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
        rows = [_record(experience) | {"written_at": written_at} for experience in experiences]
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
        self._update(ids, {name: [_finite(x) for x in values] for name, values in given.items() if values is not None})

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

    def truncate_after(self, id_: int) -> int:
        """Delete the rows after `id_` (0 = all), which a resumed run writes again. Returns: the number of deleted rows.

        Raises: StoreError when the store ends before `id_`, so that rows of the checkpoint are missing.
        """
        last = self.last_id()
        if id_ > last:
            raise StoreError(
                f"experience store {self.path}: the checkpoint was saved after experience {id_}, but the store ends at "
                f"{last}. Restore the store of that run, or start a new run in another output folder."
            )
        with self._errors(), self._transaction():
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

    def list(self, *, status: Status | str | None = None, step: int | None = None, limit: int | None = None) -> Rows:
        """Return the newest `limit` rows (default: all) with this status and step, oldest first."""
        where, values = "WHERE true", []
        for column, value in (("status", None if status is None else Status(status).value), ("step", step)):
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
        words = _clean(text).casefold().split()
        where = "WHERE true" + f" AND instr(fold({_SEARCHED}), ?) > 0" * len(words)
        return self._newest(where, words, limit)

    def funnel(self) -> dict[Status, int]:
        """Return the number of rows for every status, in the order of the funnel."""
        with self._errors():
            counts = dict(self._db.execute("SELECT status, count(*) FROM experiences GROUP BY status"))
        return {status: counts.get(status.value, 0) for status in Status}

    def digest(self) -> str:
        """Return the SHA-256 of all rows without `written_at`. It is equal for an uninterrupted and a resumed run."""
        names = ", ".join(name for name in COLUMNS if name != "written_at")
        sha = hashlib.sha256()
        with self._errors():
            for row in self._db.execute(f"SELECT {names} FROM experiences ORDER BY id"):
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
                (_write_jsonl if path.suffix == ".jsonl" else _write_parquet)(staged, rows)
        except OSError as error:
            raise StoreError(f"export path {path}: cannot be written ({error}); choose another folder.") from error
        return len(rows)

    def _newest(self, where: str, values: Sequence[object], limit: int | None) -> Rows:
        if limit is None:
            return self._select(where, values)
        return self._select(f"{where} ORDER BY id DESC LIMIT ?", (*values, max(0, limit)))

    def _select(self, where: str, values: Sequence[object]) -> Rows:
        sql = f"SELECT * FROM (SELECT {', '.join(COLUMNS)} FROM experiences {where}) ORDER BY id"
        with self._errors():
            return [_row(values) for values in self._db.execute(sql, tuple(values))]

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


def _clean(value: Any) -> Any:
    """Replace characters that cannot be stored by U+FFFD, in all nested texts of `value`."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _record(experience: Experience) -> dict[str, Any]:
    """Return the SQLite value of each column of an experience."""
    analysis, leak, replay = experience.analysis, experience.leak, experience.replay
    pair = analysis.pair
    parsed = leak.redacted if leak and leak.redacted else experience.parsed
    record: dict[str, Any] = {
        "step": experience.step,
        "prompt_hash": pair.group.prompt_hash,
        "prompt": pair.group.prompt,
        "answer": pair.group.answer,
        "right_text": pair.right.text,
        "wrong_text": pair.wrong.text,
        "right_index": pair.right.index,
        "wrong_index": pair.wrong.index,
        "pair_index": pair.index,
        "common_prefix_tokens": pair.common_prefix_tokens,
        "analysis": analysis.text,
        "analysis_tokens": len(analysis.analysis_ids),
        "bifurcation": parsed.bifurcation if parsed else None,
        "critique": parsed.critique if parsed else None,
        "heuristic": parsed.heuristic if parsed else None,
        "status": experience.status.value,
        "reason": experience.reason,
        "leak_reasons": leak.reasons if leak else (),
        "redacted": int(bool(leak and leak.redacted)),
        "replay_verdicts": replay.verdicts if replay else (),
        "replay_texts": replay.texts if replay else (),
        "control_verdicts": replay.control_verdicts if replay else (),
        "uplift": replay.uplift if replay else None,
        "nll_written": _finite(analysis.nll_nats),
    }
    record = {column: _clean(value) for column, value in record.items()}
    return record | {column: json.dumps(record[column], ensure_ascii=False) for column in _JSON_COLUMNS}


def _row(values: Sequence[Any]) -> ExperienceRow:
    """Convert the values of `COLUMNS` back to a row; the inverse of `_record`."""
    row = dict(zip(COLUMNS, values, strict=True))
    for column in _JSON_COLUMNS:
        row[column] = json.loads(row[column])
    row["status"] = Status(row["status"])
    row["redacted"] = bool(row["redacted"])
    row["leak_reasons"] = tuple(row["leak_reasons"])
    row["replay_texts"] = tuple(row["replay_texts"])
    for column in ("replay_verdicts", "control_verdicts"):
        row[column] = tuple(Verdict(verdict) for verdict in row[column])
    return ExperienceRow(**row)


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string()}
    types = {name: kinds[kind] for name, kind in re.findall(r"(\w+) (INTEGER|REAL|TEXT)", SCHEMA)}
    types |= {"redacted": pa.bool_()} | dict.fromkeys(_LIST_COLUMNS, pa.list_(pa.string()))
    plain = [row | {"prompt": json.dumps(row["prompt"], ensure_ascii=False)} for row in rows]
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(types)), path)
