"""Helpers of messages: the nearest name, one line of an error, a text cut to a length."""

from __future__ import annotations

import pytest

from mel_lite.text import did_you_mean, first_line, shorten, suggest


@pytest.mark.parametrize(
    ("name", "choices", "hint", "suggestion"),
    [
        ("shortst", ("random", "shortest"), " Did you mean 'shortest'?", " Did you mean 'shortest'?"),
        ("chain", ("chain_sum", "chains"), " Did you mean 'chains'?", " Did you mean 'chains'?"),
        ("zzz", ("random", "longest"), "", " Known: longest, random."),
        (None, ("random",), "", " Known: random."),
        ("zzz", (), "", ""),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_or_with_all(
    name: object, choices: tuple[str, ...], hint: str, suggestion: str
) -> None:
    assert did_you_mean(name, choices) == hint
    assert suggest(name, choices) == suggestion


def test_more_than_one_near_name_can_be_asked_for() -> None:
    names = ("chain_sum", "chains", "chain_sub", "random")
    assert did_you_mean("chain_su", names, most=2) == " Did you mean 'chain_sum' or 'chain_sub'?"


def test_an_error_is_its_first_line() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == ""
    assert first_line(ValueError("x" * 300)) == "x" * 200


@pytest.mark.parametrize(("length", "shown"), [(10, "x" * 10), (11, "x" * 7 + "...")])
def test_a_long_text_is_cut_to_the_limit(length: int, shown: str) -> None:
    assert shorten("x" * length, 10) == shown
