"""vLLM on the weights that train, set up by the real Unsloth on a CPU: `python vllm_shared.py FOLDER 4bit`.

Unsloth supports this only on GPUs, so its queries of the GPU are faked here, and vLLM's linear layers keep the layout
that can be shared (on a CPU it would pack them). Everything else is real: our `load_unsloth`, Unsloth's `load_vllm`,
the model that it builds from vLLM's tensors, its patches of vLLM, LoRA passed in memory, bitsandbytes. Not covered:
sleep mode.

Prints one JSON object: clause -> "" or the traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import unsloth
from unsloth_zoo import vllm_utils

# isort: split
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from vllm.model_executor.layers import utils as vllm_layers

import engine_contract
from engine_contract import CLAUSES, EOS
from mel_lite import MELConfig, MELTrainer
from mel_lite.engines.unsloth import adapter_fingerprint, is_unsloth, load_unsloth, unsloth_engine
from mel_lite.engines.vllm import VLLMEngine
from mel_lite.errors import EngineError
from mel_lite.memory import formulas
from mel_lite.models.adapters import LoraSpec
from mel_lite.models.load import ModelSpec
from mel_lite.training.scoring import install_scoring_head
from tiny_models import set_lora
from trainers import assert_learned, even_ids

FOLDER, FOUR_BIT = Path(sys.argv[1]), "4bit" in sys.argv
CARD_BYTES, FREE_BYTES, SHARE = 8 * 2**30, 6 * 2**30, 0.45
CONTEXT_TOKENS, RANK, SEQUENCES = 256, 8, 24
HALF, EFFECT = 0.3, 5.0
"""Largest difference of log-probs in float16, in nats, and smallest without the adapter. Measured: up to 0.18, and
over 20."""


class FastLanguageModel:
    """Does what Unsloth's class does on a GPU with `fast_inference`, without the parts that need a GPU."""

    @staticmethod
    def from_pretrained(**options: Any) -> tuple[Any, None]:
        assert options["fast_inference"]
        config, four_bit = AutoConfig.from_pretrained(options["model_name"]), options["load_in_4bit"]
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float16,
        )  # fmt: skip
        names = "gpu_memory_utilization max_seq_length max_lora_rank max_num_seqs max_num_batched_tokens".split()
        llm = vllm_utils.load_vllm(
            model_name=options["model_name"], config=config, dtype=torch.float16, use_bitsandbytes=four_bit,
            enforce_eager=True, compilation_config=0, **{name: options[name] for name in names},
        )  # fmt: skip
        _, tensors = vllm_utils.get_vllm_state_dict(llm, config=config)
        model = vllm_utils.convert_vllm_to_huggingface(tensors, config, torch.float16, nf4 if four_bit else None)
        model.vllm_engine = llm
        return model, None

    @staticmethod
    def get_peft_model(model: Any, **options: Any) -> Any:
        lora = LoraConfig(r=options["r"], lora_alpha=options["lora_alpha"], target_modules=options["target_modules"])
        adapted = get_peft_model(model, lora)
        adapted.for_training = adapted.for_inference = lambda **_: None
        return adapted


def fake_the_gpu() -> None:
    """Replace Unsloth's queries of the GPU."""
    unsloth.FastLanguageModel = FastLanguageModel
    vllm_utils.patch_vllm(debug=False)
    vllm_utils.get_mem_info = lambda: (FREE_BYTES, CARD_BYTES)
    vllm_utils.get_target_device = lambda index=None: "cpu"
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    keep = lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear)  # noqa: E731
    vllm_layers.dispatch_cpu_unquantized_gemm = keep


def loaded(**spec: Any) -> Any:
    """Load the model with our loader and a share of the card, as a plan does."""
    options = {"gpu_memory_utilization": SHARE, "max_num_seqs": SEQUENCES, "load_in_4bit": FOUR_BIT} | spec
    cuda, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    memory, torch.cuda.mem_get_info = torch.cuda.mem_get_info, lambda: (FREE_BYTES, CARD_BYTES)
    try:
        model_spec = ModelSpec(str(FOLDER), dtype="float16", **options)
        return load_unsloth(model_spec, LoraSpec(r=RANK), vllm=True, max_seq_length=CONTEXT_TOKENS, seed=1)
    finally:
        torch.cuda.is_available, torch.cuda.mem_get_info = cuda, memory


def build(model: Any, *, eos: int = EOS) -> VLLMEngine:
    engine = unsloth_engine(model, step=lambda: 0, eos_ids=[eos])
    assert isinstance(engine, VLLMEngine)
    return engine


def vllms_weights(model: Any) -> dict[str, torch.Tensor]:
    inner = model.vllm_engine.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: weight for name, weight in inner.named_parameters() if "lora" not in name}


def every_base_weight_is_a_tensor_of_vllm(model: Any) -> None:
    """Each base weight of the training model shares the storage of one of vLLM's weights: none is in memory twice."""
    theirs = {weight.untyped_storage().data_ptr() for weight in vllms_weights(model).values()}
    ours = {n: p for n, p in model.named_parameters() if ".lora_" not in n and p.numel()}
    assert len(ours) > 15
    separate = [name for name, weight in ours.items() if weight.untyped_storage().data_ptr() not in theirs]
    assert not separate, separate


def the_base_takes_the_planned_memory(model: Any) -> None:
    """Compares the bytes of all weights with the plan, including the double-quantized scales of 4-bit weights."""
    tensors = [p for n, p in model.named_parameters() if ".lora_" not in n]
    for weight in list(tensors):
        if (state := getattr(weight, "quant_state", None)) is not None:
            assert state.nested, "vLLM alone would not double-quantize the scales"
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
    shape = formulas.shape_of(AutoConfig.from_pretrained(FOLDER).to_dict())
    predicted = formulas.weight_bytes(shape, four_bit=FOUR_BIT)
    assert abs(held / predicted - 1) < 0.01, (held, predicted)


def vllm_was_started_as_planned(model: Any) -> None:
    config = model.vllm_engine.llm_engine.vllm_config
    assert abs(config.cache_config.gpu_memory_utilization - SHARE) < 1e-3, (
        "a share of the whole card, not of the free memory"
    )
    assert config.scheduler_config.max_num_seqs == SEQUENCES and config.model_config.max_model_len == CONTEXT_TOKENS
    assert config.model_config.logprobs_mode == "processed_logprobs" and config.cache_config.enable_prefix_caching
    engine = build(model)
    assert abs(engine.share - SHARE) < 1e-3 and engine.max_num_seqs == SEQUENCES


def a_context_that_unsloth_shortens_is_rejected(model: Any) -> None:
    """If Unsloth estimates that the share is too small for one sequence, it starts vLLM with a shorter context."""
    original = vllm_utils.load_vllm
    granted = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=0))))  # fmt: skip
    fit = vllm_utils._fit_max_seq_length_to_kv_cache

    def started_short(**options: Any) -> Any:
        tokens, _, _, _ = vllm_utils.approximate_vllm_memory_usage(
            options["config"], max_seq_length=options["max_seq_length"], max_lora_rank=RANK,
            gpu_memory_utilization=options["gpu_memory_utilization"],
        )  # fmt: skip
        granted.llm_engine.vllm_config.model_config.max_model_len = fit(options["max_seq_length"], min(tokens, 128))
        return granted

    vllm_utils.load_vllm = started_short
    state, vllm_utils.get_vllm_state_dict = vllm_utils.get_vllm_state_dict, lambda llm, config: (None, None)
    convert = vllm_utils.convert_vllm_to_huggingface
    vllm_utils.convert_vllm_to_huggingface = lambda *_: SimpleNamespace()
    try:
        loaded()
    except EngineError as error:
        assert "sequences of 128 tokens, but this run needs 256" in str(error)
    else:
        raise AssertionError("accepted")
    finally:
        vllm_utils.load_vllm, vllm_utils.get_vllm_state_dict = original, state
        vllm_utils.convert_vllm_to_huggingface = convert


def a_run_learns_on_the_weights_that_are_sampled(model: Any) -> None:
    """Three updates: the probes pass, the adapter changes, and no base weight does."""
    base = {name: weight.clone() for name, weight in vllms_weights(model).items()}
    before = adapter_fingerprint(model)
    with tempfile.TemporaryDirectory() as made:
        args = MELConfig(
            output_dir=made, algorithm="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False,
            num_generations=4, per_device_train_batch_size=8, max_completion_length=16, max_steps=3,
            probe_max_diff=0.05, save_strategy="no", logging_steps=1, learning_rate=1e-3, report_to="none",
            disable_tqdm=True, seed=7,
        )  # fmt: skip
        tasks = Dataset.from_list([{"prompt": f"What is {i} plus {i % 5}?"} for i in range(24)])
        trainer = MELTrainer(
            model, args=args, train_dataset=tasks, reward_funcs=even_ids,
            processing_class=AutoTokenizer.from_pretrained(FOLDER),
        )  # fmt: skip
        assert isinstance(trainer.engine.unmetered, VLLMEngine), "the default for a model that Unsloth loaded"
        trainer.train()
        assert_learned(trainer)
        rows = [json.loads(line) for line in (Path(made) / "metrics.jsonl").read_text().splitlines()]
    assert adapter_fingerprint(model) != before
    moved = [name for name, weight in vllms_weights(model).items() if not torch.equal(weight, base[name])]
    assert not moved, moved
    shares = [row["mel/probe_adapter"] for row in rows if "mel/probe_adapter" in row]
    assert shares and max(abs(share - 1) for share in shares) < 0.1, shares
    diffs = [row["mel/probe_logp_diff"] for row in rows if "mel/probe_logp_diff" in row]
    assert 0 < max(diffs) < 0.05, diffs
    ratios = [row["sampling/importance_sampling_ratio/mean"] for row in rows if "reward" in row]
    assert len(ratios) == 3 and max(abs(ratio - 1) for ratio in ratios) < 0.15, ratios


ALONE: tuple[Callable[[Any], None], ...] = (
    every_base_weight_is_a_tensor_of_vllm,
    the_base_takes_the_planned_memory,
    vllm_was_started_as_planned,
    a_context_that_unsloth_shortens_is_rejected,
    a_run_learns_on_the_weights_that_are_sampled,
)


def main() -> dict[str, str]:
    fake_the_gpu()
    model = loaded()
    assert is_unsloth(model)
    install_scoring_head(model.get_base_model())
    set_lora(model, 0.3)
    engine_contract.ROUNDING, engine_contract.EFFECT = HALF, EFFECT
    clauses = {name: lambda clause=clause: clause(build, model) for name, clause in CLAUSES.items()}
    clauses |= {clause.__name__: lambda clause=clause: clause(model) for clause in ALONE}
    found = {}
    for name, clause in clauses.items():
        try:
            clause()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    shutil.rmtree("unsloth_compiled_cache", ignore_errors=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
