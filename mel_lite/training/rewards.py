"""Verdicts beside TRL's rewards: every completion gets both, from one call of the verifier.

B completions of this rank, W of all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from mel_lite.config import MELConfig
from mel_lite.models.chat import safe_turns
from mel_lite.seeds import prompt_hash
from mel_lite.training.estimators import batch_advantages, only_right
from mel_lite.training.metrics import PhaseClock
from mel_lite.types import Finish, Group, Rollout, Verdict
from mel_lite.verify.judge import Judge, RewardJudge, completion_text


class JudgedRewards:
    """Mixin over a TRL trainer. Leaves the judged rollouts of the last batch in `_scored`, in row order."""

    accelerator: Any
    args: MELConfig
    temperature: float
    reward_weights: torch.Tensor
    eos_token_ids: list[int]
    _tokenizer: Any
    _judge: Judge
    _answer_column: str | None
    _clock: PhaseClock
    _scored: list[tuple[Group, Rollout]]
    _reward_W: torch.Tensor
    _logs: dict[str, Any]
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
        self._reward_W = self._weighted(rewards_per_func)
        first = self.accelerator.process_index * len(texts)
        rewards = self._reward_W[first : first + len(texts)].tolist()
        if isinstance(judge, RewardJudge):
            self._verdicts = [judge.verdict(reward) for reward in rewards]
        self._scored = []
        for i, (group, ids) in enumerate(zip(groups, completion_ids_list, strict=True)):
            finish = Finish.STOP if ids[-1] in self.eos_token_ids else Finish.LENGTH
            rollout = Rollout(first + i, tuple(ids), texts[i], self._verdicts[i], finish, rewards[i])
            self._scored.append((group, rollout))
        return rewards_per_func

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """As TRL's, of conversations whose text spells no special token: a dataset's row forges no turn, either."""
        safe = [prompt if isinstance(prompt, str) else safe_turns(prompt, self._tokenizer) for prompt in prompts]
        return super()._tokenize_prompts(safe)  # type: ignore[misc]

    def _verifier_reward(self, completions: Any, **_: Any) -> list[float | None]:
        """The default reward: 1 for right, 0 for wrong, None (no reward, no gradient) for abstain."""
        return [{"right": 1.0, "wrong": 0.0}.get(verdict) for verdict in self._verdicts]

    def _weighted(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Weighted sum over the reward functions; NaN where every function abstained."""
        total = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return total.masked_fill(rewards_per_func.isnan().all(dim=1), float("nan"))

    def _estimated(self, batch: dict[str, Any]) -> dict[str, Any]:
        """TRL's scored batch, with the advantages or masks of the estimator in place of its own."""
        rows = len(self._scored)
        first = self.accelerator.process_index * rows
        if self.args.estimator == "reinforce++":
            advantage_W = batch_advantages(self._reward_W)
            self._relog_advantages(advantage_W)
            return batch | {"advantages": advantage_W[first : first + rows]}
        if self.args.estimator == "rft":
            verdicts = [rollout.verdict is Verdict.RIGHT for _, rollout in self._scored]
            is_right_B = torch.tensor(verdicts, device=batch["completion_mask"].device)
            self._relog_advantages(self.accelerator.gather(is_right_B.float()))
            return only_right(batch, is_right_B, self.accelerator.gather)
        return batch

    @property
    def _policy_temperature(self) -> float:
        """Of the policy term's log-probs. RFT learns texts, as lessons are learnt: at temperature 1."""
        return 1.0 if self.args.estimator == "rft" else self.temperature

    def _relog_advantages(self, advantage_W: torch.Tensor) -> None:
        """The completions table shows what is trained on, not the advantages TRL computed first."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantage_W))):
            logged.pop()
        logged.extend(advantage_W.tolist())

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
        first = self.accelerator.process_index * len(texts)
        return self._weighted(rewards_per_func)[first : first + len(texts)].tolist()

    def _group_of(self, example: dict[str, Any]) -> Group:
        """The question of a dataset row, without its rollouts."""
        columns = {k: v for k, v in example.items() if k not in ("prompt", self._answer_column)}
        answer = None if self._answer_column is None else example.get(self._answer_column)
        answer = None if answer is None else str(answer)
        return Group(example["prompt"], prompt_hash(example["prompt"]), (), answer, columns)
