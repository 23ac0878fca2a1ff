"""Run verifiers in worker processes that are killed at a deadline, so that no answer can hang or crash a run.

Handled: answers that loop forever, even in C code; answers that exhaust memory, segfault, exit or write to the worker's
pipes; verifiers that print, raise or fork; a parent that dies. Each failure turns only its own item into an ABSTAIN.
Not handled: this is not a sandbox. A worker has the user's permissions, files and network. Children that a verifier
detaches into their own session survive it. Never let a verifier execute model text.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mel_lite import signals
from mel_lite.errors import ConfigError, VerifierError
from mel_lite.text import printable
from mel_lite.types import Verdict
from mel_lite.verify.thoughts import THINK_TAGS
from mel_lite.verify.transport import environment, pack
from mel_lite.verify.verifiers import BUILT_IN

MAX_COMPLETION_CHARS = 200_000
"""Longest completion that reaches a verifier. Only the end of a longer one does, since the answer is there."""
MAX_REFERENCE_CHARS = 20_000
"""Longest reference answer. A longer one gives ABSTAIN."""
START_DEADLINE_S = 60.0
"""Seconds a worker may take to import its verifier. They do not count towards any answer's deadline."""
MANY = 8
"""Number of consecutive failed calls after which a verifier counts as broken."""
_MAX_FAILED_STARTS = 3
_MAX_WAIT_S = 0.5
_MAX_REPLY_BYTES = 65_536
_WORKER_FILE = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts since the pool was created."""

    calls: int = 0
    timeouts: int = 0
    """Answers without a verdict at the deadline."""
    errors: int = 0
    """Answers whose verifier raised, ran out of memory, died, or wrote something other than a verdict."""
    respawns: int = 0
    """Workers replaced, for any reason."""


class _Worker:
    """One process and the thread that writes to and reads from it. A request may block the thread, never the pool."""

    def __init__(self, setup: bytes, folder: str, events: queue.SimpleQueue[tuple[_Worker, bytes]]) -> None:
        self.task: tuple[int, int] | None = None
        """(request id, position in the batch) while busy, else None."""
        self.columns: frozenset[str] | None = None
        self.ready = False
        self.due_s = time.monotonic() + START_DEADLINE_S
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment(folder),
            start_new_session=True,
        )
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox.put(setup)
        threading.Thread(target=self._pump, args=(events,), name="mel-lite-verify", daemon=True).start()

    def send(self, line: bytes, task: tuple[int, int], deadline_s: float) -> None:
        self.task = task
        self.due_s = time.monotonic() + deadline_s
        self._inbox.put(line)

    def kill(self) -> None:
        """Kill the whole process group and reap the process. Safe to repeat."""
        self._inbox.put(None)
        if hasattr(os, "killpg"):
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # already gone; macOS answers EPERM for a zombie
                pass
        self.process.kill()
        self.process.wait()

    def _pump(self, events: queue.SimpleQueue[tuple[_Worker, bytes]]) -> None:
        assert self.process.stdin and self.process.stdout
        try:
            while (line := self._inbox.get()) is not None:
                self.process.stdin.write(line)
                self.process.stdin.flush()
                reply = self.process.stdout.readline(_MAX_REPLY_BYTES)
                events.put((self, reply))
                if not reply:
                    break
        except (OSError, ValueError):
            events.put((self, b""))
        finally:
            for pipe in (self.process.stdin, self.process.stdout):
                try:
                    pipe.close()
                except OSError:  # unsent bytes to a process that has exited
                    pass


class VerifyPool:
    """Pool of `workers` processes that judge answers. An answer without a verdict after `deadline_s` is an ABSTAIN.

    Starts its processes on first use. Any thread may use it; batches run one at a time. The processes end on `close`,
    at the end of a `with` block, or when the interpreter exits.

    Args:
        verifier: what `mel_lite.verify.verifiers.get_verifier` accepts: a name, or a function.
        workers: number of processes, >= 1.
        deadline_s: wall time per answer in seconds, measured in the parent; start-up does not count.
        memory_bytes: address space of one worker.
        max_respawns: workers that may be lost in one batch, other than at the deadline, before `verify` raises.
        think_tags: (start, end) of the thoughts that built-in verifiers do not read.
    Raises: ConfigError for a value out of range; VerifierError for a function that cannot be sent to a worker.
    """

    def __init__(
        self,
        verifier: str | Callable[..., Any],
        *,
        workers: int = 2,
        deadline_s: float = 1.0,
        memory_bytes: int = 2 * 2**30,
        max_respawns: int = 64,
        think_tags: Sequence[tuple[str, str]] = THINK_TAGS,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers = {workers}: a pool needs at least 1 worker process.")
        if not 0 < deadline_s < math.inf:
            raise ConfigError(f"deadline_s = {deadline_s}: the deadline must be a number of seconds above 0.")
        if memory_bytes < 256 * 2**20:
            raise ConfigError(f"memory_bytes = {memory_bytes}: Python and sympy alone need 256 MiB (268435456).")
        self._packed: dict[str, Any] = {**pack(verifier), "think_tags": list(think_tags)}
        self._verifier = self._packed["verifier"]
        self.think_tags = tuple(think_tags) if self._verifier in BUILT_IN else ()
        """Tags of the thoughts that this verifier does not read; none for your own."""
        self._size = workers
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._max_respawns = max_respawns
        self._stats = PoolStats()
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[tuple[_Worker, bytes]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._folder = tempfile.mkdtemp(prefix="mel-lite-verify-")
        self._finalizer = weakref.finalize(self, _shut_down, self._workers, self._folder, os.getpid())
        self._next_id = 0
        self._failed_starts = 0
        self._failed_in_row = 0
        self._first_error = ""

    @property
    def stats(self) -> PoolStats:
        """Snapshot of the counts since the pool was created."""
        return self._stats

    def verify(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Verdict]:
        """Judge items of (completion, reference answer, other columns). Returns their verdicts, in order.

        A missed deadline, an exception and a dead worker give ABSTAIN and are counted in `stats`. The verifier receives
        column values that JSON cannot represent as text.

        Raises: VerifierError when the verifier cannot be loaded, returns something other than a verdict, failed in at
        least 8 consecutive calls including all of this batch, or lost more than `max_respawns` workers in this batch.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise VerifierError("this VerifyPool is closed; create a new one.")
            try:
                return self._run(items)
            except BaseException:
                self._stop()  # a worker may still be busy with an item of the aborted batch
                raise

    def close(self) -> None:
        """Kill all workers. Safe to repeat."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> VerifyPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one batch ----

    def _run(self, items: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Verdict]:
        batch = _Batch(items, max_losses=self._max_respawns)
        while batch.open:
            signals.poll()
            self._fill(batch)
            try:
                worker, reply = self._events.get(timeout=self._wait_s())
            except queue.Empty:
                self._expire(batch)
                continue
            if worker in self._workers:  # else it was replaced, and this is its last reply
                self._receive(worker, reply, batch)
        self._judge_verifier(batch)
        return batch.verdicts

    def _fill(self, batch: _Batch) -> None:
        """Start missing workers and give every idle worker an item."""
        for worker in [w for w in self._workers if w.ready and w.task is None and w.process.poll() is not None]:
            self._replace(worker)  # died while idle, so no item caused it
        while len(self._workers) < min(self._size, batch.open):
            self._workers.append(self._spawn())
        for worker in self._workers:
            if worker.ready and worker.task is None and batch.waiting:
                position = batch.waiting.popleft()
                self._next_id += 1
                line = _request(self._next_id, batch.items[position], worker.columns)
                worker.send(line, (self._next_id, position), self._deadline_s)

    def _receive(self, worker: _Worker, reply: bytes, batch: _Batch) -> None:
        message = _parse(reply)
        if "fatal" in message:
            raise VerifierError(str(message["fatal"]))
        if worker.task is None:
            self._receive_start(worker, message)
            return
        number, position = worker.task
        verdict, error = message.get("verdict"), message.get("error")
        if message.get("id") != number or (verdict not in tuple(Verdict) and not isinstance(error, str)):
            died = "the worker process died" if not reply else "the worker wrote something other than a verdict"
            self._fail(died, batch)
            self._lose(worker, batch)
            return
        worker.task, worker.due_s = None, math.inf
        if error is not None:
            self._fail(printable(error), batch)
            if message.get("retire"):
                self._replace(worker)
            return
        self._failed_in_row = 0
        self._count(calls=1)
        batch.verdicts[position] = Verdict(str(verdict))
        batch.open -= 1

    def _receive_start(self, worker: _Worker, message: dict[str, Any]) -> None:
        if "ready" in message and not worker.ready:
            worker.ready, worker.due_s = True, math.inf
            worker.columns = None if message["ready"] is None else frozenset(message["ready"])
            self._failed_starts = 0
            return
        self._failed_starts += 1
        self._replace(worker)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise VerifierError(
                f"verifier = {self._verifier!r}: {self._failed_starts} worker processes in a row died while loading it "
                f"(exit code {worker.process.returncode}). Import it in a Python shell to see why. It may also need "
                f"more memory than memory_bytes = {self._memory_bytes}."
            )

    def _expire(self, batch: _Batch) -> None:
        """Replace the workers that are past their deadline."""
        now_s = time.monotonic()
        for worker in [w for w in self._workers if w.due_s <= now_s]:
            if worker.task is None:
                raise VerifierError(
                    f"verifier = {self._verifier!r} was not loaded after {START_DEADLINE_S:.0f} s: it must import "
                    "quickly. Precompute slow tables into a file that it reads, or make its imports lighter."
                )
            batch.timeouts += 1
            batch.open -= 1
            self._count(calls=1, timeouts=1)
            self._replace(worker)

    def _fail(self, error: str, batch: _Batch) -> None:
        self._first_error = self._first_error if self._failed_in_row else error
        self._failed_in_row += 1
        batch.errors += 1
        batch.open -= 1
        self._count(calls=1, errors=1)

    def _judge_verifier(self, batch: _Batch) -> None:
        """Raise when every call failed, and warn when every call missed the deadline.

        A verifier that always fails is broken. For one that is always late, the deadline is too short.
        """
        judged = len(batch.items) - batch.refused
        if batch.errors and batch.errors == judged and self._failed_in_row >= MANY:
            raise VerifierError(
                f"verifier = {self._verifier!r} failed in {self._failed_in_row} calls in a row, so its verdicts are "
                f"meaningless. First error: {self._first_error}. Call it by hand on one row to debug it."
            )
        if batch.timeouts == judged and judged >= MANY:
            warnings.warn(
                f"verifier = {self._verifier!r}: all {judged} answers of this batch missed the deadline of "
                f"{self._deadline_s} s. If the verifier is slow, rather than the answers hostile, raise the deadline.",
                stacklevel=4,
            )

    # ---- workers ----

    def _spawn(self) -> _Worker:
        here = os.getcwd()
        setup = {
            **self._packed,
            "deadline_s": self._deadline_s,
            "memory_bytes": self._memory_bytes,
            "parent_pid": os.getpid(),
            "sys_path": [*(entry or here for entry in sys.path), here],
            "package_folder": str(Path(__file__).resolve().parents[2]),
        }
        return _Worker(json.dumps(setup).encode() + b"\n", self._folder, self._events)

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._workers.append(self._spawn())
        self._count(respawns=1)

    def _lose(self, worker: _Worker, batch: _Batch) -> None:
        self._replace(worker)
        batch.losses += 1
        if batch.losses > batch.max_losses:
            raise VerifierError(
                f"verifier = {self._verifier!r} lost {batch.losses} worker processes in one batch "
                f"(max_respawns = {batch.max_losses}). First error: {self._first_error}."
            )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _wait_s(self) -> float:
        """Return the time until the next deadline, capped so that signals are handled soon."""
        due_s = min(worker.due_s for worker in self._workers)
        return min(_MAX_WAIT_S, max(0.0, due_s - time.monotonic()))

    def _count(self, **more: int) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


class _Batch:
    """State of one call of `verify`."""

    def __init__(self, items: Sequence[tuple[str, str, dict[str, Any]]], max_losses: int) -> None:
        self.items = items
        self.verdicts = [Verdict.ABSTAIN] * len(items)
        self.waiting = deque(i for i, (_, answer, _) in enumerate(items) if len(str(answer)) <= MAX_REFERENCE_CHARS)
        self.refused = len(items) - len(self.waiting)
        self.open = len(self.waiting)
        self.timeouts = self.errors = self.losses = 0
        self.max_losses = max_losses


def _request(number: int, item: tuple[str, str, dict[str, Any]], columns: frozenset[str] | None) -> bytes:
    completion, answer, row = item
    taken = {name: value for name, value in row.items() if columns is None or name in columns}
    text = completion if len(completion) <= MAX_COMPLETION_CHARS else completion[-MAX_COMPLETION_CHARS:]
    request = {"id": number, "completion": text, "answer": str(answer), "columns": taken}
    return json.dumps(request, default=str).encode() + b"\n"


def _parse(reply: bytes) -> dict[str, Any]:
    """Return the reply as a message, or an empty one when it is not a JSON object."""
    try:
        message = json.loads(reply)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _shut_down(workers: list[_Worker], folder: str, owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # a fork of the owner must not kill the owner's workers when it exits
        return
    for worker in workers:
        worker.kill()
    workers.clear()
    shutil.rmtree(folder, ignore_errors=True)
