"""Helpers for runs with several processes (`accelerate launch`, `torchrun`): rank, broadcast, and split sampling."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import MelLiteError

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process. Rank 0 prints and writes."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_first(call: Callable[[], T], *, cpu: bool) -> T:
    """Call `call` on rank 0 and broadcast its result to every rank. Joins the process group first.

    Args: `cpu`, True when training on CPUs (gloo).
    Raises: on every rank, the MelLiteError that `call` raised on rank 0. On other ranks it is marked as already
        reported.
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
        problem.already_reported = rank() != 0
        raise problem
    return value


class SplitEngine(Engine):
    """Engine that splits requests over the ranks, each with its own engine, and gathers all completions on every rank.

    All ranks must call `generate` with the same requests. The completions equal those of a single process, since a
    sequence depends only on its prompt and seed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name = engine.name
        self.mixes, self.own_kernels, self.context_tokens = engine.mixes, engine.own_kernels, engine.context_tokens

    def wake(self) -> None:
        """Wake the engine of this rank."""
        self._engine.wake()

    def sleep(self) -> None:
        """Put the engine of this rank to sleep."""
        self._engine.sleep()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Sample one completion per request, in their order."""
        from accelerate.utils import gather_object

        local = range(rank(), len(requests), world())
        completions = self._engine.generate([requests[i] for i in local], sampling) if local else []
        done: dict[int, Completion] = dict(gather_object(list(zip(local, completions, strict=True))))
        return [done[i] for i in range(len(requests))]
