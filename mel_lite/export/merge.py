"""Export a trained adapter for serving: as a clean adapter folder, a checked 16-bit merged model, or a GGUF file.

Rounding limits the quality of a merge. The update is added in float32 to the base weights that the adapter saw in
training (the dequantized weights of a 4-bit base) and rounded once. The written model is loaded again and compared with
the adapter model, and the figures are saved next to the weights. The target folder does not exist before that.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil

from mel_lite.engines.base import Request, Sampling
from mel_lite.errors import ExportError, check_choice
from mel_lite.export.gguf import GGUF_TYPES, Tools, find_tools, write_gguf
from mel_lite.export.report import REPORT, ExportReport, Fidelity, card
from mel_lite.files import publish_dir
from mel_lite.models.adapters import RECORD, WEIGHTS, adapter_base, attach_adapter, find_adapter
from mel_lite.models.chat import render
from mel_lite.models.load import ModelSpec, eos_ids, load_base, load_config, load_tokenizer
from mel_lite.models.progress_bars import progress_bars
from mel_lite.recipe import MergedDtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FORMATS = ("adapter", "merged-16bit", *GGUF_TYPES)
DTYPES = get_args(MergedDtype)
CHECK_PROMPTS = (
    "What is 17 + 25? Think step by step, then give the final answer.",
    "A train travels 60 miles in 1.5 hours. How long does it take for 100 miles at the same speed?",
    "Simplify the fraction 42/56 and explain each step.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "Sort these words alphabetically: pear, apple, fig, cherry.",
    "Solve for x: 3x - 7 = 2x + 5. Check your answer by substitution.",
    "Two dice are rolled. What is the probability that the sum is 7?",
)
CHECK_NEW_TOKENS = 32
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def export(
    source: Path,
    out_dir: Path,
    *,
    format: str = "merged-16bit",
    base: ModelSpec | None = None,
    dtype: str = "auto",
    allow_untrained: bool = False,
) -> ExportReport:
    """Export the adapter of a run, checkpoint or adapter folder to `out_dir`.

    Args:
        format: `adapter` (only PEFT's files), `merged-16bit` (a plain model, compared with the adapter model), or
            `f16`, `q8_0`, `q4_k_m` (the merged model as a GGUF file of this type, written by llama.cpp's tools).
        base: location of the base if it differs from the recorded one. The way it is loaded (dtype, 4-bit) is always
            that of training, as far as it was recorded.
        dtype: dtype of the merged weights. `auto` is the base checkpoint's own 16-bit type, or float16 for a float32
            checkpoint whose weights fit its range (on the demo model, the KL of its rounding is 60 times smaller than
            that of bfloat16).
        allow_untrained: export an adapter whose LoRA-B is still zero, which does not change the base.
    Raises: ExportError when `out_dir` is in use, the adapter is untrained or not finite, or there is not enough disk
        space; ModelError when adapter and base do not match; ConfigError for an unknown format or dtype.
    """
    check_choice("format", format, FORMATS)
    check_choice("dtype", dtype, DTYPES)
    adapter_dir = find_adapter(source)
    spec = _training_base(adapter_dir, base)
    _check_adapter_weights(adapter_dir, allow_untrained=allow_untrained)
    _check_target(out_dir)
    options = [] if out_dir == source / format else ["--output", str(out_dir)]
    options += [] if base is None else ["--base", base.name]
    options += ["--allow-untrained"] if allow_untrained else []
    tools = find_tools(format, source, options) if format in GGUF_TYPES else None
    with _staging(out_dir) as staging, progress_bars(shown=False):  # several models, each with a bar
        if format == "adapter":
            _copy(adapter_dir, staging, ("adapter_config.json", WEIGHTS, RECORD, *_TOKENIZER_FILES))
            report = ExportReport(out_dir, format, adapter_dir, spec, None, None)
        elif tools is not None:
            report = _export_gguf(adapter_dir, out_dir, staging, spec, format, tools)
        else:
            report = _export_merged(adapter_dir, out_dir, staging, spec, dtype)
        (staging / "README.md").write_text(card(report), encoding="utf-8")
        (staging / REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
        try:
            publish_dir(staging, out_dir)
        except OSError as error:
            raise ExportError(f"cannot publish {out_dir}: {error}. Remove it or name another folder.") from error
    if report.fidelity is not None and not report.fidelity.is_faithful:
        logger.warning(
            "%s differs from the adapter model: mean KL %.1e nats/token, same top token %.2f%%. Serve the adapter on "
            "its base (format adapter)%s.",
            out_dir,
            report.fidelity.mean_kl_nats,
            100 * report.fidelity.top1_agreement,
            ", or try dtype float16, which rounds 8 times finer" if report.dtype == "bfloat16" else "",
        )
    return report


def _training_base(adapter_dir: Path, base: ModelSpec | None) -> ModelSpec:
    recorded = adapter_base(adapter_dir)
    if base is None:
        return recorded
    if not (adapter_dir / RECORD).is_file():
        return base
    return replace(recorded, name=base.name, revision=base.revision, attn_implementation=base.attn_implementation)


def _check_adapter_weights(adapter_dir: Path, *, allow_untrained: bool) -> None:
    from safetensors.torch import load_file

    weights = load_file(adapter_dir / WEIGHTS)
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise ExportError(f"adapter {adapter_dir} holds NaN or infinity in {broken[0]}. Export an earlier checkpoint.")
    # Weights other than LoRA's are whole modules or tokens that were trained.
    zero_at_first = ("lora_B", "lora_embedding_A")
    whole = any("lora_" not in name for name in weights)
    changes = whole or any(weight.any() for name, weight in weights.items() if any(z in name for z in zero_at_first))
    if not changes and not allow_untrained:
        raise ExportError(
            f"adapter {adapter_dir} has learned nothing: every LoRA-B is zero, so it does not change the base. Look "
            "for the cause in the run's reward and funnel; allow_untrained (--allow-untrained) exports it anyway."
        )


def _check_target(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ExportError(f"{out_dir} exists and is not an empty folder. Remove it or name another one (--output).")


@contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """Create a hidden folder next to the target, and delete it afterwards unless it was renamed.

    Also deletes such folders of processes that have died.
    """
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        for leftover in out_dir.parent.glob(f".{out_dir.name}.*.partial"):
            if (owner := re.search(r"\.(\d+)\.partial$", leftover.name)) and not _is_another_process(int(owner[1])):
                shutil.rmtree(leftover, ignore_errors=True)
        staging = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
        staging.mkdir()
    except OSError as error:
        raise ExportError(f"cannot write in {out_dir.parent}: {error}. Name another folder (--output).") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def _export_merged(adapter_dir: Path, out_dir: Path, staging: Path, spec: ModelSpec, dtype: str) -> ExportReport:
    _check_space(spec, staging)
    tokenizer = load_tokenizer(spec, saved_in=adapter_dir)
    prompts = [_prompt_ids(text, tokenizer) for text in CHECK_PROMPTS]

    model = attach_adapter(_exact_on_cpu(load_base(spec)), adapter_dir)
    answers = _greedy(model, prompts, tokenizer)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    expected = _next_token_logps(model, sequences)
    del model  # one model in memory at a time

    merged = merge(adapter_dir, spec, dtype)
    dtype = str(merged.dtype).removeprefix("torch.")
    merged.generation_config.eos_token_id = list(eos_ids(merged, tokenizer))
    merged.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        merged.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    except OSError as error:
        raise ExportError(f"cannot write the merged model next to {out_dir}: {error}.") from error
    del merged

    reloaded = _exact_on_cpu(load_base(ModelSpec(str(staging), dtype=dtype)))
    same = [a == b for a, b in zip(answers, _greedy(reloaded, prompts, tokenizer), strict=True)]
    fidelity = _compare(expected, _next_token_logps(reloaded, sequences), same)
    if not math.isfinite(fidelity.mean_kl_nats):
        raise ExportError(f"the merged model computes NaN or infinity in {dtype}. Set dtype to bfloat16.")
    return ExportReport(out_dir, "merged-16bit", adapter_dir, spec, dtype, fidelity)


def _export_gguf(
    adapter_dir: Path, out_dir: Path, staging: Path, spec: ModelSpec, kind: str, tools: Tools
) -> ExportReport:
    """Merge and check as for `merged-16bit`, then convert with llama.cpp. The figures describe the merged model."""
    merged = staging / "merged-16bit"
    merged.mkdir()
    report = _export_merged(adapter_dir, out_dir, merged, spec, "auto")
    name = Path(spec.name).name.lower()
    write_gguf(tools, merged, staging / f"{name}-{kind}.gguf", kind)
    shutil.rmtree(merged)
    return replace(report, format=kind)


def _exact_on_cpu(model: PreTrainedModel) -> PreTrainedModel:
    """On a CPU, compute in float32 with the same 16-bit weight values: 16-bit arithmetic is slow and noisy there.

    If the host has not enough memory for all weights in float32, convert one layer at a time.
    """
    if model.device.type != "cpu" or getattr(model, "is_quantized", False):
        return model
    present_bytes = sum(weight.nbytes for weight in model.parameters())
    extra_bytes = 4 * sum(weight.numel() for weight in model.parameters()) - present_bytes
    return model.float() if extra_bytes < _free_host_bytes() else _float_while_used(model)


def _free_host_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _float_while_used(model: PreTrainedModel) -> PreTrainedModel:
    """Convert the weights of each layer to float32 while it computes. This is slower but gives the same values."""
    dtypes = {
        layer: weight.dtype
        for layer in model.modules()
        if (weight := next(layer.parameters(recurse=False), None)) is not None
    }

    def widen(layer: Any, _inputs: Any) -> None:
        layer.float()

    def narrow(layer: Any, _inputs: Any, _output: Any) -> None:
        layer.to(dtypes[layer])

    for layer in dtypes:
        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(narrow)
    return model


def _check_space(spec: ModelSpec, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without memory
        skeleton = AutoModelForCausalLM.from_config(load_config(spec))
    needed_bytes = 2 * sum(weight.numel() for weight in skeleton.parameters()) + 50_000_000
    if (free_bytes := shutil.disk_usage(folder).free) < needed_bytes:
        raise ExportError(
            f"the merged model needs {needed_bytes / 1e9:.1f} GB, but {folder.parent} has {free_bytes / 1e9:.1f} GB "
            "free. Free some space, or name a folder on another disk (--output)."
        )


def merge(adapter_dir: Path, spec: ModelSpec, dtype: str = "auto") -> PreTrainedModel:
    """Merge the adapter's update into the base: round_16bit(float32(W) + float32(update)), once per weight.

    W are the weights that the adapter saw in training: loaded in the same dtype, and quantized and dequantized if they
    were in 4 bits. Works layer by layer, so that the peak memory is one float32 layer above the 16-bit model.

    Raises: ExportError when a weight exceeds the range of `dtype`.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    base = load_base(spec)
    if getattr(base, "is_quantized", False):
        base = base.dequantize()
    target = _merged_dtype(base, spec, dtype)
    model = attach_adapter(base, adapter_dir)
    _untie_adapted_head(base)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer().float()
            module.merge(safe_merge=True)
            layer.to(target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload(safe_merge=True).to(target)
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False  # modules_to_save trained one of them
    if not all(bool(torch.isfinite(weight).all()) for weight in merged.parameters()):
        raise ExportError(f"a merged weight exceeds the range of {dtype} ({target}). Set dtype to bfloat16.")
    return merged


def _merged_dtype(base: PreTrainedModel, spec: ModelSpec, dtype: str) -> torch.dtype:
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    stored = load_config(spec).dtype
    if stored in (torch.float16, torch.bfloat16):
        return stored
    largest = max(weight.detach().abs().max().item() for weight in base.parameters())
    return torch.float16 if largest < torch.finfo(torch.float16).max / 2 else torch.bfloat16


def _untie_adapted_head(base: PreTrainedModel) -> None:
    """Give a tied head its own copy if the embedding or the head is adapted: the update belongs to only one of them."""
    import torch

    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    adapted = any(hasattr(module, "base_layer") for module in (embedding, head))
    tokens, head_tokens = (getattr(module, "token_adapter", None) for module in (embedding, head))
    one_tokens = tokens is not None and getattr(head_tokens, "tied_adapter", None) is tokens
    adapted |= not one_tokens and (tokens or head_tokens) is not None
    layer = getattr(head_tokens or head, "base_layer", head)
    if adapted and layer.weight is getattr(tokens or embedding, "base_layer", embedding).weight:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _prompt_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    return render([{"role": "user", "content": text}] if tokenizer.chat_template else text, tokenizer)


def _greedy(model: Any, prompts: list[tuple[int, ...]], tokenizer: Any) -> list[tuple[int, ...]]:
    from mel_lite.engines.hf import HFEngine

    engine = HFEngine(model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id)
    requests = [Request(ids, seed=0) for ids in prompts]
    return [done.ids for done in engine.generate(requests, Sampling(CHECK_NEW_TOKENS, temperature=0.0))]


def _next_token_logps(model: Any, sequences: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Compute next-token log-probs in nats after each of the T tokens of a sequence: (T, V) each, float32, on CPU."""
    import torch

    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1).cpu()
            for ids in sequences
        ]


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor], greedy_equal: list[bool]) -> Fidelity:
    """Compute KL(expected || found) per token and top-1 agreement from lists of log-probs (T, V) in nats."""
    import torch

    pairs = list(zip(expected, found, strict=True))
    kl_N = torch.cat([(p_TV.exp() * (p_TV - q_TV)).sum(-1) for p_TV, q_TV in pairs]).clamp_min(0)
    same_N = torch.cat([p_TV.argmax(-1) == q_TV.argmax(-1) for p_TV, q_TV in pairs])
    return Fidelity(
        tokens=kl_N.numel(),
        mean_kl_nats=kl_N.mean().item(),
        max_kl_nats=kl_N.max().item(),
        top1_agreement=same_N.float().mean().item(),
        greedy_equal=tuple(greedy_equal),
    )
