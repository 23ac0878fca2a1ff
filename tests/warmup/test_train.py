"""Training on warm-up examples gives a usable adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from demo_warmup import train
from mel_lite.errors import ConfigError
from mel_lite.models.adapters import RECORD, WEIGHTS, LoraSpec, attach_adapter
from mel_lite.models.load import ModelSpec, load_base, load_tokenizer
from mel_lite.warmup.examples import load_examples, tokenize
from mel_lite.warmup.options import WarmupEval, WarmupOptions
from mel_lite.warmup.train import in_batches, warmup
from tiny_models import CHAT_TEMPLATE, save_tiny


def test_batches_hold_rows_of_similar_length_and_all_rows() -> None:
    rows = [
        {"input_ids": [i] * length, "labels": []} for i, length in enumerate([10, 50, 11, 52, 12, 51, 90, 91, 92, 9])
    ]
    ordered = in_batches(rows, 3, seed=0)
    assert sorted(map(str, ordered)) == sorted(map(str, rows))
    lengths = [len(row["input_ids"]) for row in ordered]
    batches = [sorted(lengths[i : i + 3]) for i in range(0, 10, 3)]
    assert sorted(batches) == [[9, 10, 11], [12, 50, 51], [52, 90, 91], [92]] and batches[-1] == [92]
    assert in_batches(rows, 3, seed=0) == ordered and in_batches(rows, 3, seed=1) != ordered


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 4, "micro_batch_size": 3}, {"learning_rate": 0.0}, {"epochs": 0}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WarmupOptions(**options)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """Warm up a tiny model on two examples, one of which exceeds its 512 tokens. Return folder, result and file."""
    folder = tmp_path_factory.mktemp("warmup")
    save_tiny(folder / "base")
    rows = [
        {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "completion": "Answer: 4"},
        {"prompt": [{"role": "user", "content": "x" * 600}], "completion": "Answer: 5"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": "What is 2 + 2?", "answer": "4"}]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    result = warmup(
        folder / "rows.jsonl",
        folder / "out",
        model=ModelSpec(str(folder / "base")),
        lora=LoraSpec(r=8, alpha=16),
        options=WarmupOptions(max_steps=60, batch_size=1, learning_rate=1e-2, save_steps=30),
        evaluation=WarmupEval(str(folder / "tasks.jsonl"), verifier="numeric", k=2, max_new_tokens=16),
    )
    return folder, result, folder / "rows.jsonl"


def nll_nats(model: Any, tokenizer: Any, file: Path) -> float:
    """Compute the mean NLL per completion token of the first example from plain logits."""
    rows, _ = tokenize(load_examples(file)[:1], tokenizer, max_length_tokens=512, turn_end=2)
    ids, labels = (torch.tensor([rows[0][name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100))


def test_warmup_learns_the_example_and_measures_it(trained: tuple[Path, Any, Path]) -> None:
    folder, result, file = trained
    assert (result.examples, result.skipped_long, result.steps) == (1, 1, 60)
    assert result.trained_tokens == len("Answer: 4") + 1
    spec = ModelSpec(str(folder / "base"))
    tokenizer = load_tokenizer(spec)
    untrained = nll_nats(load_base(spec), tokenizer, file)
    learned = nll_nats(attach_adapter(load_base(spec), result.adapter), tokenizer, file)
    assert learned < 0.1 < 1.0 < untrained
    assert result.before.pass_at_1.value == 0.0 and result.after.pass_at_1.value == 1.0


@pytest.mark.parametrize("max_steps", [3, 10])
def test_warmup_loss_is_the_mean_over_completion_tokens(
    trained: tuple[Path, Any, Path], tmp_path: Path, max_steps: int
) -> None:
    folder, _, file = trained
    spec = ModelSpec(str(folder / "base"))
    expected = nll_nats(load_base(spec), load_tokenizer(spec), file)
    options = WarmupOptions(max_steps=max_steps, batch_size=1, learning_rate=1e-12)
    result = warmup(file, tmp_path / "out", model=spec, lora=LoraSpec(r=4), options=options)
    assert math.isclose(result.final_loss_nats, expected, rel_tol=1e-3)


def test_training_continues_from_the_adapter(trained: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, file = trained
    spec = ModelSpec(str(folder / "base"))
    assert json.loads((result.adapter / RECORD).read_text())["base"]["name"] == spec.name
    assert (result.adapter / "checkpoint-30" / WEIGHTS).is_file()
    own = CHAT_TEMPLATE + "{# of the adapter #}"
    (result.adapter / "chat_template.jinja").write_text(own)
    again = warmup(
        file,
        tmp_path / "more",
        model=spec,
        adapter=result.adapter,
        options=WarmupOptions(max_steps=10, batch_size=1, learning_rate=1e-3),
    )
    assert load_tokenizer(spec, saved_in=again.adapter).chat_template == own
    assert again.final_loss_nats < 0.1  # it started where the first warm-up ended
    assert nll_nats(attach_adapter(load_base(spec), again.adapter), load_tokenizer(spec), file) < 0.1


def test_nothing_is_overwritten_and_contradictions_are_rejected(
    trained: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    folder, result, file = trained
    spec = ModelSpec(str(folder / "base"))
    before = (result.adapter / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        warmup(file, result.adapter, model=spec)
    assert (result.adapter / WEIGHTS).read_bytes() == before
    with pytest.raises(ConfigError, match="lora and adapter together"):
        warmup(file, tmp_path / "new", model=spec, lora=LoraSpec(), adapter=result.adapter)


def test_shipping_rounds_to_float16_and_drops_local_paths(trained: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, _ = trained
    train.ship(result.adapter, tmp_path / "shipped")
    before, after = load_file(result.adapter / WEIGHTS), load_file(tmp_path / "shipped" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name].float(), tensor, rtol=2**-11, atol=1e-7)
    assert str(folder) not in (tmp_path / "shipped" / "adapter_config.json").read_text()
    assert json.loads((tmp_path / "shipped" / RECORD).read_text())["base"]["dtype"] == "auto"
