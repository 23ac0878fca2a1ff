"""Examples of a warm-up: reading, and tokens to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mel_lite.errors import DataError, ModelError
from mel_lite.models.chat import render
from mel_lite.warmup.examples import Example, load_examples, tokenize
from tiny_models import tiny_tokenizer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows\.jsonl, line 2: '{' is not JSON"),
        ("[1]", r"line 2: '\[1\]' is not an object"),
        ('{"prompt": "x"}', r"line 2: column 'completion' is missing; it has 'prompt'"),
        ('{"prompt": "", "completion": "y"}', "line 2, column 'prompt': '' is empty"),
        ('{"prompt": 3, "completion": "y"}', "line 2, column 'prompt': 3 is neither text nor messages"),
        ('{"prompt": [], "completion": "y"}', "line 2, column 'prompt'"),
        (
            '{"prompt": [{"role": "user"}], "completion": "y"}',
            "column 'prompt': .* has a message that is not .*'content'",
        ),
        (
            '{"prompt": [{"role": "robot", "content": "a"}], "completion": "y"}',
            "'robot'.* has a message that is not {'role': system.*; message 1 is {'role': 'robot', 'content': 'a'}",
        ),
        (
            '{"prompt": [{"role": "user", "content": "' + 90 * "a" + '"}, {"role": "user"}], "completion": "y"}',
            "column 'prompt': .*; message 2 is {'role': 'user'}",
        ),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "completion": "y"}', "ends with an assistant turn"),
        ('{"prompt": "x", "completion": "  "}', "line 2, column 'completion': '  ' is not text"),
        ('{"prompt": "x", "completion": null}', "line 2, column 'completion': None is not text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        load_examples(file)


def test_unreadable_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        load_examples(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no examples"):
        load_examples(tmp_path / "empty.jsonl")


def test_trl_conversational_completions_are_read(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": "four"}]
    prompt = [{"role": "user", "content": "2 + 2?"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": turn, "other": 1}))
    assert load_examples(tmp_path / "rows.jsonl") == [Example(prompt, "four")]


def test_examples_are_read_by_the_rules_for_tasks(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "name": "add", "content": "4"}]  # fmt: skip
    rows = [{"question": "2+2?", "reply": "four"}, {"question": turns, "reply": "five"}]
    plain, asked = "2+2?", [turns[0], turns[1] | {"content": ""}, turns[2]]
    for name, content in (("a.json", json.dumps(rows, indent=1)), ("b.jsonl", "\r\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(content)
        examples = load_examples(tmp_path / name, completion_column="reply")
        assert examples == [Example(plain, "four"), Example(asked, "five")]
    with_system = load_examples(tmp_path / "a.json", completion_column="reply", system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert [example.prompt for example in with_system] == [
        [system, {"role": "user", "content": plain}],
        [system, *asked],
    ]
    with pytest.raises(
        DataError, match=r"a.json, row 1: column 'completion' is missing; .*completion_column \(--compl"
    ):
        load_examples(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"row 1: column 'ask' is missing; .* prompt_column \(--prompt-column\)"):
        load_examples(tmp_path / "a.json", prompt_column="ask", completion_column="reply")


def test_a_conversation_the_template_rejects_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    refusing = "{{ raise_exception('no tools') if messages[-1].role == 'tool' else messages[0].content }}"
    tokenizer.chat_template = refusing
    user = {"role": "user", "content": "x"}
    rows = [{"question": [user], "completion": "y"}, {"question": [user, user | {"role": "tool"}], "completion": "y"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    examples = load_examples(tmp_path / "rows.jsonl")
    assert len(tokenize(examples[:1], tokenizer, max_length_tokens=99)[0]) == 1
    with pytest.raises(ModelError, match=r"^rows.jsonl, line 3, column 'question': .* no tools"):
        tokenize(examples, tokenizer, max_length_tokens=99)


def test_only_the_completion_is_learned_and_it_ends_the_turn() -> None:
    tokenizer = tiny_tokenizer()
    chat = Example([{"role": "user", "content": "2 + 2?"}], "four")
    (row,), skipped = tokenize([chat], tokenizer, max_length_tokens=200, turn_end=2)
    prompt_ids = list(render(chat.prompt, tokenizer))
    assert row["input_ids"][: len(prompt_ids)] == prompt_ids
    assert row["labels"][: len(prompt_ids)] == [-100] * len(prompt_ids)
    learned = row["labels"][len(prompt_ids) :]
    assert learned == row["input_ids"][len(prompt_ids) :] and learned[-1] == 2
    assert tokenizer.decode(learned[:-1]) == "four" and skipped == 0


def test_long_examples_are_left_out_whole() -> None:
    tokenizer = tiny_tokenizer()
    short, long = Example("a", "b"), Example("a" * 50, "b")  # 3 and 52 tokens
    rows, skipped = tokenize([long, short], tokenizer, max_length_tokens=3)
    assert [len(row["input_ids"]) for row in rows] == [3] and skipped == 1
    with pytest.raises(DataError, match="None of the 2 examples fits 2 tokens; the shortest has 3"):
        tokenize([long, short], tokenizer, max_length_tokens=2)
