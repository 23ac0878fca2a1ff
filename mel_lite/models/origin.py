"""Find a base model by its name, and say in words what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mel_lite.errors import MelLiteError, ModelError
from mel_lite.models.demo import demo_model_dir

DEMO = "demo"
"""Name of the demo model of `mel_lite.models.demo`."""
NO_TOKENIZER = "it has no tokenizer (tokenizer.json). Copy the files of its tokenizer into the folder."
_WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


def locate(name: str) -> str:
    """Return a path or Hub id that transformers can load. Raises: ModelError for a local folder without a model."""
    if name == DEMO:
        return str(demo_model_dir())
    path = Path(name).expanduser()
    if path.is_file() or path.suffix in _WEIGHT_FILES:
        raise ModelError(
            f"model={name!r} is the name of a file. Give the folder with config.json, tokenizer and safetensors "
            "weights (GGUF files are for llama.cpp, and cannot be trained)."
        )
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"model={name!r}: no such folder. Check the path, or give a Hub id (owner/name).")
        return name
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"model={name!r} is a LoRA adapter, not a base model. Give its base as model.")
    if not (path / "config.json").is_file():
        raise ModelError(f"model={name!r} has no config.json, so it is not a model folder. Check the path.")
    return str(path)


@contextmanager
def model_errors(name: str) -> Iterator[None]:
    """Convert errors of transformers and the Hub client while loading `name` to a ModelError with the fix."""
    import torch

    try:
        yield
    except (MelLiteError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a corrupt file may raise anything in its reader
        raise ModelError(f"model={name!r}: {_advice(name, error)}") from error


def _advice(name: str, error: BaseException) -> str:
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(map(str, chain))

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if raised(hub.GatedRepoError):
        return f"the repository is gated. Accept its terms at https://huggingface.co/{name}, then `hf auth login`."
    if raised(hub.RevisionNotFoundError):
        return "the repository has no such revision. Set revision to an existing branch, tag or commit."
    if raised(hub.RepositoryNotFoundError):
        return "no such repository on the Hub, or it is private. Check the spelling, or `hf auth login`."
    if raised(hub.LocalEntryNotFoundError, ConnectionError) or "couldn't connect" in text:
        return (
            "not in the local cache, and the Hub cannot be reached. Connect to the network, give a local folder, or "
            "use the demo model (model=demo), which comes from the Python package index."
        )
    if raised(hub.HFValidationError):
        return "neither an existing folder nor a Hub id (owner/name). Check the spelling."
    if "trust_remote_code" in text:
        return "it needs code from its repository, which MEL-Lite never runs. Use a model built into transformers."
    if "safetensors" in text and ("no file named" in text or "does not appear" in text):
        return "it has no safetensors weights, and pickled ones are never loaded. Convert it with `save_pretrained`."
    if "Couldn't instantiate the backend tokenizer" in text:
        return NO_TOKENIZER
    if isinstance(error, ImportError) and "bitsandbytes" in text:
        return f"{error}. 4-bit loading needs `pip install bitsandbytes`."
    if isinstance(error, (OSError, ValueError, ImportError)):
        return str(error)
    return f"its files are corrupt ({type(error).__name__}: {error}). Download them again, or use another model."
