"""Interface of a generation engine: token ids in, token ids out, always sampled with the current adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mel_lite.types import Finish

LOOK_TOKENS = 32
"""Tokens between two looks at a sequence that may be hopeless."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling options of a phase. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    """Continue to `max_new_tokens` after an end-of-sequence id, to measure the cost of the longest sequences."""
    is_hopeless: Callable[[Sequence[int]], bool] | None = None
    """Called with the ids of an unfinished sequence, every `LOOK_TOKENS` of them; True ends it (Finish.ENDED). Engines
    without `ends_hopeless` ignore it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to sample. Equal prompts may appear many times, each with its own seed."""

    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling | None = None
    """Options of its own, for engines that mix; None = those of the call."""

    def options(self, of_call: Sampling) -> Sampling:
        """Return the options it is sampled with."""
        return of_call if self.sampling is None else self.sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled sequence."""

    ids: tuple[int, ...]
    """Sampled ids, including the end-of-sequence id when `finish` is STOP. Never empty."""
    logprobs: tuple[float, ...]
    """Log-probability in nats of each id under the distribution it was drawn from."""
    finish: Finish


class Engine(ABC):
    """Samples from the policy being trained. Subclasses set `name` and implement `generate`, `wake` and `sleep`."""

    name: str
    mixes: bool = False
    """True if the requests of one call may have sampling options of their own (`Request.sampling`)."""
    ends_hopeless: bool = False
    """True if `Sampling.is_hopeless` ends a sequence."""
    own_kernels: bool = False
    """True if log-probs differ from the trainer's by rounding, so that importance sampling must correct for it."""
    context_tokens: int | None = None
    """Longest sequence the engine accepts, prompt and completion together; None = the model's own limit."""
    share: float | None = None
    """Share of the GPU's memory that the engine was started with, in (0, 1); None = it reserves none, or unknown."""
    max_num_seqs: int | None = None
    """Most sequences the engine samples at once; None = unknown."""
    watch: Callable[[int, int], None] | None = None
    """Called while `generate` samples, with the number of finished sequences and the tokens that each of the current
    ones has (0 = unknown). It must be cheap: transformers call it once per token."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in the order of `requests`.

        A sequence depends only on its prompt and seed, not on the other sequences of the batch.
        """

    @abstractmethod
    def wake(self) -> None:
        """Reallocate memory and load the current adapter."""

    @abstractmethod
    def sleep(self) -> None:
        """Free the engine's memory before the training phase."""

    def limit_cache(self, tokens: int) -> bool:
        """Limit the KV cache to `tokens`.

        Returns: False when the engine has no such limit, which is the default.
        """
        return False
