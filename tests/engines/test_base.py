"""One contract for all engines, and the ways in which vLLM can violate it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_contract import CLAUSES, EOS, PAD, requests
from fake_vllm import fake_vllm_engine
from mel_lite import signals
from mel_lite.engines.base import Engine, Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.vllm import _Interruptible
from mel_lite.errors import EngineError
from real_packages import needs_unsloth, with_unsloth
from tiny_models import save_tiny, set_lora

ROOT = Path(__file__).resolve().parents[2]


BUILDERS = {
    "hf": lambda model, eos=EOS: HFEngine(model, eos_ids=[eos], pad_id=PAD),
    "vllm": lambda model, eos=EOS: fake_vllm_engine(model, eos_ids=(eos,))[0],
    "vllm without standby": lambda model, eos=EOS: fake_vllm_engine(model, eos_ids=(eos,), standby=False)[0],
}


@pytest.mark.parametrize("engine", BUILDERS)
@pytest.mark.parametrize("clause", CLAUSES)
def test_contract(clause: str, engine: str, model: Any) -> None:
    assert isinstance(BUILDERS[engine](model), Engine)
    CLAUSES[clause](BUILDERS[engine], model)


def test_an_engine_with_the_three_methods_alone_has_the_defaults() -> None:
    class Minimal(Engine):
        name = "minimal"

        def generate(self, requests: Any, sampling: Any) -> Any:
            return []

        def wake(self) -> None: ...

        def sleep(self) -> None: ...

    engine = Minimal()
    assert (engine.own_kernels, engine.context_tokens, engine.share, engine.max_num_seqs) == (False, None, None, None)
    assert engine.limit_cache(100) is False
    with pytest.raises(TypeError, match="sleep"):
        type("NoSleep", (Engine,), {"generate": Minimal.generate, "wake": Minimal.wake})()


@pytest.fixture(scope="module")
def unsloth_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    script = Path(__file__).parents[1] / "helpers" / "engine_contract.py"
    return json.loads(with_unsloth(script, folder, cwd=folder).stdout.splitlines()[-1])


@needs_unsloth
@pytest.mark.slow
@pytest.mark.parametrize("load", ["fp32", "4bit"])
@pytest.mark.parametrize("clause", CLAUSES)
def test_contract_of_the_real_unsloth(clause: str, load: str, unsloth_results: dict[str, str]) -> None:
    problem = unsloth_results[f"{clause}-{load}"]
    assert problem == "", problem


# ---- requests sent to vLLM ----


def test_a_phase_is_submitted_at_once_sorted_by_prompt_with_its_seeds(model: Any) -> None:
    engine, llm = fake_vllm_engine(model)
    asked = [Request((20, 21, 5 + i % 2, 30 + i), seed=100 + i) for i in range(6)]
    done = engine.generate(asked, Sampling(4, temperature=0.5, top_p=0.9, top_k=7, min_p=None))
    (call,) = llm.calls
    assert call.prompts == sorted(r.prompt_ids for r in asked), "prompts with a common prefix are adjacent"
    assert {p.seed: ids for p, ids in zip(call.params, call.prompts, strict=True)} == {
        r.seed: r.prompt_ids for r in asked
    }
    options = vars(call.params[0]) | {"seed": None}
    assert options == {
        "n": 1, "seed": None, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [EOS], "ignore_eos": False, "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    assert [len(c.ids) for c in engine.generate(asked, Sampling(9, ignore_eos=True))] == [9] * 6
    assert llm.calls[1].params[0].ignore_eos and llm.calls[1].params[0].stop_token_ids == []
    alone = [fake_vllm_engine(model)[0].generate([r], Sampling(4, 0.5, 0.9, 7))[0] for r in asked]
    assert [c.ids for c in done] == [c.ids for c in alone], "completions come in the order of the requests"


def test_every_request_carries_the_adapter_and_each_state_has_its_own_id(model: Any) -> None:
    step = 0
    engine, llm = fake_vllm_engine(model, step=lambda: step)
    engine.generate(requests(1), Sampling(2))
    engine.sleep()
    engine.wake()
    engine.generate(requests(2), Sampling(2))
    step = 1  # an update of zero: same weights, another step
    engine.generate(requests(3), Sampling(2))
    set_lora(model, 0.3, seed=9)  # other weights at the same step, as after loading a checkpoint
    engine.generate(requests(4), Sampling(2))
    set_lora(model, 0.3)
    assert [call.lora.lora_int_id for call in llm.calls] == [1, 1, 2, 3]
    assert llm.events == ["sleep 1", "wake"]


def test_no_request_is_submitted_without_a_lora_request(model: Any) -> None:
    engine, llm = fake_vllm_engine(model)
    engine._load_adapter = lambda: None
    with pytest.raises(AssertionError, match="samples from the base model"):
        engine.generate(requests(1), Sampling(2))
    assert llm.calls == []


# ---- output of vLLM ----


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fewer", "returned 2 completions for 3 requests"),
        ("nan", r"1 of \d+ log-probs of a completion as nan: its logits were not finite.*bfloat16.*--engine hf"),
        ("no log-probs", "no log-probs for a completion"),
        ("aborts", "finish_reason='abort'"),
        ("cuts prompts", "truncated or changed the ids"),
        ("drops request", r"adapter None instead of 1 \(step 0\)"),
    ],
)
def test_output_that_is_not_a_sample_of_the_policy_is_rejected(fault: str, message: str, model: Any) -> None:
    engine, _ = fake_vllm_engine(model, fault=fault)
    with pytest.raises(EngineError, match=f"(?s){message}") as error:
        engine.generate(requests(1, 2, 3), Sampling(6))
    assert error.value.exit_code == 6


def test_out_of_memory_lowers_concurrency_and_changes_no_token(model: Any) -> None:
    asked, sampling = requests(*range(9)), Sampling(6)
    expected = [done.ids for done in fake_vllm_engine(model)[0].generate(asked, sampling)]
    engine, llm = fake_vllm_engine(model, fault="memory")
    assert [done.ids for done in engine.generate(asked, sampling)] == expected
    assert [len(call.prompts) for call in llm.calls] == [9, 4, 2, 2, 2, 2, 1]
    assert llm.events == ["abort 9", "abort 4"], "queued requests are aborted, not sampled again"
    assert [done.ids for done in engine.generate(asked[:4], sampling)] == expected[:4]
    assert len(llm.calls[-1].prompts) == 2, "later calls keep the lower concurrency"


def test_one_sequence_that_does_not_fit_is_an_error(model: Any) -> None:
    engine, llm = fake_vllm_engine(model)
    llm.generate = lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="one sequence of 5 prompt and up to 6 new.*gpu_memory_utilization"):
        engine.generate(requests(1), Sampling(6))


def test_a_prompt_longer_than_the_context_is_an_error_before_anything_is_sampled(model: Any) -> None:
    engine, llm = fake_vllm_engine(model)
    with pytest.raises(EngineError, match=r"4096 tokens does not fit vLLM's context of 4096.*model.max_seq_length"):
        engine.generate([Request((7,) * 4096, 1)], Sampling(6))
    assert llm.calls == []


def test_a_signal_stops_the_sampling_and_leaves_nothing_queued(model: Any) -> None:
    engine, llm = fake_vllm_engine(model)
    with signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Interrupted):
            engine.generate(requests(1, 2), Sampling(3))
    assert llm.events == ["abort 2"] and llm.unfinished == {}


def test_the_progress_bar_shows_nothing_and_polls(capfd: pytest.CaptureFixture[str]) -> None:
    """vLLM calls it once per finished sequence. A signal can stop a phase nowhere else."""
    with signals.deferred():
        bar = _Interruptible(total=2, desc="Processed prompts", dynamic_ncols=True, postfix="")
        bar.update(1)
        assert [*_Interruptible([1, 2], desc="Adding requests")] == [1, 2]
        assert capfd.readouterr() == ("", "")
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(signals.Interrupted):
            bar.update(1)


# ---- GPU benchmark script ----


def test_a_check_whose_process_dies_is_recorded(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("gpu_engines", ROOT / "benchmarks" / "gpu_engines.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.CHECKS, script.MODELS = ("no such check",), ("qwen3-random",)
    report = script.measure(tmp_path, quick=True)
    stage = report["checks"]["no such check on qwen3-random"]["process"]
    assert not stage["ok"] and "ended with 2" in stage["error"] and "invalid choice" in stage["error"]
    assert json.loads((tmp_path / "gpu-engines.json").read_text()) == report
    assert report["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
