"""Engine contract with the real vLLM on its CPU backend: `python vllm_contract.py FOLDER`.

`FOLDER` holds a base model. Prints one JSON object: clause -> "" or the traceback. vLLM's CPU backend changes threads
and the process group, so the tests run it in a separate process. `vllm_shared.py` covers weights shared with the
trainer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run vLLM in this process, as Unsloth does, so that an exception of ours can unwind it.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import FinishReason
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from engine_contract import CLAUSES, EOS, requests
from fake_vllm import LateEngine
from live_bytes import LiveBytes
from mel_lite import signals
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.unsloth import adapter_fingerprint
from mel_lite.engines.vllm import VLLMEngine
from mel_lite.errors import EngineError
from mel_lite.memory.vllm import LOGIT_BYTES
from mel_lite.training.scoring import install_scoring_head
from mel_lite.types import Finish
from tiny_models import set_lora
from trainers import assert_learned, even_ids
from trainers import build as build_trainer

CONTEXT_TOKENS, RANK = 256, 8
FOLDER = Path(sys.argv[1])
adapters_loaded = 0
Build = Callable[..., VLLMEngine]


def adapted_model(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    install_scoring_head(base)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
    set_lora(model, 0.3)
    return model


def started(folder: Path) -> LLM:
    """Start vLLM with Unsloth's options, as far as a CPU supports them."""
    return LLM(
        str(folder), dtype="float32", enforce_eager=True, max_model_len=CONTEXT_TOKENS, enable_lora=True, max_loras=1,
        max_lora_rank=RANK, logprobs_mode="processed_logprobs", max_logprobs=0, enable_prefix_caching=True,
        max_num_seqs=32, seed=0,
    )  # fmt: skip


def builder(llm: LLM, adapters: Path) -> Build:
    def build(model: Any, *, eos: int = EOS, step: Callable[[], int] = lambda: 0) -> VLLMEngine:
        def load_adapter() -> LoRARequest:
            global adapters_loaded
            adapters_loaded += 1
            model.save_pretrained(adapters / str(adapters_loaded))
            return LoRARequest(str(adapters_loaded), adapters_loaded, str(adapters / str(adapters_loaded)))

        settings = llm.llm_engine.vllm_config.model_config
        return VLLMEngine(
            llm, sampling_params=SamplingParams, load_adapter=load_adapter, step=step, eos_ids=[eos], standby=False,
            fingerprint=lambda: adapter_fingerprint(model), context_tokens=settings.max_model_len,
            aborted=FinishReason.ABORT,
        )  # fmt: skip

    return build


def sampling_continues_past_the_end_if_requested(build: Build, model: Any) -> None:
    asked = requests(*range(6))
    sampled = build(model).generate(asked, Sampling(40, temperature=2.0))
    common = Counter(token for c in sampled for token in c.ids[1:-1]).most_common(1)[0][0]
    assert any(c.finish is Finish.STOP for c in build(model, eos=common).generate(asked, Sampling(40, temperature=2.0)))
    on = build(model, eos=common).generate(asked, Sampling(40, temperature=2.0, ignore_eos=True))
    assert [(len(c.ids), len(c.logprobs)) for c in on] == [(40, 40)] * 6


def a_prompt_that_is_too_long_is_rejected_with_the_option_to_set(build: Build, model: Any) -> None:
    try:
        build(model).generate([Request((20,) * CONTEXT_TOKENS, 1)], Sampling(4))
    except EngineError as error:
        assert "model.max_seq_length" in str(error)
    else:
        raise AssertionError("sampled")


def a_signal_stops_the_sampling_and_leaves_nothing_behind(build: Build, model: Any) -> None:
    """The next call samples only its own requests, although others were in flight."""
    engine, seen = build(model), 0

    def poll() -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            raise signals.Interrupted(15)

    original, signals.poll = signals.poll, poll
    try:
        # Different lengths, so that one finishes while others are still sampled.
        engine.generate([Request((30, 31 + i), i) for i in range(40)], Sampling(60, temperature=2.0))
    except signals.Interrupted:
        pass
    else:
        raise AssertionError("not interrupted")
    finally:
        signals.poll = original
    asked = requests(1, 2, 3)
    assert engine.generate(asked, Sampling(6)) == build(model).generate(asked, Sampling(6))


def a_run_that_samples_with_it_learns_and_its_probes_pass(build: Build, model: Any) -> None:
    """vLLM receives each of three updates. Trainer and vLLM agree on the log-probs of the trained adapter."""
    with tempfile.TemporaryDirectory() as made:
        late, run = LateEngine(), Path(made) / "run"
        shutil.copytree(FOLDER, Path(made) / "base")
        trainer = build_trainer(
            Path(made), model=AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32), engine=late,
            algorithm="grpo", reward_funcs=even_ids, probe_max_diff=0.01, max_steps=3, output_dir=run,
        )  # fmt: skip
        late.inner, before = build(trainer.model, step=lambda: trainer.state.global_step), adapters_loaded
        trainer.train()
        assert_learned(trainer)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert adapters_loaded - before == 3, "one adapter per update"
    (share,) = [row["mel/probe_adapter"] for row in rows if "mel/probe_adapter" in row]
    assert abs(share - 1) < 0.01, share
    diffs = [row["mel/probe_logp_diff"] for row in rows if "mel/probe_logp_diff" in row]
    assert len(diffs) == 2 and 0 < max(diffs) < 1e-4, diffs
    ratios = [row["sampling/importance_sampling_ratio/mean"] for row in rows if "reward" in row]
    assert len(ratios) == 3 and max(abs(ratio - 1) for ratio in ratios) < 1e-3, ratios


def its_sampler_holds_no_more_than_planned(build: Build, model: Any) -> None:
    """Peak live bytes per logit: as vLLM measures at start-up, with top-k and top-p for all, and as we sample.

    The planned figure also includes the temporary memory of a GPU's sort, which is not measured here.
    """
    sequences, vocabulary = 16, 20_000
    held = {}
    for name, cut in (("at the start", True), ("as we sample", False)):
        filled = {value: torch.full((sequences,), value) for value in (0.5, 0.9, 0.1, vocabulary - 1)}
        metadata = SamplingMetadata(
            temperature=filled[0.5], all_greedy=False, all_random=False, top_p=filled[0.9] if cut else None,
            top_k=filled[vocabulary - 1] if cut else None, no_penalties=True, max_num_logprobs=None if cut else 0,
            generators={} if cut else {i: torch.Generator().manual_seed(i) for i in range(sequences)},
            logprob_token_ids=None, prompt_token_ids=None, frequency_penalties=filled[0.1],
            presence_penalties=filled[0.1], repetition_penalties=filled[0.1], spec_token_ids=[[]] * sequences,
            output_token_ids=[[] for _ in range(sequences)], allowed_token_ids_mask=None, bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
        )  # fmt: skip
        logits = torch.randn(sequences, vocabulary).bfloat16()
        with LiveBytes() as live:
            Sampler(logprobs_mode="processed_logprobs")(logits=logits.clone(), sampling_metadata=metadata)
        held[name] = live.peak_bytes / sequences / vocabulary
    assert 20 < held["at the start"] <= LOGIT_BYTES and 8 < held["as we sample"] < held["at the start"], held


MORE = (
    sampling_continues_past_the_end_if_requested,
    a_prompt_that_is_too_long_is_rejected_with_the_option_to_set,
    a_signal_stops_the_sampling_and_leaves_nothing_behind,
    a_run_that_samples_with_it_learns_and_its_probes_pass,
    its_sampler_holds_no_more_than_planned,
)


def main() -> dict[str, str]:
    found, model = {}, adapted_model(FOLDER)
    with tempfile.TemporaryDirectory() as adapters:
        build = builder(started(FOLDER), Path(adapters))
        for name, clause in (CLAUSES | {clause.__name__: clause for clause in MORE}).items():
            try:
                clause(build, model)
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
