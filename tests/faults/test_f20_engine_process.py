"""F20: an engine whose process dies in the middle of a batch.

The transformers engine runs in the trainer's process, so it cannot die alone. These tests use an engine with the same
interface that samples in a worker process on a copy of the weights, like vLLM. The worker, its death (SIGKILL) and its
copy of the model with LoRA are real.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import EngineError
from mel_lite.resilience import checkpoint_files
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.scoring import score
from trainers import assert_learned, build, digest, run_state, step_log, trainable

FORK = multiprocessing.get_context("fork")


class WorkerEngine(Engine):
    """Samples in a forked process with the weights at the time of the fork. `wake` forks again after an update."""

    name = "worker"

    def __init__(self, kills: Sequence[int] = ()) -> None:
        self.trainer: Any = None
        self.kills = list(kills)
        """Calls of `generate`, counted from 1, in which the worker is killed after its first completion."""
        self.calls, self.forks, self.gaps = 0, 0, list[float]()
        self._worker: Any = None
        self._pipe: Any = None
        self._weights = ""

    def wake(self) -> None:
        weights = digest(trainable(self.trainer))
        if self._worker is not None and self._worker.is_alive() and weights == self._weights:
            return
        self.close()
        self._pipe, theirs = FORK.Pipe()
        self._worker = FORK.Process(target=self._serve, args=(theirs,), daemon=True)
        self._worker.start()
        theirs.close()
        self._weights, self.forks = weights, self.forks + 1

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.join()
            self._pipe.close()
            self._worker = None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        self._pipe.send((list(requests), sampling))
        done: list[Completion] = []
        while len(done) < len(requests):
            done.append(self._pipe.recv())  # EOFError when the worker is gone
            if len(done) == 1 and self.calls in self.kills:
                os.kill(self._worker.pid, signal.SIGKILL)
                self._worker.join()
        self._compare(requests, done)
        return done

    def _serve(self, pipe: Any) -> None:
        engine = HFEngine(self.trainer.model, eos_ids=[2], pad_id=0, max_concurrent=1)
        while True:
            requests, sampling = pipe.recv()
            for request in requests:
                pipe.send(engine.generate([request], sampling)[0])

    def _compare(self, requests: Sequence[Request], done: Sequence[Completion]) -> None:
        """Record the largest difference from the trainer's log-probs. It is 0 when LoRA is applied exactly once."""
        rows = [Row(torch.tensor(r.prompt_ids + c.ids), len(c.ids)) for r, c in zip(requests, done, strict=True)]
        model = self.trainer.model
        training = model.training
        model.eval()
        with torch.no_grad():
            logps, *_ = score(model, pack(rows, pad_id=0))
        model.train(training)
        self.gaps += [float((torch.tensor(c.logprobs) - p).abs().max()) for c, p in zip(done, logps, strict=True)]


def even(completion_ids: Any, **_: Any) -> list[float]:
    """Reward the share of even tokens, which varies for a random model."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def train(folder: Path, engine: WorkerEngine, *, resume: bool = False) -> Any:
    trainer = build(
        folder,
        engine=engine,
        algorithm="grpo",
        reward_funcs=even,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        max_completion_length=6,
    )
    engine.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    finally:
        engine.close()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, engine = tmp_path_factory.mktemp("whole"), WorkerEngine()
    trainer = train(folder, engine)
    assert_learned(trainer)
    assert engine.forks == 4, "one copy of the weights per update"
    assert max(engine.gaps) < 1e-4
    return run_state(trainer), step_log(folder / "run")


@pytest.mark.slow
def test_a_worker_killed_in_a_batch_is_replaced_and_samples_the_same(
    tmp_path: Path, whole: Any, caplog: pytest.LogCaptureFixture
) -> None:
    children = len(psutil.Process().children())
    engine = WorkerEngine(kills=(2, 4))
    with caplog.at_level(logging.WARNING, "mel_lite.training.metrics"):
        trainer = train(tmp_path, engine)
    assert caplog.text.count("EOFError") == caplog.text.count("Restarting it") == 2
    assert engine.forks == 6 and engine.calls == 6
    assert (run_state(trainer), step_log(tmp_path / "run")) == whole
    assert max(engine.gaps) < 1e-4, "the new worker applies the current adapter once"
    assert_learned(trainer)
    assert len(psutil.Process().children()) == children, "no worker is left"


@pytest.mark.slow
def test_one_that_dies_twice_in_a_batch_saves_and_stops(tmp_path: Path, whole: Any) -> None:
    with pytest.raises(EngineError, match=r"engine 'worker' failed twice .*EOFError.*Saved checkpoint-3") as error:
        train(tmp_path, WorkerEngine(kills=(4, 5)))
    assert error.value.exit_code == 6
    assert [path.name for path in checkpoint_files.committed(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint_files.problem(tmp_path / "run" / "checkpoint-3") is None
    resumed = train(tmp_path, WorkerEngine(), resume=True)
    assert (run_state(resumed), step_log(tmp_path / "run")) == whole


class Stale(WorkerEngine):
    """Worker that never updates its copy of the weights."""

    def wake(self) -> None:
        if self._worker is None:
            super().wake()


def test_a_copy_that_is_not_updated_shows_in_the_gaps(tmp_path: Path) -> None:
    """F21: checks the figure used above. The first batch agrees, every later one does not."""
    engine = Stale()
    train(tmp_path, engine)
    first, later = engine.gaps[:8], engine.gaps[8:]
    assert engine.forks == 1 and max(first) < 1e-4 < 1e-3 < max(later)
