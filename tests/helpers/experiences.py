"""Meta-experiences for tests of the store, the parser and the pipeline."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from mel_lite.engines.base import Sampling
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES
from mel_lite.types import (
    Analysis,
    Experience,
    Finish,
    Group,
    MetaExperience,
    Pair,
    Prompt,
    Rollout,
    Status,
    Verdict,
)

QUESTION = "How many primes are below 30?"
CHAT: Prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
PARSED = MetaExperience("Counted 1 as a prime.", "The definition was not checked.", "If asked to count, then define.")
WANT = MetaExperience(
    "It adds before it multiplies.",
    "Order of operations was ignored.\n\nI rushed; I will bind products first.",
    "- If signs are mixed, then bind products first.",
)


def experience(step: int = 1, status: Status = Status.KEPT, *, prompt: Prompt = CHAT, text: str = "raw") -> Experience:
    right = Rollout(4, (5, 6, 7), "so the answer is \\boxed{10}", Verdict.RIGHT)
    wrong = Rollout(6, (5, 8), "hence 11", Verdict.WRONG)
    group = Group(prompt, "00c0ffee00c0ffee", (right, wrong), answer="10")
    analysis = Analysis(Pair(group, right, wrong, 1, index=2), (1, 2), (3, 4, 5), text, Finish.STOP, 1.25)
    parsed = None if status is Status.UNPARSED else PARSED
    reason = "" if status is Status.KEPT else f"dropped: {status}"
    return Experience(step, analysis, status, reason, parsed)


def lesson_context(tokenizer: Any, **changes: Any) -> LessonContext:
    """A context for tests of one stage; what the stage does not use may be missing."""
    defaults: dict[str, Any] = {
        "engine": None,
        "tokenizer": tokenizer,
        "templates": DEFAULT_TEMPLATES,
        "judge": None,
        "clock": lambda phase: nullcontext(),
        "analysis": Sampling(64),
        "replay": Sampling(8),
        "max_context_tokens": 4_000,
        "context_tokens": 8_000,
        "run_seed": 1,
    }
    return LessonContext(**defaults | changes)
