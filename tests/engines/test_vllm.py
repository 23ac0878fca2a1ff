"""The engine with the real vLLM on its CPU backend, in separate processes: alone, and by Unsloth on shared weights.

Not covered: sleep mode, and GPU figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine_contract import CLAUSES
from real_packages import needs_unsloth, needs_vllm, with_both, with_vllm
from tiny_models import save_tiny

pytestmark = [needs_vllm, pytest.mark.slow]

MORE = (
    "sampling_continues_past_the_end_if_requested",
    "a_prompt_that_is_too_long_is_rejected_with_the_option_to_set",
    "a_signal_stops_the_sampling_and_leaves_nothing_behind",
    "a_run_that_samples_with_it_learns_and_its_probes_pass",
    "its_sampler_holds_no_more_than_planned",
)
"""Clauses of `vllm_contract.py`, in addition to those of all engines."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), head_dim=64)  # a size that vLLM's CPU attention supports
    script = Path(__file__).parents[1] / "helpers" / "vllm_contract.py"
    return json.loads(with_vllm(script, folder, cwd=folder.parent).stdout.splitlines()[-1])


@pytest.mark.parametrize("clause", [*CLAUSES, *MORE])
def test_contract(clause: str, results: dict[str, str]) -> None:
    assert set(results) == {*CLAUSES, *MORE}
    problem = results[clause]
    assert problem == "", problem


SHARED = (
    "every_base_weight_is_a_tensor_of_vllm",
    "the_base_takes_the_planned_memory",
    "vllm_was_started_as_planned",
    "a_context_that_unsloth_shortens_is_rejected",
    "a_run_learns_on_the_weights_that_are_sampled",
)
"""Clauses of `vllm_shared.py`, in addition to those of all engines."""


@pytest.fixture(scope="module", params=["16bit", "4bit"])
def shared_results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), head_dim=64)
    script = Path(__file__).parents[1] / "helpers" / "vllm_shared.py"
    return json.loads(with_both(script, folder, request.param, cwd=folder.parent).stdout.splitlines()[-1])


@needs_unsloth
@pytest.mark.parametrize("clause", [*CLAUSES, *SHARED])
def test_contract_on_shared_weights(clause: str, shared_results: dict[str, str]) -> None:
    assert set(shared_results) == {*CLAUSES, *SHARED}
    problem = shared_results[clause]
    assert problem == "", problem


def test_a_mel_step_of_the_demo(tmp_path: Path) -> None:
    """Rollouts, analyses and replays of the real model. Trainer and engine agree to rounding, with the adapter."""
    script = Path(__file__).parents[1] / "helpers" / "vllm_demo.py"
    found = json.loads(with_vllm(script, tmp_path, cwd=tmp_path).stdout.splitlines()[-1])
    assert 0 < found["mel/probe_logp_diff"] < 1e-5 and found["mel/probe_adapter"] == pytest.approx(1, abs=0.01)
    assert found["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert found["mel/pairs"] >= 1 and found["mel/written"] == found["mel/pairs"]
    assert found["mel/parsed"] >= 1, "a warm start writes analyses that can be read"
    assert found["grad_norm"] > 0 and found["time/analysis_s"] > 0 and found["mel/generated_tokens"] > 500
