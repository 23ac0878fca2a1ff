"""Pair selection: which completions, in which order, with which numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mel_lite.errors import ConfigError
from mel_lite.lessons.pairs import select_pairs
from mel_lite.text import common_prefix_tokens
from mel_lite.types import Finish, Group, Pair, PairStrategy, Rollout, Verdict

R, W, A = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN


def group(
    *rows: tuple[Verdict, tuple[int, ...]], prompt: str = "q", start: int = 0, cut: tuple[int, ...] = ()
) -> Group:
    """A group whose rollouts count from `start`; those at the positions in `cut` hit the token limit."""
    rollouts = tuple(
        Rollout(start + i, ids, "", verdict, Finish.LENGTH if i in cut else Finish.STOP)
        for i, (verdict, ids) in enumerate(rows)
    )
    return Group(prompt, prompt, rollouts)


def chosen(groups: list[Group], per_group: int = 1, strategy: str = "longest_prefix", seed: int = 0, step: int = 0):
    pairs = select_pairs(groups, per_group=per_group, strategy=strategy, run_seed=seed, step=step)
    return [(pair.right.index, pair.wrong.index, pair.common_prefix_tokens) for pair in pairs]


MIXED = group((R, (1, 2, 3, 4, 5)), (W, (1, 9)), (R, (1, 2)), (W, (1, 2, 3, 8, 8, 8)), (A, (1, 2, 3, 4, 6)))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_common_prefix_is_the_longest_shared_one(a: list[int], b: list[int]) -> None:
    n = common_prefix_tokens(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_longest_prefix_takes_the_latest_point_of_parting() -> None:
    (pair,) = select_pairs([MIXED], per_group=1, strategy="longest_prefix", run_seed=0, step=0)
    assert pair == Pair(MIXED, MIXED.rollouts[0], MIXED.rollouts[3], 3, 0)
    assert chosen([MIXED], per_group=2) == [(0, 3, 3), (2, 3, 2)]


def test_shortest_takes_the_fewest_tokens() -> None:
    assert chosen([MIXED], strategy="shortest", per_group=2) == [(2, 1, 1), (0, 1, 1)]


def test_distinct_forks_takes_one_pair_per_fork_before_a_second() -> None:
    """The wrong ones fail to take the steps 3, 3 and 2 of the right one, so the second 3 comes last."""
    rows = ((R, (1, 2, 3, 4)), (W, (1, 2, 8)), (W, (1, 2, 9)), (W, (1, 7)))
    assert chosen([group(*rows)], 2) == [(0, 1, 2), (0, 2, 2)]
    assert chosen([group(*rows)], 2, "distinct_forks") == [(0, 1, 2), (0, 3, 1)]
    assert chosen([group(*rows)], -1, "distinct_forks") == [(0, 1, 2), (0, 3, 1), (0, 2, 2)]


def test_another_right_step_is_another_fork() -> None:
    rows = ((R, (1, 3)), (W, (1, 8)), (R, (1, 4)))
    assert chosen([group(*rows)], 2, "distinct_forks") == [(0, 1, 1), (2, 1, 1)]


def test_ties_keep_sampling_order() -> None:
    tied = group((W, (1, 5)), (R, (1, 2)), (W, (1, 6)), (R, (1, 3)))
    for strategy in ("longest_prefix", "shortest"):
        assert chosen([tied], -1, strategy) == [(1, 0, 1), (1, 2, 1), (3, 0, 1), (3, 2, 1)]
    assert chosen([tied], -1, "distinct_forks") == [(1, 0, 1), (3, 0, 1), (1, 2, 1), (3, 2, 1)]


def test_minus_one_takes_all_and_never_an_abstained_one() -> None:
    assert {pair[:2] for pair in chosen([MIXED], -1)} == {(0, 1), (0, 3), (2, 1), (2, 3)}


def test_a_cut_off_wrong_solution_comes_last_but_comes() -> None:
    rows = ((R, (1, 2, 3)), (W, (1, 2, 3, 4)), (W, (9,)))
    for strategy in PairStrategy:
        assert chosen([group(*rows, cut=(1,))], -1, strategy) == [(0, 2, 0), (0, 1, 3)]
    assert chosen([group(*rows)], -1) == [(0, 1, 3), (0, 2, 0)]
    assert chosen([group(*rows[:2], cut=(1,))]) == [(0, 1, 3)]


def test_unmixed_groups_are_skipped_and_indices_run_over_all_groups() -> None:
    groups = [group((R, (1,)), (R, (2,))), MIXED, group((W, (1,)), (A, (2,))), group((R, (1,)), (W, (2,)), start=8)]
    pairs = select_pairs(groups, per_group=2, strategy="longest_prefix", run_seed=0, step=0)
    assert [(pair.index, pair.right.index, pair.wrong.index) for pair in pairs] == [(0, 0, 3), (1, 2, 3), (2, 8, 9)]
    assert [pair.group for pair in pairs] == [MIXED, MIXED, groups[3]]


def test_equal_completions_with_opposite_verdicts_never_part() -> None:
    assert chosen([group((R, (1, 2)), (W, (1, 2)), (W, (1, 3)))], -1) == [(0, 2, 1)]


def test_random_depends_on_seed_step_prompt_and_group_alone() -> None:
    def many(prompt: str = "q", start: int = 0) -> Group:
        return group(*[(R, (i,)) for i in range(8)], *[(W, (9, i)) for i in range(8)], prompt=prompt, start=start)

    def draw(groups: list[Group], **kwargs: int) -> list[tuple[int, int, int]]:
        return chosen(groups, 5, "random", **kwargs)

    base = draw([many()])
    assert draw([many()]) == base
    assert draw([MIXED, many()])[-5:] == base, "other groups of the step must not matter"
    assert len({tuple(base), *(tuple(draw([many()], seed=1, step=i)) for i in range(4)), tuple(draw([many("p")]))}) == 6
    second = [(right - 16, wrong - 16, n) for right, wrong, n in draw([many(start=16)])]
    assert second != base, "two groups of one prompt in a step draw apart"


def test_random_reaches_every_pair() -> None:
    seen = {chosen([MIXED], 1, "random", step=step)[0][:2] for step in range(60)}
    assert seen == {(0, 1), (0, 3), (2, 1), (2, 3)}


@pytest.mark.parametrize("per_group", [0, -2])
def test_a_count_that_cannot_be_is_refused(per_group: int) -> None:
    with pytest.raises(ConfigError, match=f"pairs_per_group={per_group} must be 1 or more, or -1"):
        chosen([], per_group)


def test_an_unknown_strategy_is_refused_even_without_groups() -> None:
    with pytest.raises(ConfigError, match=r"pair_strategy='longest' is not one of .*Did you mean 'longest_prefix'\?"):
        chosen([], strategy="longest")
