"""Hopeless analyses: `certain` ends only what can no longer be parsed, and changes no token of the others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiences import lesson_context
from mel_lite.engines import decode, hf
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.lessons.parsing import MAX_CHARS, ParseFailure, hopeless, parse_analysis
from mel_lite.lessons.pipeline import checked
from mel_lite.training.scoring import install_scoring_head
from mel_lite.types import Analysis, EarlyEnd, Finish, Group, Pair, Rollout, Status, Verdict
from tiny_models import save_tiny, tiny_tokenizer

GOOD = (
    "## Bifurcation\nIt adds before it multiplies.\n\n## Critique\nThe order of operations was ignored here.\n\n"
    "## Heuristics\n- If signs are mixed, then bind products first.\n"
)
PREFILL = "## Bifurcation\n"


def why(text: str, when: EarlyEnd = EarlyEnd.CERTAIN, share: float = 0.1) -> str:
    return hopeless(text, when, share=share, prefill=PREFILL)


@pytest.mark.parametrize(
    ("text", "certain", "likely"),
    [
        (PREFILL + "so " * 9, "the word 'so' occurs 8 times in a row", "the word 'so' occurs 8 times in a row"),
        (PREFILL + "so " * 7 + "so", "", ""),  # the last word may become "sofa"
        (PREFILL + "a" * (MAX_CHARS + 1), f"{MAX_CHARS + 16} characters", f"{MAX_CHARS + 16} characters"),
        (PREFILL + "<think>" + "so " * 9, "", ""),
        (PREFILL + "<think>" + "so " * 9 + "</think>" + PREFILL, "", ""),
        (PREFILL + "It adds one and then two. " * 12, "", " four-word phrases are distinct"),
        (GOOD, "", ""),
    ],
)
def test_what_is_hopeless(text: str, certain: str, likely: str) -> None:
    for when, reason in ((EarlyEnd.NEVER, ""), (EarlyEnd.CERTAIN, certain), (EarlyEnd.LIKELY, likely)):
        found = why(text, when)
        assert bool(found) is bool(reason) and reason in found


def test_no_further_section_by_half_of_the_tokens_is_likely_hopeless() -> None:
    begun, reply = GOOD[: GOOD.index("## Critique")], '{"bifurcation": "It adds'
    assert why(begun, EarlyEnd.LIKELY, share=0.5) == "no further section by half of its tokens"
    assert why(begun, EarlyEnd.LIKELY, share=0.49) == ""
    assert why(begun, EarlyEnd.CERTAIN, share=0.5) == ""
    assert why(GOOD[: GOOD.index("The order")], EarlyEnd.LIKELY, share=0.5) == ""
    assert why(PREFILL + reply, EarlyEnd.LIKELY, share=0.5) == "", "JSON has no headings"


def test_no_continuation_of_a_certain_one_is_parsed_and_no_beginning_of_a_good_one_is_certain() -> None:
    rng = random.Random(5)
    pieces = [
        "so ",
        "so",
        "fa ",
        "\n",
        "- If a, then b. ",
        "## Critique\n",
        "## Heuristics\n",
        "x=1; ",
        "\x00",
        "é",
        "{",
        "}",
    ]
    ended = parsed = 0
    for _ in range(1500):
        most = rng.choice(pieces)
        begun = PREFILL + "".join(rng.choice([most, most, most, rng.choice(pieces)]) for _ in range(rng.randrange(30)))
        text = begun + rng.choice(["", "fa ", "ber "]) + rng.choice(["", GOOD, GOOD[len(PREFILL) :], '"}'])
        try:
            parse_analysis(text, finish=Finish.STOP)
            parsed += 1
            assert not why(begun), begun
        except ParseFailure:
            ended += bool(why(begun))
    assert parsed > 50 and ended > 50


@pytest.fixture(scope="module", params=["own loop", "model.generate"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFEngine:
    base = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)
    install_scoring_head(base)
    return HFEngine(base, eos_ids=[2], pad_id=0, shares_prefill=request.param == "own loop")


def test_the_others_keep_every_token(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up criterion, so that a random model has both; rows that are not looked at are rollouts."""
    for module in (decode, hf):
        monkeypatch.setattr(module, "LOOK_TOKENS", 4)
    looks: list[int] = []

    def is_hopeless(ids: Any) -> bool:
        looks.append(len(ids))
        return sum(ids) % 3 == 0

    requests = [Request(tuple(range(10, 12 + seed % 4)), seed) for seed in range(12)]
    sampling = Sampling(30, temperature=1.3)
    free = engine.generate(requests, sampling)
    watched = Sampling(30, temperature=1.3, is_hopeless=is_hopeless)
    mixed = engine.generate(
        [Request(r.prompt_ids, r.seed, watched if r.seed % 2 else None) for r in requests], sampling
    )
    ended = [done for done in mixed if done.finish is Finish.ENDED]
    assert 0 < len(ended) < 6 and {len(done.ids) % 4 for done in ended} == {0} and set(looks) <= set(range(4, 31, 4))
    for request, whole, done in zip(requests, free, mixed, strict=True):
        if done.finish is Finish.ENDED:
            assert request.seed % 2 and len(done.ids) < len(whole.ids)
            assert sum(done.ids) % 3 == 0 and whole.ids[: len(done.ids)] == done.ids
        else:
            assert (done.ids, done.finish) == (whole.ids, whole.finish)
            assert done.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


def test_one_that_was_ended_is_stored_with_the_reason() -> None:
    tokenizer = tiny_tokenizer()
    ids = tuple(tokenizer("so " * 9)["input_ids"])
    rollouts = (Rollout(0, (5,), "r", Verdict.RIGHT), Rollout(1, (6,), "w", Verdict.WRONG))
    pair = Pair(Group("?", "h", rollouts), *rollouts, 0)
    context = lesson_context(tokenizer, hopeless=lambda ids: why(PREFILL + tokenizer.decode(list(ids))))
    found = checked(Analysis(pair, (1,), ids, PREFILL + "so " * 9, Finish.ENDED, 1.0), context, 0)
    assert (found.status, found.reason) == (Status.UNPARSED, "ended early: the word 'so' occurs 8 times in a row")
