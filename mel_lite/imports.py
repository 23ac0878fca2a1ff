"""Objects named by a dotted path in a config file, and the command that installs what is missing."""

from __future__ import annotations

import importlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from mel_lite.errors import MelLiteError
from mel_lite.text import did_you_mean


def load_object(path: str, *, field: str, error: type[MelLiteError]) -> Any:
    """Import `package.module:name` (or `package.module.name`); the current folder is searched last.

    Raises: `error`, naming `field` and the path, when the module does not import or has no such name.
    """
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    here = os.getcwd()  # an installed console script does not have it on its path
    sys.path.append(here)
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as problem:
        raise error(
            f"{field} = {path!r}: importing {module_name!r} failed with {type(problem).__name__}: {problem}. "
            "The file must be importable from the folder you start in (a notebook cell is not: save it as a .py file)."
        ) from problem
    finally:
        sys.path.reverse()
        sys.path.remove(here)
        sys.path.reverse()
    for part in attribute.split("."):
        if not hasattr(target, part):
            near = did_you_mean(part, dir(target))
            raise error(f"{field} = {path!r}: {module_name!r} has no {attribute!r}.{near}")
        target = getattr(target, part)
    return target


def install_command(extra: str) -> str:
    """Return the command that adds the packages of `extra` to this installation, which no package index has.

    It names the checkout that is imported, or else the folder, archive or repository that pip installed it from
    (`direct_url.json`, PEP 610).
    """
    source = Path(__file__).resolve().parents[1]
    if (source / "pyproject.toml").is_file():
        return f'pip install -e "{source}[{extra}]"'
    try:
        recorded = json.loads(distribution("mel-lite").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        recorded = {}
    if "url" not in recorded:
        return f'pip install -e ".[{extra}]" in a clone of the repository'
    version = recorded.get("vcs_info")
    url = f"{version['vcs']}+{recorded['url']}@{version['commit_id']}" if version else recorded["url"]
    return f'pip install "mel-lite[{extra}] @ {url}"'
