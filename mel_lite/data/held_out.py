"""Hold tasks out of training, and find evaluation tasks that are trained on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mel_lite.models.chat import question_text
from mel_lite.types import Prompt

if TYPE_CHECKING:
    import datasets

HELD_OUT = "held-out"
"""Value of `data.eval` for a part of the training tasks."""
SHARE = 10
"""One of this many questions is held out."""
MOST = 100
"""Most questions held out, if `eval.limit` is unset."""
LEAST = 100
"""With fewer questions none is held out: too few would be left for both."""


def hold_out(
    tasks: datasets.Dataset, *, limit: int | None, least_left: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Return the tasks to train on and those held out; None when there are too few.

    A tenth of the questions is held out, at most `limit` (None = 100), and with each of them all rows that repeat it.
    The choice depends on the questions alone: neither on their order nor on a seed, so that runs can be compared.

    Args:
        least_left: rows that training needs.
    """
    keys = [question_key(prompt) for prompt in tasks["prompt"]]
    questions = sorted(set(keys))  # keys are hashes, so this order is a fixed shuffle
    if len(questions) < LEAST:
        return tasks, None
    chosen = set(questions[: min(len(questions) // SHARE, MOST if limit is None else limit)])
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    kept = [row for row, key in enumerate(keys) if key not in chosen]
    if len(kept) < least_left:
        return tasks, None
    return tasks.select(kept), tasks.select(sorted(first[key] for key in chosen))


def trained_too(train: datasets.Dataset, held_out: datasets.Dataset) -> int:
    """Return the number of evaluation tasks whose question is also trained on."""
    known = {question_key(prompt) for prompt in train["prompt"]}
    return sum(question_key(prompt) in known for prompt in held_out["prompt"])


def question_key(prompt: Prompt) -> str:
    """Return a hash of a prompt's question, without system turns and regardless of case and white space."""
    text = " ".join(question_text(prompt).split()).casefold()
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


__all__ = ["HELD_OUT", "hold_out", "question_key", "trained_too"]
