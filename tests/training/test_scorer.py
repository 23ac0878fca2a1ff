"""Reading texts with the trained model: log-probs, whole distributions and divergences of full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from mel_lite.types import Lesson
from tiny_models import set_lora
from trainers import build

TEXTS = [
    Lesson(0, tuple(range(10, 40)), tuple(range(100, 120))),
    Lesson(0, (5, 6), (7, 8, 9)),
    Lesson(0, tuple(range(50, 90)), tuple(range(20, 45))),
]


def reader(folder: Path, **options: Any) -> Any:
    trainer = build(folder, temperature=0.7, **options)
    set_lora(trainer.model, 0.2)
    trainer.model.train()
    return trainer


def log_softmax(trainer: Any, text: Lesson) -> torch.Tensor:
    """(T, V) along a text's target ids at the policy's temperature, from the model's own logits."""
    ids_1T = torch.tensor([text.context_ids + text.target_ids])
    with torch.no_grad():
        logits_TV = trainer.model(input_ids=ids_1T).logits[0, len(text.context_ids) - 1 : -1].double()
    return (logits_TV / 0.7).log_softmax(dim=-1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [None, 1, 60])
def test_readings_are_those_of_full_logits(tmp_path: Path, tokens: int | None, shared: bool) -> None:
    trainer = reader(tmp_path, max_micro_batch_tokens=tokens, per_device_train_batch_size=4, share_prompts=shared)
    readings, logps = trainer.scorer.read(TEXTS), trainer.scorer.logps(TEXTS)
    head = trainer.model.get_output_embeddings()
    for text, reading, logp_T in zip(TEXTS, readings, logps, strict=True):
        expected_TV = log_softmax(trainer, text)
        picked_T = expected_TV.gather(1, torch.tensor(text.target_ids)[:, None])[:, 0]
        assert torch.allclose(logp_T.double(), picked_T, atol=1e-4) and torch.equal(reading.logp_T, logp_T)
        found_TV = (head(reading.hidden_TH).double() / 0.7).log_softmax(dim=-1)
        assert torch.allclose(found_TV, expected_TV, atol=1e-4)
        assert not logp_T.requires_grad and not reading.hidden_TH.requires_grad
    assert trainer.model.training
    one, other = (log_softmax(trainer, text)[:20] for text in (TEXTS[0], TEXTS[2]))
    kl_N = trainer.scorer.kl(readings[0].hidden_TH[:20], readings[2].hidden_TH[:20])
    assert torch.allclose(kl_N.double(), (one.exp() * (one - other)).sum(dim=1), rtol=1e-4)
    assert kl_N.min() > 0.1 and not kl_N.requires_grad


def test_texts_of_one_prompt_compute_it_once(tmp_path: Path) -> None:
    texts = [Lesson(0, tuple(range(10, 90)), tuple(range(100 + i, 110 + i))) for i in range(4)]
    tokens, logps = {}, {}
    for shared in (True, False):
        trainer = reader(tmp_path / str(shared), share_prompts=shared)
        seen = tokens[shared] = []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda _, __, inputs, seen=seen: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        logps[shared] = torch.cat(trainer.scorer.logps(texts))
    assert sum(tokens[True]) == 80 + 4 * 9 and sum(tokens[False]) == 4 * 90
    assert torch.allclose(logps[True], logps[False], atol=1e-5)


def test_nothing_to_read_reads_nothing(tmp_path: Path) -> None:
    trainer = reader(tmp_path)
    trainer.scorer._score = None  # would fail
    assert (trainer.scorer.logps([]), trainer.scorer.read([]), trainer.scorer([])) == ([], [], [])


def test_dropout_is_off_while_reading(tmp_path: Path) -> None:
    trainer = reader(tmp_path)
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer.model.train()
    noisy = [trainer.model(input_ids=torch.tensor([TEXTS[0].context_ids])).logits for _ in range(2)]
    assert not torch.equal(*noisy), "dropout is on while training"
    first, second = trainer.scorer.logps(TEXTS), trainer.scorer.logps(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
