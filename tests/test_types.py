"""Options with a fixed set of values: texts and members are the same thing, and a wrong one is refused in one way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest

from mel_lite.config import MELConfig
from mel_lite.errors import ConfigError, check_choice
from mel_lite.types import (
    Algorithm,
    Choice,
    CollapseAction,
    LeakPolicy,
    LessonNormalization,
    PairStrategy,
    ReplayCriterion,
    Status,
)

OPTIONS: dict[str, type[Choice]] = {
    "algorithm": Algorithm,
    "pair_strategy": PairStrategy,
    "leak_policy": LeakPolicy,
    "replay_criterion": ReplayCriterion,
    "mel_normalization": LessonNormalization,
    "on_collapse": CollapseAction,
}
DESCRIBED = {field.name: field.metadata for field in fields(MELConfig)}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_takes_texts_and_members_and_describes_each(name: str, tmp_path: Path) -> None:
    for choice in OPTIONS[name]:
        for given in (choice, choice.value):
            args = MELConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: given})
            assert getattr(args, name) == choice.value
        assert f"`{choice.value}`: {choice.__doc__}" in DESCRIBED[name]["help"]
    assert DESCRIBED[name]["choices"] == tuple(choice.value for choice in OPTIONS[name])
    assert len({choice.__doc__ for choice in OPTIONS[name]} | {OPTIONS[name].__doc__}) == len(OPTIONS[name]) + 1
    with pytest.raises(ConfigError, match=f"{name}='no-such' is not one of {', '.join(map(str, OPTIONS[name]))[:9]}"):
        MELConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: "no-such"})


@pytest.mark.parametrize(
    ("field", "value", "choices", "message"),
    [
        ("leak_policy", "redakt", LeakPolicy,
         "leak_policy='redakt' is not one of reject, redact, off. Did you mean 'redact'? Set leak_policy."),
        ("dtype", None, ("auto", "float16"), "dtype=None is not one of auto, float16. Set dtype."),
        ("--status", "kep", Status,
         "--status 'kep' is not one of unparsed, leaked, not_lifting, replay_failed, kept. Did you mean 'kept'? Set "
         "--status."),
    ],
)  # fmt: skip
def test_a_value_that_is_no_choice_is_refused_with_the_nearest_one(
    field: str, value: object, choices: Iterable[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_choice(field, value, choices)
    assert str(caught.value) == message
