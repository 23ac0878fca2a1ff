"""The installed `mel-lite` command, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def mel_lite_command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user would."""
    command = [str(Path(sys.executable).with_name("mel-lite")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=900, check=False)
