"""Run folders: default locations, and a lock so that only one process writes to a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mel_lite.errors import ConfigError

RUNS = Path("runs")


def default_output_dir(model: str, algorithm: str) -> Path:
    """Return `runs/<date-time>-<model>-<algorithm>`."""
    return RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{model.rstrip('/').split('/')[-1].lower()}-{algorithm}"


def newest_run() -> Path:
    """Return the most recently started run folder in `runs/`. Raises ConfigError if there is none."""
    folders = [path.parent for path in RUNS.glob("*/config.yaml")]
    if not folders:
        raise ConfigError(f"There is no run in {RUNS}/. Pass the run's folder (for train: --output-dir).")
    return max(folders, key=lambda folder: (folder / "config.yaml").stat().st_mtime)


def check_folder(folder: Path, *, resume: bool) -> None:
    """Check that a run could write to a folder, without creating it.

    Raises: ConfigError if the folder is not empty and `resume` is False, or if it cannot be written.
    """
    if not resume and any(p.is_file() and p.name != ".lock" for p in folder.rglob("*")):
        raise ConfigError(
            f"output folder {folder} is not empty. Continue that run with --resume, or choose another --output-dir."
        )
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"output folder {folder} cannot be written: {there} is a file. Choose another --output-dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output folder {folder} cannot be written: Permission denied ({there}).")


@contextmanager
def run_folder(folder: Path, *, resume: bool) -> Iterator[None]:
    """Create the run folder if needed and lock it for this process.

    Raises: ConfigError if the folder is not empty and `resume` is False, if another process holds the lock, or if the
        folder cannot be written.
    """
    check_folder(folder, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
        (folder / ".lock").write_text(f"{os.getpid()}\n")
    except Timeout as error:
        holder = _holder(folder)
        who = f" (pid {holder})" if holder else ""
        raise ConfigError(
            f"output folder {folder} is in use by another process{who}. Choose another --output-dir."
        ) from error
    except OSError as error:
        raise ConfigError(f"output folder {folder} cannot be written: {error.strerror or error}.") from error
    try:
        yield
    finally:
        lock.release()


def process_using(folder: Path) -> str | None:
    """Return the pid of the process that writes to a run now, `unknown` if it is not told; None when there is none."""
    file = folder / ".lock"
    if not file.is_file():
        return None
    import fcntl

    try:
        with file.open("rb") as opened:  # FileLock would empty the file
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(folder) or "unknown"
    except OSError:  # a file system without locks
        return None
    return None


def _holder(folder: Path) -> str:
    """Return the pid that the lock's holder wrote into the lock file; empty if it cannot be read."""
    try:
        return str(int((folder / ".lock").read_text()))
    except (OSError, ValueError):
        return ""
