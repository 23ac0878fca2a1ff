"""Prompts: what they say, that they fit, that nothing in them can forge a turn, and what users may override."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_templates import QUESTION, SYSTEM, TEMPLATES, tokenizer_with
from mel_lite.errors import ConfigError, DataError
from mel_lite.lessons.prompts import (
    BEFORE_PARTING_TOKENS,
    DEFAULT_TEMPLATES,
    REST_TOKENS,
    UnfitPair,
    analysis_prompt,
    load_templates,
    question_prompt,
    replay_prompt,
)
from mel_lite.types import Group, Pair, Prompt, Rollout, Verdict
from tiny_models import SPECIAL

TOKENIZER = tokenizer_with()
CHAT = [{"role": "user", "content": "What is 2+3?"}]


def pair_of(right: str, wrong: str, prompt: Prompt = CHAT) -> Pair:
    def ids(text: str) -> tuple[int, ...]:
        return (*TOKENIZER(text)["input_ids"], 2)

    shared = next(
        (i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), min(len(right), len(wrong))
    )
    rollouts = (Rollout(0, ids(right), right, Verdict.RIGHT), Rollout(1, ids(wrong), wrong, Verdict.WRONG))
    return Pair(Group(prompt, "h", rollouts), *rollouts, shared)


def analysis_text(
    pair: Pair, limit: int = 100_000, tokenizer=TOKENIZER, templates=DEFAULT_TEMPLATES, mark: bool = False
) -> str:
    ids = analysis_prompt(pair, tokenizer, templates, max_context_tokens=limit, mark=mark)
    assert len(ids) <= limit
    return tokenizer.decode(ids)


def special_ids(ids) -> list[int]:
    return [i for i in ids if i < len(SPECIAL)]


# ---- what the prompts say


def test_the_analysis_prompt_as_a_conversation() -> None:
    text = analysis_text(pair_of("Two and three make five.", "Two and three make six."))
    assert text.startswith(f"<|im_start|>system\n{DEFAULT_TEMPLATES.analysis_system}<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n## Bifurcation\n")
    question, wrong, right = (text.index(s) for s in ("What is 2+3?", "three make six.", "three make five."))
    assert question < wrong < right
    assert "INCORRECT final answer:\n<incorrect>\nTwo and three make six.\n</incorrect>" in text
    assert "the CORRECT final answer:\n<correct>\nTwo and three make five.\n</correct>" in text
    headings = ["Bifurcation", "Critique", "Reflection", "Heuristics"]
    assert re.findall(r"^## (\w+)$", text, re.M) == [*headings, "Bifurcation"]


def test_the_instructions_are_compact() -> None:
    words = f"{DEFAULT_TEMPLATES.analysis_system} {DEFAULT_TEMPLATES.analysis_user}".split()
    assert len(words) < 240, "about 4 tokens per 3 words; context is dear on one GPU"


def test_the_analysis_prompt_of_plain_text_needs_no_chat_template() -> None:
    pair = pair_of("It is 5.", "It is 6.", prompt="Question: 2+3?\nAnswer:")
    text = analysis_text(pair, tokenizer=tokenizer_with(None))
    assert text.startswith(DEFAULT_TEMPLATES.analysis_system + "\n\nQuestion:\nQuestion: 2+3?\nAnswer:\n")
    assert text.endswith("it.\n\n## Bifurcation\n") or text.endswith("\n\n## Bifurcation\n")
    assert "<|" not in text


def test_a_dialogue_is_rendered_with_its_roles_and_without_its_system_turn():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2+3?"},
    ]
    text = analysis_text(pair_of("5", "6", prompt))
    assert "Question:\nUser: What is 1+1?\n\nAssistant: 2\n\nUser: And 2+3?\n\nSolution" in text
    assert "Be brief." not in text


def test_the_replay_prompt_puts_the_notes_before_the_question_in_the_last_user_turn() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, *CHAT]
    group = Group(prompt, "h", ())
    text = TOKENIZER.decode(replay_prompt(group, " Notes of mine. ", TOKENIZER, DEFAULT_TEMPLATES))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "<notes>\nNotes of mine.\n</notes>" in text
    assert text.endswith("\n\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n")
    assert group.prompt == [{"role": "system", "content": "Be brief."}, *CHAT], "the group is left as it was"
    control = TOKENIZER.decode(question_prompt(group, TOKENIZER))
    assert control == TOKENIZER.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def test_only_the_last_of_several_user_turns_gets_the_notes() -> None:
    prompt = [*CHAT, {"role": "assistant", "content": "5"}, {"role": "user", "content": "Sure?"}]
    text = TOKENIZER.decode(replay_prompt(Group(prompt, "h", ()), "M", TOKENIZER, DEFAULT_TEMPLATES))
    assert text.startswith("<|im_start|>user\nWhat is 2+3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n")
    assert text.count("<notes>") == 1


def test_a_plain_replay_prompt_ends_with_the_question_as_it_is() -> None:
    group = Group("Q: 2+3?\nA:", "h", ())
    text = TOKENIZER.decode(replay_prompt(group, "M", TOKENIZER, DEFAULT_TEMPLATES))
    assert text == DEFAULT_TEMPLATES.replay_user.replace("{experience}", "M").replace("{question}", "Q: 2+3?\nA:")
    assert TOKENIZER.decode(question_prompt(group, TOKENIZER)) == "Q: 2+3?\nA:"


def test_a_conversation_without_a_user_turn_cannot_be_replayed() -> None:
    with pytest.raises(DataError, match="prompt h has no message with role 'user'"):
        replay_prompt(Group([{"role": "system", "content": "x"}], "h", ()), "M", TOKENIZER, DEFAULT_TEMPLATES)


def test_values_are_not_searched_for_placeholders() -> None:
    pair = pair_of("{wrong} {question} \\boxed{5}", "{right} \\1 {", prompt="{right} {experience}?")
    text = analysis_text(pair)
    assert "<correct>\n{wrong} {question} \\boxed{5}\n</correct>" in text and "{right} {experience}?" in text
    group = Group("{experience}?", "h", ())
    assert TOKENIZER.decode(replay_prompt(group, "{question}", TOKENIZER, DEFAULT_TEMPLATES)).count("{question}") == 1


# ---- chat templates


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_lesson_prompts_keep_every_system_turn(kind: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[kind].source)
    group = Group([{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}], "h", ())
    control = TOKENIZER.decode(question_prompt(group, tokenizer))
    assert control == TEMPLATES[kind].expected
    replay = TOKENIZER.decode(replay_prompt(group, "M", tokenizer, DEFAULT_TEMPLATES))
    asked = DEFAULT_TEMPLATES.replay_user.replace("{experience}", "M").replace("{question}", QUESTION)
    assert replay == control.replace(QUESTION, asked)


@pytest.mark.parametrize("kind", ["rejects", "drops"])
def test_the_analysis_instruction_is_folded_like_any_system_turn(kind: str) -> None:
    text = analysis_text(pair_of("5", "6"), tokenizer=tokenizer_with(TEMPLATES[kind].source))
    assert text.startswith(f"<|im_start|>user\n{DEFAULT_TEMPLATES.analysis_system}\n\nQuestion:\nWhat is 2+3?\n")
    assert text.count(DEFAULT_TEMPLATES.analysis_system) == 1


# ---- nothing forges a turn

FORGERY = st.lists(st.sampled_from([*SPECIAL, "<|", "|>", "im_end", "<", "a", " ", "\n"]), max_size=12).map("".join)


@given(FORGERY, FORGERY, FORGERY, FORGERY)
def test_prompts_hold_the_special_ids_of_harmless_ones(question: str, right: str, wrong: str, notes: str) -> None:
    def prompts(question: str, right: str, wrong: str, notes: str) -> list[list[int]]:
        chat = [{"role": "system", "content": question}, {"role": "user", "content": question}]
        pair, plain = pair_of(right, wrong, chat), pair_of(right, wrong, question)
        return [
            special_ids(ids)
            for ids in (
                analysis_prompt(pair, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=99_999),
                analysis_prompt(plain, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=99_999),
                analysis_prompt(plain, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=99_999, mark=False),
                replay_prompt(pair.group, notes, TOKENIZER, DEFAULT_TEMPLATES),
                replay_prompt(Group("q", "h", ()), notes, TOKENIZER, DEFAULT_TEMPLATES),
                question_prompt(pair.group, TOKENIZER),
            )
        ]

    assert prompts(question, right, wrong, notes) == prompts("q", "r", "w", "n")


# ---- trimming

SHARED = "".join(f"s{i:03d} " for i in range(200))
RIGHT_REST = "RIGHT" + "".join(f"r{i:03d} " for i in range(80)) + "final 5"
WRONG_REST = "WRONG" + "".join(f"w{i:03d} " for i in range(160)) + "final 6"
LONG = pair_of(SHARED + RIGHT_REST, SHARED + WRONG_REST)


def solutions(text: str) -> tuple[str, str]:
    wrong = re.search(r"<incorrect>\n(.*)\n</incorrect>", text, re.S)
    right = re.search(r"<correct>\n(.*)\n</correct>", text, re.S)
    assert wrong and right
    return wrong[1], right[1]


def test_what_fits_is_not_trimmed() -> None:
    full_ids = analysis_prompt(LONG, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False)
    assert analysis_prompt(LONG, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=len(full_ids), mark=False) == full_ids
    assert solutions(analysis_text(LONG)) == (SHARED + WRONG_REST, SHARED + RIGHT_REST)


@pytest.mark.parametrize("less", [1, 200, 700, 1300])
def test_the_middle_of_the_common_prefix_goes_first(less: int) -> None:
    full_tokens = len(analysis_prompt(LONG, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False))
    wrong, right = solutions(analysis_text(LONG, full_tokens - less))
    for text, rest in ((wrong, WRONG_REST), (right, RIGHT_REST)):
        marker = re.search(r"\n?\[\.\.\. (\d+) tokens that both solutions share are left out \.\.\.\]\n", text)
        assert marker, text
        head, tail = text[: marker.start()], text[marker.end() :]
        assert tail.endswith(rest), "nothing after the point of parting is cut"
        before = tail.removesuffix(rest)
        assert SHARED.startswith(head) and SHARED.endswith(before) and len(before) >= BEFORE_PARTING_TOKENS
        assert len(head) + len(before) + int(marker[1]) == len(SHARED), "the marker tells the truth"
        assert less > 1200 or abs(len(head) - len(before)) <= 1, "the middle is cut"


def test_then_the_middle_of_the_rest_goes_and_the_ends_stay() -> None:
    full_tokens = len(analysis_prompt(LONG, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False))
    wrong, right = solutions(analysis_text(LONG, full_tokens - 2100))
    for text, rest in ((wrong, WRONG_REST), (right, RIGHT_REST)):
        window = SHARED[-BEFORE_PARTING_TOKENS:] + rest[:REST_TOKENS]
        assert window in text and text.endswith(rest[-REST_TOKENS + 1 :])
    counts = [int(n) for n in re.findall(r"\.\.\. (\d+) tokens are left out", wrong + right)]
    assert len(counts) == 2 and counts[0] > counts[1], "the longer solution gives more"


def test_the_smallest_prompt_fits_and_one_token_less_raises() -> None:
    full_tokens = len(analysis_prompt(LONG, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False))

    def fits(limit: int) -> bool:
        try:
            return bool(analysis_text(LONG, limit))
        except UnfitPair:
            return False

    smallest = bisect.bisect_left(range(full_tokens), True, key=fits)
    assert smallest < full_tokens - 2500
    with pytest.raises(UnfitPair, match=f"has {full_tokens} tokens, {smallest - 1} fit"):
        analysis_text(LONG, smallest - 1)
    assert all(fits(limit) for limit in range(smallest, full_tokens, 97))


def test_a_long_question_is_not_cut() -> None:
    pair = pair_of("5", "6", prompt="why " * 500)
    with pytest.raises(UnfitPair):
        analysis_text(pair, 1500)


def test_a_cut_through_a_character_leaves_no_debris() -> None:
    shared = "\u03b1\u03b2\u03b3" * 300  # two tokens per letter
    pair = pair_of(shared + "R", shared + "W")
    pair = dataclasses.replace(pair, common_prefix_tokens=len(shared) * 2)
    for less in range(100, 108):
        full = len(analysis_prompt(pair, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False))
        text = analysis_text(pair, full - less)
        assert "\ufffd" not in text and "left out" in text


# ---- the mark at the fork


@pytest.mark.parametrize(
    ("pair", "less", "digest"),
    [
        (pair_of("Two and three\n\nmake five.", "Two and three\n\nmake six."), 0, "08899ca475771b42"),
        (pair_of("It is 5.", "It is 6.", prompt="Question: 2+3?\nAnswer:"), 0, "8f82bf90d9e5be14"),
        (LONG, 2100, "1aabc6f7a1138af5"),
    ],
    ids=["chat", "plain", "trimmed"],
)
def test_without_the_mark_the_prompt_is_that_of_commit_48b4e81_byte_for_byte(pair: Pair, less: int, digest: str):
    full = len(analysis_prompt(pair, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False))
    assert hashlib.sha256(analysis_text(pair, full - less).encode()).hexdigest()[:16] == digest


def test_the_first_differing_lines_are_marked_and_the_instruction_says_so() -> None:
    text = analysis_text(pair_of("Add:\n2+3=5\nSo 5.", "Add:\n2+3=6\nSo 6."), mark=True)
    assert "<incorrect>\nAdd:\n> 2+3=6\nSo 6.\n</incorrect>" in text
    assert "<correct>\nAdd:\n> 2+3=5\nSo 5.\n</correct>" in text
    note = (
        "\n\nThe first line in which the two solutions differ begins with `>` in each. Name the wrong step of the "
        "incorrect solution in the bifurcation: quote its line exactly, in backticks, without that mark."
    )
    unmarked = analysis_text(pair_of("Add:\n2+3=5\nSo 5.", "Add:\n2+3=6\nSo 6."))
    assert text.replace("> 2", "2").replace(note, "", 1) == unmarked.replace("it.\n<|im_end|>", "it.<|im_end|>")


def test_the_mark_of_the_templates_is_used(tmp_path: Path) -> None:
    mine = load_templates(write(tmp_path, "fork_mark: 'HERE '\nfork_note: 'See {mark}!'"))
    text = analysis_text(pair_of("It is 5.", "It is 6."), templates=mine, mark=True)
    assert "<incorrect>\nIt is\nHERE 6.\n</incorrect>" in text and "\n\nSee HERE!<|im_end|>" in text
    assert mine.version_of(marked=True) == mine.version_of(marked=False) + "+fork"


@pytest.mark.parametrize("less", [0, 1, 300, 900, 1500])
@pytest.mark.parametrize(
    ("line_end", "blanks", "marked"),
    [("\n", "", "rest"), ("\n", "   \n\n", "rest"), ("", "", "rest"), ("", "\n", "line")],
    ids=["lines", "lines after blanks", "words", "one long line"],
)
def test_cuts_never_take_the_mark_or_move_it_to_another_line(less: int, line_end: str, blanks: str, marked: str):
    shared = "".join(f"s{i:03d} {line_end}" for i in range(200))
    pair = pair_of(shared + RIGHT_REST, shared + blanks + WRONG_REST)
    full = len(analysis_prompt(pair, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=10**6))
    wrong, right = solutions(analysis_text(pair, full - less, mark=True))
    for text, rest in ((wrong, "WRONGw000"), (right, "RIGHTr000")):
        (line,) = re.findall("^ ?> (.*)$", text, re.M)
        assert ("left out" in text) == (less > 0)
        if marked == "rest":
            assert line.startswith(rest)
        else:
            # The differing line begins in what both share; where its beginning is cut, what is left of it is marked.
            assert "s199" in line and (less == 0) == line.startswith("s000")


# ---- overrides


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_no_file_means_the_defaults() -> None:
    assert load_templates(None) is DEFAULT_TEMPLATES
    assert DEFAULT_TEMPLATES.version == "1"


def test_the_demo_has_short_prompts() -> None:
    demo = load_templates("demo")
    assert demo.version_of(marked=True) == "demo-1+fork"
    words = [len(texts.instructions(marked=True).split()) for texts in (demo, DEFAULT_TEMPLATES)]
    assert words[0] < 30 < 150 < words[1]
    assert "> 2+3=6" in analysis_text(pair_of("Add:\n2+3=5", "Add:\n2+3=6"), templates=demo, mark=True)


def test_a_file_overrides_fields_and_gets_a_version_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "analysis_prefill: 'So '\nreplay_user: '{question} \\boxed{x} {experience}'\n")
    loaded = load_templates(path)
    assert (loaded.analysis_prefill, loaded.analysis_user) == ("So ", DEFAULT_TEMPLATES.analysis_user)
    assert re.fullmatch("custom-[0-9a-f]{8}", loaded.version)
    assert loaded.version != load_templates(write(tmp_path, "analysis_prefill: 'Thus '")).version
    assert load_templates(write(tmp_path, "version: '7'")).version == "7"
    assert analysis_text(pair_of("5", "6"), templates=loaded).endswith("assistant\nSo ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("analysis_usr: x", r"unknown field 'analysis_usr'\. Did you mean 'analysis_user'\?"),
        ("replay_user: '{question}'", r"replay_user is missing the placeholder \{experience\}"),
        ("replay_user: '{question} {experience} {notes}'", r"replay_user has the unknown placeholder \{notes\}"),
        ("analysis_user: '{question} {rigth} {wrong}'", r"unknown placeholder \{rigth\}\. Did you mean 'right'\?"),
        ("analysis_system: 'You are {name}.'", r"analysis_system takes no placeholders"),
        ("analysis_prefill: 3", r"analysis_prefill is 3, not text"),
        ("fork_mark: ' '", r"fork_mark is ' ', but it must be visible text on one line"),
        ("fork_note: 'See the mark.'", r"fork_note is missing the placeholder \{mark\}"),
        ("- a", "has no fields"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_that_cannot_work_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_templates(write(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' cannot be read"):
        load_templates(str(tmp_path / "nowhere.yaml"))


def test_an_empty_fork_note_leaves_the_instruction_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("fork_note: ''\n")
    templates = load_templates(str(tmp_path / "t.yaml"))
    assert templates.instructions(marked=True) == templates.analysis_user
    assert len(DEFAULT_TEMPLATES.instructions(marked=True)) > len(DEFAULT_TEMPLATES.analysis_user) + 20
