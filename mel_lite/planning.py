"""Will it fit? The settings that keep every phase of a recipe under a card's memory, and what to change where none do.

Settings that leave the result of a step as it is (tokens at once, concurrency, checkpointing, the optimiser's storage)
are chosen here unless the user set them. What changes the method (lengths, model, rank) is only ever advised.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite import memory
from mel_lite.errors import ConfigError, ModelError
from mel_lite.memory import CONTEXT_BYTES, GIB, Shape
from mel_lite.presets import Recipe, keys_of, resolve, suggest
from mel_lite.workload import DEFAULTS, PROMPT_TOKENS, Phase, Workload, option_of, predict, with_lessons, workload

if TYPE_CHECKING:
    from rich.console import Group

BUDGETS = {
    "12gb": int(11.6 * GIB),
    "16gb": int(14.5 * GIB),
    "24gb": int(22.0 * GIB),
    "40gb": int(39.3 * GIB),
    "80gb": int(79.0 * GIB),
}
"""Bytes the smallest card of each class gives a process, as PyTorch reports them: RTX 3060; T4; A10G and L4 (error
correction takes its part); A100-40; A100-80."""

MOST_TOKENS = 16384
"""More at once keep a GPU no busier."""
TOKEN_STEP = 1024
TARGET_SHARE = 0.95
"""Settings are chosen to stay below this share of a card, since predictions are not exact."""
TOKENS, CACHE = "train.max_micro_batch_tokens", "train.max_cache_tokens"
CHECKPOINTING, OPTIM = "train.gradient_checkpointing", "train.optim"
NEUTRAL = (TOKENS, CACHE, CHECKPOINTING, OPTIM)
"""What is chosen freely: the result of a step does not depend on it (8-bit moments: by rounding only)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's predicted memory on one card."""

    model: str
    gpu: str
    budget_bytes: int
    phases: tuple[Phase, ...]
    """In the order of a run. The export is listed but not part of the peak: it can run on the CPU, later."""
    choices: dict[str, Any]
    """Settings the prediction is for, by recipe key."""
    advice: tuple[str, ...] = ()
    """Each one change that would make it fit, as options of the command line."""
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Phase:
        """The phase with the highest peak; the export does not count."""
        return max((phase for phase in self.phases if phase.name != "export"), key=lambda phase: phase.bytes)

    @property
    def peak_bytes(self) -> int:
        """Highest of all phases but the export."""
        return self.worst.bytes

    @property
    def fits(self) -> bool:
        """True when the peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_json(self) -> str:
        """`fits, budget_bytes, peak_bytes, phases: [{name, bytes, parts}], choices`, and more, as a JSON object."""
        head = {"fits": self.fits, "budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        return json.dumps({"model": self.model, "gpu": self.gpu, **head, **_tail(asdict(self))}, indent=1)

    def header(self) -> str:
        """What the file of a preset says of its memory, as comment lines."""
        peak, budget = f"{self.peak_bytes / GIB:.1f} GiB ({self.worst.name})", f"{self.budget_bytes / GIB:.1f} GiB"
        return (
            f"# Peak memory: {peak} of the {budget} such a card gives, predicted by\n"
            f"# `mel-lite plan --gpu {self.gpu}`; measured: not yet."
        )

    def refusal(self) -> str:
        """Why it does not fit, and what to change."""
        what = (
            f"{self.model} does not fit {self.gpu}: the {self.worst.name} phase needs {self.peak_bytes / GIB:.1f} GiB, "
            f"the card gives {self.budget_bytes / GIB:.1f} GiB. "
        )
        if self.advice:
            return what + "Any one of these fits:\n  " + "\n  ".join(self.advice)
        return what + "No single change mends that. Use a smaller model (--model) or a larger card (--gpu)."

    def view(self) -> Group:
        """A bar per phase, the settings, and what to know."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.gpu}: predicted GPU memory", show_header=False, box=None)
        scale = max(self.budget_bytes, *(phase.bytes for phase in self.phases))
        for phase in self.phases:
            inside = phase.bytes <= self.budget_bytes
            colour = "green" if inside else ("yellow" if phase.name == "export" else "red")
            bar = "█" * max(1, round(40 * phase.bytes / scale))
            table.add_row(phase.name, f"[{colour}]{bar}[/]", f"{phase.bytes / GIB:.1f} GiB")
        table.add_row("card", "─" * round(40 * self.budget_bytes / scale), f"{self.budget_bytes / GIB:.1f} GiB")
        settings = "  ".join(f"{key.partition('.')[2] or key}={value}" for key, value in self.choices.items())
        return Group(table, f"[dim]{settings}[/]", *(f"[yellow]note:[/] {note}" for note in self.notes))


def _tail(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("phases", "choices", "advice", "notes")}


# ---- choosing --------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, shape: Shape, *, gpu: str, budget_bytes: int, pinned: Iterable[str] = ()) -> Plan:
    """Choose the neutral settings for a card and predict every phase under them.

    Keys in `pinned` (such as `train.optim`) stay as the recipe has them. Where nothing fits, the plan is that of the
    smallest settings, with advice.

    Raises: ConfigError where the recipe cannot be predicted.
    """
    fixed, target_bytes = frozenset(pinned), int(TARGET_SHARE * budget_bytes)
    chosen = _fitting(recipe, shape, target_bytes, fixed) or _fitting(recipe, shape, budget_bytes, fixed)
    advice: tuple[str, ...] = ()
    if chosen is None:
        advice = tuple(_advice(recipe, shape, target_bytes, fixed))
        chosen = _smallest(recipe, shape, fixed)
    load = workload(chosen, shape)
    phases = predict(load)
    notes = []
    if recipe.data.max_prompt_tokens is None:
        notes.append(f"prompts are taken to have at most {PROMPT_TOKENS} tokens; data.max_prompt_tokens makes it so.")
    if load.exports and phases[-1].bytes > budget_bytes:
        notes.append(
            f"the export, which has the model in 16 bits, needs {phases[-1].bytes / GIB:.1f} GiB. After training, "
            "export on the CPU: CUDA_VISIBLE_DEVICES= mel-lite export RUN"
        )
    return Plan(recipe.model.name, gpu, budget_bytes, phases, _choices(chosen, load), advice, tuple(notes))


def apply(recipe: Recipe, made: Plan) -> Recipe:
    """The recipe with the chosen settings of `train` in it."""
    chosen = {key.partition(".")[2]: value for key, value in made.choices.items() if key.startswith("train.")}
    return replace(recipe, train={**recipe.train, **chosen})


def _choices(recipe: Recipe, load: Workload) -> dict[str, Any]:
    option = {key: option_of(recipe, key) for key in DEFAULTS}
    choices = {key: option[key.partition(".")[2]] for key in NEUTRAL}
    if load.pairs:
        choices["train.max_context_tokens"] = load.context_tokens
        choices["train.analysis_max_tokens"] = load.analysis_tokens
    choices["train.num_generations"] = option["num_generations"]
    choices["train.max_completion_length"] = load.completion_tokens
    return choices | {"data.max_prompt_tokens": load.prompt_tokens, "model.load_in_4bit": load.four_bit}


def _with(recipe: Recipe, **train: Any) -> Recipe:
    return replace(recipe, train={**recipe.train, **train})


def _fitting(recipe: Recipe, shape: Shape, budget_bytes: int, pinned: frozenset[str]) -> Recipe | None:
    """The first of the settings, best first, whose every phase but the export is within the budget."""

    def trains(sized: Recipe) -> bool:
        peaks = {phase.name: phase.bytes for phase in predict(workload(sized, shape))}
        return max(peaks[name] for name in ("load", "update", "optimiser")) <= budget_bytes

    for candidate in _storage(recipe, shape, pinned):
        sizes = _micro_batches(candidate, shape, pinned)
        # More tokens take more memory, so the largest micro-batch that fits is found by halving.
        first = bisect.bisect_left(sizes, True, key=trains)
        if first < len(sizes) and (whole := _concurrency(sizes[first], shape, budget_bytes, pinned)) is not None:
            return whole
    return None


def _storage(recipe: Recipe, shape: Shape, pinned: frozenset[str]) -> Iterator[Recipe]:
    """The recipe, then with less to store: shorter C_retro where its length is open, checkpointing, 8-bit moments."""
    option = {key: option_of(recipe, key) for key in DEFAULTS}
    full = workload(recipe, shape).context_tokens
    contexts: list[int] = [full]
    if option["max_context_tokens"] is None and with_lessons(recipe):
        contexts += [tokens for tokens in range(full - full % 512, 1535, -512) if tokens < full]
    checkpointings = {bool(option["gradient_checkpointing"]): None, True: None}
    optimisers = {str(option["optim"]): None, "paged_adamw_8bit": None}
    for context in contexts:
        for checkpointing in [option["gradient_checkpointing"]] if CHECKPOINTING in pinned else checkpointings:
            for optim in [option["optim"]] if OPTIM in pinned else optimisers:
                yield _with(recipe, max_context_tokens=context, gradient_checkpointing=checkpointing, optim=optim)


def _micro_batches(recipe: Recipe, shape: Shape, pinned: frozenset[str]) -> list[Recipe]:
    """The recipe with ever fewer tokens going forward and backward at once, down to the longest row."""
    if TOKENS in pinned:
        return [recipe]
    load = workload(recipe, shape)
    longest = max(load.rollout_tokens, load.lesson_tokens if load.pairs else 0)
    most = max(longest, min(MOST_TOKENS, load.micro_batch_tokens))
    sizes = [*range(most, longest, -TOKEN_STEP), longest]
    return [_with(recipe, max_micro_batch_tokens=size) for size in sizes]


def _concurrency(recipe: Recipe, shape: Shape, budget_bytes: int, pinned: frozenset[str]) -> Recipe | None:
    """The most tokens in the cache that fit, less what saves no round of sampling; None when no sequence fits."""
    load = workload(recipe, shape)

    def fits(tokens: int | None) -> bool:
        phases = predict(replace(load, max_cache_tokens=tokens))
        return all(phase.bytes <= budget_bytes for phase in phases if phase.name != "export")

    if CACHE in pinned:
        return recipe if fits(load.max_cache_tokens) else None
    lengths = {name: prompt + new for name, (_, prompt, new) in load.sampled.items()}
    sizes = {n * length for name, length in lengths.items() for n in range(1, load.sampled[name][0] + 1)}
    most = next((tokens for tokens in sorted(sizes, reverse=True) if fits(tokens)), None)
    if most is None:
        return None
    full = replace(load, max_cache_tokens=most)
    needed = []
    for name, length in lengths.items():
        rounds = math.ceil(load.sampled[name][0] / full.at_once(name))
        needed.append(math.ceil(load.sampled[name][0] / rounds) * length)
    return _with(recipe, max_cache_tokens=min(most, max(needed)))


def _smallest(recipe: Recipe, shape: Shape, pinned: frozenset[str]) -> Recipe:
    storage = list(_storage(recipe, shape, pinned))[-1]
    smallest = _micro_batches(storage, shape, pinned)[-1]
    if CACHE in pinned:
        return smallest
    longest = max(prompt + new for _, prompt, new in workload(smallest, shape).sampled.values())
    return _with(smallest, max_cache_tokens=longest)


def _advice(recipe: Recipe, shape: Shape, budget_bytes: int, pinned: frozenset[str]) -> Iterator[str]:
    """Single changes that make it fit, mildest first."""

    def fits(changed: Recipe, held: frozenset[str], of: Shape = shape) -> bool:
        return _fitting(changed, of, budget_bytes, held) is not None

    for key in NEUTRAL:
        freed = _fitting(recipe, shape, budget_bytes, pinned - {key}) if key in pinned else None
        if freed is not None:
            yield f"--set {key}={option_of(freed, key.partition('.')[2])}"
    load = workload(recipe, shape)
    if load.measures_gradients and fits(_with(recipe, grad_norm_every=0), pinned):
        yield "--set train.grad_norm_every=0"
    if load.pairs:
        contexts = range(load.context_tokens - load.context_tokens % 512, 1023, -512)
        shorter = next((n for n in contexts if fits(_with(recipe, max_context_tokens=n), pinned)), None)
        if shorter:
            yield f"--set train.max_context_tokens={shorter}"
    lengths = (load.completion_tokens >> halvings for halvings in range(1, 12))
    short = next((n for n in lengths if n >= 256 and fits(_with(recipe, max_completion_length=n), pinned)), None)
    if short:
        yield f"--set train.max_completion_length={short}"
    if not load.four_bit and fits(replace(recipe, model=replace(recipe.model, load_in_4bit=True)), pinned):
        yield "--set model.load_in_4bit=true"
    smaller = sorted(memory.KNOWN.items(), key=lambda item: -memory.linear_parameters(item[1]))
    family, base = recipe.model.name.partition("-")[0], "-Base" if recipe.model.name.endswith("-Base") else ""
    for name, other in smaller:
        less = memory.linear_parameters(other) < memory.linear_parameters(shape)
        if name.startswith(f"{family}-") and less and fits(recipe, pinned, other):
            yield f"--model {name}{base}"
            break


# ---- which card, which model -----------------------------------------------------------------------------------------


def find_gpu(name: str) -> tuple[str, int, dict[str, bool]]:
    """(preset, budget in bytes, precision options) of `--gpu`; `auto` asks PyTorch about the first card.

    The precision is that of the card, and empty where the preset decides.
    Raises: ConfigError for an unknown name, for `cpu`, and for `auto` without a GPU or with one below every preset.
    """
    if name in BUDGETS:
        return name, BUDGETS[name], {}
    if name == "cpu":
        raise ConfigError(f"--gpu cpu: there is no GPU memory to plan. Name one of {', '.join(BUDGETS)} or auto.")
    if name != "auto":
        raise ConfigError(f"--gpu {name!r} is no preset{suggest(name, [*BUDGETS, 'auto', 'cpu'])}")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--gpu auto: PyTorch sees no GPU here (`mel-lite doctor` says why). Name a preset instead.")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # The context this question made is part of every prediction, so it is not counted twice.
    budget_bytes = min(total_bytes, free_bytes + CONTEXT_BYTES)
    card = torch.cuda.get_device_name()
    presets = [preset for preset, needed in BUDGETS.items() if needed <= total_bytes]
    if not presets:
        raise ConfigError(
            f"--gpu auto: {card} has {total_bytes / GIB:.1f} GiB; the smallest preset is for "
            f"{BUDGETS['12gb'] / GIB:.1f}. Name a preset and a small model: --gpu 12gb --model Qwen/Qwen3-0.6B-Base."
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return presets[-1], budget_bytes, {"bf16": bf16, "fp16": not bf16}


def plan_for(gpu: str, config: Path | None, overrides: Sequence[tuple[str, Any]]) -> tuple[Recipe, Plan | None, str]:
    """Resolve a recipe for a card and plan it; what the file and the overrides set is not chosen anew.

    Returns: the recipe with the chosen settings in it, its plan, and, where there is no plan, the reason.
    Raises: ConfigError as `find_gpu`, `presets.resolve` and `plan`.
    """
    preset, budget_bytes, precision = find_gpu(gpu)
    pinned = {key for key, _ in overrides} | (keys_of(config) if config is not None else set())
    detected = [(f"train.{name}", value) for name, value in precision.items() if f"train.{name}" not in pinned]
    recipe = resolve(preset=preset, config=config, overrides=[*detected, *overrides])
    try:
        shape = shape_for(recipe)
    except ModelError as reason:
        return recipe, None, str(reason)
    made = plan(recipe, shape, gpu=gpu, budget_bytes=budget_bytes, pinned=pinned)
    return apply(recipe, made), made, ""


def shape_for(recipe: Recipe) -> Shape:
    """Sizes of a recipe's model: from the table of well-known ones, else from its config.

    Raises: ModelError when the config cannot be reached, or describes another kind of model.
    """
    if (known := memory.known_shape(recipe.model.name)) is not None:
        return known
    from mel_lite.models import load_config

    config = load_config(recipe.model)
    return memory.shape_of(config.get_text_config().to_dict())
