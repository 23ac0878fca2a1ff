"""Generation configs that transformers would refuse to save."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

import trainers
from mel_lite.models.generation import make_generation_config_valid


@pytest.mark.parametrize(
    ("options", "do_sample", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, True, 0.9),
        ({"do_sample": True, "temperature": 0.7}, True, 0.7),
        ({"num_beams": 2, "num_return_sequences": 3}, None, None),
    ],
)
def test_an_invalid_config_can_be_saved_afterwards(
    tmp_path: Path, options: dict[str, object], do_sample: bool | None, temperature: float | None
) -> None:
    model = trainers.tiny_model(tmp_path / "base")
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    for name, value in options.items():  # as from a file: nothing is checked
        setattr(model.generation_config, name, value)
    make_generation_config_valid(model)
    model.generation_config.validate(strict=True)
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.eos_token_id, saved.pad_token_id) == (2, 0)
    if do_sample is not None:
        assert (saved.do_sample, saved.temperature) == (do_sample, temperature)
    else:
        assert saved.num_return_sequences in (None, 1)
