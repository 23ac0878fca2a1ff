"""Processes that train together (`accelerate launch`, `torchrun`): who speaks, what all agree on, who samples what."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import MelLiteError

T = TypeVar("T")


def rank() -> int:
    """Number of this process; 0 is the one that prints and writes."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_first(call: Callable[[], T], *, cpu: bool) -> T:
    """What `call` returns on process 0, on every process; joins the process group first. `cpu`: train on CPUs (gloo).

    Raises: on every process, the MelLiteError that `call` raised on process 0; elsewhere it is marked as `told`.
    """
    if world() == 1:
        return call()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=cpu)
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = call()
        except MelLiteError as error:
            answer[1] = error
    value, problem = broadcast_object_list(answer, from_process=0)
    if problem is not None:
        problem.told = rank() != 0
        raise problem
    return value


class SplitEngine:
    """Deals requests over the processes, each with an engine of its own; every process gets all completions.

    All processes must call `generate` with the same requests. Completions are those of one process alone, since a
    sequence depends on its prompt and seed only.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name

    def wake(self) -> None:
        """Wake the engine of this process."""
        self._engine.wake()

    def sleep(self) -> None:
        """Put the engine of this process to sleep."""
        self._engine.sleep()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        from accelerate.utils import gather_object

        mine = range(rank(), len(requests), world())
        completions = self._engine.generate([requests[i] for i in mine], sampling) if mine else []
        done: dict[int, Completion] = dict(gather_object(list(zip(mine, completions, strict=True))))
        return [done[i] for i in range(len(requests))]
