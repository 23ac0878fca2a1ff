"""Run scripts with the real Unsloth, vLLM or DeepSpeed in separate processes, since each changes a whole process.

`make test-all` installs them in folders next to the environment (requirements/unsloth.txt, vllm.txt and deepspeed.txt),
not into it: packages that their metadata requires are missing there, and their CPU backends do not need them.
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

DEEPSPEED_SITE = Path(os.environ.get("MEL_LITE_DEEPSPEED_SITE", Path(sys.prefix) / "deepspeed"))


def needs(site: Path, package: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test if the package is not installed."""
    there = (site / package / "__init__.py").is_file()
    return pytest.mark.skipif(not there, reason=f"{package} is not in {site}: `make test-all` installs it")


needs_unsloth, needs_vllm = needs(SITE, "unsloth"), needs(VLLM_SITE, "vllm")
needs_deepspeed = needs(DEEPSPEED_SITE, "deepspeed")


def with_sites(
    sites: Sequence[Path], *arguments: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` with `sites` on `sys.path`."""
    here = Path(__file__).parent
    # The checkout comes after the sites: the installed package or the existing path decides which mel_lite is tested.
    paths = [*map(str, sites), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def with_unsloth(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process that can import unsloth."""
    return with_sites([SITE], *arguments, cwd=cwd, **environment)


def with_vllm(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process that can import vllm."""
    return with_sites([VLLM_SITE], *arguments, cwd=cwd, **environment)


def with_both(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process that can import unsloth and vllm."""
    return with_sites([VLLM_SITE, SITE], *arguments, cwd=cwd, **environment)
