"""MEL-Lite with the real Unsloth on its CPU backend: both import orders, and a run from recipe to merged model.

This does not cover GPUs, where Unsloth replaces transformers' layers by its own code.
"""

from __future__ import annotations

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Qwen3Config

from import_orders import REPORT
from mel_lite.engines.unsloth import KEEP_UTILIZATION, STANDBY
from mel_lite.memory import formulas
from mel_lite.memory import vllm as vllm_memory
from mel_lite.memory.vllm import VLLMCard, VLLMShare
from mel_lite.memory.workload import workload
from mel_lite.recipe import resolve
from mel_lite.resilience import checkpoint_files
from real_packages import SITE, needs_unsloth, with_unsloth
from tiny_models import save_tiny

pytestmark = [pytest.mark.slow, needs_unsloth]

OURS = "from mel_lite import MELConfig, MELTrainer\n"
CPU_BACKEND = "import unsloth\nassert unsloth.DEVICE_TYPE == 'cpu'\n"
GPU_PATH = """
import unsloth, trl
assert unsloth.DEVICE_TYPE == 'cuda', unsloth.DEVICE_TYPE
from unsloth.models.rl import PatchRL, _patch_trl_rl_trainers
PatchRL(unsloth.FastLanguageModel)
_patch_trl_rl_trainers("grpo_trainer")
assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer" and trl.trainer.GRPOTrainer is trl.GRPOTrainer
"""
"""Does what `import unsloth` does on a GPU. With UNSLOTH_ALLOW_CPU, only the last step has to be added."""


@pytest.mark.parametrize("order", ["ours first", "unsloth first"])
@pytest.mark.parametrize(("path", "backend"), [(CPU_BACKEND, "0"), (GPU_PATH, "1")], ids=["CPU backend", "GPU path"])
def test_the_base_is_trls_released_class_in_both_import_orders(
    order: str, path: str, backend: str, tmp_path: Path
) -> None:
    parts = (OURS, path) if order == "ours first" else (path,)
    code = "\n".join([*parts, *(line.removeprefix("    ") for line in REPORT.splitlines())])
    report = json.loads(with_unsloth("-c", code, cwd=tmp_path, UNSLOTH_ALLOW_CPU=backend).stdout.splitlines()[-1])
    assert report["base"] == "GRPOTrainer" and report["file"] == ["trl", "trainer", "grpo_trainer.py"]
    assert report["calls_compute_loss"]
    assert report["config"] == ["GRPOConfig", "_BaseConfig"] and report["learning_rate"] == 1e-6


def test_unsloths_patches_change_no_bit_of_a_run(tmp_path: Path) -> None:
    """On a GPU, Unsloth rewrites parts of transformers' Trainer and TRL's classes, but not MELTrainer's updates."""
    script = Path(__file__).parents[1] / "helpers" / "unsloth_trajectory.py"
    ends = {}
    for order in ("without", "unsloth first", "unsloth second"):
        done = with_unsloth(script, order, tmp_path / order, cwd=tmp_path, UNSLOTH_ALLOW_CPU="1")
        ends[order] = json.loads(done.stdout.splitlines()[-1])
    assert [end.pop("trainer") for end in ends.values()] == ["transformers.trainer", *["unsloth.models._utils"] * 2]
    assert ends["unsloth first"] == ends["unsloth second"] == ends["without"]


RECIPE: dict[str, Any] = {
    "model": {"name": "base", "dtype": "float32", "load_in_4bit": True, "engine": "unsloth"},
    "lora": {"r": 4, "alpha": 8},
    "data": {"train": "tasks.jsonl", "eval": "tasks.jsonl"},
    "eval": {"limit": 2, "k": 2},
    "train": {
        "algorithm": "grpo",
        "verifier": "coin:judge",
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 16,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": True,
        "use_cpu": True,
        "bf16": False,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
    },
}
COIN = """
def judge(completion, answer):
    return "right" if sum(map(ord, completion)) % 2 else "wrong"
"""
"""Judges at random: a random model is never right, and a group of wrong completions has no advantages."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unsloth")
    save_tiny(folder / "base")
    tasks = [{"prompt": f"What is {a} plus 1?", "answer": str(a + 1)} for a in range(8)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "coin.py").write_text(COIN)
    return folder


def train(place: Path, run: str, *arguments: object) -> str:
    command = ("-m", "mel_lite", "train", "--output-dir", run, *arguments)
    return with_unsloth(*command, cwd=place).stdout


@pytest.fixture(scope="module")
def whole(place: Path) -> str:
    return train(place, "whole", "--config", "recipe.yaml")


def steps(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_from_recipe_to_merged_model(place: Path, whole: str) -> None:
    lines = whole.splitlines()
    chosen = next(
        i for i, line in enumerate(lines) if line.startswith("engine: unsloth (model.engine=unsloth; no CUDA")
    )
    assert chosen < next(i for i, line in enumerate(lines) if "no GPU found, training on CPU" in line), (
        "printed before it"
    )
    assert "Unsloth (CPU): LlamaForCausalLM" in whole and "4-bit = True" in whole
    rows = steps(place / "whole")
    probed = {row["step"]: row["mel/probe_logp_diff"] for row in rows if "mel/probe_logp_diff" in row}
    assert list(probed) == [1, 2] and 0 < max(probed.values()) < 1e-4
    assert rows[1]["mel/probe_adapter"] == pytest.approx(1, abs=1e-2)
    assert all(row["grad_norm"] > 0 for row in rows)
    learned = {n: w for n, w in weights(place / "whole" / "adapter").items() if "lora_B" in n}
    assert learned and all(bool(w.any()) for w in learned.values())
    record = json.loads((place / "whole" / "adapter" / "mel_lite.json").read_text())
    assert record["base"]["load_in_4bit"] and record["base"]["dtype"] == "float32"
    assert "merged vs adapter  │ faithful" in whole and (place / "whole" / "merged-16bit" / "config.json").is_file()


def test_a_resumed_run_ends_in_the_same_bytes(place: Path, whole: str) -> None:
    train(place, "cut", "--config", "recipe.yaml", "--max-steps", 2)
    train(place, "cut", "--resume", "--max-steps", 3)
    assert [path.name for path in checkpoint_files.committed(place / "cut")][-1] == "checkpoint-3"
    one, other = weights(place / "whole" / "adapter"), weights(place / "cut" / "adapter")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert "mel/probe_logp_diff" in steps(place / "cut")[2], "probed again after the resume"


def test_a_run_whose_engine_failed_can_resume_with_transformers(place: Path, whole: str) -> None:
    """On a CPU, both engines sample alike from the same weights, so the run ends in the same bytes."""
    shutil.copytree(
        place / "whole", place / "other", ignore=shutil.ignore_patterns("checkpoint-3", "adapter", "merged*")
    )
    shown = train(place, "other", "--resume", "--engine", "hf", "--max-steps", 3)
    assert "engine: hf (model.engine=hf)" in shown
    one, other = weights(place / "whole" / "adapter"), weights(place / "other" / "adapter")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_unsloth_has_the_names_we_use() -> None:
    """The GPU path is not imported here, so its names are read from the source."""

    def parameters(file: str, function: str, owner: str | None = None) -> set[str]:
        tree = ast.parse((SITE / file).read_text())
        scope = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner] if owner else [tree]
        (found, *_) = [n for s in scope for n in s.body if isinstance(n, ast.FunctionDef) and n.name == function]
        return {a.arg for a in found.args.args + found.args.kwonlyargs}

    loading = parameters("unsloth/models/loader.py", "from_pretrained", "FastLanguageModel")
    assert loading >= {
        "model_name", "max_seq_length", "dtype", "load_in_4bit", "revision", "fast_inference", "max_lora_rank",
        "gpu_memory_utilization", "use_gradient_checkpointing", "use_exact_model_name", "trust_remote_code",
        "random_state", "offload_embedding",
    }  # fmt: skip
    assert parameters("unsloth/models/llama.py", "get_peft_model", "FastLlamaModel") >= {
        "r", "target_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "random_state",
        "use_gradient_checkpointing",
    }  # fmt: skip
    assert parameters("unsloth_zoo/vllm_utils.py", "load_lora") >= {"model", "save_directory", "load_tensors"}
    assert parameters("unsloth_zoo/vllm_utils.py", "load_vllm") >= {
        "gpu_memory_utilization", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens",
    }  # fmt: skip
    vllm = (SITE / "unsloth_zoo/vllm_utils.py").read_text()
    assert "actual_gpu_memory_utilization = free_memory / total_memory" in vllm, "free memory as a share of the card"
    for name in (STANDBY, KEEP_UTILIZATION):
        assert f'os.getenv("{name}", "0")' in vllm
    assert '"processed_logprobs" if training' in vllm and "enable_prefix_caching  : bool = True" in vllm


def test_the_gpu_script_runs_all_its_stages(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_engines.py"
    for check, stages in (("unsloth", 7), ("vllm", 1)):
        arguments = ("--check", check, "--model", "qwen3-random", "--quick", "--out", tmp_path / check)
        with_unsloth(script, *arguments, cwd=tmp_path)
        found = json.loads((tmp_path / check / "stages.json").read_text())
        assert len(found) == stages
        if check == "vllm":  # there is no GPU here: the failure is recorded with its reason
            assert not found["load"]["ok"] and "needs a GPU" in found["load"]["error"]
            continue
        assert all(stage["ok"] for stage in found.values()), found
        assert found["agreement_after_an_update"]["adapter_share"] == pytest.approx(1, abs=1e-3)
        assert found["export"]["faithful"] and found["speed"]["tokens"] > 8


GRANTED = """
import json, sys
import unsloth
from unsloth_zoo import vllm_utils
from transformers import AutoConfig

total, found = 24 * 2**30, []
vllm_utils.get_mem_info = lambda: (total, total)
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    for four_bit in (True, False):
        weights = vllm_utils.vllm_weights_memory_usage(config, load_in_4bit=four_bit)
        for rank, share, tokens in ((4, 0.5, 256), (32, 0.7, 2048), (32, 0.8, 6144), (64, 0.95, 32_000)):
            granted, _, utilization, _ = vllm_utils.approximate_vllm_memory_usage(
                config, load_in_4bit=four_bit, max_seq_length=tokens, gpu_memory_utilization=share,
                max_lora_rank=vllm_utils.determine_max_lora_rank(rank), weight_bytes=weights,
            )
            found.append([folder, four_bit, rank, share, tokens, granted, utilization])
print(json.dumps(found))
"""


def test_the_planned_context_is_the_one_unsloth_grants(tmp_path: Path) -> None:
    """Compares with Unsloth's own functions for a card of 24 GiB: the context it starts vLLM with, and the share."""
    card, shapes = VLLMCard(24 * 2**30, 24 * 2**30), {}
    for name in ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B"):
        shape = formulas.KNOWN[name]
        config = Qwen3Config(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim, tie_word_embeddings=shape.tied, max_position_embeddings=shape.context,
        )  # fmt: skip
        config.save_pretrained(folder := tmp_path / name.replace("/", "-"))
        shapes[str(folder)] = shape
    (tmp_path / "granted.py").write_text(GRANTED)
    rows = json.loads(with_unsloth(tmp_path / "granted.py", *shapes, cwd=tmp_path).stdout.splitlines()[-1])
    assert len(rows) == 24 and sum(granted > 0 for *_, granted, _ in rows) > 12
    recipe = resolve(preset="24gb")
    for folder, four_bit, rank, share, tokens, granted, utilization in rows:
        load = workload(recipe, shapes[folder], vllm_on=card)
        load = replace(load, four_bit=four_bit, max_seq_length=tokens, vllm=VLLMShare(card, rank, 64, share))
        assert load.share_bytes == pytest.approx(utilization * card.total_bytes, abs=2**10)
        options = {"four_bit": four_bit}
        ours = vllm_memory.granted_tokens(shapes[folder], load.share_bytes, rank, **options)
        assert ours == granted, (folder, four_bit, rank, share, tokens)
