"""F8: SIGTERM and SIGINT in every phase commit a checkpoint and end the run; a second signal ends it at once.

Compilation does not matter: by default no part of a step is compiled, and a kernel's first launch is inside `forward`.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fault_runs import Farm
from mel_lite import signals
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.resilience import checkpoint_files
from mel_lite.verify.pool import PoolStats, VerifyPool
from tiny_models import tiny_config
from trainers import assert_learned, build, run_state, step_log

PHASES = ("rollout", "verify", "analysis", "replay", "forward", "backward", "save")


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_commits_a_checkpoint_in_every_phase(
    runs: Farm,
    reference: tuple[dict[str, str], list[dict[str, Any]]],
    folder: Path,
    common: dict[str, Any],
    phase: str,
    record_property: Any,
) -> None:
    """The signal comes in step 3, for which no save is scheduled. The resumed run equals the uninterrupted one."""
    number = PHASES.index(phase)
    signum, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[number % 2]
    planned = common | {"save_steps": 2 if phase == "save" else 4}
    run = runs.start(folder, **planned, slow_s=0.25)
    run.wait_for(phase, 2)
    time.sleep(0.1)
    start_s = time.monotonic()
    run.send(signum)
    assert run.wait() == code, run.output()
    record_property("signal_to_exit_s", time.monotonic() - start_s)
    newest = checkpoint_files.committed(folder / "run")[-1]
    assert newest.name == "checkpoint-2" and checkpoint_files.problem(newest) is None
    assert "saving a checkpoint, then stopping" in run.output()

    assert runs.run(folder, **planned, resume=True) == 0, run.output()
    state, log = reference
    assert json.loads((folder / "state.json").read_text()) == state
    assert step_log(folder / "run") == log


def test_a_second_signal_ends_it_at_once(runs: Farm, folder: Path, common: dict[str, Any]) -> None:
    run = runs.start(folder, **common, slow_s=0.7)
    run.wait_for("backward", 1)  # a phase without polling
    run.send(signal.SIGTERM)
    time.sleep(0.1)
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert "stopped immediately" in run.output()
    assert (folder / "phases.txt").read_text().endswith("phase backward 1\n"), "no phase came after it"
    assert [path.name for path in checkpoint_files.committed(folder / "run")] == ["checkpoint-1"]
    assert checkpoint_files.problem(folder / "run" / "checkpoint-1") is None


def test_before_the_first_step_there_is_nothing_to_save(runs: Farm, folder: Path, common: dict[str, Any]) -> None:
    run = runs.start(folder, **common, slow_s=0.5)
    run.wait_for("rollout", 0)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert "nothing new to save" in run.output()
    assert checkpoint_files.committed(folder / "run") == []


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "gradient checkpointing"])
def test_a_signal_is_handled_within_a_micro_batch(tmp_path: Path, where: str, checkpointed: bool) -> None:
    """The signal comes in the first decoder layer of the forward pass, or as the backward pass begins, and ends it."""
    trainer = build(tmp_path, max_steps=3, algorithm="grpo", gradient_checkpointing=checkpointed)
    layers = trainer.model.get_base_model().model.layers
    asked, reached = [0], {"forward": 0, "backward": 0}

    def ask() -> None:
        if trainer.state.global_step == 1 and trainer.model.training and not asked[0]:
            asked[0] += 1
            os.kill(os.getpid(), signal.SIGTERM)

    def first_layer(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and where == "forward":
            ask()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: reached.update(backward=reached["backward"] + asked[0]))

    layers[0].register_forward_hook(first_layer)
    layers[-1].register_forward_hook(lambda *_: reached.update(forward=reached["forward"] + asked[0]))
    backward = trainer.accelerator.backward

    def asked_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        if where == "backward":
            ask()
        backward(loss, **kwargs)

    trainer.accelerator.backward = asked_backward
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143 and asked == [1]
    assert reached == {"forward": 0, "backward": 0}, "the pass ran to its end"
    assert [path.name for path in checkpoint_files.committed(tmp_path / "run")] == ["checkpoint-1"]
    resumed = build(tmp_path, max_steps=3, algorithm="grpo", gradient_checkpointing=checkpointed)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path, output_dir=tmp_path / "whole", max_steps=3, algorithm="grpo",
                  gradient_checkpointing=checkpointed)  # fmt: skip
    whole.train()
    assert run_state(resumed) == run_state(whole)
    assert_learned(resumed)


def test_generation_stops_within_a_token() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config())
    model.config.max_position_embeddings = 100_000
    passes = [0]

    def ask(*_: Any) -> None:
        passes[0] += 1
        if passes[0] == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_hook(ask)
    engine = HFEngine(model, eos_ids=[319], pad_id=0)
    requests = [Request((5, 6, 7), seed) for seed in range(4)]
    with signals.deferred(), pytest.raises(signals.Interrupted) as stop:
        engine.generate(requests, Sampling(50_000))
    assert stop.value.signum == signal.SIGTERM and passes == [20]
    assert model.training, "the model is as it was before"


SLOW_RULE = """
import os, signal, time
def rule(completion, answer):
    if completion:
        os.kill(int(completion), signal.SIGINT)
    time.sleep(60)
"""


def test_verification_stops_before_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_rule.py").write_text(SLOW_RULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with VerifyPool("slow_rule:rule", deadline_s=50) as pool:
        with signals.deferred(), pytest.raises(signals.Interrupted):
            pool.verify([(str(os.getpid()), "b", {}), *[("", "b", {})] * 3])
        assert pool.stats == PoolStats(), "no answer was waited for"


def test_handlers_are_restored_and_other_threads_not_affected() -> None:
    before = [signal.getsignal(signum) for signum in signals.SIGNALS]
    with signals.deferred():
        assert [signal.getsignal(signum) for signum in signals.SIGNALS] != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.pending() == signal.SIGTERM
        failures: list[BaseException] = []

        def elsewhere() -> None:
            try:
                signals.poll()
                with signals.deferred():
                    pass
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert failures == []
        with pytest.raises(signals.Interrupted):
            signals.poll()
    assert [signal.getsignal(signum) for signum in signals.SIGNALS] == before
    assert signals.pending() is None
    signals.poll()


def test_several_processes_are_asked_not_unwound() -> None:
    with signals.deferred(alone=False):
        os.kill(os.getpid(), signal.SIGINT)
        signals.poll()
        os.kill(os.getpid(), signal.SIGTERM)  # from the launcher, right after the terminal's
        assert signals.pending() == signal.SIGINT


def test_the_exception_for_a_calling_program() -> None:
    assert isinstance(signals.Interrupted(signal.SIGINT).as_exit("x"), KeyboardInterrupt)
    stop = signals.Interrupted(signal.SIGTERM).as_exit("x")
    assert isinstance(stop, SystemExit) and stop.code == 143
    assert not isinstance(signals.Interrupted(signal.SIGTERM), Exception)
