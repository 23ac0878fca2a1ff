"""Take a verifier to the worker processes: by its name, or as code when no other process can import it by name."""

from __future__ import annotations

import base64
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from mel_lite.errors import VerifierError
from mel_lite.imports import load_object
from mel_lite.verify.verifiers import BUILT_IN, callable_name

MAX_CODE_BYTES = 16 * 2**20
"""Largest function with what it refers to. A larger one would start every worker slowly."""
_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "PATHEXT")


def pack(verifier: str | Callable[..., Any]) -> dict[str, str]:
    """Return the part of a worker's setup that names the verifier, or holds its code.

    A name is left as it is. A function that its module exports goes by name; one of `__main__`, a notebook, a function
    body or a lambda goes as code.

    Raises: VerifierError for a function that neither an import nor a copy can bring into another process.
    """
    if isinstance(verifier, str):
        if verifier.partition(":")[0] != "__main__" and not verifier.startswith("__main__."):
            return {"verifier": verifier}
        verifier = load_object(verifier, field="verifier", error=VerifierError)
    assert not isinstance(verifier, str)
    name = callable_name(verifier)
    if name.partition(":")[0] == "__main__" or not _is_exported(verifier, name):
        return {"verifier": name, "code": _code(verifier, name)}
    if not _can_be_found(name.partition(":")[0]):
        raise VerifierError(
            f"verifier = {name!r} is in a module that no other process can import (it has no file on sys.path), and "
            "verifiers run in worker processes. Put it into a .py file in the folder you start in, and import it."
        )
    return {"verifier": next((built_in for built_in, own in BUILT_IN.items() if own is verifier), name)}


def unpack(setup: dict[str, Any]) -> str | Callable[..., Any]:
    """Return the verifier of a worker's setup: a name, or the function itself."""
    if "code" not in setup:
        return str(setup["verifier"])
    import dill  # type: ignore[import-untyped]

    function: Callable[..., Any] = dill.loads(base64.b64decode(setup["code"]))
    return function


def environment(folder: str) -> dict[str, str]:
    """Return a minimal environment without tokens, proxies or thread pools; home and TMPDIR in the pool's folder."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return kept | {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _is_exported(function: Callable[..., Any], name: str) -> bool:
    """Return True when `module:name` of the running process is this very function."""
    module, _, attribute = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    return found is function


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _code(function: Callable[..., Any], name: str) -> str:
    import dill

    try:
        code = dill.dumps(function, recurse=True)
        dill.loads(code)
    except Exception as error:
        raise VerifierError(
            f"verifier = {name!r} cannot be copied into a worker process ({type(error).__name__}: {error}). Define it "
            "at the top level of a .py file, without open files, locks or models, and name it 'my_file:my_function'."
        ) from error
    if len(code) > MAX_CODE_BYTES:
        raise VerifierError(
            f"verifier = {name!r} refers to objects of {len(code) / 2**20:.0f} MiB, which every worker process would "
            "receive. Define it in a .py file that loads what it needs, and name it 'my_file:my_function'."
        )
    return base64.b64encode(code).decode()


__all__ = ["environment", "pack", "unpack"]
