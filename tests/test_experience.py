"""Analyses: how they are asked for, what is read out of them, and the tokens a lesson trains on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.errors import ConfigError, EngineError
from mel_lite.experience import MAX_CHARS, ParseFailure, lesson_from, parse_analysis, write_analyses
from mel_lite.templates import DEFAULT_TEMPLATES, Templates, analysis_prompt
from mel_lite.types import Analysis, Finish, Group, MetaExperience, Pair, Rollout, Verdict
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 2
SAMPLING = Sampling(max_new_tokens=64)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


# ---- parsing

WANT = MetaExperience(
    "It adds before it multiplies.",
    "Order of operations was ignored.\n\nI rushed; I will bind products first.",
    "- If signs are mixed, then bind products first.",
)
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
def test_shapes_of_small_models_are_read_the_same(shape):
    assert parse(SHAPES[shape]) == WANT


def test_a_reflection_alone_is_the_critique():
    assert parse(f"## Bifurcation\n{B}\n## Reflection\n{R}\n## Heuristics\n{H}").critique == R


def test_a_missing_reflection_is_not_missed():
    assert parse(f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{H}").critique == C


def test_subheadings_stay_in_their_part():
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


def test_headings_of_the_heuristics_are_all_theirs():
    text = (
        f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristic 1: Order\nBind first.\n## Heuristic 2: Signs\nLook twice."
    )
    parsed = parse(text)
    assert "Bind first." in parsed.heuristic and "Look twice." in parsed.heuristic


def test_sentences_that_begin_with_a_name_are_text():
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
def test_what_holds_no_experience_is_refused_with_the_reason(text, reason):
    with pytest.raises(ParseFailure) as failure:
        parse(text)
    assert str(failure.value).startswith(reason)


def test_numbered_failures_do_not_blame_honest_analyses():
    rules = "\n".join(
        f"- If a {thing} is unclear, then {act} it before going on."
        for thing, act in zip(
            "unit sign bound case symbol table figure step".split(),
            "convert copy test split name read draw justify".split(),
            strict=True,
        )
    )
    assert parse(f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n{rules}").heuristic == rules


def test_parroted_instructions_are_refused_and_quoting_a_little_is_not():
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


def test_cut_off_before_the_heuristics():
    text = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heur"
    with pytest.raises(ParseFailure, match="cut off at the token limit before the heuristics"):
        parse(text, Finish.LENGTH)
    with pytest.raises(ParseFailure, match="no heuristic"):
        parse(text)


def test_cut_off_within_the_heuristics_loses_the_unfinished_rule_only():
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
def test_time_is_linear(piece, length):
    head = f"## Bifurcation\n{B}\n## Critique\n{C}\n## Heuristics\n"
    text = (head + piece * (length // len(piece)))[:length]
    for finish in Finish:
        start_s = time.perf_counter()
        try:
            parse(text, finish)
        except ParseFailure:
            pass
        assert time.perf_counter() - start_s < 1


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*PIECES, B, C, R, H]) | st.text(max_size=8), max_size=30).map("".join),
    st.sampled_from(Finish),
)
def test_any_text_is_read_or_refused(text, finish):
    try:
        parsed = parse(text, finish)
    except ParseFailure as failure:
        assert str(failure)
    else:
        assert all(part.strip() == part != "" for part in (parsed.bifurcation, parsed.critique, parsed.heuristic))


# ---- writing


class Scripted:
    """Writes the next of its texts for each request."""

    name = "scripted"

    def __init__(self, *texts: str, finish: Finish = Finish.STOP, logprobs: bool = True) -> None:
        self.texts, self.finish, self.logprobs = list(texts), finish, logprobs
        self.calls: list[list[Request]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert sampling == SAMPLING
        self.calls.append(list(requests))
        done = []
        for text in self.texts[: len(requests)]:
            ids = (*ids_of(text), *((EOS,) if self.finish is Finish.STOP else ()))
            done.append(Completion(ids, tuple(-0.25 * i for i in range(len(ids))) * self.logprobs, self.finish))
        return done

    def wake(self) -> None: ...

    def sleep(self) -> None: ...


def pair(index: int = 0, prompt: str = "2+3?", solution: str = "It is 5.") -> Pair:
    rollouts = (
        Rollout(0, ids_of(solution), solution, Verdict.RIGHT),
        Rollout(1, ids_of("It is 6."), "It is 6.", Verdict.WRONG),
    )
    return Pair(Group([{"role": "user", "content": prompt}], f"hash-{prompt}", rollouts), *rollouts, 6, index)


def write(
    engine: Scripted, pairs: list[Pair], limit: int = 4_000, templates: Templates = DEFAULT_TEMPLATES, **kwargs: int
):
    options = {"run_seed": 1, "step": 2} | kwargs
    return write_analyses(
        pairs,
        engine=engine,
        tokenizer=TOKENIZER,
        templates=templates,
        sampling=SAMPLING,
        max_context_tokens=limit,
        **options,
    )


def test_one_batch_writes_all_analyses():
    engine = Scripted("A step.", "Another.")
    pairs = [pair(0), pair(1, "4+4?")]
    analyses, skipped = write(engine, pairs)
    assert skipped == []
    ((first, second),) = engine.calls
    contexts = [analysis_prompt(each, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=4_000) for each in pairs]
    assert [first.prompt_ids, second.prompt_ids] == contexts
    assert [a.context_ids for a in analyses] == contexts
    assert analyses[0] == Analysis(
        pairs[0], contexts[0], (*ids_of("A step."), EOS), "## Bifurcation\nA step.", Finish.STOP, 0.25 * 7 / 2
    )
    assert analyses[1].text == "## Bifurcation\nAnother."


def test_a_pair_that_does_not_fit_is_skipped_with_the_reason():
    engine = Scripted("A step.")
    pairs = [pair(0, "why " * 900), pair(1)]
    analyses, skipped = write(engine, pairs)
    assert [a.pair for a in analyses] == [pairs[1]] and len(engine.calls[0]) == 1
    ((unfit, reason),) = skipped
    assert unfit == pairs[0] and "4000 fit, and the rest may not be trimmed" in reason


def test_no_pair_asks_nobody_and_no_log_probs_give_nan():
    engine = Scripted("A step.", logprobs=False)
    assert write(engine, []) == ([], []) and engine.calls == []
    (analysis,), _ = write(engine, [pair()])
    assert analysis.nll_nats != analysis.nll_nats


def test_seeds_depend_on_run_step_prompt_and_pair():
    def seeds(*pairs: Pair, **kwargs: int) -> list[int]:
        engine = Scripted(*["A step."] * len(pairs))
        write(engine, list(pairs), **kwargs)
        return [request.seed for request in engine.calls[0]]

    assert seeds(pair(0), pair(1))[1:] == seeds(pair(1))
    assert (
        len(
            {
                *seeds(pair(0)),
                *seeds(pair(1)),
                *seeds(pair(0, "1+1?")),
                *seeds(pair(0), step=3),
                *seeds(pair(0), run_seed=2),
            }
        )
        == 5
    )


def test_a_short_answer_of_the_engine_is_an_error():
    with pytest.raises(EngineError, match="'scripted' answered 1 of 2 analysis requests"):
        write(Scripted("A step."), [pair(0), pair(1)])


# ---- lessons


def analysis_of(text: str, finish: Finish = Finish.STOP, templates: Templates = DEFAULT_TEMPLATES) -> Analysis:
    (analysis,), _ = write(Scripted(text, finish=finish), [pair()], templates=templates)
    return analysis


def lesson(analysis: Analysis, train_on: str = "analysis", redacted: MetaExperience | None = None, parsed=WANT):
    return lesson_from(analysis, parsed, tokenizer=TOKENIZER, redacted=redacted, train_on=train_on, experience_id=7)


def test_the_analysis_is_trained_on_exactly_as_sampled():
    analysis = analysis_of("It adds.\n## Critique\nbad")
    made = lesson(analysis)
    assert (made.experience_id, made.context_ids, made.target_ids) == (7, analysis.context_ids, analysis.analysis_ids)
    odd = Analysis(analysis.pair, analysis.context_ids, (70, 71, EOS), "not what the ids decode to", Finish.STOP, 0.0)
    assert lesson(odd).target_ids == (70, 71, EOS)


@pytest.mark.parametrize("redacted", [None, MetaExperience("It adds [...].", "c", "h")])
@pytest.mark.parametrize(
    ("prefill", "rest_of"),
    [("## Bifurcation\n", "## Bifurcation\n"), ("", ""), ("Let me see.\n\n## Bif", "## Bif"), ("Well: ", "")],
)
def test_context_and_canonical_text_join_without_saying_the_heading_twice(prefill, rest_of, redacted):
    analysis = analysis_of("x", templates=Templates(analysis_prefill=prefill))
    made = lesson(analysis, train_on="experience", redacted=redacted)
    text = (redacted or WANT).as_text()
    assert TOKENIZER.decode(made.target_ids) == text.removeprefix(rest_of) + "<|im_end|>"
    assert made.context_ids == analysis.context_ids
    assert TOKENIZER.decode(made.context_ids).endswith(prefill)


def test_a_redacted_analysis_is_never_trained_on_as_sampled():
    analysis = analysis_of("It adds 474.\n## Critique\nbad")
    made = lesson(analysis, redacted=MetaExperience("It adds [...].", "bad", "h"))
    assert "474" not in TOKENIZER.decode(made.target_ids)
    assert TOKENIZER.decode(made.target_ids) == "It adds [...].\n\n## Critique\nbad\n\n## Heuristics\nh<|im_end|>"


def test_the_end_is_the_id_that_ended_the_analysis_else_the_tokenizers():
    sampled = analysis_of("x")
    other_end = Analysis(sampled.pair, sampled.context_ids, (9, 3), sampled.text, Finish.STOP, 0.0)
    assert lesson(other_end, "experience").target_ids[-1] == 3
    assert lesson(analysis_of("x", Finish.LENGTH), "experience").target_ids[-1] == EOS


def test_canonical_text_cannot_hold_control_tokens():
    forged = MetaExperience("a <|im_end|> b", "c", "h")
    ids = lesson(analysis_of("x"), "experience", parsed=forged).target_ids
    assert [i for i in ids if i < 4] == [EOS] and ids[-1] == EOS


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match="mel_train_on='all' is not one of analysis, experience"):
        lesson(analysis_of("x"), "all")
