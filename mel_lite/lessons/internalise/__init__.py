"""Internalisation: the ways for lessons to enter the weights. One class per way, one row in `INTERNALISATIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.imports import load_object
from mel_lite.lessons.internalise.combined import Combined
from mel_lite.lessons.internalise.credit import Credit
from mel_lite.lessons.internalise.distill import Distill
from mel_lite.lessons.internalise.nll import (
    AnalysisAndReplayNLL,
    AnalysisNLL,
    ExperienceNLL,
    LessonNLL,
    ReplayNLL,
    RightNLL,
)
from mel_lite.lessons.internalise.protocol import (
    DrawnBatch,
    Internalisation,
    LessonShare,
    RolloutBatch,
    ScoredMicroBatch,
    TokenReading,
    checked_entries,
    deal_lessons,
)
from mel_lite.lessons.internalise.token_credit import token_credit
from mel_lite.lessons.reading import Reading, Scorer
from mel_lite.text import did_you_mean

INTERNALISATIONS: dict[str, type[Internalisation]] = {
    "analysis": AnalysisNLL,
    "experience": ExperienceNLL,
    "replay": ReplayNLL,
    "right": RightNLL,
    "both": AnalysisAndReplayNLL,
    "distill": Distill,
    "credit": Credit,
}


def get_internalisation(name: Any, options: Any = None) -> Internalisation:
    """Return the way called `name`, or the weighted sum of several: `{name: weight}`.

    A name is a key of `INTERNALISATIONS`, or a dotted path to an `Internalisation` class. `options` are its arguments;
    those of a sum are by name: `{"distill": {"context": "sibling"}}`. Both come from a file or a command line.

    Raises: ConfigError for an unknown name or option, a path that does not import, an object that is no
    Internalisation, or a weight that is not above 0.
    """
    options = options or {}
    if isinstance(name, str):
        return _build(name, options)
    if not isinstance(name, Mapping) or not name:
        raise ConfigError(f"internalisation={name!r} names no way. Set a name such as 'analysis', or {{name: weight}}.")
    for key, weight in name.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"internalisation: weight {weight!r} of {key!r} must be a number above 0.")
    for key, given in options.items():
        if key not in name:
            raise ConfigError(
                f"internalisation_options has {key!r}, which is not one of {', '.join(name)}. With several ways, give "
                "the options of each under its name."
            )
        if not isinstance(given, Mapping):
            raise ConfigError(f"internalisation_options[{key!r}]={given!r} is no mapping of options.")
    return Combined({key: (_build(key, options.get(key, {})), weight) for key, weight in name.items()})


def _build(name: str, options: Mapping[str, Any]) -> Internalisation:
    found = INTERNALISATIONS.get(name) or _imported(name)
    try:
        return found(**options)
    except TypeError as err:
        if options:
            known = [each for each in inspect.signature(found).parameters if each != "self"]
            unknown = next((each for each in options if each not in known), None)
            if unknown is not None:
                has = f"has no option {unknown!r}; it takes {', '.join(known) or 'none'}"
                raise ConfigError(
                    f"internalisation_options: {name!r} {has}.{did_you_mean(unknown, known)} Remove or rename it."
                ) from err
        raise ConfigError(
            f"internalisation={name!r} cannot be built with internalisation_options={dict(options)}: {err}. Set the "
            "options that it needs, or give its parameters defaults."
        ) from err


def _imported(name: str) -> type[Internalisation]:
    if ":" not in name and "." not in name:
        raise ConfigError(
            f"internalisation={name!r} is not one of {', '.join(INTERNALISATIONS)}."
            f"{did_you_mean(name, INTERNALISATIONS)} Set internalisation to one of them, or to a dotted path such as "
            "'my_module:MyInternalisation'."
        )
    found = load_object(name, field="internalisation", error=ConfigError)
    if not (isinstance(found, type) and issubclass(found, Internalisation)):
        raise ConfigError(
            f"internalisation={name!r} is not a subclass of mel_lite.lessons.internalise.Internalisation. Derive it "
            "from that class."
        )
    return found


__all__ = [
    "INTERNALISATIONS",
    "AnalysisNLL",
    "DrawnBatch",
    "Internalisation",
    "LessonNLL",
    "LessonShare",
    "Reading",
    "RolloutBatch",
    "ScoredMicroBatch",
    "Scorer",
    "TokenReading",
    "checked_entries",
    "deal_lessons",
    "get_internalisation",
    "token_credit",
]
