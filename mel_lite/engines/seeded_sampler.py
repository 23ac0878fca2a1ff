"""Draw tokens from one uniform random number per (seed, position). B sequences, T sampled positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mel_lite import signals
from mel_lite.engines.base import Sampling


class SeededSampler(LogitsProcessor):
    """Sampler of a batch, with the distribution of `Sampling`.

    For greedy decoding by `model.generate` it is a logits processor that keeps one finite logit per row.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        prompt_tokens: int,
        sampling: Sampling,
        device: torch.device,
        saw: Callable[[int, int], None] | None = None,
    ) -> None:
        """Prepare the draws of a batch. `saw`: called with the finished rows and the tokens of each of the others."""
        self.logprobs: list[torch.Tensor] = []
        self._saw, self._rows = saw, len(seeds)
        self._prompt_tokens = prompt_tokens
        self._warpers = LogitsProcessorList()
        self._uniform_BT: torch.Tensor | None = None
        if sampling.temperature == 0:
            return
        self._uniform_BT = torch.stack(
            [
                torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for seed in seeds
            ]
        ).to(device)
        if sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))

    def draw(
        self, input_ids: torch.Tensor, scores_BV: torch.Tensor, position: int, rows_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token drawn at a sampled position for each row, and its log-probability in nats; (B,) each.

        `rows_B`: numbers of the rows among the seeds; None = all.
        """
        signals.poll()  # called once per token, so that a signal can stop the longest phase of a run
        if self._saw is not None:
            self._saw(self._rows - len(scores_BV), position + 1)
        logp_BV = torch.log_softmax(self._warpers(input_ids, scores_BV.float()), dim=-1)
        if self._uniform_BT is None:
            choice_B = logp_BV.argmax(dim=-1)
        else:
            # In float32, the error of the running sum of 150,000 terms exceeds a rare token's probability.
            cdf_BV = logp_BV.double().exp_().cumsum_(dim=-1)
            uniform_B = self._uniform_BT[:, position]
            threshold_B = (uniform_B if rows_B is None else uniform_B[rows_B]) * cdf_BV[:, -1]
            choice_B = torch.searchsorted(cdf_BV, threshold_B[:, None], right=True)[:, 0]
            choice_B = choice_B.clamp(max=logp_BV.shape[-1] - 1)
        return choice_B, logp_BV.gather(1, choice_B[:, None])[:, 0]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        choice_B, logp_B = self.draw(input_ids, scores, input_ids.shape[1] - self._prompt_tokens)
        self.logprobs.append(logp_B)
        return torch.full_like(scores, -torch.inf).scatter_(1, choice_B[:, None], 0.0)
