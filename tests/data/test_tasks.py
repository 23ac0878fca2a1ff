"""Sources are loaded as rows of prompt and answer. Errors name file, row and column."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mel_lite.data import demo_tasks, sources, tasks
from mel_lite.data.tasks import MAX_PROMPT_CHARS, PRESETS, load_tasks, recommended_verifier
from mel_lite.errors import DataError
from mel_lite.verify.verifiers import get_verifier

Publish = Callable[..., None]
ROWS = [{"question": f"{i} + 1?", "answer": i + 1, "level": i % 2} for i in range(6)]
EXPECTED = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "level": i % 2} for i in range(6)]


def write(path: Path, rows: list[Any]) -> str:
    """Write rows in the format of the file name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return a function that writes rows in Hub layout, where `datasets.load_dataset` finds them without a network."""
    monkeypatch.chdir(tmp_path)

    def make(hub_id: str, rows: list[Any], *, config: str = "default", split: str = "train") -> None:
        folder = Path(hub_id)
        folder.mkdir(parents=True)
        write(folder / "rows.jsonl", rows)
        others = [name for name in ("all", "other") if name != config]  # so that another configuration would fail
        card = f"configs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n"
        card += "".join(f"- config_name: {name}\n  data_files: none.jsonl\n" for name in others)
        (folder / "README.md").write_text(f"---\n{card}---\n")

    return make


# ---- files ----


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
        ("a.jsonl", b'{"prompt": "\xff", "answer": 1}\n', r"a.jsonl, line 1: .* is not JSON \('utf-8' codec"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: .* is not JSON"),
        ("a.json", b'{"prompt": "x"}', "a.json: holds a dict; a .json file must be a list of objects"),
        ("a.csv", b"prompt,answer\nx,1\ny,2,3\n", "a.csv, row 2: has more cells than the header"),
        ("a.csv", b"prompt,answer\nx,1\n\xff,2\n", "a.csv, row .: is not readable as UTF-8 CSV"),
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
    ("row", "message"),
    [
        ({"prompt": 7, "answer": "1"}, "row 2, column 'prompt': 7 is neither text nor messages"),
        ({"prompt": " ", "answer": "1"}, "row 2, column 'prompt': ' ' is empty"),
        ({"answer": "1"}, "row 2, column 'prompt': None is empty"),
        ({"prompt": "x", "answer": {"a": 1}}, "row 2, column 'answer': {'a': 1} is a dict, not a text or number"),
        ({"prompt": [{"role": "bot", "content": "x"}], "answer": "1"}, "row 2, column 'prompt': .* has a message that"),
        ({"prompt": [{"role": "user", "content": None}], "answer": "1"}, "row 2, column 'prompt': .* has a message"),
        ({"prompt": [{"role": "user", "content": "x"}], "answer": "1"}, "row 2, column 'prompt': .* in some rows and"),
        ({"prompt": ["y" * 500], "answer": "1"}, r"column 'prompt': \['y{75}\.\.\. has a message"),
    ],
)
def test_malformed_rows_name_file_row_column_and_value(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.json", [{"prompt": "x", "answer": "1"}, row])
    with pytest.raises(DataError, match=f"^tasks.json, {message}" if message.startswith("row") else message):
        load_tasks(path)


def test_rows_without_answer_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "x", "answer": None}, {"question": "x", "answer": " "}, {"question": "x"}]
    with pytest.warns(UserWarning, match="tasks.json: skipped 3 without an answer of 9 rows"):
        assert list(load_tasks(write(tmp_path / "tasks.json", rows))) == EXPECTED
    with pytest.raises(DataError, match=r"3 of 4 rows cannot be used \(3 without an answer\).*answer_column"):
        load_tasks(write(tmp_path / "few.json", rows[5:]))
    with pytest.raises(DataError, match="3 of 3 rows cannot be used"):
        load_tasks(write(tmp_path / "none.json", rows[6:]))


def test_oversize_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    large = [
        {"question": "x" * MAX_PROMPT_CHARS, "answer": 1},
        {"question": "x", "answer": "1" * (tasks.MAX_ANSWER_CHARS + 1)},
        {"question": "x", "answer": 1, "level": None, "notes": "n" * tasks.MAX_ROW_CHARS},
    ]
    with pytest.warns(UserWarning, match="skipped 3 too long of 9 rows"):
        assert load_tasks(write(tmp_path / "tasks.json", ROWS + large))["prompt"][:] == [r["prompt"] for r in EXPECTED]


# ---- columns ----


@pytest.mark.parametrize("prompt", ["prompt", "question", "problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_usual_column_names_are_found(prompt: str, answer: str, tmp_path: Path) -> None:
    tasks = load_tasks(write(tmp_path / "tasks.json", [{prompt: "p", answer: 2.0, "kind": "k"}]))
    assert list(tasks) == [{"prompt": "p", "answer": "2", "kind": "k"}]


def test_ambiguous_and_unknown_columns_name_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "tasks.json", [{"problem": "p", "solution": "because ... 2", "answer": "2", "prompt": "q"}])
    with pytest.raises(DataError, match=r"'prompt', 'problem' could each be the prompt. .*prompt_column = 'prompt'"):
        load_tasks(path)
    with pytest.raises(DataError, match=r"'answer', 'solution' could each be the answer.*answer_column"):
        load_tasks(path, prompt_column="problem")
    with pytest.raises(DataError, match="answer_column = 'anwser' is not a column; it has 'problem', 'solution'"):
        load_tasks(path, prompt_column="problem", answer_column="anwser")
    with pytest.raises(DataError, match="none of the columns 'text' is called 'prompt' or 'question' or 'problem'"):
        load_tasks(write(tmp_path / "other.json", [{"text": "p"}]))
    chosen = load_tasks(path, prompt_column="problem", answer_column="answer")
    assert list(chosen) == [{"prompt": "p", "answer": "2", "solution": "because ... 2", "prompt_original": "q"}]


def test_a_column_of_two_types_is_named_and_bytes_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'level' mixes int and str"):
        load_tasks(write(tmp_path / "tasks.json", [*ROWS, {"question": "x", "answer": 1, "level": "hard"}]))
    path = write(tmp_path / "tasks.parquet", [row | {"image": b"\x89PNG"} for row in ROWS])
    with pytest.warns(UserWarning, match="dropped columns that JSON cannot represent: image"):
        assert list(load_tasks(path)) == EXPECTED


def test_prompts_become_conversations_if_requested(tmp_path: Path) -> None:
    user = {"role": "user", "content": "p"}
    plain = write(tmp_path / "plain.json", [{"prompt": "p", "answer": "1"}])
    talk = write(tmp_path / "talk.json", [{"prompt": [{"role": "system", "content": "old"}, user], "answer": "1"}])
    assert load_tasks(plain)["prompt"][:] == ["p"]
    assert load_tasks(plain, conversational=True)["prompt"][:] == [[user]]
    system = {"role": "system", "content": "new"}
    assert load_tasks(plain, system_prompt="new")["prompt"][:] == [[system, user]]
    assert load_tasks(talk)["prompt"][:] == [[{"role": "system", "content": "old"}, user]]
    assert load_tasks(talk, system_prompt="new")["prompt"][:] == [[system, user]]


# ---- specs ----


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("demo:dev", {}, "the demo has no split 'dev'; it has train, test"),
        ("no.jsonl", {}, "no such file"),
        ("./folder", {}, "give a file ending in"),
        ("demo", {"limit": 0}, "limit = 0"),
        ("somebody/something", {}, r"could not be loaded from the Hugging Face Hub \(\w+: .*'demo' needs no network"),
    ],
)
def test_unusable_specs(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tasks(spec, **options)


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split = 'test': a file has no splits"):
        load_tasks(write(tmp_path / "tasks.json", ROWS), split="test")


def test_recommended_verifiers_exist() -> None:
    assert recommended_verifier("demo") == recommended_verifier("demo:test") == "numeric"
    assert recommended_verifier("openai/gsm8k:main") == "numeric"
    assert recommended_verifier("open-r1/DAPO-Math-17k-Processed") == "math"
    assert recommended_verifier("reasoning-gym:gcd") == "reasoning-gym"
    assert recommended_verifier("my.jsonl") is None
    assert all(get_verifier(preset.verifier) for preset in PRESETS.values())


# ---- presets ----

WRAPPED = "Solve the following math problem step by step. [...]\n\n{}\n\nRemember to put your answer on its own line."


def test_dapo_as_released_keeps_each_prompt_once(publish: Publish) -> None:
    def row(question: str, answer: str, index: int) -> dict[str, Any]:
        prompt = [{"role": "user", "content": WRAPPED.format(question)}]
        return {
            "data_source": "math_dapo",
            "prompt": prompt,
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(index)},
        }

    publish("BytedTsinghua-SIA/DAPO-Math-17k", [row("a", "1", 0), row("b", "34", 1), row("a", "1", 2)] * 1_000)
    tasks = load_tasks("BytedTsinghua-SIA/DAPO-Math-17k")
    assert [(task["prompt"][0]["content"], task["answer"]) for task in tasks] == [
        (WRAPPED.format("a"), "1"),
        (WRAPPED.format("b"), "34"),
    ]
    assert tasks[1]["reward_model"]["ground_truth"] == "34" and tasks[1]["extra_info"] == {"index": "1"}


def test_dapo_processed_uses_the_original_prompt(publish: Publish) -> None:
    source = [{"role": "user", "content": WRAPPED.format("a")}]
    row = {"prompt": "a", "solution": "34", "source_prompt": source, "reward_model": {"ground_truth": "34"}}
    publish("open-r1/DAPO-Math-17k-Processed", [row, row], config="en")
    tasks = load_tasks("open-r1/DAPO-Math-17k-Processed")
    assert list(tasks) == [
        {"prompt": source, "answer": "34", "prompt_original": "a", "reward_model": {"ground_truth": "34"}}
    ]


def test_the_gsm8k_answer_follows_the_marker(publish: Publish) -> None:
    rows = [
        {"question": "How many?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"},
        {"question": "Who?", "answer": "#### 5"},
        {"question": "Broken", "answer": "no marker"},
    ]
    publish("openai/gsm8k", rows, config="main", split="test")
    with pytest.warns(UserWarning, match="skipped 1 without an answer of 3 rows"):
        tasks = load_tasks("openai/gsm8k", split="test")
    assert tasks["answer"][:] == ["1,002", "5"]
    assert tasks[0]["prompt"] == f"How many?\n\n{PRESETS['openai/gsm8k'].instruction}"
    assert tasks[0]["rationale"] == "1+1=<<1+1=2>>2\n#### 1,002"
    assert get_verifier("numeric")("Answer: 1002", tasks[0]["answer"]) == "right"


def test_a_hub_dataset_in_the_same_layout_needs_no_preset(publish: Publish) -> None:
    prompt = [{"role": "user", "content": "q"}]
    row = {"prompt": prompt, "reward_model": {"ground_truth": ["7"]}}
    publish("somebody/mirror", [row], config="small", split="validation")
    tasks = load_tasks("somebody/mirror:small", split="validation")
    assert list(tasks) == [{"prompt": prompt, "answer": "7", "reward_model": {"ground_truth": ["7"]}}]


# ---- generated and packaged tasks ----


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
    with pytest.raises(DataError, match=r'needs the package reasoning-gym .*pip install "mel-lite\[gym\]"'):
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
            terms = task["prompt"].removeprefix("What is ").partition("?")[0].split()
            value = int(terms[0])
            for sign, term in zip(terms[1::2], terms[2::2], strict=True):
                value = {"+": value + int(term), "-": value - int(term), "*": value * int(term)}[sign]
            assert int(task["answer"]) == value
            assert verifier(f"Answer: {value}", task["answer"]) == "right"
            assert verifier(f"Answer: {value + 1}", task["answer"]) == "wrong"


def test_demo_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    subprocess.run([sys.executable, "-m", "mel_lite.data.demo_tasks.make", str(tmp_path)], check=True)
    for split in demo_tasks.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == demo_tasks.path(split).read_bytes()
