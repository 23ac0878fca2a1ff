"""Scripted engine: a policy that is right about half the time and writes well-formed analyses.

Tests of the trainer need every stage of the funnel within a second, which no tiny random model provides. Only the
sampling is scripted; tokenizer, trainer, model, losses, store and checkpoints are real.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.types import Finish

ANALYSIS = (
    "The wrong solution parts from the right one when it reads the second number of the question.\n\n"
    "## Critique\nIt took the sign for granted instead of reading it. The right solution named the operation first, "
    "which kept it safe. Name the operation before computing.\n\n"
    "## Reflection\nI rushed. I will read the operation before the numbers and check it once more.\n\n"
    "## Heuristics\n- If a question joins two numbers, then name the operation before computing anything.\n"
)


def default_answer(question: str, rng: random.Random) -> str:
    """Return `Answer: a+b`, right two times in three (sampled from `rng`)."""
    a, b = map(int, re.findall(r"\d+", question)[-2:])
    return f"Answer: {a + b + (rng.random() < 1 / 3)}"


class ScriptedEngine(Engine):
    """Answers each request according to its prompt, at random but determined by the request's seed."""

    name = "scripted"
    mixes = True

    def __init__(
        self,
        tokenizer: Any,
        *,
        answer: Callable[[str, random.Random], str] = default_answer,
        analysis: Callable[[random.Random], str] = lambda rng: ANALYSIS,
    ) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._analysis = analysis
        self.calls: list[tuple[Sequence[Request], Sampling]] = []

    def wake(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append((requests, sampling))
        return [self._complete(request, request.options(sampling)) for request in requests]

    def _complete(self, request: Request, sampling: Sampling) -> Completion:
        rng = random.Random(request.seed)
        prompt = self._tokenizer.decode(request.prompt_ids)
        writes_analysis = prompt.rstrip().endswith("## Bifurcation")
        text = self._analysis(rng) if writes_analysis else self._answer(prompt, rng)
        ids = [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        cut = tuple(ids[: sampling.max_new_tokens])
        finish = Finish.STOP if len(cut) == len(ids) else Finish.LENGTH
        return Completion(cut, (-0.5,) * len(cut), finish)
