"""Verdicts along with TRL's rewards, and the policy estimators: every completion is judged once per generation batch.

B completions of this rank, W of all ranks, C padded completion width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mel_lite.config import MELConfig
from mel_lite.engines.metered import PhaseClock
from mel_lite.errors import ModelError
from mel_lite.lessons.internalise import LessonShare
from mel_lite.models.chat import is_text, prompt_end, question_text, render, safe_turns
from mel_lite.seeds import prompt_hash
from mel_lite.text import shorten
from mel_lite.training.estimators import batch_advantages, only_right
from mel_lite.types import Algorithm, Finish, Group, Prompt, Rollout, Verdict
from mel_lite.verify.judge import REWARD_COLUMN, VERDICT_COLUMN, Judge, RewardJudge, group_of, judged_text


class GenerationBatch(list[dict[str, Any]]):
    """The dataset rows of one generation batch, with what each stage of the step made of them.

    TRL passes this object through its hooks as `inputs`, from `_prepare_inputs` to `_calculate_rewards`.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.rollouts: list[tuple[Group, Rollout]] = []
        """This rank's judged completions, each with its question, in row order."""
        self.reward_W: torch.Tensor | None = None
        """Weighted rewards over all ranks; NaN where every function abstained."""
        self.rewards_WF: torch.Tensor | None = None
        """Rewards by function over all ranks, where dynamic sampling has computed them already."""
        self.extras: dict[str, list[Any]] = {}
        """Values that reward functions logged about this rank's completions then, by column."""
        self.shares: list[LessonShare] = []
        """Lessons per micro-batch of this rank; empty when none were drawn."""

    @property
    def verdicts(self) -> list[Verdict]:
        return [rollout.verdict for _, rollout in self.rollouts]


def groups_of(rows: Sequence[tuple[Group, Rollout]], size: int) -> list[Group]:
    """Collect judged rows of all ranks into groups; TRL's sampler keeps the `size` completions of a prompt together."""
    groups = []
    for first in range(0, len(rows), size):
        members = rows[first : first + size]
        question = members[0][0]
        assert all(g.prompt_hash == question.prompt_hash for g, _ in members), "a group was torn apart"
        rollouts = tuple(rollout for _, rollout in members)
        groups.append(replace(question, rollouts=rollouts))
    return groups


class JudgedRewards:
    """Mixin over a TRL trainer that judges completions before TRL computes their rewards."""

    accelerator: Any
    args: MELConfig
    temperature: float
    reward_weights: torch.Tensor
    reward_funcs: list[Any]
    eos_token_ids: list[int]
    judge: Judge
    answer_column: str | None
    clock: PhaseClock
    dynamic_sampling: Any = None
    engine_probe: Any
    environment_factories: Any
    _tokenizer: Any
    _is_vlm: bool
    _logs: dict[str, Any]
    _pending_extra_logs: defaultdict[str, list[Any]]
    _pending_metrics: defaultdict[str, list[float]]

    def policy_batch(self, scored: GenerationBatch) -> dict[str, Any]:
        """Sample and judge the completions of a batch; returns TRL's batch, with advantages and before any lesson."""
        if self.dynamic_sampling is not None and self.model.training:  # type: ignore[attr-defined]
            self.dynamic_sampling.fill(scored)
        batch = super()._generate_and_score_completions(scored)  # type: ignore[misc]
        if self.engine_probe is not None:
            self.engine_probe.check(batch)
        return self._estimated(batch, scored)

    def _generate(self, prompts: list[Any]) -> Any:
        ready = None if self.dynamic_sampling is None else self.dynamic_sampling.take()
        return super()._generate(prompts) if ready is None else ready  # type: ignore[misc]

    def reward(
        self, part: GenerationBatch, completions: list[Any], completion_ids: list[list[int]]
    ) -> tuple[torch.Tensor, dict[str, list[Any]]]:
        """Judge and reward completions that may not be trained on.

        Returns: rewards by function over all ranks (W, F), NaN where a function abstained; and what reward functions
        logged about each completion, kept out of the table of completions.
        """
        pending, self._pending_extra_logs = self._pending_extra_logs, defaultdict(list)
        try:
            rewards_WF = self._calculate_rewards(part, [row["prompt"] for row in part], completions, completion_ids)
            logged = {name: values for name, values in self._pending_extra_logs.items() if len(values) == len(part)}
        finally:
            self._pending_extra_logs = pending
        return rewards_WF, logged

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        if isinstance(inputs, GenerationBatch) and inputs.rewards_WF is not None:
            for name, values in inputs.extras.items():
                self._pending_extra_logs[name].extend(values)
            inputs.reward_W = self._weighted(inputs.rewards_WF)
            return inputs.rewards_WF
        self.stop_together()  # type: ignore[attr-defined]  # all ranks are here, with their rollouts sampled
        ends = self._prompt_ends(prompts)
        asked = inputs
        if self.environment_factories is not None:  # they may write the prompts, or add to those of the rows
            asked = [row | {"prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)]
        groups = [group_of(row, self.answer_column, end) for row, end in zip(asked, ends, strict=True)]
        texts = [judged_text(c) for c in completions]
        judge = self.judge
        verdicts: list[Verdict] = []
        rows = inputs
        if not isinstance(judge, RewardJudge):
            with self.clock("verify"):
                self.clock.expect(len(texts))
                verdicts = judge(groups, texts)
            if self._verifier_reward in self.reward_funcs:
                rows = [example | {VERDICT_COLUMN: verdict} for example, verdict in zip(inputs, verdicts, strict=True)]
        rewards_per_func = super()._calculate_rewards(  # type: ignore[misc]
            rows, prompts, completions, completion_ids_list
        )
        if isinstance(inputs, GenerationBatch):
            inputs.reward_W = self._weighted(rewards_per_func)
            first = self.accelerator.process_index * len(texts)
            rewards = inputs.reward_W[first : first + len(texts)].tolist()
            if isinstance(judge, RewardJudge):
                verdicts = [judge.verdict(reward) for reward in rewards]
            for i, (group, ids) in enumerate(zip(groups, completion_ids_list, strict=True)):
                finish = Finish.STOP if ids[-1] in self.eos_token_ids else Finish.LENGTH
                rollout = Rollout(first + i, tuple(ids), texts[i], verdicts[i], finish, rewards[i])
                inputs.rollouts.append((group, rollout))
            self._pending_extra_logs[VERDICT_COLUMN].extend(verdict.value for verdict in verdicts)
            self._pending_extra_logs[REWARD_COLUMN].extend(rewards)
        return rewards_per_func

    def _prompt_ends(self, prompts: list[Any]) -> list[str]:
        """Return the end of each prompt as it was rendered; empty where no verifier reads text.

        A question is rendered once, but with environments, which bring tools of their own: TRL renders whole batches.
        """
        if isinstance(self.judge, RewardJudge) or self._is_vlm:
            return [""] * len(prompts)
        if self.environment_factories is not None:
            return [prompt_end(ids, self._tokenizer) for ids in self._tokenize_prompts(prompts)[0]]
        hashes = [prompt_hash(prompt) for prompt in prompts]
        questions = dict(zip(hashes, prompts, strict=True))
        rendered, _, _ = self._tokenize_prompts(list(questions.values()))
        ends = {key: prompt_end(ids, self._tokenizer) for key, ids in zip(questions, rendered, strict=True)}
        return [ends[key] for key in hashes]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Tokenize text prompts with `render`, like evaluation and replay; leave tools and images to TRL.

        A row of the dataset cannot open or close a chat turn on either path.
        """
        trainer: Any = self
        if trainer._is_vlm or trainer.tools or not all(is_text(prompt) for prompt in prompts):
            safe = [prompt if isinstance(prompt, str) else safe_turns(prompt, self._tokenizer) for prompt in prompts]
            return super()._tokenize_prompts(safe)  # type: ignore[misc]
        return [self._render(prompt) for prompt in prompts], None, {}

    def _render(self, prompt: Prompt) -> list[int]:
        kwargs = self.chat_template_kwargs  # type: ignore[attr-defined]
        try:
            return list(render(prompt, self._tokenizer, chat_template_kwargs=kwargs))
        except ModelError as error:  # of a streamed row; others were rendered at construction
            raise ModelError(f"The prompt {shorten(repr(question_text(prompt)))}: {error}") from error

    def _verifier_reward(self, completions: Any, **columns: Any) -> list[float | None]:
        """Return the default reward: 1 for right, 0 for wrong, None (no reward, no gradient) for abstain."""
        return [{"right": 1.0, "wrong": 0.0}.get(verdict) for verdict in columns[VERDICT_COLUMN]]

    def _weighted(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum over reward functions; NaN where every function abstained."""
        total = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return total.masked_fill(rewards_per_func.isnan().all(dim=1), float("nan"))

    def _estimated(self, batch: dict[str, Any], scored: GenerationBatch) -> dict[str, Any]:
        """Return TRL's scored batch with the advantages or masks of the estimator."""
        first = self.accelerator.process_index * len(scored.rollouts)
        if self.args.estimator == Algorithm.REINFORCE_PP:
            assert scored.reward_W is not None
            advantage_W = batch_advantages(scored.reward_W)
            self._relog_advantages(advantage_W)
            return batch | {"advantages": advantage_W[first : first + len(scored.rollouts)]}
        if self.args.estimator == Algorithm.RFT:
            verdicts = [verdict is Verdict.RIGHT for verdict in scored.verdicts]
            is_right_B = torch.tensor(verdicts, device=batch["completion_mask"].device)
            self._relog_advantages(self.accelerator.gather(is_right_B.float()))
            return only_right(batch, is_right_B, self.accelerator.gather)
        return batch

    @property
    def policy_temperature(self) -> float:
        """Temperature of the policy term's log-probs. RFT trains on texts, at temperature 1 like lessons."""
        return 1.0 if self.args.estimator == Algorithm.RFT else self.temperature

    def _relog_advantages(self, advantage_W: torch.Tensor) -> None:
        """Replace the logged advantages, so that the completions table shows what is trained on."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantage_W))):
            logged.pop()
        logged.extend(advantage_W.tolist())

    def rewards_of(self, groups: Sequence[Group], texts: Sequence[str]) -> list[float]:
        """Return the rewards of replay attempts, for runs whose judge is the reward functions."""
        inputs = [{"prompt": g.prompt, **g.columns} for g in groups]
        prompts = [g.prompt for g in groups]
        completions = [
            text if isinstance(p, str) else [{"role": "assistant", "content": text}]
            for p, text in zip(prompts, texts, strict=True)
        ]
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # Keeps what a reward function logs about a replay out of the columns of the next rollouts.
        pending = self._pending_extra_logs, self._pending_metrics
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, ids)  # type: ignore[misc]
        finally:
            self._pending_extra_logs, self._pending_metrics = pending
        first = self.accelerator.process_index * len(texts)
        return self._weighted(rewards_per_func)[first : first + len(texts)].tolist()
