"""Check Unsloth and vLLM on a real GPU: `python benchmarks/gpu_engines.py [--quick] [--out FOLDER]`.

The checks run in processes of their own, because unsloth patches its process permanently and a crash must not end the
others:

- `transformers`: the engine that runs everywhere, for comparison.
- `unsloth`: 4-bit load, LoRA, forward and backward, generation, agreement of log-probs, merged export.
- `vllm`: the same with vLLM on the trained weights; agreement before and after the adapter changes and after sleep and
  wake, freed memory, tokens per second.

The models are SmolLM2-135M (the demo model) and a Qwen3 with random weights. A stage that fails is recorded with its
error, and the next one runs. Writes gpu-engines.json. Without a GPU, `unsloth` runs on Unsloth's CPU backend.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CHECKS = ("transformers", "unsloth", "vllm")
MODELS = ("smollm2", "qwen3-random")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "vllm", "vllm-bnb-plugin")
TIMEOUT_S = {False: 1500, True: 420}
CONTEXT_TOKENS = 2048
RANK = 16
LORA_B_SCALE = 0.02
"""Standard deviation of the random LoRA-B that simulates a trained one."""

Stage = Callable[[], dict[str, Any]]


def measure(out_dir: Path, quick: bool) -> dict[str, Any]:
    """Run every check on every model, and return the report that is written to `out_dir`/gpu-engines.json.

    `{"environment": ..., "checks": {"<check> on <model>": {"<stage>": {"ok": bool, "seconds_s": float, ...}}}}`; a
    check whose process died has the stage `process`.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"environment": environment(), "quick": quick, "checks": {}}
    for model in MODELS:
        for check in CHECKS:
            found = _in_subprocess(check, model, out_dir / "work" / f"{check}-{model}", quick)
            report["checks"][f"{check} on {model}"] = found
            stages = ", ".join(f"{name} {'ok' if stage['ok'] else 'FAILED'}" for name, stage in found.items())
            print(f"{check} on {model}: {stages}", flush=True)
            (out_dir / "gpu-engines.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def environment() -> dict[str, Any]:
    """Return GPU and package versions."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": versions,
    }


def _in_subprocess(check: str, model: str, work: Path, quick: bool) -> dict[str, Any]:
    """Run one check in a process of its own; return its stages, and the error if the process died."""
    work.mkdir(parents=True, exist_ok=True)
    result = work / "stages.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--check", check, "--model", model, "--out", str(work)]
    start_s = time.monotonic()
    with (work / "log.txt").open("w") as log:
        try:
            ended = subprocess.run(
                [*command, "--quick"] if quick else command,
                stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT_S[quick], check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            ended = -1
    stages: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    if ended != 0:
        tail = (work / "log.txt").read_text(errors="replace")[-2000:]
        why = "ran out of time" if ended == -1 else f"ended with {ended}"
        stages["process"] = {"ok": False, "seconds_s": time.monotonic() - start_s, "error": f"{why}: {tail}"}
    return stages


# ---- One check ----


class Stages:
    """Runner of stages that writes each result to disk, so that a crash loses no finished stage."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {}

    def __call__(self, name: str, stage: Stage) -> bool:
        """Run one stage, record its result, and return True if it succeeded."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start_s = time.monotonic()
        try:
            found = {"ok": True, **stage()}
        except Exception:
            found = {"ok": False, "error": traceback.format_exc()[-2000:]}
        found["seconds_s"] = time.monotonic() - start_s
        if torch.cuda.is_available():
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
            found["device_used_bytes"] = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]
        self.found[name] = found
        self._path.write_text(json.dumps(self.found, indent=1))
        return bool(found["ok"])


class Check:
    """One engine over a 4-bit model with an adapter, and the stages of its check."""

    def __init__(self, check: str, folder: Path, work: Path, quick: bool) -> None:
        self.check, self.folder, self.work = check, folder, work
        self.sequences, self.new_tokens = (8, 16) if quick else (64, 256)
        self.step = 0
        self.model: Any = None
        self.engine: Any = None

    def load(self) -> dict[str, Any]:
        from peft import get_peft_model
        from transformers import AutoTokenizer

        from mel_lite.engines.hf import HFEngine
        from mel_lite.engines.unsloth import load_unsloth, unsloth_engine
        from mel_lite.models.adapters import LoraSpec, lora_config
        from mel_lite.models.load import ModelSpec, load_base
        from mel_lite.training.scoring import install_scoring_head

        spec, lora = ModelSpec(str(self.folder), load_in_4bit=True), LoraSpec(r=RANK, alpha=2 * RANK)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if self.check == "transformers":
            self.model = get_peft_model(load_base(spec), lora_config(lora))
        else:
            vllm = self.check == "vllm"
            self.model = load_unsloth(spec, lora, vllm=vllm, max_seq_length=CONTEXT_TOKENS, seed=1)
        install_scoring_head(self.model.get_base_model())
        stops, pad = [self.tokenizer.eos_token_id], self.tokenizer.pad_token_id or 0
        if self.check == "transformers":
            self.engine = HFEngine(self.model, eos_ids=stops, pad_id=pad, autocast=self._autocast)
        else:
            self.engine = unsloth_engine(
                self.model, step=lambda: self.step, eos_ids=stops, pad_id=pad, autocast=self._autocast
            )
        return {"engine": self.engine.name, "model_bytes": self.model.get_memory_footprint()}

    def _autocast(self) -> Any:
        return torch.autocast("cuda", dtype=torch.bfloat16) if torch.cuda.is_available() else nullcontext()

    def forward_backward(self) -> dict[str, Any]:
        """Check that a gradient reaches every LoRA-B (LoRA-A has none while B is zero) and only the adapter."""
        self.model.train()
        with self._autocast():
            logp_T = self._scored(self._rows(self._sample(4, 8)))
        (-logp_T.mean()).backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        dead = [n for n, g in grads.items() if "lora_B" in n and not (g.isfinite().all() and g.any())]
        layers = sum("lora_B" in n for n in grads)
        self.model.zero_grad(set_to_none=True)
        assert layers and not dead and all("lora_" in n for n in grads), (layers, dead[:3], list(grads)[:3])
        return {"lora_layers_with_gradient": layers}

    def agreement(self) -> dict[str, Any]:
        """Compare engine and trainer on the same completions; measure how much of the adapter the engine applies."""
        from mel_lite.training.engine_probe import agreement

        done = self._sample(min(16, self.sequences), min(64, self.new_tokens))
        self.engine.sleep()
        self.model.eval()
        rows = self._rows(done)
        with torch.no_grad(), self._autocast():
            trainer_T = self._scored(rows)
            with self.model.disable_adapter():
                base_T = self._scored(rows)
        self.engine.wake()
        found = agreement(torch.tensor([x for _, c in done for x in c.logprobs]), trainer_T, base_T)
        return {"tokens": len(trainer_T), **{k: v if v == v else None for k, v in asdict(found).items()}}

    def agreement_after_an_update(self) -> dict[str, Any]:
        """Repeat `agreement` after a change of the adapter, to detect one that is stale, ignored or applied twice."""
        generator = torch.Generator().manual_seed(self.step)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * LORA_B_SCALE)
        self.step += 1
        self.engine.wake()
        found = self.agreement()
        assert abs(found["adapter_share"] - 1) < 0.5, found
        return found

    def sleep_and_wake(self) -> dict[str, Any]:
        """Measure the memory that `sleep` frees, and compare the tokens of equal seeds before and after."""
        before = [c.ids for _, c in self._sample(4, 16)]
        awake_bytes = self._device_used_bytes()
        self.engine.sleep()
        asleep_bytes = self._device_used_bytes()
        start_s = time.monotonic()
        self.engine.wake()
        wake_s = time.monotonic() - start_s
        same = sum(a == c.ids for a, (_, c) in zip(before, self._sample(4, 16), strict=True))
        return {"freed_bytes": awake_bytes - asleep_bytes, "wake_s": wake_s, "same_sequences_of_4": same}

    def speed(self) -> dict[str, Any]:
        """Measure tokens per second with all sequences submitted at once."""
        self._sample(self.sequences, 4)  # warm-up
        start_s = time.monotonic()
        done = self._sample(self.sequences, self.new_tokens)
        elapsed_s = time.monotonic() - start_s
        tokens = sum(len(c.ids) for _, c in done)
        return {"sequences": len(done), "tokens": tokens, "tokens_per_s": tokens / elapsed_s}

    def export(self) -> dict[str, Any]:
        """Export the merged adapter on the CPU, in a process of its own, which compares it with the adapter model."""
        from mel_lite.models.adapters import write_fingerprint

        adapter, merged = self.work / "adapter", self.work / "merged-16bit"
        self.model.save_pretrained(adapter)
        self.tokenizer.save_pretrained(adapter)
        write_fingerprint(adapter, self.model)
        done = subprocess.run(
            [sys.executable, "-m", "mel_lite", "export", str(adapter), "--output", str(merged)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {"faithful": "faithful" in done.stdout, "report": done.stdout[-1500:]}

    def _sample(self, sequences: int, new_tokens: int) -> list[Any]:
        from mel_lite.engines.base import Request, Sampling

        texts = [
            f"Question {i // 8}: what is {i // 8 + 3} plus {i // 8 * 7}? Think step by step.\n"
            for i in range(sequences)
        ]
        requests = [Request(tuple(self.tokenizer(text)["input_ids"]), seed=i) for i, text in enumerate(texts)]
        return list(zip(requests, self.engine.generate(requests, Sampling(new_tokens)), strict=True))

    def _rows(self, done: list[Any]) -> list[Any]:
        from mel_lite.training.batches.packing import Row

        device = self.model.device
        return [Row(torch.tensor(r.prompt_ids + c.ids, device=device), len(c.ids)) for r, c in done]

    def _scored(self, rows: list[Any]) -> torch.Tensor:
        from mel_lite.training.batches.packing import pack
        from mel_lite.training.scoring import score

        return torch.cat(score(self.model, pack(rows, pad_id=self.tokenizer.pad_token_id or 0))[0])

    def _device_used_bytes(self) -> int:
        if not torch.cuda.is_available():
            return 0
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return total_bytes - free_bytes


def run_check(check: str, model: str, work: Path, quick: bool) -> dict[str, Any]:
    """Run all stages of one check in this process; each is written to `work`/stages.json when it ends."""
    stages = Stages(work / "stages.json")
    subject = Check(check, folder_of(model, work, quick), work, quick)
    if not stages("load", subject.load):
        return stages.found
    for stage in (
        subject.forward_backward, subject.agreement, subject.agreement_after_an_update, subject.sleep_and_wake,
        subject.speed, subject.export,
    ):  # fmt: skip
        stages(stage.__name__, stage)
    return stages.found


def folder_of(model: str, work: Path, quick: bool) -> Path:
    """Return a local model folder: the demo model, or a Qwen3 with random weights and one token per byte."""
    if model == "smollm2":
        from mel_lite.models.demo import demo_model_dir

        return demo_model_dir()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    special = ["<|pad|>", "<|end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1])
    hidden, layers = (256, 2) if quick else (1024, 8)
    config = Qwen3Config(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
        max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    random_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        random_model.model.norm.weight.mul_(8)  # without it all tokens would be almost equally likely
    folder = work / "base"
    random_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="output folder")
    parser.add_argument("--quick", action="store_true", help="use small sizes, to check that it runs")
    parser.add_argument("--check", choices=CHECKS, help="run only this check, in this process")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="model of --check")
    arguments = parser.parse_args()
    if arguments.check is None:
        measure(arguments.out, arguments.quick)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    run_check(arguments.check, arguments.model, arguments.out, arguments.quick)


if __name__ == "__main__":
    main()
