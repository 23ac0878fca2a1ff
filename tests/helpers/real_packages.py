"""Runs scripts with the real Unsloth or the real vLLM, in processes of their own: either takes hold of a whole process.

`make test-all` installs them beside the environment (requirements/unsloth.txt and vllm.txt), not into it: they
lack the packages that their metadata asks for, and their CPU backends need none of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SITE = Path(os.environ.get("MEL_LITE_UNSLOTH_SITE", Path(sys.prefix) / "unsloth"))
VLLM_SITE = Path(os.environ.get("MEL_LITE_VLLM_SITE", Path(sys.prefix) / "vllm"))


def needs(site: Path, package: str) -> pytest.MarkDecorator:
    """Skip where the package is not installed."""
    there = (site / package / "__init__.py").is_file()
    return pytest.mark.skipif(not there, reason=f"{package} is not in {site}: `make test-all` installs it")


needs_unsloth, needs_vllm = needs(SITE, "unsloth"), needs(VLLM_SITE, "vllm")


def with_sites(
    sites: Sequence[Path], *arguments: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` where what is in `sites` can be imported."""
    here = Path(__file__).parent
    # The checkout comes after the sites: what is installed or on the path already decides which mel_lite is tested.
    paths = [*map(str, sites), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def with_unsloth(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` where `import unsloth` works."""
    return with_sites([SITE], *arguments, cwd=cwd, **environment)


def with_vllm(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` where `import vllm` works."""
    return with_sites([VLLM_SITE], *arguments, cwd=cwd, **environment)


def with_both(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` where `import unsloth` and `import vllm` work."""
    return with_sites([VLLM_SITE, SITE], *arguments, cwd=cwd, **environment)
