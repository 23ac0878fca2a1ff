"""What a generation engine is: token ids in, token ids out, always with the adapter as it is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mel_lite.types import Finish


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a phase samples. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever is sampled: for measuring what the longest sequences take."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to sample. Equal prompts may appear many times, each with its own seed."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled sequence."""

    ids: tuple[int, ...]
    """Sampled ids, the end-of-sequence id included when `finish` is STOP; never empty."""
    logprobs: tuple[float, ...]
    """Log-probability in nats of each id under the distribution it was drawn from."""
    finish: Finish


@runtime_checkable
class Engine(Protocol):
    """Samples from the policy being trained.

    `generate` answers in the order of `requests`; a sequence depends on its prompt and seed alone, not on its
    neighbours in the batch. `sleep` gives up the engine's memory before the training phase; `wake` takes it back and
    makes the current adapter the one that is sampled.
    """

    name: str

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]: ...

    def wake(self) -> None: ...

    def sleep(self) -> None: ...
