"""Recipes: the options of a run, resolved from a preset, a YAML file and flags."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mel_lite.errors import ConfigError
from mel_lite.gpus import GPU_PRESETS, preset_of
from mel_lite.models.adapters import LoraSpec
from mel_lite.models.load import ModelSpec
from mel_lite.models.origin import DEMO
from mel_lite.text import suggest

logger = logging.getLogger(__name__)

PACKAGED = ("bank",)
"""Recipes that `--config` takes by name: files in `mel_lite/configs/` that change a preset's method."""
GgufType = Literal["f16", "q8_0", "q4_k_m"]
"""Types by llama.cpp's names. Its converter writes the first two; `llama-quantize` creates the third from an f16."""
MergedDtype = Literal["auto", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Tasks to train and evaluate on. A spec is `demo`, a file, a Hub id, or `reasoning-gym:<task>`."""

    train: str = "demo"
    """Spec of the training tasks."""
    eval: str | None = None
    """Spec of the evaluation's tasks; None = no evaluation. `held-out`: a tenth of the training tasks, at most
    `eval.limit` (unset: 100), which are then not trained on; none if there are fewer than 100. The choice depends on
    the questions alone."""
    split: str | None = None
    """Split of `train`; None = its training split."""
    eval_split: str | None = None
    """Split of `eval`; None = its training split."""
    limit: int | None = None
    """Number of training tasks to use, from the first on; None = all."""
    max_prompt_tokens: int | None = None
    """Longest training prompt; longer ones are left out. None = what leaves room for a completion in the context."""
    prompt_column: str | None = None
    """Column of the question; None = by its usual names."""
    answer_column: str | None = None
    """Column of the reference answer; None = by its usual names."""
    system_prompt: str | None = None
    """System message before each task."""
    conversational: bool | None = None
    """Turn plain questions into a user turn; None = when the tokenizer has a chat template."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Evaluation on the held-out tasks, before and after training."""

    limit: int | None = None
    """Number of held-out tasks to use, from the first on; None = all."""
    k: int = 8
    """Samples per task for Avg@k and Pass@k."""
    temperature: float = 0.6
    """Temperature of those samples."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None = `train.max_completion_length`."""
    with_lessons: bool = False
    """After training, put the run's kept lessons that match a question into its prompt, as `mel-lite eval
    --with-lessons` does."""
    every_steps: int | None = None
    """Also evaluate after every this many optimizer steps, for the curves of `report` and `compare`; None = only before
    and after training."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Model to write after training, in addition to the adapter."""

    format: Literal["merged-16bit"] | GgufType | None = "merged-16bit"
    """`merged-16bit`; a GGUF type, where llama.cpp's tools are installed; or null for the adapter alone."""
    dtype: MergedDtype = "auto"
    """Dtype of the merged weights. `auto`: the base checkpoint's own 16-bit type, or for a float32 checkpoint whose
    weights fit its range, float16."""


SECTIONS = {"model": ModelSpec, "lora": LoraSpec, "data": DataOptions, "eval": EvalOptions, "export": ExportOptions}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Options of a run. `train` holds MELConfig options, which are checked when the MELConfig is built."""

    model: ModelSpec
    lora: LoraSpec | None
    data: DataOptions
    eval: EvalOptions
    export: ExportOptions
    train: dict[str, Any] = field(default_factory=dict)

    def as_yaml(self) -> str:
        """Return the recipe as YAML, from which `--config` reads an equal recipe."""
        sections: dict[str, Any] = {
            name: None if getattr(self, name) is None else _plain(getattr(self, name)) for name in SECTIONS
        }
        return yaml.safe_dump({**sections, "train": self.train}, sort_keys=False)


def _plain(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in fields(section)}


def resolve(
    *, preset: str | None = None, config: Path | None = None, overrides: Sequence[tuple[str, Any]] = ()
) -> Recipe:
    """Return the recipe of a preset, then a file, then overrides (`a.b`, value); later values win.

    `a.b.c` overrides one option of the mapping `a.b`, such as `train.internalisation_options.context`.

    Raises: ConfigError for an unknown preset, section or key (with the nearest known one), or a value of a wrong type.
    """
    values: dict[str, Any] = {name: {} for name in [*SECTIONS, "train"]}
    if preset is not None:
        _merge(values, _load_preset(preset), f"preset {preset}")
    if config is not None:
        _merge(values, _load_yaml(config), str(config))
    for dotted, value in overrides:
        section, dot, path = dotted.partition(".")
        if not dot:
            raise ConfigError(f"--set {dotted}={value}: write section.key=value, e.g. --set train.learning_rate=1e-5.")
        key, *inner = path.split(".")
        held = (values.get(section) or {}).get(key)
        _merge(values, {section: {key: _replaced(held, inner, value, f"{section}.{key}")}}, f"--set {dotted}")
    if "name" not in values["model"]:
        raise ConfigError("No model is named. Use --gpu, --model, or set model.name in the --config file.")
    written = {key for key, _ in overrides}
    written |= {key for key in ("lora.start_from", "train.templates") if value_in(config, key) is not None}
    lora, name = values["lora"] or {}, values["model"]["name"]
    if lora.get("start_from") == DEMO and name != DEMO and "lora.start_from" not in written:
        logger.warning("The preset's adapter fits only the demo model, so %s starts without it.", name)
        values["lora"] = {**lora, "start_from": None}
    if values["train"].get("templates") == DEMO and name != DEMO and "train.templates" not in written:
        del values["train"]["templates"]  # only the demo's warm start has learned what its short prompts ask for
    return _build(values)


def _replaced(held: Any, keys: Sequence[str], value: Any, name: str) -> Any:
    """Return `value`, or the mapping `held` with `value` at the end of `keys`."""
    if not keys:
        return value
    if held is not None and not isinstance(held, dict):
        raise ConfigError(f"--set {name}.{'.'.join(keys)}: {name} is {held!r}, not a mapping. Set {name} as a whole.")
    first, *rest = keys
    return {**(held or {}), first: _replaced((held or {}).get(first), rest, value, f"{name}.{first}")}


def _merge(values: dict[str, Any], new: dict[str, Any], origin: str) -> None:
    for section, options in new.items():
        if section not in values:
            raise ConfigError(f"{origin}: unknown section {section!r}.{suggest(section, values)}")
        if options is None:
            if section != "lora":
                raise ConfigError(f"{origin}: section {section!r} is empty. Remove it, or give it options.")
            values[section] = None
            continue
        if not isinstance(options, dict):
            raise ConfigError(f"{origin}: section {section!r} is {options!r}; it must hold `key: value` lines.")
        known = [f.name for f in fields(SECTIONS[section])] if section in SECTIONS else None
        for key in options:
            if known is not None and key not in known:
                raise ConfigError(f"{origin}: unknown key {section}.{key}.{suggest(key, known)}")
        values[section] = {**(values[section] or {}), **options}


def _build(values: dict[str, Any]) -> Recipe:
    built: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        if values[name] is None:
            built[name] = None
            continue
        hints = get_type_hints(kind)
        built[name] = kind(**{key: _typed(f"{name}.{key}", value, hints[key]) for key, value in values[name].items()})
    return Recipe(**built, train=values["train"])


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return `value` as one of the types of a field. Numbers may be text: YAML reads 1e-5 as text."""
    union = get_origin(hint) in (Union, UnionType)
    members = get_args(hint) if union else (hint,)
    allowed = [get_origin(member) or member for member in members]
    choices = [text for member in members if get_origin(member) is Literal for text in get_args(member)]
    if value is None and NoneType in allowed:
        return None
    if isinstance(value, str) and (str in allowed or value in choices):
        return value
    if isinstance(value, bool) or bool in allowed:
        if isinstance(value, bool) and bool in allowed:
            return value
    elif isinstance(value, int) and int in allowed:
        return value
    elif isinstance(value, (int, float, str)) and float in allowed:
        with suppress(ValueError):
            return float(value)
    elif isinstance(value, list) and (Sequence in allowed or list in allowed):
        return value
    elif isinstance(value, dict) and dict in allowed:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and str in allowed:
        return str(value)  # a revision that looks like a number
    names = {NoneType: "null", Sequence: "a list", list: "a list", dict: "a mapping"}
    wanted = choices or [
        names.get(kind) or getattr(kind, "__name__", str(kind)) for kind in allowed if kind is not Callable
    ]
    raise ConfigError(f"{key}={value!r} must be {' or '.join(map(str, wanted))}. Set {key}.")


def _load_preset(preset: str) -> dict[str, Any]:
    name, _ = preset_of(preset)
    if name == "auto":
        raise ConfigError("preset 'auto' depends on the machine. Name the card or its memory, such as 24gb.")
    return dict(yaml.safe_load(_packaged(GPU_PRESETS[name])))


def packaged_options(name: str) -> dict[str, Any]:
    """Return the options of a packaged recipe, by `section.key`."""
    sections = yaml.safe_load(_packaged(name))
    return {f"{section}.{key}": value for section, options in sections.items() for key, value in options.items()}


def _packaged(name: str) -> str:
    return resources.files("mel_lite.configs").joinpath(f"{name}.yaml").read_text()


def _load_yaml(path: Path) -> dict[str, Any]:
    """Return the sections of a file, or of a packaged recipe unless a file has its name."""
    try:
        is_packaged = str(path) in PACKAGED and not path.exists()
        loaded = yaml.safe_load(_packaged(str(path)) if is_packaged else path.read_text())
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror or error}. Name a readable YAML file, or a packaged recipe "
            f"({', '.join(PACKAGED)})."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"--config {path} holds {type(loaded).__name__}, not sections ({', '.join(SECTIONS)}, train)."
        )
    return loaded


def keys_of(path: Path) -> set[str]:
    """Return every `section.key` that a recipe file sets. Raises ConfigError when it cannot be read."""
    sections = {section: options for section, options in _load_yaml(path).items() if isinstance(options, dict)}
    return {f"{section}.{key}" for section, options in sections.items() for key in options}


def value_in(path: Path | None, key: str) -> Any:
    """Return the value of `section.key` in a recipe file; None when it is not set there, and without a file."""
    section, _, name = key.partition(".")
    options = None if path is None else _load_yaml(path).get(section)
    return options.get(name) if isinstance(options, dict) else None


def parse_set(text: str) -> tuple[str, Any]:
    """Split `a.b=value` into (`a.b`, value), with the value read as YAML. Raises ConfigError when there is no `=`.

    YAML reads 1e-5 as text; it becomes a number where a field needs one.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: write section.key=value, e.g. --set train.learning_rate=1e-5.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error
    return key.strip(), parsed


def build_args(recipe: Recipe, output_dir: Path) -> Any:
    """Return the MELConfig of a recipe. Raises ConfigError for an unknown key (with a suggestion) or a bad value."""
    from mel_lite.config import MELConfig

    known = [f.name for f in fields(MELConfig) if f.init]
    for key in recipe.train:
        if key not in known or key == "output_dir":
            raise ConfigError(f"unknown key train.{key}.{suggest(key, known)}")
    numeric = {f.name for f in fields(MELConfig) if "float" in str(f.type)}
    # TRL's fields are checked by TRL; their annotations do not all resolve without optional packages.
    ours = get_type_hints(type("Ours", (), {"__annotations__": MELConfig.__annotations__}), {"Callable": Callable})
    options = {}
    for key, value in recipe.train.items():
        options[key] = value
        if key in ours:
            options[key] = _typed(f"train.{key}", value, ours[key])
        elif key in numeric and isinstance(value, str):
            try:
                options[key] = float(value)
            except ValueError:
                if "str" not in str(MELConfig.__dataclass_fields__[key].type):
                    raise ConfigError(f"train.{key}={value!r} is not a number. Set train.{key}.") from None
    try:
        return MELConfig(output_dir=str(output_dir), **options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"section 'train': {error}") from error
