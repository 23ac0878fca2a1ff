"""run.json: the preset of a run, its versions and machine, and the seconds of each stage."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mel_lite import __version__
from mel_lite.engines.metered import PhaseClock
from mel_lite.files import atomic_write_text

FILE_NAME = "run.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "unsloth", "vllm")


class RunRecord:
    """Writes run.json after each stage. A resumed run adds a session; earlier ones stay."""

    def __init__(self, folder: Path | None, *, preset: str | None, device: str, resume: bool) -> None:
        """Begin a session. `folder`: None = write nothing, as on all ranks but the first."""
        self._folder = folder
        self._clock = PhaseClock()
        self._started_s = time.monotonic()
        earlier = read_record(folder) if folder is not None and resume else {}
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._session: dict[str, Any] = {"started_at": started, "stages_s": {}}
        self._values = {
            "preset": preset or earlier.get("preset"),
            **record_here(device),
            "sessions": [*earlier.get("sessions", ()), self._session],
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds since this session began."""
        return time.monotonic() - self._started_s

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block, excluding stages timed inside it, and write the file at its end."""
        try:
            with self._clock.rest(name):
                yield
        finally:
            self.write()

    def write(self) -> None:
        """Write the file, unless the folder has no config.yaml: an aborted start leaves its folder empty."""
        seconds_s = {stage: round(value, 3) for stage, value in self._clock.seconds_s.items()}
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        self._session |= {"ended_at": ended, "stages_s": seconds_s}
        if self._folder is not None and (self._folder / "config.yaml").is_file():
            atomic_write_text(self._folder / FILE_NAME, json.dumps(self._values, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a run's run.json; empty if it is missing or damaged."""
    try:
        values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    sessions = values.get("sessions") if isinstance(values, dict) else None
    if not isinstance(sessions, list) or not all(isinstance(each, dict) for each in sessions):
        return {}
    return dict(values)


def stage_seconds(record: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each stage, summed over the sessions of a run."""
    totals: dict[str, float] = {}
    for session in record.get("sessions", ()):
        for name, seconds in (session.get("stages_s") or {}).items():
            if isinstance(seconds, int | float):
                totals[name] = totals.get(name, 0.0) + seconds
    return totals


def record_here(device: str | None = None) -> dict[str, Any]:
    """Return versions and device of this process."""
    return {
        "mel_lite": __version__,
        "device": device or device_here(),
        "python": platform.python_version(),
        "packages": _versions(),
    }


def device_here() -> str:
    """Return the device that trains: the GPU's name, or the CPU with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
