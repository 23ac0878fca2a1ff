"""The answer of a completion is what follows its last thought."""

from __future__ import annotations

import pytest

from cpu_limit import cpu_limit
from mel_lite.errors import ConfigError
from mel_lite.verify.thoughts import THINK_TAGS, answer_part, opened_thought, parse_tags

CHANNELS = "<|channel|>analysis<|message|>5?<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", "7"),
        ("<think>5</think>7", "7"),
        ("5</think>7", "7"),
        ("<think>5</think>6<think>5</think>7", "7"),
        ("<THINK>5</THINK>7", "7"),
        ("[THINK]5[/THINK]7", "7"),
        (CHANNELS + "7<|return|>", "7"),
        ("analysisIt is 5.assistantfinal7", "7"),
        ("analysisIt is 5.", None),
        ("analysis of variance: 7", "analysis of variance: 7"),
        ("<think>5</think>", ""),
        ("<think>5", None),
        ("<think>5</think>7<think>", None),
        ("<|channel|>analysis<|message|>5", None),
        ("<think></think>7</s>", "7"),
        ("", ""),
    ],
)
def test_the_part_after_the_last_thought(text: str, expected: str | None) -> None:
    assert answer_part(text) == expected


@pytest.mark.parametrize(
    ("prompt_end", "tag"),
    [
        ("assistant\n<think>\n", "<think>"),
        ("<Think>", "<think>"),
        ("assistant\n<thinking>", "<thinking>"),
        ("<|channel|>analysis<|message|>", "<|channel|>analysis"),
        ("<think>\n\n</think>\n\n", ""),
        ("Put your thoughts between <think> and </think>.", ""),
        ("Begin with <think>.\nassistant\n", ""),
        ("", ""),
    ],
)
def test_the_thought_that_a_prompt_opens(prompt_end: str, tag: str) -> None:
    assert opened_thought(prompt_end) == tag
    assert opened_thought(prompt_end, ()) == ""


def test_other_tags_replace_the_usual_ones() -> None:
    assert answer_part("<plan>5</plan>7", [("<plan>", "</plan>")]) == "7"
    assert answer_part("<think>5</think>7", [("<plan>", "</plan>")]) == "<think>5</think>7"
    assert answer_part("<think>5", []) == "<think>5"


def test_a_megabyte_of_tags_is_read_at_once() -> None:
    with cpu_limit(4):
        assert answer_part("<think>" * 150_000) is None
        assert answer_part("</think>" * 130_000 + "7") == "7"


def test_tags_of_an_option() -> None:
    assert parse_tags(None) == THINK_TAGS
    assert parse_tags([]) == ()
    assert parse_tags(["<plan> </plan>"]) == (("<plan>", "</plan>"),)
    for value in (["<plan>"], ["<plan> <plan>"], [["a", 3]], [""]):
        with pytest.raises(ConfigError, match="think_tags has"):
            parse_tags(value)
