"""Analyses: what is read out of them."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_limit import cpu_limit
from experiences import WANT
from mel_lite.lessons.parsing import MAX_CHARS, ParseFailure, parse_analysis
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES
from mel_lite.types import Finish, MetaExperience

# ---- parsing

B, C, R, H = (
    WANT.bifurcation,
    "Order of operations was ignored.",
    "I rushed; I will bind products first.",
    WANT.heuristic,
)


def parse(text: str, finish: Finish = Finish.STOP) -> MetaExperience:
    return parse_analysis(text, finish=finish)


PLAIN = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Reflection\n{R}\n## Heuristics\n{H}"
SHAPES = {
    "as asked": f"## Bifurcation\n{B}\n\n## Critique\n{C}\n\n## Reflection\n{R}\n\n## Heuristics\n{H}\n",
    "heading said again after the prefill": (
        f"## Bifurcation\n## Bifurcation\n{B}\n## Critique\n{C}\n## Reflection\n{R}\n## Heuristics\n{H}"
    ),
    "other levels": f"# Bifurcation\n{B}\n### Critique\n{C}\n#### Reflection\n{R}\n##### Heuristics\n{H}",
    "no blank after #": f"##Bifurcation\n{B}\n##Critique\n{C}\n##Reflection\n{R}\n##Heuristics\n{H}",
    "bold": f"**Bifurcation**\n{B}\n\n**Critique:**\n{C}\n\n**Reflection**:\n{R}\n\n__Heuristics__\n{H}",
    "bold in headings": (
        f"## **Bifurcation:**\n{B}\n## **Critique**\n{C}\n## **Reflection**\n{R}\n## **Heuristics**\n{H}"
    ),
    "numbered": f"1. Bifurcation\n{B}\n2) Critique\n{C}\n(3) Reflection\n{R}\nIV. Heuristics\n{H}",
    "numbered headings": f"## 1. Bifurcation\n{B}\n## 2. Critique\n{C}\n## 3: Reflection\n{R}\n## 4) Heuristics\n{H}",
    "colons on the line": f"Bifurcation: {B}\nCritique: {C}\nReflection: {R}\nHeuristics:\n{H}",
    "bold colons on the line": f"**Bifurcation:** {B}\n**Critique:** {C}\n- **Reflection:** {R}\n**Heuristics:**\n{H}",
    "upper case": f"BIFURCATION\n{B}\nCRITIQUE\n{C}\nREFLECTION\n{R}\nHEURISTICS\n{H}",
    "lower case": f"## bifurcation\n{B}\n## critique\n{C}\n## reflection\n{R}\n## heuristics\n{H}",
    "quoted": f"> ## Bifurcation\n{B}\n> ## Critique\n{C}\n> ## Reflection\n{R}\n> ## Heuristics\n{H}",
    "longer names": (
        f"## Failure Point and Cognitive Pattern\n{B}\n## Critique of the Incorrect Solution:\n{C}\n"
        f"## First-person Reflection (review, insight, action)\n{R}\n## Heuristics for Future Problems\n{H}"
    ),
    "other names": (
        f"## Point of failure\n{B}\n## Root cause analysis\n{C}\n## Self-reflection\n{R}\n## Lessons Learned\n{H}"
    ),
    "more other names": (
        f"## Turning point\n## Where they part\n{B}\n## Root Cause\n{C}\n## Insight\n{R}\n## Rules of thumb\n{H}"
    ),
    "other order": f"## Heuristics\n{H}\n## Critique\n{C}\n## Reflection\n{R}\n## Bifurcation\n{B}\n",
    "text before": f"Sure! Here is my analysis.\n\n{PLAIN}",
    "thought before": f"## Bifurcation\nHmm.\n## Heuristics\nnot yet\n</think>\n{PLAIN}",
    "garbage after": f"{PLAIN}\n\n---\n\n## Final Answer\nAnother thing altogether.\n## Bifurcation\nAgain.",
    "another turn after": (f"{PLAIN}\nUser: thanks\nQuestion: next?"),
    "another problem after": f"{PLAIN}\n**Problem:** 3+4",
    "fence": f"```markdown\n## Bifurcation\n{B}\n## Critique\n{C}\n## Reflection\n{R}\n## Heuristics\n{H}\n```",
    "windows": f"## Bifurcation\r\n{B}\r\n## Critique\r\n{C}\r\n## Reflection\r\n{R}\r\n## Heuristics\r\n{H}\r\n",
    "critique in two places": f"{PLAIN}\n## Contrast\nMore.",
    "json": json.dumps({"bifurcation": B, "critique": C, "reflection": R, "heuristics": [H.removeprefix("- ")]}),
    "json after the prefill": (
        "## Bifurcation\n```json\n"
        + json.dumps({"Failure point": B, "root_cause": C, "Reflection": R, "HEURISTICS": H}, indent=1)
        + "\n```"
    ),
    "broken json": f'{{\n"bifurcation": "{B}",\n"critique": "{C}",\n"reflection": "{R}",\n"heuristics": "{H}',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_small_models_are_read_the_same(shape: str) -> None:
    assert parse(SHAPES[shape]) == WANT


def test_a_reflection_alone_is_the_critique() -> None:
    assert parse(f"## Bifurcation\n{B}\n## Reflection\n{R}\n## Heuristics\n{H}").critique == R


def test_a_missing_reflection_is_not_missed() -> None:
    assert parse(f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{H}").critique == C


def test_subheadings_stay_in_their_part() -> None:
    text = (
        f"## Bifurcation\n{B}\n## Critique\n### Root cause\nIt hurried.\n### Insight\nThe other one waited.\n"
        "### What protected it\nA plan.\n## Heuristics\n### Rule 1: Order\nIf signs mix, then bind.\n"
        "**Root cause check:** When stuck, I must look back.\nReview:\n- all signs"
    )
    parsed = parse(text)
    for piece in ("Root cause", "It hurried.", "Insight", "The other one waited.", "What protected it", "A plan."):
        assert piece in parsed.critique
    assert "Rule 1: Order" in parsed.heuristic and "**Root cause check:** When stuck" in parsed.heuristic
    assert parsed.heuristic.endswith("Review:\n- all signs")
    assert parsed.bifurcation == B


def test_headings_of_the_heuristics_are_all_theirs() -> None:
    text = (
        f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristic 1: Order\nBind first.\n## Heuristic 2: Signs\nLook twice."
    )
    parsed = parse(text)
    assert "Bind first." in parsed.heuristic and "Look twice." in parsed.heuristic


def test_sentences_that_begin_with_a_name_are_text() -> None:
    text = (
        f"## Bifurcation\nCritique of such steps is hard.\nHeuristics can mislead here.\n{B}\n"
        f"## Critique\nReflection on it shows a rush. Analysis shows more.\n## Heuristics\n{H}"
    )
    parsed = parse(text)
    assert parsed.bifurcation.startswith("Critique of such steps is hard.\nHeuristics can mislead here.")
    assert parsed.critique == "Reflection on it shows a rush. Analysis shows more."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no bifurcation: there is no such part"),
        ("I cannot say.", "no bifurcation: there is no such part"),
        (f"## Bifurcation\n{B}\n## Heuristics\n{H}", "no critique: there is no such part"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}", "no heuristic: there is no such part"),
        (f"## Bifurcation\n\n## Critique\n{C}\n## Heuristics\n{H}", "no bifurcation: the part is empty"),
        (f"## Bifurcation\n{B}\n## Critique\n...\n## Heuristics\n{H}", "no critique: the part is empty"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n- N/A\n- none.", "no heuristic: the part is empty"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n[your text here]", "no heuristic: the part is empty"),
        ("## Bifurcation\nHere.\n## Critique\nBad.\n## Heuristics\nThink twice please.", "too short: 5 words"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n- If", "too short: 11 words, 1 of them heuristics"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{'so ' * 9}", "repeats itself: the word 'so'"),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{H * 20}", "repeats itself: "),
        (f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n" + "a+b=c;" * 200, "repeats itself: "),
        ("## Bifurcation\n" + "x" * MAX_CHARS, "runaway: 40015 characters"),
    ],
)
def test_what_holds_no_experience_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ParseFailure) as failure:
        parse(text)
    assert str(failure.value).startswith(reason)


def test_numbered_failures_do_not_blame_honest_analyses() -> None:
    rules = "\n".join(
        f"- If a {thing} is unclear, then {act} it before going on."
        for thing, act in zip(
            "unit sign bound case symbol table figure step".split(),
            "convert copy test split name read draw justify".split(),
            strict=True,
        )
    )
    assert parse(f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{rules}").heuristic == rules


def test_parroted_instructions_are_refused_and_quoting_a_little_is_not() -> None:
    told = DEFAULT_TEMPLATES.analysis_user
    asked = re.search(r"## Bifurcation\n(.*)\n\n## Critique\n(.*)\n\n## Reflection\n.*\n\n## Heuristics\n(.*)", told)
    assert asked
    parts = {"bifurcation": B, "critique": C, "heuristic": H}

    def analysis(**changed: str) -> str:
        said = parts | changed
        return "## Bifurcation\n{bifurcation}\n## Critique\n{critique}\n## Heuristics\n{heuristic}".format(**said)

    for part, echo in (("bifurcation", asked[1]), ("critique", asked[2]), ("heuristic", asked[3])):
        with pytest.raises(ParseFailure, match=rf"repeats the instructions: 100% of the {part}"):
            parse(analysis(**{part: echo}))
        longer = f"{echo} {echo.swapcase()} " + " ".join(f"word{i}" for i in range(2 * len(echo.split()) + 9))
        assert getattr(parse(analysis(**{part: longer})), part) == longer
    own = "Say in your own words what went wrong here and why that is so."
    parse_analysis(analysis(critique=own), finish=Finish.STOP)
    with pytest.raises(ParseFailure, match="repeats the instructions: 100% of the critique"):
        parse_analysis(analysis(critique=own), finish=Finish.STOP, instructions=f"Critique: {own}")


def test_cut_off_before_the_heuristics() -> None:
    text = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heur"
    with pytest.raises(ParseFailure, match="cut off at the token limit before the heuristics"):
        parse(text, Finish.LENGTH)
    with pytest.raises(ParseFailure, match="no heuristic"):
        parse(text)


def test_cut_off_within_the_heuristics_loses_the_unfinished_rule_only() -> None:
    text = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{H}\n- When a"
    assert parse(text, Finish.LENGTH).heuristic == H
    assert parse(text).heuristic == f"{H}\n- When a"
    assert parse(text.removesuffix("\n- When a"), Finish.LENGTH).heuristic == H, "the only rule stays"


PIECES = [
    "## Bifurcation\n",
    "## Critique\n",
    "**Heuristics:** ",
    "#",
    "*",
    "\n",
    " ",
    "-",
    ":",
    '{"a":',
    "}",
    "1.",
    "x ",
]


@pytest.mark.parametrize("length", [MAX_CHARS, 200_000])
@pytest.mark.parametrize("piece", [*PIECES, "If a b, then c d. ", "rule of ", "[", '"', "(ivx", "failure ", "</think>"])
def test_time_is_linear(piece: str, length: int) -> None:
    head = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n"
    text = (head + piece * (length // len(piece)))[:length]
    for finish in Finish:
        with cpu_limit(2), contextlib.suppress(ParseFailure):
            parse(text, finish)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*PIECES, B, C, R, H]) | st.text(max_size=8), max_size=30).map("".join),
    st.sampled_from(Finish),
)
def test_any_text_is_read_or_refused(text: str, finish: Finish) -> None:
    try:
        parsed = parse(text, finish)
    except ParseFailure as failure:
        assert str(failure)
    else:
        assert all(part.strip() == part != "" for part in (parsed.bifurcation, parsed.critique, parsed.heuristic))
