"""Will it fit? The settings that keep every phase of a recipe under a card's memory, and what to change where none do.

Settings that leave the result of a step as it is (tokens at once, concurrency, vLLM's share, checkpointing, the
optimiser's storage) are chosen unless the user set them. Of what changes the method, an open length of C_retro is
shortened and, last of all, groups are halved; other lengths, model and rank are only ever advised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.engines import distributed
from mel_lite.engines.choice import EngineChoice, check_engine, check_length, planned_engine, this_machine
from mel_lite.errors import ConfigError, ModelError
from mel_lite.memory import formulas
from mel_lite.memory.formulas import CONTEXT_BYTES, GIB, Shape
from mel_lite.memory.predict import Phase, predict
from mel_lite.memory.search import BATCH, GROUP, Search, value_of
from mel_lite.memory.workload import PROMPT_TOKENS, VLLMCard, Workload, workload
from mel_lite.models.adapters import lora_config
from mel_lite.recipe import Recipe, keys_of, resolve, value_in
from mel_lite.text import suggest

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

TARGET_SHARE = 0.95
"""Settings are chosen to stay below this share of a card, since predictions are not exact."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's predicted memory on one card."""

    model: str
    gpu: str
    engine: EngineChoice
    """What samples."""
    budget_bytes: int
    phases: tuple[Phase, ...]
    """In the order of a run. The export is listed but not part of the peak: it can run on the CPU, later."""
    choices: dict[str, Any]
    """Settings the prediction is for, by recipe key."""
    advice: tuple[str, ...] = ()
    """Each one change that would make it fit, as options of the command line."""
    notes: tuple[str, ...] = ()
    obstacle: str = ""
    """Why it cannot run whatever the peaks are; empty where it can."""

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
        """True when the peak is within the budget, and vLLM could start."""
        return self.peak_bytes <= self.budget_bytes and not self.obstacle

    def to_json(self) -> str:
        """`fits, budget_bytes, peak_bytes, phases: [{name, bytes, parts}], choices`, and more, as a JSON object."""
        head = {"fits": self.fits, "budget_bytes": self.budget_bytes, "peak_bytes": self.peak_bytes}
        return json.dumps({"model": self.model, "gpu": self.gpu, **head, **_tail(asdict(self))}, indent=1)

    @property
    def peak(self) -> str:
        """The highest peak and its phase, for people."""
        return f"{self.peak_bytes / GIB:.1f} GiB ({self.worst.name})"

    def refusal(self) -> str:
        """Why it does not fit, and what to change."""
        peak, budget = f"{self.peak_bytes / GIB:.1f} GiB", f"{self.budget_bytes / GIB:.1f} GiB"
        reason = self.obstacle or f"the {self.worst.name} phase needs {peak}, the card gives {budget}"
        what = f"{self.model} does not fit {self.gpu}: {reason}. "
        if self.advice:
            return what + "Any one of these fits:\n  " + "\n  ".join(self.advice)
        return what + "No single change mends that. Use a smaller model (--model) or a larger card (--gpu)."

    def view(self) -> Group:
        """A bar per phase, the settings, and what to know."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        title = f"[bold]predicted GPU memory: {escape(self.model)} on {self.gpu}, {self.engine.title}[/]"
        table = Table(show_header=False, box=None)
        scale = max(self.budget_bytes, *(phase.bytes for phase in self.phases))
        for phase in self.phases:
            inside = phase.bytes <= self.budget_bytes
            if phase.name == "export" and self.engine.engine == "unsloth":
                inside = True  # it is the host's memory
            colour = "green" if inside else ("yellow" if phase.name == "export" else "red")
            bar = "█" * max(1, round(40 * phase.bytes / scale))
            table.add_row(phase.name, f"[{colour}]{bar}[/]", f"{phase.bytes / GIB:.1f} GiB")
        table.add_row("card", "─" * round(40 * self.budget_bytes / scale), f"{self.budget_bytes / GIB:.1f} GiB")
        settings = "  ".join(f"{key.partition('.')[2] or key}={value}" for key, value in self.choices.items())
        return Group(title, table, f"[dim]{settings}[/]", *(f"[yellow]note:[/] {note}" for note in self.notes))


def _tail(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("engine", "phases", "choices", "advice", "notes", "obstacle")}


# ---- choosing --------------------------------------------------------------------------------------------------------


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
    """Choose the settings for a card and predict every phase under them.

    Keys in `pinned` (such as `train.optim`) stay as the recipe has them. Where nothing fits, the plan is that of the
    smallest settings, with advice.

    Args:
        engine: What samples; None = transformers.
        card: The whole card, of which vLLM's share is counted; None = one that is the budget, and free.
    Raises: ConfigError where the recipe cannot be predicted.
    """
    engine = engine or EngineChoice("hf", False, "what a plan is for unless told otherwise")
    card = card or VLLMCard(budget_bytes, budget_bytes - CONTEXT_BYTES)
    most = Search(shape, budget_bytes, frozenset(pinned), card if engine.vllm else None)
    likely = replace(most, budget_bytes=int(TARGET_SHARE * budget_bytes))
    searches = (likely, most, replace(likely, halves_groups=True), replace(most, halves_groups=True))
    chosen = next(filter(None, (search.fitting(recipe) for search in searches)), None)
    with_transformers: tuple[str, ...] = ()
    if engine.vllm and (chosen is None or _group(chosen) != _group(recipe)):
        alone = replace(most, vllm_on=None).fitting(recipe)
        with_transformers = () if alone is None else ("--engine hf",)
    advice: tuple[str, ...] = ()
    if chosen is None:
        advice = (*likely.released(recipe), *with_transformers, *likely.advice(recipe))
        chosen = likely.smallest(recipe)
    load = most.workload(chosen)
    phases = predict(load)
    notes = _notes(load, phases, budget_bytes, exports_on_cpu=engine.engine == "unsloth")
    if _group(chosen) != _group(recipe):
        other = f", but for {with_transformers[0]}" if with_transformers else ""
        notes.append(
            f"groups have {_group(chosen)} completions, not {_group(recipe)}: nothing else fits{other}. "
            f"--set {GROUP}=... decides."
        )
    told = tuple(notes), _obstacle(load)
    return Plan(recipe.model.name, gpu, engine, budget_bytes, phases, _choices(chosen, load, most), advice, *told)


def _group(recipe: Recipe) -> int:
    return int(value_of(recipe, GROUP))


def _obstacle(load: Workload) -> str:
    if load.vllm is None or load.vllm_granted_tokens >= load.vllm_context_tokens:
        return ""
    return (
        f"with a share of {load.share_bytes / GIB:.1f} GiB vLLM makes room for sequences of {load.vllm_granted_tokens} "
        f"tokens, and the longest has {load.vllm_context_tokens}"
    )


def _notes(load: Workload, phases: Sequence[Phase], budget_bytes: int, *, exports_on_cpu: bool) -> list[str]:
    notes = []
    if load.assumes_prompts:
        notes.append(f"prompts are taken to have at most {PROMPT_TOKENS} tokens; data.max_prompt_tokens makes it so.")
    if load.vllm is not None and not _obstacle(load):
        notes.append(
            f"vLLM's cache holds {load.vllm_cache_tokens} tokens: {load.at_once('rollout')} of {load.completions} "
            "rollouts at full length, more of shorter ones. The update is predicted for transformers' layers."
        )
    if load.exports and exports_on_cpu:
        notes.append("the export runs on the CPU, in a process of its own: its bar is the host's memory.")
    elif load.exports and phases[-1].bytes > budget_bytes:
        notes.append(
            f"the export, which has the model in 16 bits, needs {phases[-1].bytes / GIB:.1f} GiB. After training, "
            "export on the CPU: CUDA_VISIBLE_DEVICES= mel-lite export RUN"
        )
    return notes


def apply(recipe: Recipe, made: Plan) -> Recipe:
    """The recipe with the chosen settings in it."""
    chosen: dict[str, dict[str, Any]] = {"train": {}, "model": {}}
    for key, value in made.choices.items():
        section, _, name = key.partition(".")
        if section in chosen:
            chosen[section][name] = value
    model = replace(recipe.model, **chosen["model"])
    return replace(recipe, model=model, train={**recipe.train, **chosen["train"]})


def _choices(recipe: Recipe, load: Workload, search: Search) -> dict[str, Any]:
    choices = {key: value_of(recipe, key) for key in search.neutral}
    if load.pairs:
        choices["train.max_context_tokens"] = load.context_tokens
        choices["train.analysis_max_tokens"] = load.analysis_tokens
    choices |= {GROUP: value_of(recipe, GROUP), BATCH: value_of(recipe, BATCH)}
    choices["train.max_completion_length"] = load.completion_tokens
    return choices | {"data.max_prompt_tokens": load.prompt_tokens, "model.load_in_4bit": load.four_bit}


# ---- which card, which model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU that is planned for."""

    preset: str
    budget_bytes: int
    """What it gives this process, its CUDA context included."""
    whole: VLLMCard
    """All of its memory, of which vLLM's share is counted."""
    precision: dict[str, bool]
    """Options of `train` that it decides; empty where the preset does."""


def find_gpu(name: str, *, run_here: bool = False) -> Card:
    """The card of `--gpu`; `auto` asks PyTorch about the first one.

    `run_here`: the plan is for a run on this machine now, so that a preset gets no more than the card here has free.
    Raises: ConfigError for an unknown name, for `cpu`, and for `auto` without a GPU or with one below every preset.
    """
    if name == "cpu":
        raise ConfigError(f"--gpu cpu: there is no GPU memory to plan. Name one of {', '.join(BUDGETS)} or auto.")
    if name != "auto" and name not in BUDGETS:
        raise ConfigError(f"--gpu {name!r} is no preset.{suggest(name, [*BUDGETS, 'auto', 'cpu'])}")
    if name in BUDGETS and not run_here:
        return _elsewhere(name)
    import torch

    if not torch.cuda.is_available():
        if name in BUDGETS:
            return _elsewhere(name)
        raise ConfigError("--gpu auto: PyTorch sees no GPU here (`mel-lite doctor` says why). Name a preset instead.")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # The context this question made is part of every prediction, so it is not counted twice.
    budget_bytes = min(total_bytes, free_bytes + CONTEXT_BYTES)
    if name in BUDGETS:
        return Card(name, min(BUDGETS[name], budget_bytes), VLLMCard(total_bytes, free_bytes), {})
    card = torch.cuda.get_device_name()
    presets = [preset for preset, needed in BUDGETS.items() if needed <= total_bytes]
    if not presets:
        raise ConfigError(
            f"--gpu auto: {card} has {total_bytes / GIB:.1f} GiB; the smallest preset is for "
            f"{BUDGETS['12gb'] / GIB:.1f}. Name a preset and a small model: --gpu 12gb --model Qwen/Qwen3-0.6B-Base."
        )
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = {"bf16": bf16, "fp16": not bf16}
    return Card(presets[-1], budget_bytes, VLLMCard(total_bytes, free_bytes), precision)


def _elsewhere(preset: str) -> Card:
    budget_bytes = BUDGETS[preset]
    return Card(preset, budget_bytes, VLLMCard(budget_bytes, budget_bytes - CONTEXT_BYTES), {})


def plan_for(
    gpu: str, config: Path | None, overrides: Sequence[tuple[str, Any]], *, run_here: bool = False
) -> tuple[Recipe, Plan | None, str]:
    """Resolve a recipe for a card and plan it; what the file and the overrides set is not chosen anew.

    `run_here` as in `find_gpu`. A plan for another machine takes it that `mel-lite[gpu]` is installed there.

    Returns: the recipe with the chosen settings in it, its plan, and, where there is no plan, the reason.
    Raises: ConfigError as `find_gpu`, `presets.resolve`, `choose_engine` and `plan`.
    """
    card = find_gpu(gpu, run_here=run_here)
    pinned = {key for key, _ in overrides} | (keys_of(config) if config is not None else set())
    precision = _precision(card, config, overrides)
    recipe = resolve(preset=card.preset, config=config, overrides=[*precision, *overrides])
    _check_options(recipe)
    try:
        shape = shape_for(recipe)
    except ModelError as reason:
        return recipe, None, str(reason)
    here = run_here or gpu == "auto"
    engine = planned_engine(recipe.model, recipe.lora, this_machine(distributed.world()) if here else None)
    check_engine(engine, recipe)
    check_length(engine, recipe.model, workload(recipe, shape).longest_sampled)
    made = plan(recipe, shape, gpu=gpu, pinned=pinned, engine=engine, budget_bytes=card.budget_bytes, card=card.whole)
    return apply(recipe, made), made, ""


def _precision(card: Card, config: Path | None, overrides: Sequence[tuple[str, Any]]) -> list[tuple[str, bool]]:
    """What the card computes in, where that is open; the one that is asked for puts out the other."""
    keys = ("train.bf16", "train.fp16")
    given = {key: dict(overrides).get(key, value_in(config, key)) for key in keys}
    found = {key: card.precision.get(key.removeprefix("train.")) for key in keys}
    for key, other in (keys, keys[::-1]):
        found[other] = False if given[key] is True else found[other]
    return [(key, value) for key, value in found.items() if value is not None and given[key] is None]


def _check_options(recipe: Recipe) -> None:
    """Raises: ConfigError for what a run would be refused for, whatever the machine."""
    if recipe.train.get("bf16") and recipe.train.get("fp16"):
        raise ConfigError(
            "train.bf16=true and train.fp16=true: training computes in one of the two. Set train.bf16=false or "
            "train.fp16=false."
        )
    if recipe.lora is not None:
        lora_config(recipe.lora)


def shape_for(recipe: Recipe) -> Shape:
    """Sizes of a recipe's model: from the table of well-known ones, else from its config.

    Raises: ModelError when the config cannot be reached, or describes another kind of model.
    """
    if (known := formulas.known_shape(recipe.model.name)) is not None:
        return known
    from mel_lite.models.load import load_config

    config = load_config(recipe.model)
    return formulas.shape_of(config.get_text_config().to_dict())
