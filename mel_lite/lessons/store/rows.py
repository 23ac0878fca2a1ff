"""Rows of the experience store: the schema, and conversion from and to SQLite, JSON Lines and Parquet."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mel_lite.types import Experience, Prompt, Span, Status, Verdict

SCHEMA_VERSION = 5
ADDED: dict[int, tuple[str, ...]] = {
    1: ("quote_start INTEGER", "quote_end INTEGER", "templates_version TEXT"), 2: ("shift_nats REAL",), 3: (),
    4: ("staleness_steps INTEGER", "staleness_versions INTEGER"),
}  # fmt: skip
"""Columns that the next version adds to each; all may be NULL. Version 4 adds the table of token credit."""

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
    written_at TEXT NOT NULL, quote_start INTEGER, quote_end INTEGER, templates_version TEXT,
    shift_nats REAL, staleness_steps INTEGER, staleness_versions INTEGER
)
"""
_LIST_COLUMNS = ("leak_reasons", "replay_verdicts", "replay_texts", "control_verdicts")
_JSON_COLUMNS = ("prompt", *_LIST_COLUMNS)
SEARCHED = " || char(10) || ".join(
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
    """Optimizer step in which it was complete, from 1, as in metrics.jsonl. The file's column holds the number of steps
    before."""
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
    quote_start: int | None
    quote_end: int | None
    """Characters [start, end) of `wrong_text` that the bifurcation quotes; None when none was found."""
    templates_version: str | None
    """Identifies the texts of the analysis prompt."""
    shift_nats: float | None
    """Lift by M of the group's right rollouts minus that of its wrong ones; None when it was not scored."""
    staleness_steps: int
    """Optimizer steps from its rollouts to `step`; 0 with the strict schedule."""
    staleness_versions: int
    """Updates of the weights among them."""

    @property
    def rollouts_step(self) -> int:
        """Optimizer step that sampled its rollouts, from 1."""
        return self.step - self.staleness_steps

    @property
    def quoted_step(self) -> str | None:
        """The quoted characters of `wrong_text`."""
        if self.quote_start is None or self.quote_end is None:
            return None
        return Span(self.quote_start, self.quote_end).of(self.wrong_text)


@dataclass(frozen=True, slots=True)
class Outline:
    """The short columns of a row, for lists of many."""

    id: int
    step: int
    """Optimizer step in which it was complete, from 1."""
    status: Status
    prompt: Prompt
    lesson: str
    """Its heuristic; the reason for the drop where it was dropped."""


COLUMNS = tuple(field.name for field in fields(ExperienceRow))


def clean(value: Any) -> Any:
    """Replace characters that cannot be stored by U+FFFD, in all nested texts of `value`."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


def finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def to_record(experience: Experience) -> dict[str, Any]:
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
        "nll_written": finite(analysis.nll_nats),
        "quote_start": experience.quote.start if experience.quote else None,
        "quote_end": experience.quote.end if experience.quote else None,
        "templates_version": analysis.templates_version or None,
        "shift_nats": finite(experience.shift_nats),
        "staleness_steps": experience.staleness_steps,
        "staleness_versions": experience.staleness_versions,
    }
    record = {column: clean(value) for column, value in record.items()}
    return record | {column: json.dumps(record[column], ensure_ascii=False) for column in _JSON_COLUMNS}


def to_row(values: Sequence[Any]) -> ExperienceRow:
    """Convert the values of `COLUMNS` back to a row; the inverse of `to_record`."""
    row = dict(zip(COLUMNS, values, strict=True))
    for column in _JSON_COLUMNS:
        row[column] = json.loads(row[column])
    row["step"] += 1
    row["status"] = Status(row["status"])
    for column in ("staleness_steps", "staleness_versions"):
        row[column] = row[column] or 0  # NULL in rows of older releases
    row["redacted"] = bool(row["redacted"])
    row["leak_reasons"] = tuple(row["leak_reasons"])
    row["replay_texts"] = tuple(row["replay_texts"])
    for column in ("replay_verdicts", "control_verdicts"):
        row[column] = tuple(Verdict(verdict) for verdict in row[column])
    return ExperienceRow(**row)


def to_outline(values: Sequence[Any]) -> Outline:
    """Convert the values of id, step, status, prompt, heuristic and reason."""
    id_, step, status, prompt, heuristic, reason = values
    kept = Status(status) is Status.KEPT
    return Outline(id_, step + 1, Status(status), json.loads(prompt), (heuristic if kept else reason) or "")


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string()}
    types = {name: kinds[kind] for name, kind in re.findall(r"(\w+) (INTEGER|REAL|TEXT)", SCHEMA)}
    types |= {"redacted": pa.bool_()} | dict.fromkeys(_LIST_COLUMNS, pa.list_(pa.string()))
    plain = [row | {"prompt": json.dumps(row["prompt"], ensure_ascii=False)} for row in rows]
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(types)), path)
