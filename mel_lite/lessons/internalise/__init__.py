"""Internalisation: the ways for lessons to enter the weights. One class per way, one row in `INTERNALISATIONS`."""

from __future__ import annotations

from mel_lite.errors import ConfigError
from mel_lite.imports import load_object
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
    RolloutBatch,
    ScoredMicroBatch,
    Scorer,
    checked_entries,
    deal_lessons,
)
from mel_lite.text import did_you_mean

INTERNALISATIONS: dict[str, type[Internalisation]] = {
    "analysis": AnalysisNLL,
    "experience": ExperienceNLL,
    "replay": ReplayNLL,
    "right": RightNLL,
    "both": AnalysisAndReplayNLL,
}


def get_internalisation(name: str) -> Internalisation:
    """Return the way called `name`: a key of `INTERNALISATIONS`, or a dotted path to an `Internalisation` class.

    Raises: ConfigError for an unknown name, a path that does not import, or an object that is no Internalisation.
    """
    if name in INTERNALISATIONS:
        return INTERNALISATIONS[name]()
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
    try:
        return found()
    except TypeError as err:
        raise ConfigError(
            f"internalisation={name!r} cannot be built without arguments: {err}. Give its parameters defaults, or "
            "derive a class that sets them."
        ) from err


__all__ = [
    "INTERNALISATIONS",
    "AnalysisNLL",
    "DrawnBatch",
    "Internalisation",
    "LessonNLL",
    "RolloutBatch",
    "ScoredMicroBatch",
    "Scorer",
    "checked_entries",
    "deal_lessons",
    "get_internalisation",
]
