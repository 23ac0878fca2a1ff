"""Upload a folder to the Hub, after showing exactly which files would go."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mel_lite.errors import ConfigError
from mel_lite.hub.dataset_card import ROWS
from mel_lite.text import first_line

LEFT_OUT = (".*", "*.lock", "*.tmp", "*.partial")
"""Names that are never uploaded; of folders, too."""
LARGEST_UNIT = 1024


@dataclass(frozen=True, slots=True)
class Upload:
    """A folder that would go to the Hub as it is."""

    folder: Path
    repo_id: str
    repo_type: str
    """`model` or `dataset`."""
    private: bool
    files: tuple[tuple[str, int], ...]
    """Path in the repository and size in bytes, in the order of the names."""

    @property
    def total_bytes(self) -> int:
        """Sum of the sizes."""
        return sum(size for _, size in self.files)

    def listing(self) -> str:
        """Return what would go where, one file per line."""
        where = f"{self.repo_type} repository {self.repo_id} ({'private' if self.private else 'public'})"
        rows = [f"{human(size):>10}  {name}" for name, size in self.files]
        return "\n".join([f"{self.folder} -> {where}", *rows, f"{human(self.total_bytes):>10}  in {len(rows)} files"])


def prepare(folder: Path, repo_id: str, *, private: bool) -> Upload:
    """Return the upload of a folder: an adapter, a model, or a dataset of `experiences export`; a run's adapter.

    Raises: ConfigError when there is nothing to upload, or its card cannot be read by huggingface_hub.
    """
    from huggingface_hub import DatasetCard, ModelCard
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Give an adapter, a merged model or a dataset folder.")
    if (folder / "config.yaml").is_file() and (folder / "adapter").is_dir():
        folder = folder / "adapter"
    is_dataset = (folder / ROWS).is_file()
    if not is_dataset and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        raise ConfigError(
            f"{folder} holds no weights and no dataset. Give a run, its adapter/, an exported model, or a folder of "
            "`mel-lite experiences export`."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repository {repo_id!r}: {first_line(error)} Write owner/name.") from error
    card = folder / "README.md"
    try:
        (DatasetCard if is_dataset else ModelCard).load(card)
    except Exception as error:  # a missing file, or YAML that is none
        raise ConfigError(f"{card}: the Hub could not read this card ({first_line(error)}).") from error
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch(part, left) for part in name.parts for left in LEFT_OUT):
            files.append((name.as_posix(), path.stat().st_size))
    return Upload(folder, repo_id, "dataset" if is_dataset else "model", private, tuple(files))


def push(upload: Upload, *, token: str | None = None) -> str:
    """Upload the files of `upload` in one commit, into a repository that is made if needed. Returns: its address.

    Raises: ConfigError offline, without a token, and for what the Hub answers.
    """
    from huggingface_hub import HfApi, constants, errors, get_token

    later = "Nothing was uploaded."
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push in offline mode. {later} Unset HF_HUB_OFFLINE, and try again.")
    if not (token := token or get_token()):
        raise ConfigError(f"push without a token, which the Hub would refuse. {later} Run `hf auth login`.")
    api = HfApi(token=token)
    names = [name for name, _ in upload.files]
    try:
        api.create_repo(upload.repo_id, repo_type=upload.repo_type, private=upload.private, exist_ok=True)
        done = api.upload_folder(
            repo_id=upload.repo_id, repo_type=upload.repo_type, folder_path=upload.folder, allow_patterns=names,
            commit_message="Upload with mel-lite",
        )  # fmt: skip
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        fix = " Run `hf auth login` with a token that may write there." if refused else " Try again."
        raise ConfigError(f"push to {upload.repo_id}: the Hub answers {first_line(error)}.{fix}") from error
    except Exception as error:  # no network: the HTTP client has many ways to say so
        raise ConfigError(
            f"push to {upload.repo_id}: the Hub cannot be reached ({type(error).__name__}). {later} Connect to the "
            "network, and try again."
        ) from error
    return str(done.repo_url if hasattr(done, "repo_url") else done.commit_url)


def human(size_bytes: int) -> str:
    """Return a size with the unit that fits, such as `12.3 MiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < LARGEST_UNIT:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= LARGEST_UNIT
    return f"{size:.1f} GiB"
