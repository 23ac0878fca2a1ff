"""Worker process of `VerifyPool`: reads one request per line, writes one verdict per line.

It is run by path (`python -P .../worker.py`), so it needs nothing installed. The first line it reads holds the parent's
`sys.path` and the verifier's name. It takes the pipes over before any foreign code runs: a verifier prints to stderr,
and reads an empty stdin.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, BinaryIO

MAX_FILE_BYTES = 16 * 2**20
MAX_OPEN_FILES = 256


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    requests, replies = _claim_pipes()
    setup = json.loads(requests.readline())
    _limit_resources(setup["memory_bytes"])
    _die_with_parent(setup["parent_pid"])
    sys.path[:] = setup["sys_path"]
    _find_our_package(setup["package_folder"])
    try:
        verifier = _load(setup)
    except BaseException as error:  # including SystemExit during import: the parent must report it
        _send(replies, {"fatal": str(error) or repr(error)})
        return
    _send(replies, {"ready": None if verifier.columns is None else sorted(verifier.columns)})
    while line := requests.readline():
        _limit_cpu(setup["deadline_s"])
        _send(replies, _judge(verifier, json.loads(line)))


def _find_our_package(folder: str) -> None:
    """Make `import mel_lite` import the parent's copy, even if another one is installed."""
    spec = importlib.util.find_spec("mel_lite")
    if (
        spec is None
        or spec.origin is None
        or os.path.realpath(spec.origin) != os.path.join(folder, "mel_lite", "__init__.py")
    ):
        sys.path.insert(0, folder)


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return private copies of stdin and stdout, which children do not inherit. Make stdin empty and stdout stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _load(setup: dict[str, Any]) -> Any:
    from mel_lite.verify.transport import unpack
    from mel_lite.verify.verifiers import BUILT_IN, get_verifier

    name = setup["verifier"]
    verifier = get_verifier(unpack(setup), think_tags=[(start, end) for start, end in setup["think_tags"]])
    if name in BUILT_IN and name != "reasoning-gym":
        verifier(r"\boxed{\frac{1}{2}}", "0.5")  # load imports and grammar tables now, not on the first answer's time
    return verifier


def _judge(verifier: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to one request: a verdict, or the error. `retire` asks the pool to replace this worker."""
    from mel_lite.errors import VerifierError

    number = request["id"]
    try:
        verdict = verifier(request["completion"], request["answer"], **request["columns"])
        return {"id": number, "verdict": str(verdict)}
    except VerifierError as error:
        return {"id": number, "fatal": str(error)}
    except BaseException as error:
        spent = isinstance(error, MemoryError)
        return {"id": number, "error": _one_line(error)[:2_000], "retire": spent}


def _one_line(error: BaseException) -> str:
    """Format type, message and innermost frame of an exception in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    first = (str(error).splitlines() or [""])[0][:500]
    return f"{type(error).__name__}: {first}{where}"


def _limit_resources(memory_bytes: int) -> None:
    """Limit address space, core dumps, file size and open files. Skip limits that this system does not support."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, limit in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", MAX_FILE_BYTES),
        ("RLIMIT_NOFILE", MAX_OPEN_FILES),
    ):
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            continue


def _limit_cpu(deadline_s: float) -> None:
    """Let the kernel kill this process well after the deadline, even if the parent is gone and C code holds the GIL."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spare_s = (2 * deadline_s + 2) * (os.cpu_count() or 1)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = math.ceil(usage.ru_utime + usage.ru_stime + spare_s)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _die_with_parent(parent_pid: int) -> None:
    """Kill this process group once the parent has exited.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started us ends, and any thread may use the pool.
    """
    if not hasattr(os, "killpg"):
        return

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
