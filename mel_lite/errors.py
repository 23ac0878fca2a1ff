"""Errors shown to users. Each message states the field, its value, why it is wrong, and the fix."""

from collections.abc import Iterable

from mel_lite.text import did_you_mean


class MelLiteError(Exception):
    """Base of every error MEL-Lite raises for a user. `exit_code` is what the CLI exits with."""

    exit_code = 2
    already_reported = False
    """True when another process of the run reports it."""


class ConfigError(MelLiteError, ValueError):
    """An option, preset or combination of options that cannot work."""


class DataError(MelLiteError, ValueError):
    """A dataset, file or row that cannot be used. The message names file, row and column where there is one."""


class VerifierError(MelLiteError, ValueError):
    """A verifier that cannot be found, or that failed too often for its verdicts to be used."""


class ModelError(MelLiteError, ValueError):
    """A model or tokenizer MEL-Lite cannot train: no chat template, wrong base for an adapter, ..."""


class EngineError(MelLiteError, RuntimeError):
    """The generation engine failed or cannot run here."""

    exit_code = 6


class CheckpointError(MelLiteError, ValueError):
    """A checkpoint that is missing, incomplete, corrupt, or of another run."""

    exit_code = 3


class DiskFullError(MelLiteError, OSError):
    """A checkpoint could not be written because the disk is full. The previous one is complete."""

    exit_code = 4


class DivergedError(MelLiteError, RuntimeError):
    """Training stopped: updates were not finite, or its metrics collapsed."""

    exit_code = 5


class ExportError(MelLiteError, ValueError):
    """An export that would not be faithful to the trained adapter, or cannot be written."""


class StoreError(MelLiteError, ValueError):
    """The run's experience store is missing, locked for writing by another run, or of another version."""


def check_choice(field: str, value: object, choices: Iterable[str], *, fix: str = "") -> None:
    """Raise ConfigError with the nearest choice and the fix (default: set `field`) unless `value` is in `choices`."""
    known = [str(choice) for choice in choices]
    if value not in known:
        hint = did_you_mean(value, known)
        given = f"{field} {value!r}" if field.startswith("--") else f"{field}={value!r}"
        raise ConfigError(f"{given} is not one of {', '.join(known)}.{hint} {fix or f'Set {field}.'}")


__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiskFullError",
    "DivergedError",
    "EngineError",
    "ExportError",
    "MelLiteError",
    "ModelError",
    "StoreError",
    "VerifierError",
    "check_choice",
]
