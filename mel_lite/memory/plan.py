"""Memory plans: settings that keep every phase of a recipe within a card's memory, or advice if none do.

Settings that do not change the result of a step (tokens per micro-batch, concurrency, vLLM's share, checkpointing,
optimizer storage) are chosen unless the user set them. Of the settings that do change it, the planner shortens an unset
length of C_retro and, as a last resort, halves the groups. Other lengths, model and rank are only advised.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mel_lite.engines import distributed
from mel_lite.engines.choice import EngineChoice, Machine, check_engine, check_length, planned_engine, this_machine
from mel_lite.errors import ConfigError, ModelError
from mel_lite.gpus import cpu_budget_bytes, preset_of
from mel_lite.memory import formulas
from mel_lite.memory.formulas import CONTEXT_BYTES, GIB, Shape
from mel_lite.memory.predict import Phase, predict
from mel_lite.memory.search import BATCH, CONTEXT, GROUP, Search, value_of
from mel_lite.memory.vllm import VLLMCard
from mel_lite.memory.workload import Workload, workload
from mel_lite.models.adapters import lora_config
from mel_lite.recipe import Recipe, keys_of, resolve, value_in

logger = logging.getLogger(__name__)

BUDGETS = {
    "12gb": int(11.6 * GIB),
    "16gb": int(14.5 * GIB),
    "24gb": int(22.0 * GIB),
    "40gb": int(39.3 * GIB),
    "80gb": int(79.0 * GIB),
}
"""Bytes available to a process on the smallest card of each class, as PyTorch reports them: RTX 3060; T4; A10G and L4
(error correction uses some memory); A100-40; A100-80."""

TARGET_SHARE = 0.95
"""Fraction of a card's memory that settings are chosen for. The rest is a margin, since predictions are not exact."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted memory of a recipe on one card."""

    model: str
    gpu: str
    engine: EngineChoice
    """Engine that samples."""
    budget_bytes: int
    phases: tuple[Phase, ...]
    """Phases in the order of a run. The export is listed but does not count for the peak: it can run later on a CPU."""
    choices: dict[str, Any]
    """Settings that the prediction assumes, by recipe key."""
    advice: tuple[str, ...] = ()
    """Command-line options, each of which would make the recipe fit by itself."""
    notes: tuple[str, ...] = ()
    obstacle: str = ""
    """Reason why the recipe cannot run regardless of the peaks; empty if there is none."""

    @property
    def on_cpu(self) -> bool:
        """True if the memory is that of the machine, for a run without a GPU."""
        return preset_of(self.gpu)[0] == "cpu"

    @property
    def worst(self) -> Phase:
        """Phase with the highest peak, without the export."""
        return max((phase for phase in self.phases if phase.name != "export"), key=lambda phase: phase.bytes)

    @property
    def peak_bytes(self) -> int:
        """Highest peak of all phases except the export."""
        return self.worst.bytes

    @property
    def fits(self) -> bool:
        """True if the peak is within the budget and vLLM can start."""
        return self.peak_bytes <= self.budget_bytes and not self.obstacle

    def to_json(self) -> str:
        """Return a JSON object: `fits, budget_bytes, peak_bytes, phases: [{name, bytes, parts}], choices` and more."""
        values = asdict(self)
        head = {"fits": self.fits, "budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        tail = {name: values[name] for name in ("engine", "phases", "choices", "advice", "notes", "obstacle")}
        return json.dumps({"model": self.model, "gpu": self.gpu, **head, **tail}, indent=1)

    @property
    def peak(self) -> str:
        """Highest peak and its phase, as text."""
        return f"{self.peak_bytes / GIB:.1f} GiB ({self.worst.name})"

    def refusal(self) -> str:
        """Return the message for a recipe that does not fit: the reason and the changes that help."""
        peak, budget = f"{self.peak_bytes / GIB:.1f} GiB", f"{self.budget_bytes / GIB:.1f} GiB"
        has = "there are" if self.on_cpu else "the card has"
        reason = self.obstacle or f"the {self.worst.name} phase needs {peak}, {has} {budget}"
        problem = f"{self.model} does not fit {self.gpu}: {reason}. "
        if self.advice:
            return problem + "Any one of these fits:\n  " + "\n  ".join(self.advice)
        if self.on_cpu:
            needed_gb = math.ceil(self.peak_bytes / 1e9)
            return problem + f"Give it {needed_gb} GB (--gpu cpu-{needed_gb}gb), or use a smaller model (--model)."
        return problem + "No single change fixes that. Use a smaller model (--model) or a larger card (--gpu)."


# ---- choice of settings ----------------------------------------------------------------------------------------------


def plan(
    recipe: Recipe,
    shape: Shape,
    *,
    gpu: str,
    budget_bytes: int,
    pinned: Iterable[str] = (),
    engine: EngineChoice | None = None,
    card: VLLMCard | None = None,
) -> Plan:
    """Choose the settings for a card and predict every phase with them.

    Keys in `pinned` (such as `train.optim`) keep the recipe's value. If nothing fits, the plan has the settings that
    take the least memory, and advice.

    Args:
        engine: Engine that samples; None = transformers.
        card: The whole card that vLLM's share refers to; None = a free card of the size of the budget.
    Raises: ConfigError if the recipe cannot be predicted.
    """
    engine = engine or EngineChoice("hf", False, "default of a plan")
    card = card or VLLMCard(budget_bytes, budget_bytes - CONTEXT_BYTES)
    on_cpu = bool(value_of(recipe, "train.use_cpu"))
    full = Search(shape, budget_bytes, frozenset(pinned), card if engine.vllm else None, on_cpu=on_cpu)
    target = replace(full, budget_bytes=int(TARGET_SHARE * budget_bytes))
    searches = (target, full, replace(target, halves_groups=True), replace(full, halves_groups=True))
    chosen = next(filter(None, (search.fit(recipe) for search in searches)), None)
    engine_advice: tuple[str, ...] = ()
    if engine.vllm and (chosen is None or _group(chosen) != _group(recipe)):
        with_transformers = replace(full, vllm_on=None).fit(recipe)
        engine_advice = () if with_transformers is None else ("--engine hf",)
    advice: tuple[str, ...] = ()
    if chosen is None:
        advice = (*target.unpinned(recipe), *engine_advice, *target.advice(recipe))
        chosen = target.smallest(recipe)
    load = full.workload(chosen)
    phases = predict(load)
    notes = _notes(load, phases, budget_bytes, exports_on_cpu=engine.engine == "unsloth")
    if _group(chosen) != _group(recipe):
        exception = f" except with {engine_advice[0]}" if engine_advice else ""
        notes.append(
            f"groups have {_group(chosen)} completions instead of {_group(recipe)}: nothing else fits{exception}. "
            f"Set the size yourself with --set {GROUP}=..."
        )
    own_context = value_of(recipe, CONTEXT) if CONTEXT in full.pinned else None
    choices = _choices(chosen, load, full, own_context)
    return Plan(recipe.model.name, gpu, engine, budget_bytes, phases, choices, advice, tuple(notes), _obstacle(load))


def _group(recipe: Recipe) -> int:
    return int(value_of(recipe, GROUP))


def _obstacle(load: Workload) -> str:
    if load.vllm is None or load.vllm_granted_tokens >= load.vllm_context_tokens:
        return ""
    if load.share_bytes <= 0:
        return (
            f"training on sequences of {load.vllm_context_tokens} tokens takes the whole card, so vLLM gets no memory"
        )
    if load.vllm_granted_tokens <= 0:
        return (
            f"a share of {load.share_bytes / GIB:.1f} GiB holds vLLM's copy of the model but no sequence, and the "
            f"longest has {load.vllm_context_tokens} tokens"
        )
    return (
        f"with a share of {load.share_bytes / GIB:.1f} GiB, vLLM accepts sequences of up to {load.vllm_granted_tokens} "
        f"tokens, but the longest has {load.vllm_context_tokens}"
    )


def _notes(load: Workload, phases: Sequence[Phase], budget_bytes: int, *, exports_on_cpu: bool) -> list[str]:
    notes = []
    if load.assumes_prompts:
        notes.append(
            f"prompts are assumed to have at most {load.prompt_tokens} tokens; data.max_prompt_tokens enforces it."
        )
    if load.vllm is not None and not _obstacle(load):
        notes.append(
            f"vLLM's cache holds {load.vllm_cache_tokens} tokens: {load.at_once('rollout')} of {load.completions} "
            "rollouts at full length, or more shorter ones. The update is predicted for transformers' layers."
        )
    if load.exports and exports_on_cpu:
        notes.append("the export runs on the CPU, in a separate process: its bar shows host memory.")
    elif load.exports and load.on_cpu and phases[-1].bytes > budget_bytes:
        notes.append(
            f"the export needs {phases[-1].bytes / GIB:.1f} GiB. Without it (--set export.format=null), the adapter is "
            "saved, and `mel-lite export RUN` merges it on a larger machine."
        )
    elif load.exports and phases[-1].bytes > budget_bytes:
        notes.append(
            f"the export loads the model in 16 bits and needs {phases[-1].bytes / GIB:.1f} GiB. After training, "
            "export on the CPU: CUDA_VISIBLE_DEVICES= mel-lite export RUN"
        )
    return notes


def apply(recipe: Recipe, made: Plan) -> Recipe:
    """Return the recipe with the chosen settings filled in."""
    chosen: dict[str, dict[str, Any]] = {"train": {}, "model": {}}
    for key, value in made.choices.items():
        section, _, name = key.partition(".")
        if section in chosen:
            chosen[section][name] = value
    model = replace(recipe.model, **chosen["model"])
    return replace(recipe, model=model, train={**recipe.train, **chosen["train"]})


def _choices(recipe: Recipe, load: Workload, search: Search, own_context: int | None) -> dict[str, Any]:
    choices = {key: value_of(recipe, key) for key in search.neutral}
    if load.pairs:
        # The workload assumes instructions of at most INSTRUCTION_TOKENS, which the user's templates may exceed.
        most = load.shape.context - load.analysis_tokens
        choices[CONTEXT] = load.context_tokens if own_context is None else min(own_context, most)
        choices["train.analysis_max_tokens"] = load.analysis_tokens
    choices |= {GROUP: value_of(recipe, GROUP), BATCH: value_of(recipe, BATCH)}
    choices["train.max_completion_length"] = load.completion_tokens
    return choices | {"data.max_prompt_tokens": load.prompt_tokens, "model.load_in_4bit": load.four_bit}


# ---- card and model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Card:
    """GPU that a plan is for."""

    preset: str
    budget_bytes: int
    """Bytes available to this process, CUDA context included."""
    whole: VLLMCard
    """The whole card, which vLLM's share refers to."""
    precision: dict[str, bool]
    """`train` options that the card decides; empty if the preset decides."""


def find_gpu(name: str, *, run_here: bool = False) -> Card:
    """Return the card of `--gpu`. For `auto`, query PyTorch for the first GPU.

    `run_here`: the plan is for a run on this machine now, so a preset's budget is capped at the free memory here.
    Raises: ConfigError for an unknown name, and for `auto` without a GPU or with one below every preset.
    """
    stated_bytes = cpu_budget_bytes(name)
    name, _ = preset_of(name)
    if name == "cpu":
        return _host(stated_bytes, run_here=run_here)
    if name in BUDGETS and not run_here:
        return _nominal_card(name)
    import torch

    if not torch.cuda.is_available():
        if name in BUDGETS:
            logger.warning(
                "--gpu %s: PyTorch sees no GPU here; `mel-lite doctor` finds out why. Use --gpu cpu to run without.",
                name,
            )
            return _nominal_card(name)
        raise ConfigError("--gpu auto: PyTorch sees no GPU here (`mel-lite doctor` says why). Name a preset instead.")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # This query created a CUDA context. Every prediction includes the context, so it is not counted twice.
    budget_bytes = min(total_bytes, free_bytes + CONTEXT_BYTES)
    if name in BUDGETS:
        return Card(name, min(BUDGETS[name], budget_bytes), VLLMCard(total_bytes, free_bytes), {})
    card = torch.cuda.get_device_name()
    presets = [preset for preset, needed in BUDGETS.items() if needed <= total_bytes]
    if not presets:
        raise ConfigError(
            f"--gpu auto: {card} has {total_bytes / GIB:.1f} GiB; the smallest preset is for "
            f"{BUDGETS['12gb'] / GIB:.1f} GiB. Name a preset and a small model: --gpu 12gb --model "
            "Qwen/Qwen3-0.6B-Base."
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = {"bf16": bf16, "fp16": not bf16}
    return Card(presets[-1], budget_bytes, VLLMCard(total_bytes, free_bytes), precision)


def _host(stated_bytes: int | None, *, run_here: bool) -> Card:
    """Return the memory of a run on the CPU: what is stated (`cpu-4gb`), at most what is free here or, else, all."""
    import psutil

    memory = psutil.virtual_memory()
    budget_bytes = int(memory.available if run_here or stated_bytes is None else memory.total)
    if stated_bytes is not None:
        budget_bytes = min(stated_bytes, budget_bytes) if run_here else stated_bytes
    if run_here:
        budget_bytes //= distributed.world()
    return Card("cpu", budget_bytes, VLLMCard(budget_bytes, budget_bytes), {})


def _nominal_card(preset: str) -> Card:
    """Return the smallest card of a preset's class, with all of its memory free."""
    budget_bytes = BUDGETS[preset]
    return Card(preset, budget_bytes, VLLMCard(budget_bytes, budget_bytes - CONTEXT_BYTES), {})


def plan_for(
    gpu: str, config: Path | None, overrides: Sequence[tuple[str, Any]], *, run_here: bool = False
) -> tuple[Recipe, Plan | None, str]:
    """Resolve a recipe for a card and plan it. Keys set in the file or the overrides are kept.

    `run_here` as in `find_gpu`. A plan for another machine assumes that the extra `gpu` is installed there.

    Returns: the recipe with the chosen settings, its plan or None, and the reason if there is no plan.
    Raises: ConfigError like `find_gpu`, `recipe.resolve`, `choose_engine` and `plan`.
    """
    card = find_gpu(gpu, run_here=run_here)
    pinned = {key for key, _ in overrides} | (keys_of(config) if config is not None else set())
    precision = _precision(card, config, overrides)
    recipe = resolve(preset=card.preset, config=config, overrides=[*precision, *overrides])
    _check_options(recipe)
    on_cpu = card.preset == "cpu"
    if on_cpu and recipe.lora is None:
        return recipe, None, "lora=null: memory is predicted for LoRA only"
    try:
        shape = shape_for(recipe)
    except ModelError as reason:
        return recipe, None, str(reason)
    machine = this_machine(distributed.world()) if run_here or gpu == "auto" else None
    if on_cpu:
        machine = Machine(None, frozenset(), distributed.world())
    engine = planned_engine(recipe.model, recipe.lora, machine)
    check_engine(engine, recipe)
    check_length(engine, recipe.model, workload(recipe, shape).longest_sampled)
    made = plan(recipe, shape, gpu=gpu, pinned=pinned, engine=engine, budget_bytes=card.budget_bytes, card=card.whole)
    return apply(recipe, made), made, ""


def _precision(card: Card, config: Path | None, overrides: Sequence[tuple[str, Any]]) -> list[tuple[str, bool]]:
    """Return bf16 and fp16 where the user did not set them. Requesting one disables the other."""
    keys = ("train.bf16", "train.fp16")
    user = {key: dict(overrides).get(key, value_in(config, key)) for key in keys}
    chosen = {key: card.precision.get(key.removeprefix("train.")) for key in keys}
    for key, other in (keys, keys[::-1]):
        chosen[other] = False if user[key] is True else chosen[other]
    return [(key, value) for key, value in chosen.items() if value is not None and user[key] is None]


def _check_options(recipe: Recipe) -> None:
    """Raise ConfigError for options that a run would refuse on any machine."""
    if recipe.train.get("bf16") and recipe.train.get("fp16"):
        raise ConfigError(
            "train.bf16=true and train.fp16=true: training can use only one of them. Set train.bf16=false or "
            "train.fp16=false."
        )
    if recipe.lora is not None:
        lora_config(recipe.lora)


def shape_for(recipe: Recipe) -> Shape:
    """Return the sizes of a recipe's model, from the table of well-known models or else from its config.

    Raises: ModelError if the config cannot be loaded or describes an unsupported architecture.
    """
    if (known := formulas.known_shape(recipe.model.name)) is not None:
        return known
    from mel_lite.models.load import load_config

    config = load_config(recipe.model)
    return formulas.shape_of(config.get_text_config().to_dict())
