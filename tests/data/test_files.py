"""Files as other programs write them: every form gives the same rows, or one error that names row and column."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from mel_lite.data import load_tasks
from mel_lite.data.tasks import MAX_ROW_CHARS
from mel_lite.errors import DataError
from mel_lite.warmup.examples import Example, load_examples
from task_files import EXPECTED, ROWS

LINES = "\n".join(json.dumps(row) for row in ROWS)
PRETTY = json.dumps(ROWS, indent=2)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.encode() + b"\n",
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        b"\n\n" + LINES.encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.encode("utf-16"),
        LINES.encode("utf-32"),
        json.dumps(ROWS).encode(),
        PRETTY.encode(),
        b"\xef\xbb\xbf" + PRETTY.encode(),
        PRETTY.encode("utf-16"),
        json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    ],
    ids="lines,end,crlf,cr,blank,bom,utf-16,utf-32,list,pretty,pretty bom,pretty utf-16,inside".split(","),
)
def test_json_is_recognized_by_its_content(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"tasks.{suffix}"
    path.write_bytes(content)
    assert list(load_tasks(str(path))) == EXPECTED


def test_one_object_is_one_row_and_its_messages_are_not_rows(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "2+2?"}]
    for row in ({"prompt": prompt, "answer": "4"}, {"query": prompt, "answer": "4"}):
        path = tmp_path / "one.json"
        path.write_text(json.dumps(row))
        assert list(load_tasks(str(path), prompt_column=next(iter(row)))) == [{"prompt": prompt, "answer": "4"}]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    row = {"prompt": text, "completion": text, "answer": text}
    for suffix in ("jsonl", "json"):
        path = tmp_path / f"rows.{suffix}"
        path.write_text(
            json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row) + "\n", encoding="utf-8", newline=""
        )
        assert [task["prompt"] for task in load_tasks(str(path))] == [text, text]
        assert load_examples(path) == [Example(text, text)] * 2
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([list(row), list(row.values()), ["x\r\ny", "c", "1"]])
    assert [task["prompt"] for task in load_tasks(str(tmp_path / "rows.csv"))] == [text, "x\r\ny"]


def test_long_csv_cells_are_read_and_longer_rows_counted(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    with path.open("w", newline="") as file:
        notes = ["x" * 200_000, "n", "y" * MAX_ROW_CHARS, "n"]
        csv.writer(file).writerows(
            [["prompt", "answer", "note"], *([f"{i}?", i, note] for i, note in enumerate(notes))]
        )
    with pytest.warns(UserWarning, match="tasks.csv: skipped 1 too long of 4 rows"):
        tasks = load_tasks(str(path))
    assert [(task["answer"], len(task["note"])) for task in tasks] == [("0", 200_000), ("1", 1), ("3", 1)]


def test_csv_in_utf_16_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,answer\nWie groß?,4\n".encode("utf-16"))
    assert list(load_tasks(str(tmp_path / "a.csv"))) == [{"prompt": "Wie groß?", "answer": "4"}]


def test_half_a_character_is_replaced_and_counted(tmp_path: Path) -> None:
    lines = [
        r'{"prompt": "1+1? \ud83d", "completion": "2", "answer": "2", "tags": {"k\udc00": ["\ude00"]}}',
        r'{"prompt": "2+1? \ud83d\ude00", "completion": "3", "answer": "3", "tags": null}',
    ]
    expected = ["1+1? \ufffd", "2+1? \U0001f600"]
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(lines))
    with pytest.warns(
        UserWarning, match="s.jsonl: replaced half of a character .* 2 times, first in line 1, column 'pr"
    ):
        tasks = load_tasks(str(path))
    assert tasks["prompt"][:] == expected and tasks[0]["tags"] == {"k\ufffd": ["\ufffd"]}
    with pytest.warns(UserWarning, match="first in line 1, column 'prompt'"):
        assert [example.prompt for example in load_examples(path)] == expected
    (tmp_path / "s.json").write_text(f"[{lines[1]},\n{lines[0]}]")
    with pytest.warns(UserWarning, match="s.json: .* first in row 2, column 'prompt'"):
        assert load_tasks(str(tmp_path / "s.json"))["prompt"][:] == expected[::-1]


def test_integers_beyond_64_bits(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"

    def write(*seeds: Any) -> str:
        path.write_text("".join(json.dumps({"prompt": "1?", "answer": 2**70, "seed": seed}) + "\n" for seed in seeds))
        return str(path)

    with pytest.warns(UserWarning, match="b.jsonl: column 'seed' is kept as text, since line 2 has an integer beyond"):
        tasks = load_tasks(write(1, 2**63, None))
    assert tasks["seed"][:] == ["1", str(2**63), None] and tasks["answer"][:] == [str(2**70)] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tasks(write(-(2**63), 2**63 - 1))["seed"][:] == [-(2**63), 2**63 - 1]
    with pytest.raises(DataError, match=r"b.jsonl, line 2, column 'seed': \{'a': 1.* has an integer beyond 64 bits"):
        load_tasks(write({"a": 1}, {"a": 2**64}))
    with pytest.raises(DataError, match=r"b.jsonl, line 3, column 'seed': \{'a': 'x'\} has parts of other types"):
        load_tasks(write({"a": 1}, {"b": 1}, {"a": "x"}, {"a": 2}))


def test_a_folder_of_save_to_disk_is_read_with_its_splits(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "splits")
    data.save_to_disk(tmp_path / "flat")
    assert list(load_tasks(str(tmp_path / "splits"))) == list(load_tasks(str(tmp_path / "flat"))) == EXPECTED
    assert list(load_tasks(str(tmp_path / "splits"), split="test")) == [EXPECTED[2]]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        load_tasks(str(tmp_path / "splits"), split="dev")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (tmp_path / name).write_text("prompt,answer\n")

        def refuse(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            patch.setattr("pyarrow.parquet.ParquetFile", refuse)
            with pytest.raises(DataError, match=f"{name}.*Permission denied"):
                load_tasks(str(tmp_path / name))
