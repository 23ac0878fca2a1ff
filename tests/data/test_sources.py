"""Sources of tasks: files, reasoning-gym, the demo. Errors name file and row."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mel_lite.data import demo_tasks, sources
from mel_lite.data.tasks import load_tasks, recommended_verifier
from mel_lite.errors import DataError
from mel_lite.verify.verifiers import get_verifier
from task_files import EXPECTED, ROWS, write


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_format_gives_the_same_tasks(suffix: str, tmp_path: Path) -> None:
    tasks = load_tasks(write(tmp_path / f"tasks{suffix}", ROWS))
    expected = EXPECTED if suffix != ".csv" else [row | {"level": str(row["level"])} for row in EXPECTED]
    assert list(tasks) == expected
    assert load_tasks(str(tmp_path / f"tasks{suffix}"), limit=2)["answer"][:] == ["1", "2"]


def test_json_with_one_list_inside_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": ROWS}).encode())
    assert list(load_tasks(str(path))) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x", "answer": 1}\n{"prompt": \n', r"a.jsonl, line 2: '.*' is not JSON"),
        ("a.jsonl", b'{"prompt": "x", "answer": 1}\n\n[1, 2]\n', r"a.jsonl, line 3: '\[1, 2\]' is not an object"),
        ("a.jsonl", b'{"prompt": "\xff", "answer": 1}\n', r"a.jsonl, line 1: .* is not UTF-8 \(byte 0xff"),
        (
            "a.jsonl",
            b'{"prompt": "x", "answer": %s}\n' % (b"9" * 5_000),
            "line 1: .* integer of more than 4,300 digits",
        ),
        ("a.jsonl", gzip.compress(b'{"prompt": "x", "answer": 1}\n', mtime=0), r"a.jsonl: is compressed \(gzip\)"),
        ("a.jsonl", b"{}\n", r"none of the columns \(it has none\) is called"),
        ("a.jsonl", b'{"prompt": "x", "answer": 1, "o": [1, "a"]}\n', r"column 'o': .* mixes types within one list"),
        (
            "a.jsonl",
            b'{"prompt": "[{\\"role\\": \\"user\\"}]", "answer": 1}\n',
            "column 'prompt': .* messages written as text",
        ),
        (
            "a.csv",
            b"prompt,answer\n\"[{'role': 'user', 'content': 'x'}]\",1\n",
            "row 1, column 'prompt': .* messages written",
        ),
        ("a.csv", b"prompt;answer\nx;1\n", "a.csv: its columns are separated by ';'. Separate them by commas"),
        ("a.csv", b"prompt\tanswer\nx\t1\n", "a.csv: its columns are separated by"),
        (
            "a.json",
            b'{"prompt": ["x", "y"], "answer": ["1", "2"]}',
            "one object with a list for each column.*orient='records'",
        ),
        ("a.json", b'{"prompt": {"0": "x"},\n"answer": {"0": "1"}}', "one object with a list for each column"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: .* is not JSON"),
        ("a.json", b"7", "a.json: holds a int; a JSON file must be a list of objects"),
        ("a.json", b'[{"prompt": "x",\n"answer": 1},\n{"prompt" 2}]', r"a.json, line 3: .* is not JSON"),
        ("a.json", b'{"prompt": "x", "answer": 1}\n{"prompt": \n', r"a.json, line 2: .* is not JSON"),
        ("a.csv", b"prompt,answer\nx,1\ny,2,3\n", "a.csv, row 2: has more cells than the header"),
        ("a.csv", b"prompt,answer\nx,1\n\xff,2\n", "a.csv, row 2, column 'prompt': is not readable as UTF-8 .*0xff"),
        ("a.csv", b"prompt,answer\nx,1\ny,'2\n" * 9_000 + b"x,\xe9\n", "a.csv, row 27000, column 'answer': is not"),
        ("a.csv", b'prompt,answer\nx,1\ny,"2\nz,3\n', r"a.csv, row 2: is not readable .*unexpected end of data"),
        ("a.csv", b"prompt,answer,answer\nx,1,2\n", "a.csv: the header has the column 'answer' twice"),
        ("a.csv", b"prompt,r\xe9ponse\nx,1\n", "a.csv: the header's column .* is not UTF-8"),
        ("a.parquet", b"PAR1 not really", "a.parquet, row 1: is not readable as Parquet"),
        ("a.jsonl", b"", "has no rows"),
        ("a.csv", b"prompt,answer\n", "has no rows"),
        ("a.json", b"[]", "has no rows"),
        ("a.txt", b"x", "give a file ending in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_unreadable_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tasks(str(tmp_path / name))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("demo:dev", {}, "the demo has no split 'dev'; it has train, test"),
        ("no.jsonl", {}, "no such file"),
        ("./folder", {}, "give a file ending in"),
        ("tasks.tsv", {}, "give a file ending in"),
        ("tasks.jsonl.gz", {}, "give a file ending in"),
        ("tasks.jsonl:test", {}, "a file has no 'test'; give 'tasks.jsonl'"),
        ("https://example.org/a.jsonl", {}, "is a URL. Download the file"),
        (" ", {}, "is empty: give a file, a Hub id or 'demo'"),
        ("demo", {"limit": 0}, "limit = 0"),
        ("somebody/something", {}, r"could not be loaded from the Hugging Face Hub \(\w+: .*'demo' needs no network"),
    ],
)
def test_unusable_specs(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tasks(spec, **options)


def test_a_folder_with_the_name_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder. Give one of its files"):
        load_tasks(str(tmp_path / "tasks.jsonl"))


def test_decimals_are_numbers(tmp_path: Path) -> None:
    answers = [Decimal(text) for text in ("1.50", "100.00", "-7.00")]
    Dataset.from_dict({"prompt": list("abc"), "answer": answers}).to_parquet(tmp_path / "a.parquet")
    assert load_tasks(str(tmp_path / "a.parquet"))["answer"][:] == ["1.5", "100", "-7"]


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split = 'test': a file has no splits"):
        load_tasks(write(tmp_path / "tasks.json", ROWS), split="test")


def test_reasoning_gym_tasks_are_scored_by_their_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    tasks = load_tasks("reasoning-gym:chain_sum?min_terms=2&max_terms=2&size=5&seed=3")
    verifier = get_verifier("reasoning-gym")
    assert len(tasks) == 5
    for task in tasks:
        entry = json.loads(task["gym_entry"])
        assert task["prompt"] == f"{entry['question']}\n\n{sources.GYM_INSTRUCTION}"
        assert entry["metadata"]["num_terms"] == 2
        assert verifier(f"<answer>{task['answer']}</answer>", task["answer"], gym_entry=task["gym_entry"]) == "right"
        assert verifier("<answer>x</answer>", task["answer"], gym_entry=task["gym_entry"]) == "wrong"


def test_reasoning_gym_seeds_and_splits() -> None:
    pytest.importorskip("reasoning_gym")
    prompts = [
        load_tasks(f"reasoning-gym:chain_sum{query}", limit=3, **options)["prompt"][:]
        for query, options in (
            ("", {"seed": 1}),
            ("?seed=1", {}),
            ("", {"seed": 2}),
            ("", {"seed": 1, "split": "test"}),
        )
    ]
    assert prompts[0] == prompts[1]
    assert len({tuple(each) for each in prompts}) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reasoning-gym:chain_sun", "no task 'chain_sun'. Did you mean 'chain_sum'"),
        ("reasoning-gym:gcd?sizes=3", "does not take these options .*'sizes'"),
        ("reasoning-gym:gcd?size=0", "size = 0 must be at least 1"),
        ("reasoning-gym:gcd?size=many", "does not take these options"),
        ("reasoning-gym:chain_sum?min_terms=-1", "min_terms must be positive"),
    ],
)
def test_reasoning_gym_specs_that_cannot_work(spec: str, message: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=message):
        load_tasks(spec)


def test_a_missing_reasoning_gym_is_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r'needs the package reasoning-gym .*pip install -e ".*\[gym\]"'):
        load_tasks("reasoning-gym:gcd")


def test_demo_splits_share_no_question_and_every_answer_is_right() -> None:
    splits = {split: load_tasks(f"demo:{split}") for split in demo_tasks.SPLITS}
    assert {split: len(tasks) for split, tasks in splits.items()} == {"train": 400, "test": 100}
    assert list(load_tasks("demo", split="test")) == list(splits["test"])
    prompts = [task["prompt"] for tasks in splits.values() for task in tasks]
    assert len(set(prompts)) == 500
    verifier = get_verifier(recommended_verifier("demo") or "")
    for split in splits.values():
        for task in split:
            numbers = task["prompt"].removeprefix("What is ").partition("?")[0].split()
            value = int(numbers[0])
            for word, number in zip(numbers[1::2], map(int, numbers[2::2]), strict=True):
                means = {"zig": "+", "lum": "+", "pom": "-", "vex": "-", "dub": "~", "hob": "~"}[word]
                value = {"+": value + number, "-": value - number, "~": number - value}[means]
            assert int(task["answer"]) == value
            assert verifier(f"Answer: {value}", task["answer"]) == "right"
            assert verifier(f"Answer: {value + 1}", task["answer"]) == "wrong"


def test_demo_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "mel_lite.data.demo_tasks.make", str(tmp_path)], check=True)
    for split in demo_tasks.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == demo_tasks.path(split).read_bytes()
