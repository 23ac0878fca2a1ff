"""Recipes: presets, files and overrides, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mel_lite.data.tasks import recommended_verifier
from mel_lite.errors import ConfigError
from mel_lite.gpus import GPU_PRESETS
from mel_lite.recipe import build_args, keys_of, parse_set, resolve


@pytest.mark.parametrize("preset", sorted(GPU_PRESETS))
def test_every_preset_resolves_and_survives_a_round_trip(preset: str, tmp_path: Path) -> None:
    recipe = resolve(preset=preset)
    saved = tmp_path / "config.yaml"
    saved.write_text(recipe.as_yaml())
    assert resolve(config=saved) == recipe
    # The GPU presets ask for bf16 or fp16, which TRL refuses on this machine; everything else must hold.
    cpu = {"use_cpu": True, "bf16": False, "fp16": False}
    args = build_args(resolve(preset=preset, overrides=[(f"train.{k}", v) for k, v in cpu.items()]), tmp_path)
    assert args.num_generations == 8 and args.generation_batch_size % 8 == 0
    assert args.max_context_tokens >= 2 * args.max_completion_length, "both solutions fit the analysis prompt"


def test_the_24gb_preset_is_the_papers_setting() -> None:
    recipe = resolve(preset="24gb")
    assert "Qwen3" in recipe.model.name and recipe.model.load_in_4bit
    assert "DAPO-Math-17k" in recipe.data.train and recommended_verifier(recipe.data.train) == "math"


def test_a_longer_key_replaces_one_option_of_a_mapping() -> None:
    name = "train.internalisation_options"
    recipe = resolve(preset="cpu", config=Path("bank"), overrides=[parse_set(f"{name}.context=sibling+bank")])
    bank = resolve(preset="cpu", config=Path("bank")).train["internalisation_options"]
    assert bank["context"] == "bank" and recipe.train["internalisation_options"] == bank | {"context": "sibling+bank"}
    deeper = [(f"{name}.distill.context", "own"), (f"{name}.distill.sign", False)]
    assert resolve(preset="cpu", overrides=deeper).train["internalisation_options"] == {
        "distill": {"context": "own", "sign": False}
    }
    with pytest.raises(ConfigError, match=r"--set train.save_steps.x: train.save_steps is \d+, not a mapping"):
        resolve(preset="cpu", overrides=[("train.save_steps.x", 1)])
    with pytest.raises(ConfigError, match="unknown section 'trian'"):
        resolve(preset="cpu", overrides=[("trian.a.b", 1)])


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {learning_rate: 3.0e-5, max_steps: 7}\nlora: {r: 4}\n")
    recipe = resolve(preset="cpu", config=file, overrides=[("train.max_steps", 9), ("data.train", "tasks.jsonl")])
    assert recipe.train["learning_rate"] == 3e-5 and recipe.train["max_steps"] == 9
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.alpha) == (4, 16)
    assert recipe.data.train == "tasks.jsonl" and recipe.model.name == "demo"


def test_lora_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text("lora: null\n")
    recipe = resolve(preset="cpu", config=file)
    assert recipe.lora is None and yaml.safe_load(recipe.as_yaml())["lora"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.learning_rate=1e-5", ("train.learning_rate", "1e-5")),
        ("train.max_steps=3", ("train.max_steps", 3)),
        ("data.eval=null", ("data.eval", None)),
        ("lora.target_modules=[q_proj, v_proj]", ("lora.target_modules", ["q_proj", "v_proj"])),
        ("data.system_prompt=a=b", ("data.system_prompt", "a=b")),
        ("train.bf16=true", ("train.bf16", True)),
    ],
)
def test_set_reads_values_as_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_set(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "24g"}, r"--gpu '24g' is neither a preset nor a known card. Did you mean '24gb'\?"),
        ({"preset": "cpu", "overrides": [("modle.name", "x")]}, r"unknown section 'modle'. Did you mean 'model'\?"),
        ({"preset": "cpu", "overrides": [("model.nam", "x")]}, r"unknown key model.nam. Did you mean 'name'\?"),
        ({"preset": "cpu", "overrides": [("max_steps", 3)]}, "write section.key=value"),
        ({"preset": "cpu", "overrides": [("model.dtype", "int7")]}, "dtype='int7' is not one of"),
        ({}, "No model is named"),
    ],
)
def test_wrong_recipes_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", "is not YAML"),
        ("- a\n- b", "holds list, not sections"),
        ("train: 3", "section 'train' is 3"),
        ("data:", "section 'data' is empty"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        resolve(preset="cpu", config=file)
    with pytest.raises(ConfigError, match=r"Name a readable YAML file, or a packaged recipe \(bank\)"):
        resolve(preset="cpu", config=tmp_path / "none.yaml")


def test_a_packaged_recipe_goes_by_its_name_unless_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, recipe = resolve(preset="cpu"), resolve(preset="cpu", config=Path("bank"))
    changed = {key for key in recipe.train if recipe.train[key] != plain.train.get(key)}
    assert "internalisation" in changed and recipe.train["internalisation_options"]["context"] == "bank"
    assert changed == {key.partition(".")[2] for key in keys_of(Path("bank"))} and recipe.model == plain.model
    args = build_args(recipe, tmp_path)
    assert args.mel_weight == 0.3 and args.pairs_per_group == 4
    Path("bank").write_text("train: {mel_weight: 0.7}")
    assert resolve(preset="cpu", config=Path("bank")).train.get("internalisation") is None


def test_unknown_training_keys_get_a_suggestion(tmp_path: Path) -> None:
    recipe = resolve(preset="cpu", overrides=[("train.mel_wieght", 2.0)])
    with pytest.raises(ConfigError, match=r"unknown key train.mel_wieght. Did you mean 'mel_weight'\?"):
        build_args(recipe, tmp_path)
    with pytest.raises(ConfigError, match="train.learning_rate='fast' is not a number"):
        build_args(resolve(preset="cpu", overrides=[("train.learning_rate", "fast")]), tmp_path)
    with pytest.raises(ConfigError, match="section 'train'.*divisible by num_generations"):
        build_args(resolve(preset="cpu", overrides=[("train.num_generations", 5)]), tmp_path)


def test_numbers_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    overrides = [("train.learning_rate", "1e-5"), ("lora.dropout", "5e-2"), ("eval.temperature", 1)]
    recipe = resolve(preset="cpu", overrides=overrides)
    assert build_args(recipe, tmp_path).learning_rate == 1e-5
    assert recipe.lora is not None and recipe.lora.dropout == 0.05 and recipe.eval.temperature == 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.limit", "ten", "data.limit='ten' must be int or null"),
        ("lora.r", "abc", "lora.r='abc' must be int"),
        ("lora.r", 8.5, "lora.r=8.5 must be int"),
        ("lora.r", True, "lora.r=True must be int"),
        ("model.load_in_4bit", "yes", "model.load_in_4bit='yes' must be bool"),
        ("model.name", ["a"], r"model.name=\['a'\] must be str"),
        ("export.format", "gguf", "export.format='gguf' must be merged-16bit"),
        ("export.dtype", "float64", "export.dtype='float64' must be auto or bfloat16 or float16"),
        ("data.train", None, "data.train=None must be str"),
    ],
)
def test_values_of_a_wrong_type_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(preset="cpu", overrides=[(key, value)])


def test_text_that_looks_like_a_number_stays_text() -> None:
    recipe = resolve(
        preset="cpu", overrides=[parse_set("model.revision=1234e567"), parse_set("data.system_prompt=nan")]
    )
    assert recipe.model.revision == "1234e567" and recipe.data.system_prompt == "nan"


def test_a_card_and_a_memory_give_their_preset() -> None:
    assert resolve(preset="RTX-4090") == resolve(preset="25gb") == resolve(preset="24gb") != resolve(preset="16gb")
    with pytest.raises(ConfigError, match="preset 'auto' depends on the machine"):
        resolve(preset="auto")


def test_another_model_drops_the_demos_adapter(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(preset="cpu").lora.start_from == "demo"
    assert resolve(preset="cpu", overrides=[("model.name", "a/b")]).lora.start_from is None
    assert caplog.text.count("fits only the demo model") == 1
    kept = resolve(preset="cpu", overrides=[("model.name", "a/b"), ("lora.start_from", "demo")])
    assert kept.lora.start_from == "demo"
