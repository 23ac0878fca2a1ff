"""Runs scripts with the real Unsloth, in processes of their own: importing it patches libraries for a whole process.

`make test-all` installs it beside the environment (requirements/unsloth.txt), not into it: it lacks the GPU packages
that its metadata asks for, and its CPU backend needs none of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SITE = Path(os.environ.get("MEL_LITE_UNSLOTH_SITE", Path(sys.prefix) / "unsloth"))

needs_unsloth = pytest.mark.skipif(
    not (SITE / "unsloth" / "__init__.py").is_file(), reason=f"unsloth is not in {SITE}: `make test-all` installs it"
)


def with_unsloth(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` where `import unsloth` works."""
    here = Path(__file__).parent
    # The checkout comes after Unsloth: what is installed or on the path already decides which mel_lite is tested.
    paths = [str(SITE), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done
