"""Checkpoint folders that are whole or absent: staged, hashed, renamed.

A checkpoint is `checkpoint-N/` in TRL's and PEFT's layout plus two files of ours: `mel_state.json` (the position of the
run) and `manifest.json` (SHA-256 of every file, written last). It is built in a hidden staging folder and becomes
visible in one rename, so a folder named `checkpoint-N` that has a manifest is complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from mel_lite.errors import CheckpointError
from mel_lite.files import flush, sha256_of, share_weights

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "mel_state.json"
STAGING = ".staging"
_NAME = re.compile(r"checkpoint-(\d+)")


def staging_folder(run_dir: Path) -> Path:
    """Create an empty hidden folder to build a checkpoint in; remove what an interrupted save left there."""
    folder = run_dir / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def commit(staged: Path, run_dir: Path, state: dict[str, Any]) -> Path:
    """Make a staged `checkpoint-N` folder visible in `run_dir`; return its final path.

    Writes `state` and the manifest, flushes every file to disk, then renames. A folder of the same name (the step was
    repeated after falling back to an older checkpoint) is replaced.
    """
    _write_json(staged / STATE, state)
    share_weights(staged)
    files = sorted(p for p in staged.rglob("*") if p.is_file())
    _write_json(staged / MANIFEST, {str(p.relative_to(staged)): sha256_of(p) for p in files})
    for path in [*files, staged / MANIFEST, staged]:
        flush(path)
    final = run_dir / staged.name
    replaced = run_dir / f"{STAGING}-replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    staged.rename(final)
    flush(run_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(staged.parent, ignore_errors=True)
    return final


def committed(run_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest step first, whole or not."""
    found = [(int(m[1]), p) for p in run_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None when every file is unchanged since the save."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{manifest.name} is missing: the save was interrupted, or another program wrote this folder"
    try:
        hashes: dict[str, str] = dict(json.loads(manifest.read_text()))
    except (OSError, ValueError, TypeError) as error:
        return f"{manifest.name} cannot be read: {error}"
    for name, digest in hashes.items():
        path = checkpoint / name
        if not path.resolve().is_relative_to(checkpoint.resolve()):
            return f"{name} leads out of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} differs from what was saved"
    return None


def resolve(run_dir: Path, wanted: str | bool) -> Path:
    """Return the checkpoint to resume from: the one named, or the newest whole one when `wanted` is True.

    A damaged checkpoint is renamed to `<name>.corrupt`, with a warning, and the one before it is taken.

    Raises: CheckpointError when there is none, when none is whole, or when the one named is damaged.
    """
    if wanted is not True:
        path = Path(str(wanted))
        if not path.is_dir():
            raise CheckpointError(f"resume_from_checkpoint={str(path)!r} is not a folder. Give a checkpoint-N folder.")
        if (path / MANIFEST).exists() and (trouble := problem(path)):
            raise CheckpointError(f"Checkpoint {path}: {trouble}. Resume from an earlier one, or from the newest whole "
                                  "one with --resume.")  # fmt: skip
        return path
    candidates = committed(run_dir)
    if not candidates:
        raise CheckpointError(
            f"Nothing to resume in {run_dir}: it holds no checkpoint-N folder. Start without --resume, or name the "
            "run's folder with --output-dir."
        )
    troubles: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        trouble = problem(path)
        if trouble is None:
            for bad, reason in troubles:
                corrupt = bad.with_name(f"{bad.name}.corrupt")
                shutil.rmtree(corrupt, ignore_errors=True)
                bad.rename(corrupt)
                logger.warning("%s: %s. Set aside as %s; resuming from %s.", bad, reason, corrupt.name, path.name)
            return path
        troubles.append((path, trouble))
    listing = "\n".join(f"  {path.name}: {reason}" for path, reason in troubles)
    raise CheckpointError(f"No checkpoint in {run_dir} is whole:\n{listing}\nNothing was deleted.")


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename checkpoints of later steps to `<name>.superseded`, since the run continues from `step`.

    Otherwise the next resume would take the newest of them, which this run never reached.
    """
    for path in committed(run_dir):
        if int(path.name.split("-")[1]) > step:
            old = path.with_name(f"{path.name}.superseded")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return our state of a checkpoint; empty for one written by plain TRL."""
    path = checkpoint / STATE
    return json.loads(path.read_text()) if path.is_file() else {}


def rotate(run_dir: Path, *, keep: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, by step number; the newest and the best always stay."""
    if not keep or keep < 1:
        return
    paths = committed(run_dir)
    protected = {paths[-1].name} | ({Path(best).name} if best else set())
    removable = [p for p in paths if p.name not in protected]
    excess = len(paths) - max(keep, len(protected & {p.name for p in paths}))
    for path in removable[: max(0, excess)]:
        # Renamed first: a deletion that is interrupted must not leave half a checkpoint under its real name.
        doomed = run_dir / f"{STAGING}-rotated"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
