"""The learning study: its code path on a scripted policy, its ablations token by token, its intervals as numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from demo_warmup.examples import make_examples
from mel_lite.warmup.examples import Example, tokenize
from scripted import ScriptedEngine
from trainers import sums, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """benchmarks/learning.py, imported as when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("learning")


@pytest.fixture
def subject(study: Any, tmp_path: Path) -> Any:
    """A tiny model whose rollouts, analyses and replays are scripted; `loaded` holds every model handed out."""
    first = tiny_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    loaded = [first]

    def load() -> Any:
        model = tiny_model(tmp_path / "base")
        model.config.max_position_embeddings = 8192
        loaded.append(model)
        return model

    options = {
        "templates": None, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 16,
        "analysis_max_tokens": 600, "analysis_temperature": 1.0, "learning_rate": 1e-3, "grad_norm_every": 1,
    }  # fmt: skip
    made = make_examples({"analyse": 1}, seed=5)
    subject = study.Subject(tokenizer, load, sums(), sums(6), made, options, ScriptedEngine(tokenizer))
    return subject, loaded


@pytest.mark.parametrize("arm", ["grpo", "mel", "mel-replay", "mel-failed"])
def test_a_run_measures_trains_and_stops_at_its_tokens(study: Any, subject: Any, arm: str, tmp_path: Path) -> None:
    what, loaded = subject
    plan = study.Plan("small", tokens=2500, points=2, tasks=4, samples=2, lessons=2)
    found = study.run(arm, 0, plan, what)
    study.save(found, tmp_path / "runs" / f"{arm}-0.json")
    tokens = [point["tokens"] for point in found["points"]]
    assert tokens[0] == 0 and tokens == sorted(set(tokens)) and len(tokens) >= 2
    assert found["steps"][-1]["tokens"] == tokens[-1] >= 2500 > found["steps"][-2]["tokens"]
    moved = sum((a - b).abs().sum() for a, b in zip(loaded[0].parameters(), loaded[1].parameters(), strict=True))
    assert moved > 0
    if arm == "grpo":
        assert not any("mel/nll" in step for step in found["steps"])
    else:
        learned = [step["mel/nll_after"] < step["mel/nll"] for step in found["steps"] if "mel/nll" in step]
        assert learned and sum(learned) > len(learned) / 2
    figures = importlib.import_module("learning_figures")
    assert figures.runs(tmp_path / "runs")[arm] == [json.loads(json.dumps(found))]


def test_the_failed_arm_trains_on_the_analyses_whose_replay_was_wrong(study: Any, subject: Any) -> None:
    what, _ = subject
    found = study.run("mel-failed", 0, study.Plan("small", 600, 1, 4, 2, 2), what)
    assert found["options"]["internalisation"] == "learning_arms:FailedNLL"
    trained = [step for step in found["steps"] if "mel/nll" in step]
    assert trained and all(step["mel/written"] > step["mel/replay_valid"] for step in trained)


def test_the_small_model_is_made_and_asked_what_it_was_not_shown(study: Any, tmp_path: Path) -> None:
    small = importlib.import_module("learning_small")
    stages = (
        small.Stage({"solve": 40, "chain": 0, "analyse": 3, "replay": 2}, 2e-3, 3),
        small.Stage({"solve": 10, "analyse": 5, "replay": 2}, 1e-3, 2),
    )
    folder = small.make(tmp_path / "small", stages)
    assert json.loads((folder / "recipe.json").read_text())["steps"] == [3, 2]
    made = study.small(folder)
    asked = {row["prompt"][0]["content"] for row in made.test}
    assert len(asked) == 200 and not asked & {row["prompt"][0]["content"] for row in made.train}
    shown = small.examples({"solve": 3000})
    assert not asked & {each["prompt"][0]["content"] for each in shown}
    (analyse,) = small.examples({"analyse": 1})
    assert analyse["prompt"][0]["content"] == small.TEMPLATES["analysis_system"]
    assert "Incorrect:" in analyse["prompt"][1]["content"] and "running total" not in analyse["prompt"][1]["content"]
    fresh, trained = small.make_model(made.tokenizer), made.load()
    rows, _ = tokenize(
        [Example(e["prompt"], e["completion"]) for e in shown[:16]], made.tokenizer, max_length_tokens=512, turn_end=2
    )
    losses = []
    for model in (fresh, trained):
        with torch.no_grad():
            batch = [{k: torch.tensor([v]) for k, v in row.items()} for row in rows]
            losses.append(sum(model(**row).loss.item() for row in batch))
    assert losses[1] < losses[0]
