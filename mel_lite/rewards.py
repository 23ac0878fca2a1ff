"""Verdicts beside TRL's rewards: every completion gets both, from one call of the verifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from mel_lite.judging import Judge, RewardJudge, completion_text
from mel_lite.metrics import PhaseClock
from mel_lite.seeds import prompt_hash
from mel_lite.types import Finish, Group, Rollout, Verdict


class JudgedRewards:
    """Mixin over a TRL trainer. Leaves the judged rollouts of the last batch in `_scored`, in row order."""

    accelerator: Any
    reward_weights: torch.Tensor
    eos_token_ids: list[int]
    _tokenizer: Any
    _judge: Judge
    _answer_column: str | None
    _clock: PhaseClock
    _scored: list[tuple[Group, Rollout]]
    _verdicts: list[Verdict]
    _pending_extra_logs: defaultdict[str, list[Any]]
    _pending_metrics: defaultdict[str, list[float]]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        groups = [self._group_of(example) for example in inputs]
        texts = [completion_text(c) for c in completions]
        judge = self._judge
        if not isinstance(judge, RewardJudge):
            with self._clock("verify"):
                self._verdicts = judge(groups, texts)
        rewards_per_func = super()._calculate_rewards(  # type: ignore[misc]
            inputs, prompts, completions, completion_ids_list
        )
        rewards = self._local_rewards(rewards_per_func, len(texts))
        if isinstance(judge, RewardJudge):
            self._verdicts = [judge.verdict(reward) for reward in rewards]
        first = self.accelerator.process_index * len(texts)
        self._scored = []
        for i, (group, ids) in enumerate(zip(groups, completion_ids_list, strict=True)):
            finish = Finish.STOP if ids[-1] in self.eos_token_ids else Finish.LENGTH
            rollout = Rollout(first + i, tuple(ids), texts[i], self._verdicts[i], finish, rewards[i])
            self._scored.append((group, rollout))
        return rewards_per_func

    def _verifier_reward(self, completions: Any, **_: Any) -> list[float | None]:
        """The default reward: 1 for right, 0 for wrong, None (no reward, no gradient) for abstain."""
        return [{"right": 1.0, "wrong": 0.0}.get(verdict) for verdict in self._verdicts]

    def _local_rewards(self, rewards_per_func: torch.Tensor, rows: int) -> list[float]:
        """Weighted sum of this rank's rewards; NaN where every function abstained."""
        first = self.accelerator.process_index * rows
        local = rewards_per_func[first : first + rows]
        total = (local * self.reward_weights.to(local.device)).nansum(dim=1)
        return total.masked_fill(local.isnan().all(dim=1), float("nan")).tolist()

    def _rewards_of(self, groups: Sequence[Group], texts: Sequence[str]) -> list[float]:
        """Rewards of replay attempts, where the reward functions are the judge."""
        inputs = [{"prompt": g.prompt, **g.columns} for g in groups]
        prompts = [g.prompt for g in groups]
        completions = [
            text if isinstance(p, str) else [{"role": "assistant", "content": text}]
            for p, text in zip(prompts, texts, strict=True)
        ]
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # What a reward function logs about a replay must not end up among the columns of the next rollouts.
        pending = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, ids)  # type: ignore[misc]
        finally:
            self._pending_extra_logs, self._pending_metrics = pending
        return self._local_rewards(rewards_per_func, len(texts))

    def _group_of(self, example: dict[str, Any]) -> Group:
        """The question of a dataset row, without its rollouts."""
        columns = {k: v for k, v in example.items() if k not in ("prompt", self._answer_column)}
        answer = None if self._answer_column is None else example.get(self._answer_column)
        answer = None if answer is None else str(answer)
        return Group(example["prompt"], prompt_hash(example["prompt"]), (), answer, columns)
