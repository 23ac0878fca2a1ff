"""The demo's shipped adapter matches its recipe, its examples are what the generator writes, its measures are right."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from demo_figures import pooled
from demo_warmup import train
from demo_warmup.lessons import COUNTS, REST_COUNTS, REST_SEED, SEED, make_examples, rule
from demo_warmup.measure import Conditions, miscounted, obedience
from mel_lite.data.demo_tasks.words import READINGS, Chain, solution
from mel_lite.models.adapters import WEIGHTS
from mel_lite.models.demo import DEMO_ADAPTER
from scripted import ScriptedEngine
from tiny_models import tiny_tokenizer


def test_the_shipped_adapter_matches_its_recipe() -> None:
    weights = load_file(DEMO_ADAPTER / WEIGHTS)
    assert (DEMO_ADAPTER / WEIGHTS).stat().st_size <= 6_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    recipe = json.loads((DEMO_ADAPTER / "recipe.json").read_text())
    assert (recipe["data_seed"], recipe["examples"]) == (SEED, COUNTS)
    assert recipe["lora"]["r"] == train.LORA.r == weights[next(n for n in weights if "lora_A" in n)].shape[0]
    assert recipe["training"] == asdict(train.OPTIONS)
    ended = recipe["ended"]
    assert (ended["data_seed"], ended["examples"], ended["training"]) == (REST_SEED, REST_COUNTS, asdict(train.REST))
    examples = gzip.decompress((DEMO_ADAPTER / "examples.jsonl.gz").read_bytes())
    assert hashlib.sha256(examples).hexdigest() == recipe["examples_sha256"]
    kinds = Counter(json.loads(line)["kind"] for line in examples.decode().splitlines())
    assert kinds == Counter(COUNTS) + Counter(REST_COUNTS)
    made = [*make_examples(), *make_examples(REST_COUNTS, seed=REST_SEED)]
    assert examples.decode() == "".join(json.dumps(example) + "\n" for example in made)
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train.BASE


def answer(prompt: str, *, obeys: bool) -> str:
    """Solve the question of a prompt: each word as the notes say, or else as `takes`."""
    first, *rest = re.findall(r"What is ([^?]+)\?", prompt)[-1].split()
    chain = Chain((int(first), *map(int, rest[1::2])), tuple(rest[::2]))
    noted = {word: r for word in chain.words for r in READINGS if obeys and rule(word, r) in prompt}
    return solution(chain.lines([noted.get(word, "takes") for word in chain.words]))


@pytest.mark.parametrize("obeys", [True, False])
def test_obedience_is_the_share_of_noted_words_read_as_noted(obeys: bool) -> None:
    tokenizer = tiny_tokenizer()

    def policy(prompt: str, rng: random.Random) -> str:
        return answer(prompt, obeys=obeys)

    notes = make_examples({"replay": 60}, seed=5)
    conditions = Conditions(max_completion_tokens=1000)
    found = obedience(ScriptedEngine(tokenizer, answer=policy), tokenizer, notes, conditions)
    assert found["obeyed_without_notes"] == pytest.approx(1 / 3, abs=0.12), "rules are random, one in three says takes"
    if obeys:
        assert (found["obeyed"], found["obeyed_wrong"]) == (1.0, 1.0)
    else:
        assert found["obeyed"] == found["obeyed_without_notes"] and found["obeyed_wrong"] < 1


def test_miscounted_lines_are_equations_that_are_false() -> None:
    texts = ["2 vex takes 5: 2 - 5 = -3\n-3 zig adds 4: -3 + 4 = 2\nAnswer: 2", "1 dub swaps 9: 9 - 1 = 8", "no line"]
    assert miscounted(texts) == pytest.approx(1 / 3, abs=1e-3)
    assert miscounted(["nothing"]) == 0


def test_lessons_of_two_measurements_are_pooled_by_their_number() -> None:
    reports = [
        {"figures": {"replayed_lessons": 30, "uplift": "+0.200 [+0.100, +0.400]"}},
        {"figures": {"replayed_lessons": 10, "uplift": "-0.200 [-0.600, +0.400]"}},
    ]
    lessons, uplift = pooled(reports)
    assert (lessons, uplift.value) == (40, pytest.approx(0.1))
    assert uplift.low == pytest.approx(0.1 - (0.075**2 + 0.1**2) ** 0.5)
    assert uplift.high == pytest.approx(0.1 + (0.15**2 + 0.15**2) ** 0.5)
