"""Sources are loaded as rows of prompt and answer. Errors name file, row and column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mel_lite.data import tasks
from mel_lite.data.tasks import MAX_PROMPT_CHARS, PRESETS, load_tasks, recommended_verifier
from mel_lite.errors import DataError
from mel_lite.verify.verifiers import get_verifier
from task_files import EXPECTED, ROWS, write

Publish = Callable[..., None]


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


# ---- rows ----


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
    with pytest.raises(
        DataError, match=r"'prompt', 'problem' could each be .*prompt_column \(--prompt-column\) 'prompt'"
    ):
        load_tasks(path)
    with pytest.raises(DataError, match=r"'answer', 'solution' could each be the answer.*answer_column"):
        load_tasks(path, prompt_column="problem")
    with pytest.raises(DataError, match=r"'anwser', given as answer_column .*, is not a column; it has 'problem'"):
        load_tasks(path, prompt_column="problem", answer_column="anwser")
    with pytest.raises(DataError, match="none of the columns 'text' is called 'prompt' or 'question' or 'problem'"):
        load_tasks(write(tmp_path / "other.json", [{"text": "p"}]))
    chosen = load_tasks(path, prompt_column="problem", answer_column="answer")
    assert list(chosen) == [{"prompt": "p", "answer": "2", "solution": "because ... 2", "prompt_original": "q"}]


def test_a_column_of_two_types_is_named_and_bytes_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 7, column 'level': 'hard' is of another type: .* mixes int and str"):
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


# ---- messages and answers ----

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "unit": None}}}


def talk(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": "Weather?"}, *turns], "answer": "5"}


@pytest.mark.parametrize("content", ["", None])
def test_tool_calls_are_kept(content: str | None, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    reply = {"role": "tool", "name": "weather", "tool_call_id": "a1", "content": "5 C"}
    tasks = load_tasks(write(tmp_path / "tasks.jsonl", [talk(call, reply), talk()]))
    user, asked, answered = tasks[0]["prompt"]
    assert asked["tool_calls"] == [CALL] and asked["content"] == ""
    assert (answered["name"], answered["tool_call_id"], answered["content"]) == ("weather", "a1", "5 C")
    assert user["content"] == "Weather?"


def test_text_parts_become_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "answer": "4"}
    assert load_tasks(write(tmp_path / "a.jsonl", [row]))[0]["prompt"] == [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("turn", "fault"),
    [
        ({"role": "assistant", "content": None}, "has a message that is not"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "has a message that is not"),
        ({"role": "assistant", "content": "", "tool_calls": "weather()"}, "tool_calls are not a list of objects"),
        ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "part of type 'image', but only text"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type 'text', but only text"),
        ({"role": "user", "content": {"text": "x"}}, "has a message that is not"),
        ({"from": "human", "value": "x"}, "has a message that is not"),
    ],
)
def test_messages_no_template_reads_are_refused(turn: dict[str, Any], fault: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^a.jsonl, line 2, column 'prompt': \[.* {fault}"):
        load_tasks(write(tmp_path / "a.jsonl", [talk(), talk(turn)]))


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_a_conversation_without_a_user_turn_is_refused(role: str, tmp_path: Path) -> None:
    user, other = {"role": "user", "content": "x"}, {"role": role, "content": "2+2?"}
    for turns, fault in (([other], "user turn, where"), ([other, user | {"content": " "}], "text in its user turn")):
        rows = [{"prompt": [user], "answer": "1"}, {"prompt": turns, "answer": "4"}]
        with pytest.raises(DataError, match=f"a.jsonl, line 2, column 'prompt': .* has no {fault}"):
            load_tasks(write(tmp_path / "a.jsonl", rows))
    rows = [{"prompt": [other, user], "answer": "1"}]
    assert load_tasks(write(tmp_path / "a.jsonl", rows))[0]["prompt"] == [other, user]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(["7"], "7"), ([["7"]], "7"), (["7", 7, 7.0], "7"), (7.0, "7"), (True, "True"), (1e20, "1" + "0" * 20)],
)
def test_answers_that_are_one_answer(answer: Any, expected: str, tmp_path: Path) -> None:
    assert load_tasks(write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": answer}]))[0]["answer"] == expected


def test_an_answer_beyond_floats_is_not_infinity(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": 1}\n{"prompt": "x", "answer": -1e400}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2, column 'answer': -inf is a number too large .* in quotes"):
        load_tasks(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": "1e400"}\n')
    assert load_tasks(tmp_path / "a.jsonl")[0]["answer"] == "1e400"


def test_lists_without_one_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "answer": ["1"]}, {"prompt": "x", "answer": []}, {"prompt": "x", "answer": [None]}]
    with pytest.raises(DataError, match="2 of 3 rows cannot be used"):
        load_tasks(write(tmp_path / "a.jsonl", rows))
    rows[1]["answer"] = ["1", "one"]
    with pytest.raises(DataError, match=r"a.jsonl, line 2, column 'answer': \['1', 'one'\] is a list of 2 different"):
        load_tasks(write(tmp_path / "a.jsonl", rows))


def test_columns_with_names_of_reward_arguments_are_renamed(tmp_path: Path) -> None:
    row = {"prompt": "x", "answer": "1", "completions": "c", "self": 2, "completions_original": "d", "level": 3}
    with pytest.warns(UserWarning) as warned:
        tasks = load_tasks(write(tmp_path / "a.jsonl", [row]))
    kept = {"prompt": "x", "answer": "1", "completions_original_": "c", "self_original": 2, "level": 3}
    assert list(tasks) == [kept | {"completions_original": "d"}]
    assert [str(each.message) for each in warned] == [
        f"a.jsonl: column {old!r} is called {new!r}, since TRL passes values of its own as {old!r}."
        for old, new in (("completions", "completions_original_"), ("self", "self_original"))
    ]
