"""Options of a combination of internalizations, on every way into the config, and the decay of lambda."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser
from trl import TrlParser

from mel_lite import MELConfig
from mel_lite.errors import ConfigError
from mel_lite.recipe import build_args, parse_set, resolve
from train_command import command
from trainers import build

WAYS = {"analysis": 0.1, "distill": 0.3}
OPTIONS = {"distill": {"context": "sibling", "shift_nats": 0.05, "sign": False}}


def test_parsers_of_transformers_and_trl_read_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's flags give a name or JSON; TRL's YAML file gives the mapping itself."""
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    (named,) = HfArgumentParser(MELConfig).parse_args_into_dataclasses([*flags, "--internalisation", "distill"])
    assert (named.internalisation, named.internalisation_options) == ("distill", None)
    given = ["--internalisation_options", json.dumps({"context": "sibling"})]
    (optioned,) = HfArgumentParser(MELConfig).parse_args_into_dataclasses([*flags, *given])
    assert optioned.internalisation_options == {"context": "sibling"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"internalisation": WAYS, "internalisation_options": OPTIONS, "use_cpu": True}))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    given = ["--internalisation", json.dumps(WAYS), "--internalisation_options", json.dumps(OPTIONS)]
    (flagged,) = HfArgumentParser(MELConfig).parse_args_into_dataclasses([*flags, *given])
    assert (flagged.internalisation, flagged.internalisation_options) == (WAYS, OPTIONS)
    (combined,) = TrlParser(MELConfig).parse_args_and_config(["--config", str(file), *flags[:2], *flags[3:]])
    assert (combined.internalisation, combined.internalisation_options) == (WAYS, OPTIONS)


def test_a_recipe_holds_a_combination(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"train": {"internalisation": WAYS, "internalisation_options": OPTIONS}}))
    args = build_args(resolve(preset="cpu", config=file), tmp_path)
    assert (args.internalisation, args.internalisation_options) == (WAYS, OPTIONS)
    flag = parse_set("train.internalisation={distill: 0.3}")
    assert build_args(resolve(preset="cpu", overrides=[flag]), tmp_path).internalisation == {"distill": 0.3}
    with pytest.raises(ConfigError, match=r"train.internalisation=\['distill'\] must be str or null or a mapping"):
        build_args(resolve(preset="cpu", overrides=[("train.internalisation", ["distill"])]), tmp_path)
    with pytest.raises(
        ConfigError, match=r"internalisation_options='sibling' is a str. Set a mapping such as \{context"
    ):
        build_args(resolve(preset="cpu", overrides=[("train.internalisation_options", "sibling")]), tmp_path)


def test_the_command_takes_a_combination_from_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"train": {"internalisation": WAYS, "internalisation_options": OPTIONS}}))
    shown = command(tmp_path, "--config", str(file), "--dry-run").output
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "analysis" in shown


@pytest.mark.parametrize(
    ("decay", "expected"), [(0, [0.4, 0.4, 0.4, 0.4]), (2, [0.4, 0.2, 0.0, 0.0]), (4, [0.4, 0.3, 0.2, 0.1])]
)
def test_lambda_falls_linearly_to_0(tmp_path: Path, decay: int, expected: list[float]) -> None:
    args = config(tmp_path, mel_weight=0.4, mel_decay_steps=decay)
    assert [args.mel_weight_at(step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.slow
def test_the_updates_of_a_batch_share_its_lambda(tmp_path: Path) -> None:
    trainer = build(tmp_path, mel_weight=0.4, mel_decay_steps=4, num_iterations=2, max_steps=6)
    drawn, used = [], []
    draw, loss = trainer._draw, trainer._compute_loss
    trainer._draw = lambda groups: drawn.append(draw(groups)) or drawn[-1]
    trainer._compute_loss = lambda model, inputs: used.append(trainer.mel_weight) or loss(model, inputs)
    trainer.train()
    assert [each.weight for each in drawn] == pytest.approx([0.4, 0.2, 0.0])
    assert used == pytest.approx([0.4, 0.4, 0.2, 0.2, 0.0, 0.0])


def test_a_negative_decay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mel_decay_steps=-1 must be at least 0. Raise mel_decay_steps"):
        config(tmp_path, mel_decay_steps=-1)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("loss_type", "grpoo", "loss_type='grpoo' is not one of grpo, .*Did you mean 'grpo'"),
        ("learning_rate", -1e-6, "learning_rate=-1e-06 must be at least 0"),
        ("learning_rate", float("nan"), "learning_rate=nan must be at least 0"),
        ("beta", -0.1, "beta=-0.1 must be at least 0"),
        ("num_iterations", 0, "num_iterations=0 must be at least 1"),
        ("temperature", 0.0, "temperature=0.0 must be positive: without sampling"),
    ],
)
def test_a_value_that_would_fail_in_the_first_step_is_refused(
    tmp_path: Path, option: str, value: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **{option: value})


def config(folder: Path, **options: Any) -> MELConfig:
    return MELConfig(str(folder), use_cpu=True, bf16=False, **options)
