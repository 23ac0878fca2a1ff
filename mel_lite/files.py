"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path in the same folder to write to; it replaces `path` in one rename when the block ends.

    When the block raises, `path` stays as it was and the hidden file is removed. A killed process can leave it behind.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield staged
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 so that a kill leaves the old file or the new one, never a part. Nothing is flushed."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def publish_dir(staging: Path, target: Path) -> None:
    """Rename `staging` to `target` durably: flush every file and folder, rename, flush the parent folder.

    Raises: OSError when `target` exists and is not an empty folder.
    """
    share_weights(staging)
    for path in [*staging.rglob("*"), staging]:
        flush(path)
    os.rename(staging, target)
    flush(target.parent)


def share_weights(folder: Path) -> None:
    """Give weight files the mode of other new files: safetensors creates them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk (fsync)."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder to flush it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def nearest_existing_folder(path: Path) -> Path:
    """Return the absolute `path` if it is a folder, else its nearest parent that is one."""
    path = path.absolute()
    return path if path.is_dir() else nearest_existing_folder(path.parent)
