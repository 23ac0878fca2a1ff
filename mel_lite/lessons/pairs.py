"""Select the right and wrong completions of a question that are compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

from mel_lite.errors import ConfigError, check_choice
from mel_lite.seeds import seed_for
from mel_lite.text import common_prefix_tokens
from mel_lite.types import Finish, Group, Pair, PairStrategy, Rollout, Verdict

ALL_PAIRS = -1


def fork_token(group: Group, rollout: Rollout) -> int:
    """Return the number of tokens that a rollout shares with its nearest one of the other verdict; 0 without one."""
    others = group.wrong if rollout.verdict is Verdict.RIGHT else group.right
    return max((common_prefix_tokens(rollout.completion_ids, each.completion_ids) for each in others), default=0)


def select_pairs(groups: Sequence[Group], *, per_group: int, strategy: str, run_seed: int, step: int) -> list[Pair]:
    """Choose up to `per_group` (right, wrong) pairs of every mixed group, in the order of a PairStrategy.

    Ties keep sampling order. A wrong completion that was cut off at the token limit ranks after every finished one: it
    might have reached the right answer. Completions with equal tokens are never paired: they do not differ anywhere.

    Args: `per_group` at least 1, or -1 for all |Y+| x |Y-|; `groups` of all ranks in rank order, since `Pair.index` is
    the position in the returned list. Raises: ConfigError for a `per_group` or `strategy` that does not exist.
    """
    if per_group < 1 and per_group != ALL_PAIRS:
        raise ConfigError(f"pairs_per_group={per_group} must be 1 or more, or -1 for all pairs.")
    check_choice("pair_strategy", strategy, PairStrategy)
    chosen: list[Pair] = []
    for group in groups:
        if not group.is_mixed:
            continue
        candidates = [
            Pair(group, right, wrong, common_prefix_tokens(right.completion_ids, wrong.completion_ids))
            for right, wrong in product(group.right, group.wrong)
            if right.completion_ids != wrong.completion_ids
        ]
        candidates.sort(key=_ranking(strategy, group, run_seed=run_seed, step=step))
        finished = [pair for pair in candidates if pair.wrong.finish is not Finish.LENGTH]
        cut = [pair for pair in candidates if pair.wrong.finish is Finish.LENGTH]
        if strategy == PairStrategy.DISTINCT_FORKS:
            finished, cut = _one_per_fork_first(finished), _one_per_fork_first(cut)
        candidates = finished + cut
        kept = candidates if per_group == ALL_PAIRS else candidates[:per_group]
        chosen += [
            Pair(pair.group, pair.right, pair.wrong, pair.common_prefix_tokens, index=len(chosen) + offset)
            for offset, pair in enumerate(kept)
        ]
    return chosen


def _ranking(strategy: str, group: Group, *, run_seed: int, step: int) -> Callable[[Pair], float]:
    """Return the key that sorts a group's pairs, best first; the sort is stable, so ties keep sampling order."""
    if strategy in (PairStrategy.LONGEST_PREFIX, PairStrategy.DISTINCT_FORKS):
        return lambda pair: -pair.common_prefix_tokens
    if strategy == PairStrategy.SHORTEST:
        return lambda pair: _tokens(pair.right) + _tokens(pair.wrong)
    # The first rollout's index separates two groups of the same prompt in one step.
    seed = seed_for(run_seed, step=step, prompt_hash=group.prompt_hash, index=group.rollouts[0].index, purpose="pair")
    draw = random.Random(seed)
    return lambda pair: draw.random()


def _one_per_fork_first(candidates: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with the first of each fork before all others, else in the order given.

    Two pairs have the same fork if the shared tokens and the right completion's next token are equal: their wrong
    completions fail to take the same step.
    """
    forks: set[tuple[int, ...]] = set()
    first: list[Pair] = []
    others: list[Pair] = []
    for pair in candidates:
        fork = tuple(pair.right.completion_ids[: pair.common_prefix_tokens + 1])
        (others if fork in forks else first).append(pair)
        forks.add(fork)
    return first + others


def _tokens(rollout: Rollout) -> int:
    return len(rollout.completion_ids)


__all__ = ["common_prefix_tokens", "fork_token", "select_pairs"]
