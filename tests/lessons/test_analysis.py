"""Analyses are sampled in one batch, from the prompt and the seed of their pair."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from experiences import lesson_context
from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.errors import EngineError
from mel_lite.lessons.analysis import write_analyses
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, Templates, analysis_prompt
from mel_lite.types import Analysis, Finish, Group, Pair, Rollout, Verdict
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 2
SAMPLING = Sampling(max_new_tokens=64)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


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
    batch = kwargs.pop("batch", 2)
    options = {"engine": engine, "templates": templates, "max_context_tokens": limit, "analysis": SAMPLING} | kwargs
    return write_analyses(pairs, lesson_context(TOKENIZER, **options), batch=batch)


def test_one_batch_writes_all_analyses() -> None:
    engine = Scripted("A step.", "Another.")
    pairs = [pair(0), pair(1, "4+4?")]
    analyses, skipped = write(engine, pairs)
    assert skipped == []
    ((first, second),) = engine.calls
    contexts = [analysis_prompt(each, TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=4_000) for each in pairs]
    assert [first.prompt_ids, second.prompt_ids] == contexts
    assert [a.context_ids for a in analyses] == contexts
    assert analyses[0] == Analysis(
        pairs[0], contexts[0], (*ids_of("A step."), EOS), "## Bifurcation\nA step.", Finish.STOP, 0.25 * 7 / 2, "1+fork"
    )
    assert analyses[1].text == "## Bifurcation\nAnother."


def test_mark_fork_off_gives_the_prompt_without_a_mark() -> None:
    (analysis,), _ = write(Scripted("A step."), [pair()], mark_fork=False)
    unmarked = analysis_prompt(pair(), TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=4_000, mark=False)
    assert (analysis.context_ids, analysis.templates_version) == (unmarked, "1")
    assert unmarked != analysis_prompt(pair(), TOKENIZER, DEFAULT_TEMPLATES, max_context_tokens=4_000)


def test_a_pair_that_does_not_fit_is_skipped_with_the_reason() -> None:
    engine = Scripted("A step.")
    pairs = [pair(0, "why " * 900), pair(1)]
    analyses, skipped = write(engine, pairs)
    assert [a.pair for a in analyses] == [pairs[1]] and len(engine.calls[0]) == 1
    ((unfit, reason),) = skipped
    assert unfit == pairs[0] and "4000 fit, and the rest may not be trimmed" in reason


def test_no_pair_asks_nobody_and_no_log_probs_give_nan() -> None:
    engine = Scripted("A step.", logprobs=False)
    assert write(engine, []) == ([], []) and engine.calls == []
    (analysis,), _ = write(engine, [pair()])
    assert analysis.nll_nats != analysis.nll_nats


def test_seeds_depend_on_run_step_prompt_and_pair() -> None:
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
                *seeds(pair(0), batch=3),
                *seeds(pair(0), run_seed=2),
            }
        )
        == 5
    )


def test_a_short_answer_of_the_engine_is_an_error() -> None:
    with pytest.raises(EngineError, match="'scripted' answered 1 of 2 analysis requests"):
        write(Scripted("A step."), [pair(0), pair(1)])
