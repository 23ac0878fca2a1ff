"""Draw tokens from one uniform random number per (seed, position). B sequences, T sampled positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mel_lite import signals
from mel_lite.engines.base import Sampling

CPU_ROWS = 4
"""Rows whose running sums exist at once on a CPU: they stay in its cache."""


class SeededSampler(LogitsProcessor):
    """Sampler of a batch, each row with the distribution of its `Sampling`.

    For greedy decoding by `model.generate` it is a logits processor that keeps one finite logit per row.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        prompt_tokens: int,
        samplings: Sequence[Sampling],
        device: torch.device,
        saw: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare the draws of a batch. `saw`: called with the finished rows and the tokens of each of the others."""
        self.logprobs: list[torch.Tensor] = []
        self._saw, self._rows = saw, len(seeds)
        self._prompt_tokens = prompt_tokens
        kinds = [replace(each, max_new_tokens=0, ignore_eos=False, is_hopeless=None) for each in samplings]
        distinct = list(dict.fromkeys(kinds))
        self._warpers = [_warpers(kind) for kind in distinct]
        self._kind_B = torch.tensor([distinct.index(kind) for kind in kinds], device=device)
        is_greedy = [kind.temperature == 0 for kind in kinds]
        self._is_greedy_B = torch.tensor(is_greedy, device=device) if any(is_greedy) else None
        self._uniform_BT: torch.Tensor | None = None
        if not all(is_greedy):
            longest = max(each.max_new_tokens for each in samplings)
            uniform_BT = torch.zeros(len(seeds), longest, dtype=torch.float64)
            for row, (seed, each) in enumerate(zip(seeds, samplings, strict=True)):
                generator, tokens = torch.Generator().manual_seed(seed), each.max_new_tokens
                uniform_BT[row, :tokens] = torch.rand(tokens, generator=generator, dtype=torch.float64)
            self._uniform_BT = uniform_BT.to(device)

    def draw(
        self, input_ids: torch.Tensor, scores_BV: torch.Tensor, position: int, rows_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token drawn at a sampled position for each row, and its log-probability in nats; (B,) each.

        `rows_B`: numbers of the rows among the seeds; None = all.
        """
        signals.poll()  # called once per token, so that a signal can stop the longest phase of a run
        if self._saw is not None:
            self._saw(self._rows - len(scores_BV), position + 1)
        every = slice(None) if rows_B is None else rows_B
        logp_BV = self._log_probs(input_ids, scores_BV.float(), self._kind_B[every])
        if self._uniform_BT is None:
            choice_B = logp_BV.argmax(dim=-1)
        else:
            choice_B = _inverse_cdf(logp_BV, self._uniform_BT[:, position][every])
            if self._is_greedy_B is not None:
                choice_B = torch.where(self._is_greedy_B[every], logp_BV.argmax(dim=-1), choice_B)
        return choice_B, logp_BV.gather(1, choice_B[:, None])[:, 0]

    def _log_probs(self, input_ids: torch.Tensor, scores_BV: torch.Tensor, kind_B: torch.Tensor) -> torch.Tensor:
        """Return each row's log-probs under the distribution it is drawn from."""
        if len(self._warpers) == 1:
            return torch.log_softmax(self._warpers[0](input_ids, scores_BV), dim=-1)
        logp_BV = torch.empty_like(scores_BV)
        for kind, warpers in enumerate(self._warpers):
            mine = (kind_B == kind).nonzero()[:, 0]
            if len(mine):
                logp_BV[mine] = torch.log_softmax(warpers(input_ids[mine], scores_BV[mine]), dim=-1)
        return logp_BV

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        choice_B, logp_B = self.draw(input_ids, scores, input_ids.shape[1] - self._prompt_tokens)
        self.logprobs.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice_B[:, None], 0.0)


def _inverse_cdf(logp_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Return the first token of each row whose cumulative probability exceeds the row's number, (B,).

    In float32, the error of the running sum of 150,000 terms exceeds a rare token's probability.
    """
    rows = CPU_ROWS if logp_BV.device.type == "cpu" else len(logp_BV)
    room = torch.empty(rows, logp_BV.shape[1], dtype=torch.float64, device=logp_BV.device)
    choices = []
    for logp, uniform in zip(logp_BV.split(rows), uniform_B.split(rows), strict=True):
        cdf = room[: len(logp)].copy_(logp).exp_().cumsum_(dim=-1)
        choices.append(torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0])
    return torch.cat(choices).clamp(max=logp_BV.shape[1] - 1)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return what turns the model's logits into those of the distribution; none but the penalty when it is greedy."""
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return warpers
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
