"""The probe: an engine that samples from another policy than the trained one is found out, whatever made it so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_vllm import FakeLLM, trainer_with_fake_vllm
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ConfigError, EngineError
from mel_lite.resilience import checkpoint_files
from mel_lite.training.engine_probe import EVERY, Agreement, agreement, verdict
from scripted import ScriptedEngine
from tiny_models import tiny_tokenizer
from trainers import assert_learned, build, even_ids, run_state


def trained(folder: Path, **options: Any) -> tuple[Any, FakeLLM]:
    defaults = {"algorithm": "grpo", "reward_funcs": even_ids, "probe_max_diff": 0.05, "max_steps": 3}
    return trainer_with_fake_vllm(build, folder, **{**defaults, **options})


def log(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def probes(run: Path, name: str = "mel/probe_logp_diff") -> dict[int, float]:
    return {row["step"]: row[name] for row in log(run) if name in row}


def test_an_engine_that_samples_the_policy_passes_at_start_and_after_the_first_update(tmp_path: Path) -> None:
    trainer, llm = trained(tmp_path)
    trainer.train()
    assert_learned(trainer)
    found = probes(tmp_path / "run")
    assert list(found) == [1, 2], "logged with the step that was being made"
    assert 0 < max(found.values()) < 1e-5
    shares = probes(tmp_path / "run", "mel/probe_adapter")
    assert list(shares) == [2] and shares[2] == pytest.approx(1, abs=1e-2)
    assert [call.lora.lora_int_id for call in llm.calls] == [1, 2, 3], "every update is handed over"
    assert llm.events == ["sleep 1", "wake", "sleep 1", "wake", "sleep 1"], "awake for its rollouts alone"


def test_trls_importance_sampling_corrects_for_the_engines_kernels(tmp_path: Path) -> None:
    honest, _ = trained(tmp_path / "a")
    honest.train()
    ratios = [row["sampling/importance_sampling_ratio/mean"] for row in log(tmp_path / "a" / "run")]
    assert len(ratios) == 3 and ratios == pytest.approx([1, 1, 1], abs=1e-4)
    options = {"probe_max_diff": None, "vllm_importance_sampling_mode": "token_truncate", "max_steps": 1}
    off, _ = trained(tmp_path / "b", fault="other dtype", **options)
    off.train()
    (row,) = log(tmp_path / "b" / "run")
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(0.2, abs=1e-3)
    assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx((0.8187 + 1.2214) / 2, abs=0.02)


@pytest.mark.parametrize(
    ("fault", "learning_rate", "says"),
    [
        ("ignores", 1e-2, "samples without the adapter"),
        ("ignores", 1e-4, "samples without the adapter"),
        ("twice", 1e-2, "nats per token away .* applied twice"),
        ("twice", 1e-4, "samples with 2.0 x the adapter"),
    ],
)
def test_an_adapter_not_applied_or_applied_twice_stops_the_run(
    fault: str, learning_rate: float, says: str, tmp_path: Path
) -> None:
    """At the lower rate the mean difference alone is far below the limit: the adapter's own effect gives it away."""
    trainer, _ = trained(tmp_path, fault=fault, learning_rate=learning_rate)
    with pytest.raises(EngineError, match=f"Step 1: .*{says}.*--engine hf.*Saved checkpoint-1") as error:
        trainer.train()
    assert error.value.exit_code == 6
    assert checkpoint_files.problem(tmp_path / "run" / "checkpoint-1") is None


@pytest.mark.slow
def test_a_healthy_run_that_is_resumed_with_a_doubled_adapter_stops_at_once(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trained(tmp_path, max_steps=2, **saving)[0].train()
    resumed, llm = trained(tmp_path, fault="twice", max_steps=4, **saving)
    with pytest.raises(EngineError, match=r"Step 2: engine 'unsloth\+vllm' samples with (1.9|2.0) x the adapter"):
        resumed.train(resume_from_checkpoint=True)
    assert len(llm.calls) == 1
    again, _ = trained(tmp_path, max_steps=4, **saving)
    again.train(resume_from_checkpoint=True)
    whole, _ = trained(tmp_path, output_dir=tmp_path / "whole", max_steps=4, **saving)
    whole.train()
    assert run_state(again) == run_state(whole), "the probe draws nothing and changes nothing"


def test_another_dtype_stops_the_run_at_the_start(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, fault="other dtype")
    with pytest.raises(EngineError, match=r"0.2 nats per token away.*probe_max_diff=0.05.*another dtype.*No step was"):
        trainer.train()
    allowed, _ = trained(tmp_path, output_dir=tmp_path / "allowed", fault="other dtype", probe_max_diff=0.3)
    allowed.train()
    assert probes(tmp_path / "allowed")[1] == pytest.approx(0.2, abs=1e-3)


def test_cut_distributions_are_probed_on_whole_ones(tmp_path: Path) -> None:
    options = {"algorithm": "rft", "top_p": 0.7, "max_steps": 2}
    trainer, llm = trained(tmp_path, **options)
    trainer.train()
    assert max(probes(tmp_path / "run").values()) < 1e-5
    assert [{p.top_p for p in call.params} for call in llm.calls] == [{0.7}, {1.0}, {0.7}, {1.0}]


@pytest.mark.parametrize("fault", ["fails", "dies"])
def test_a_failing_engine_is_restarted_once_and_a_dead_one_saves_and_stops(fault: str, tmp_path: Path) -> None:
    whole, _ = trained(tmp_path, output_dir=tmp_path / "whole")
    whole.train()
    trainer, llm = trained(tmp_path, fault=fault, since=2)
    if fault == "fails":
        trainer.train()
        assert run_state(trainer) == run_state(whole)
    else:
        with pytest.raises(EngineError, match="failed twice.*EngineCore.*Saved checkpoint-1") as error:
            trainer.train()
        assert error.value.exit_code == 6
        assert checkpoint_files.problem(tmp_path / "run" / "checkpoint-1") is None
    assert "abort 8" in llm.events


@pytest.mark.parametrize(("fault", "says"), [("nan", "not finite"), ("fewer", "7 completions for 8 requests")])
def test_what_is_no_sample_is_not_asked_for_again(fault: str, says: str, tmp_path: Path) -> None:
    trainer, llm = trained(tmp_path, fault=fault, since=2)
    with pytest.raises(EngineError, match=f"{says}.*Saved checkpoint-1"):
        trainer.train()
    assert len(llm.calls) == 2


def test_the_transformers_engine_agrees_to_rounding(tmp_path: Path) -> None:
    class Late(HFEngine):
        def __init__(self) -> None:
            pass

    engine = Late()
    trainer = build(tmp_path, engine=engine, algorithm="grpo", reward_funcs=even_ids, probe_max_diff=0.05, lora=True)
    HFEngine.__init__(engine, trainer.model, eos_ids=[2], pad_id=0)
    trainer.train()
    assert_learned(trainer)
    assert max(probes(tmp_path / "run").values()) < 1e-5
    assert "sampling/importance_sampling_ratio/mean" not in log(tmp_path / "run")[0], "nothing to correct"


# ---- The comparison itself ----


def test_the_share_is_measured_in_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    base_T, effect_T, noise_T = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    base_T -= 3
    for share in (0.0, 1.0, 2.0):
        found = agreement(base_T + share * 0.01 * effect_T + 0.02 * noise_T, base_T + 0.01 * effect_T, base_T)
        assert found.share_error == pytest.approx(2 / 4000**0.5, rel=0.05)  # noise / (effect * sqrt(tokens))
        assert abs(found.adapter_share - share) < 4 * found.share_error
        assert found.share_is_seen and found.share_is_wrong == (share != 1)
        assert found.mean < 0.05
    early = agreement(base_T + 0.02 * noise_T, base_T + 1e-4 * effect_T, base_T)
    assert not early.share_is_seen and not early.share_is_wrong, "too early to tell"
    none = agreement(base_T + 0.02, base_T, base_T)
    assert none.mean == pytest.approx(0.02) and none.adapter_share != none.adapter_share
    assert not none.share_is_wrong and not none.share_is_seen


def test_verdicts() -> None:
    fine = Agreement(0.012, 0.4, 1.02, 0.05)
    assert verdict(fine, 0.05, engine="e", step=3) is None
    assert "above probe_max_diff=0.01." in str(verdict(fine, 0.01, engine="e", step=3))
    assert verdict(Agreement(0.012, 0.4, 1.6, 0.2), 0.05, engine="e", step=3) is None, "may be noise"
    assert verdict(Agreement(float("nan"), 0.4, 1.0, 0.01), 0.05, engine="e", step=3) is not None


def test_a_probe_that_came_too_early_is_repeated(tmp_path: Path) -> None:
    """The engine's rounding hides an adapter that is still so small."""
    rounds = {"fault": "other dtype", "probe_max_diff": 0.3}
    trainer, _ = trained(tmp_path, max_steps=EVERY + 3, learning_rate=1e-9, **rounds)
    trainer.train()
    assert list(probes(tmp_path / "run")) == [1, 2, EVERY + 2]


def test_the_option_is_checked() -> None:
    from mel_lite import MELConfig

    with pytest.raises(ConfigError, match="probe_max_diff=0 must be positive nats"):
        MELConfig(output_dir="x", probe_max_diff=0, use_cpu=True, bf16=False)


def test_vllm_that_does_not_wake_any_more_ends_the_run_with_its_steps_saved(tmp_path: Path) -> None:
    """Training has left no room for its share: the fix is another share, not another batch."""
    trainer, llm = trained(tmp_path, fault="does not wake")
    with pytest.raises(
        EngineError, match="(?s)is no longer free.*--resume.*gpu_memory_utilization.*Saved checkpoint-1"
    ):
        trainer.train()
    assert llm.events == ["sleep 1"] and trainer.state.global_step == 1
    assert [path.name for path in checkpoint_files.committed(tmp_path / "run")] == ["checkpoint-1"]


def test_an_analysis_fits_the_engines_context_too(tmp_path: Path) -> None:
    """vLLM is started for the longest sequence of a run, which may be shorter than the model's context."""
    engine = ScriptedEngine(tiny_tokenizer())
    engine.context_tokens = 1000
    assert build(tmp_path, engine=engine).lesson_context.max_context_tokens == 1000 - 600
    with pytest.raises(ConfigError, match="max_context_tokens=500 plus analysis_max_tokens=600 exceeds the context"):
        build(tmp_path, engine=engine, max_context_tokens=500)
