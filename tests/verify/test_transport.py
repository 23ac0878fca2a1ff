"""Verifiers given as functions reach the worker processes, or are refused before a run starts."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from mel_lite.config import MELConfig
from mel_lite.errors import ConfigError, VerifierError
from mel_lite.verify import verifiers
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.transport import pack
from trainers import build, judged_rollouts

ITEMS = [("Seven", "seven", {"level": 3}), ("eight", "seven", {"level": 3}), ("seven", "seven", {"level": 4})]


@pytest.mark.slow
def test_lambdas_and_local_functions_run_in_the_workers() -> None:
    wanted = 3

    def same(completion: str, answer: str, level: int) -> bool:
        return completion.lower() == answer and level == wanted

    for verifier, expected in (
        (same, ["right", "wrong", "wrong"]),
        (lambda completion, answer: completion.lower() == answer, ["right", "wrong", "right"]),
        (verifiers.exact, ["right", "wrong", "right"]),
    ):
        with VerifyPool(verifier, workers=1, deadline_s=10.0) as pool:
            assert pool.verify(ITEMS) == expected


def test_an_exported_function_goes_by_name() -> None:
    assert pack(verifiers.numeric) == {"verifier": "numeric"}
    assert pack(textwrap.dedent) == {"verifier": "textwrap:dedent"}
    assert pack("anything:at_all") == {"verifier": "anything:at_all"}


@pytest.mark.slow
def test_functions_of_a_script_run_in_the_workers(tmp_path: Path) -> None:
    """Neither form runs the script again in a worker, although it has no `if __name__` guard."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import re
            from mel_lite.verify.pool import VerifyPool
            print("started")
            LIMIT = 3
            def short(completion, answer):
                return len(re.sub(" ", "", completion)) <= LIMIT
            for verifier in (short, "__main__:short", lambda completion, answer: short(completion, answer)):
                with VerifyPool(verifier, workers=1, deadline_s=10.0) as pool:
                    print(*pool.verify([("a b c", "", {}), ("abcd", "", {})]))
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split("\n") == ["started", *["right wrong"] * 3, ""]


def test_functions_that_no_worker_can_have_are_refused() -> None:
    lines = (line for line in "ab")
    with pytest.raises(VerifierError, match="cannot be copied into a worker process"):
        VerifyPool(lambda completion, answer: completion in lines)
    large = bytes(17 * 2**20)
    with pytest.raises(VerifierError, match="refers to objects of 17 MiB"):
        VerifyPool(lambda completion, answer: completion.encode() in large)
    module = types.ModuleType("made_up_module")
    exec("def rule(completion, answer):\n    return True\n", module.__dict__)
    sys.modules["made_up_module"] = module
    try:
        with pytest.raises(VerifierError, match="in a module that no other process can import"):
            VerifyPool(module.rule)
    finally:
        del sys.modules["made_up_module"]
    with pytest.raises(VerifierError, match="'__main__' has no 'rule'"):
        VerifyPool("__main__:rule")


def test_a_score_stops_the_batch_with_the_value() -> None:
    with (
        VerifyPool(lambda completion, answer: 0.75, workers=1) as pool,
        pytest.raises(VerifierError, match=r"<lambda>' returned float 0\.75"),
    ):
        pool.verify(ITEMS)


def test_the_pool_passes_think_tags_on() -> None:
    items = [("<plan>Answer: 5</plan>Answer: 7", "7", {}), ("<plan>Answer: 7", "7", {})]
    with VerifyPool("numeric", workers=1, think_tags=(("<plan>", "</plan>"),)) as pool:
        assert pool.verify(items) == ["right", "wrong"]


def test_a_config_with_a_function_can_be_saved_copied_and_pickled(tmp_path: Path) -> None:
    def rule(completion: str, answer: str) -> bool:
        return True

    name = f"{__name__}:test_a_config_with_a_function_can_be_saved_copied_and_pickled.<locals>.rule"
    args = MELConfig(str(tmp_path), verifier=rule, think_tags=["<plan> </plan>"], use_cpu=True, bf16=False)
    assert args.verifier is rule
    assert args.to_dict()["verifier"] == name
    assert json.loads(args.to_json_string())["verifier"] == name
    assert copy.deepcopy(args).verifier is rule and copy.copy(args).verifier is rule
    assert pickle.loads(pickle.dumps(args)).verifier == name
    assert MELConfig(str(tmp_path), verifier="numeric", use_cpu=True, bf16=False).to_dict()["verifier"] == "numeric"
    with pytest.raises(ConfigError, match="verifier=7 is a int"):
        MELConfig(str(tmp_path), verifier=7, use_cpu=True, bf16=False)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="think_tags has '<plan>'"):
        MELConfig(str(tmp_path), think_tags=["<plan>"], use_cpu=True, bf16=False)


@pytest.mark.slow
def test_a_function_judges_the_rollouts_and_the_run_can_be_saved(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "report_to": "none"}
    rewards = []
    for verifier in ("numeric", lambda completion, answer: re.findall(r"\d+", completion)[-1:] == [answer]):
        trainer = build(tmp_path, verifier=verifier, output_dir=tmp_path / f"run-{len(rewards)}", **options)
        rollouts = judged_rollouts(trainer)
        trainer.train()
        rewards.append([str(rollout.verdict) for _, rollout in rollouts])
        assert (Path(trainer.args.output_dir) / "checkpoint-1").is_dir()
    assert rewards[0] == rewards[1] and {"right", "wrong"} <= set(rewards[0])


def test_a_function_that_cannot_reach_a_worker_stops_the_construction(tmp_path: Path) -> None:
    lines = (line for line in "ab")
    with pytest.raises(VerifierError, match="cannot be copied into a worker process"):
        build(tmp_path, verifier=lambda completion, answer: completion in lines)
