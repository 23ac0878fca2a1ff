"""The fork of two solutions: first differing piece, mark, and the tokens behind characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mel_lite.lessons.fork import Unit, find_fork, fork_tokens, mark_fork, token_range
from mel_lite.text import common_prefix_tokens
from mel_lite.types import Group, Pair, Rollout, Span, Verdict
from tiny_models import tiny_tokenizer

BYTES = tiny_tokenizer()


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens cross words, line ends and parts of characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["Add first.\n\n2 + 3 = 5\n", "\u00e4\u00f6\u00fc \U0001f600\U0001f601 = 5\n  so"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


MERGING = merging_tokenizer()


@pytest.mark.parametrize(
    ("right", "wrong", "ours", "theirs", "unit"),
    [
        ("a\nb = 1\nc", "a\nb = 2\nc", "b = 1", "b = 2", Unit.LINE),
        ("a\r\nb = 1\r\nc", "a\nb = 2\nc", "b = 1", "b = 2", Unit.LINE),
        ("a \n\n\n  b = 1", "a\n b = 2", "b = 1", "b = 2", Unit.LINE),
        ("a\u2028b\u2028c", "a\u2028b\u2028d", "c", "d", Unit.LINE),
        ("a\nb", "a\nb\nc", "", "c", Unit.LINE),
        ("a\nb\nc", "a\nb\n", "c", "", Unit.LINE),
        ("x\ny", "one line", "x", "one line", Unit.LINE),
        ("It is. 3.5 is 4. So 4.", "It is. 3.5 is 3. So 3.", "3.5 is 4.", "3.5 is 3.", Unit.SENTENCE),
        ("\u4e00\u3002\u4e8c\u3002", "\u4e00\u3002\u4e09\u3002", "\u4e8c\u3002", "\u4e09\u3002", Unit.SENTENCE),
        ("!" * 40 + " a", "!" * 40 + " b", "a", "b", Unit.SENTENCE),
        ("it is 5", "it is 6", "5", "6", Unit.WORD),
        ("it is", "it is 6", "", "6", Unit.WORD),
        ("", "6", "", "6", Unit.WORD),
        ("a\nb", " a \r\nb\n", "", "", Unit.LINE),
    ],
)
def test_the_first_differing_piece(right: str, wrong: str, ours: str, theirs: str, unit: Unit) -> None:
    fork = find_fork(right, wrong)
    assert (fork.right.of(right), fork.wrong.of(wrong), fork.unit) == (ours, theirs, unit)


def test_a_missing_piece_is_an_empty_span_at_the_end_of_the_text() -> None:
    assert find_fork("a\nb \n", "a\nb\nc").right == Span(3, 3)


@pytest.mark.parametrize(
    ("text", "span", "marked"),
    [
        ("a\nb\nc", Span(2, 3), "a\n> b\nc"),
        ("a\r\n  b", Span(5, 6), "a\r\n  > b"),
        ("b", Span(0, 1), "> b"),
        ("it is  6 now", Span(7, 8), "it is\n> 6 now"),
        ("a\nb", Span(3, 3), "a\nb\n>"),
        ("", Span(0, 0), ">"),
    ],
)
def test_the_mark_begins_a_line(text: str, span: Span, marked: str) -> None:
    assert mark_fork(text, span, "> ") == marked


# ---- tokens

TEXT = st.lists(
    st.sampled_from(["Add", " first", ".", "\n", "2", " + ", "=", "\u00e4", "\U0001f600", " "]), max_size=30
)


@given(TEXT, st.integers(0, 90), st.integers(1, 30), st.sampled_from([BYTES, MERGING]))
def test_the_tokens_of_a_span_are_those_whose_bytes_lie_in_it(
    pieces: list[str], start: int, length: int, tokenizer: Any
) -> None:
    text = "".join(pieces)
    span = Span(min(start, len(text)), min(start + length, len(text)))
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    first_byte, end_byte = (len(text[:at].encode()) for at in (span.start, span.end))
    alphabet = {character: byte for byte, character in enumerate_bytes()}
    expected, at = [], 0
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(ids[:-1])):
        size = len([alphabet[character] for character in token])
        if at < end_byte and at + size > first_byte and span.end > span.start:
            expected.append(index)
        at += size
    assert at == len(text.encode())
    assert list(range(*token_range(ids, span, tokenizer))) == expected


def enumerate_bytes() -> list[tuple[int, str]]:
    """Return (byte, character) of byte-level vocabularies, as GPT-2 defined them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [(byte, chr(byte)) for byte in kept] + [(byte, chr(256 + n)) for n, byte in enumerate(others)]


def pair_of(right: str, wrong: str, tokenizer: Any) -> Pair:
    rollouts = [
        Rollout(i, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), text, verdict)
        for i, (text, verdict) in enumerate(((right, Verdict.RIGHT), (wrong, Verdict.WRONG)))
    ]
    shared = common_prefix_tokens(*(each.completion_ids for each in rollouts))
    return Pair(Group("q", "h", tuple(rollouts)), *rollouts, shared)


def test_the_fork_in_tokens_is_the_first_differing_token() -> None:
    pair = pair_of("a\n1+1=2", "a\n1+1=3", BYTES)
    assert fork_tokens(pair) == fork_tokens(pair, BYTES) == (6, 6)


def test_blanks_alone_are_no_fork_where_the_tokenizer_is_given() -> None:
    pair = pair_of("a\n\n\n1+1=2", "a \n1+1=3", BYTES)
    assert fork_tokens(pair) == (1, 1)
    assert fork_tokens(pair, BYTES) == (4, 3)


def test_a_solution_that_ends_first_parts_at_its_end() -> None:
    assert fork_tokens(pair_of("a\nb", "a\nb\nc", BYTES), BYTES) == (3, 4)


def test_few_decodings_find_a_span_in_a_long_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = BYTES("x" * 4096, add_special_tokens=False)["input_ids"]
    calls = []
    decode = BYTES.decode
    monkeypatch.setattr(BYTES, "decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    assert token_range(ids, Span(4000, 4010), BYTES) == (4000, 4010)
    assert len(calls) <= 30
