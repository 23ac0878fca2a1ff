"""Python programs in processes of their own that start in a fraction of a second.

Importing torch, TRL and what they need takes most of the time of a short program. A server, one per test process,
imports them once and forks for each program. The child has these libraries loaded and nothing of MEL-Lite. It sees no
GPU. It ends like any other Python process: exit handlers run, and an exception is printed with its traceback.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "datasets", "peft", "trl.trainer.grpo_trainer")
FIXED = {"CUDA_VISIBLE_DEVICES": "", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""Read once by the libraries. CUDA does not survive a fork; the others make results equal on more machines."""

_server: subprocess.Popen[bytes] | None = None


def run_warm(
    program: str | Path, *arguments: object, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a file (`Path`) or source code (`str`) as `__main__`; the result is that of `subprocess.run`.

    Modules are found where the test finds them.

    Raises:
        TimeoutExpired: the program ran longer than `timeout_s` seconds and was killed.
    """
    command = [str(program), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / "stdout", Path(place) / "stderr"]
        request = {"command": command, "is_file": isinstance(program, Path), "cwd": str(cwd or Path.cwd()),
                   "path": sys.path, "environment": dict(os.environ), "files": list(map(str, files))}  # fmt: skip
        server = _started()
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(request).encode() + b"\n")
        pid = _number(server)
        if not select.select([server.stdout], [], [], timeout_s)[0]:
            os.kill(pid, signal.SIGKILL)
            _number(server)
            raise subprocess.TimeoutExpired(command, timeout_s)
        status = _number(server)
        return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))


def _started() -> subprocess.Popen[bytes]:
    global _server
    if _server is None:
        command = [sys.executable, "-P", __file__]
        environment = os.environ | FIXED | {"TRANSFORMERS_VERBOSITY": "error"}
        # Unbuffered, so that `select` sees what has not been read.
        _server = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(_server.kill)
    return _server


def _number(server: subprocess.Popen[bytes]) -> int:
    assert server.stdout
    line = server.stdout.readline()
    assert line, "the server of warm processes has died"
    return int(line)


# ---- the server's side ----


def serve() -> dict[str, Any] | None:
    """Answer requests with pid and exit status until stdin ends; in a child, return its request."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return dict(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def become(request: dict[str, Any]) -> int:
    """Take over the streams, folder, environment and arguments of the program and run it; the exit status."""
    for fd, name in ((0, os.devnull), *zip((1, 2), request["files"], strict=True)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"] | FIXED)
    sys.path[:] = request["path"]
    code, *sys.argv[1:] = request["command"]
    sys.argv[0] = code if request["is_file"] else "-c"
    try:
        source = Path(code).read_text() if request["is_file"] else code
        exec(compile(source, sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(status: int) -> None:
    """End the process as the interpreter does, but for taking thousands of modules apart, which takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # shared with the children until they change it
    if wanted := serve():
        leave(become(wanted))
