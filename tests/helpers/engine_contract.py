"""Contract of all engines. Run as a script, it checks Unsloth's engine.

`python engine_contract.py FOLDER` prints one JSON object: clause -> "" or the traceback. Importing unsloth patches
libraries for a whole process, so the tests run it in a separate one.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mel_lite.engines.base import LOOK_TOKENS, Engine, Request, Sampling
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.scoring import install_scoring_head, score
from mel_lite.types import Finish
from tiny_models import set_lora

EOS, PAD = 2, 0
ROUNDING = 1e-4
"""Largest allowed difference of log-probs between engine and trainer, in nats; scripts change it for other dtypes."""
EFFECT = 1e-2
"""Smallest difference, in nats, when one of them omits the adapter."""
Build = Callable[..., Engine]
"""`build(model, eos=2)` returns the engine for a PEFT model."""


def requests(*seeds: int) -> list[Request]:
    return [Request(tuple(range(10, 14 + seed % 5)), seed) for seed in seeds]


def trainer_scores(model: Any, asked: list[Request], done: list[Any], temperature: float) -> list[torch.Tensor]:
    both = zip(asked, done, strict=True)
    rows = [Row(torch.tensor(r.prompt_ids + c.ids), len(c.ids), temperature) for r, c in both]
    model.eval()
    with torch.no_grad():
        return score(model, pack(rows, pad_id=PAD))[0]


def largest_gap(model: Any, asked: list[Request], done: list[Any], temperature: float = 1.0) -> float:
    scores = trainer_scores(model, asked, done, temperature)
    return max(float((torch.tensor(c.logprobs) - p).abs().max()) for c, p in zip(done, scores, strict=True))


def a_sequence_depends_on_prompt_and_seed_alone(build: Build, model: Any) -> None:
    asked, sampling = requests(*range(12)), Sampling(12, temperature=0.7)
    together = build(model).generate(asked, sampling)
    assert [build(model).generate([r], sampling)[0].ids for r in asked[::4]] == [c.ids for c in together[::4]]
    assert [c.ids for c in build(model).generate(asked[::-1], sampling)] == [c.ids for c in together[::-1]]
    assert len({c.ids for c in build(model).generate([Request((10, 11), s) for s in range(8)], sampling)}) > 1


def reported_log_probs_are_those_the_trainer_scores(build: Build, model: Any) -> None:
    asked = requests(3, 4, 5, 6)
    done = build(model).generate(asked, Sampling(10, temperature=0.7))
    assert largest_gap(model, asked, done, 0.7) < ROUNDING
    assert min(x for c in done for x in c.logprobs) < -0.1


def the_current_adapter_is_applied(build: Build, model: Any) -> None:
    engine, asked = build(model), requests(1, 2, 3)
    for seed in (5, 6):
        engine.sleep()
        set_lora(model, 0.3, seed=seed)
        engine.wake()
        done = engine.generate(asked, Sampling(10))
        assert largest_gap(model, asked, done) < ROUNDING
        with model.disable_adapter():
            assert largest_gap(model, asked, done) > EFFECT
    set_lora(model, 0.3)


def greedy_takes_the_likeliest_token(build: Build, model: Any) -> None:
    (done,) = build(model).generate([Request((30, 31, 32, 33), 1)], Sampling(8, temperature=0))
    ids = (30, 31, 32, 33, *done.ids)
    model.eval()
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0, 3:-1]
    assert logits_TV.argmax(-1).tolist() == list(done.ids)


def a_cut_distribution_reports_its_own_log_probs(build: Build, model: Any) -> None:
    asked = [Request((40, 41), seed) for seed in range(50)]
    assert {c.logprobs for c in build(model).generate(asked, Sampling(1, temperature=2.0, top_p=1e-6))} == {(0.0,)}
    three = build(model).generate(asked, Sampling(1, temperature=2.0, top_k=3))
    assert len({c.ids for c in three}) == 3
    masses = {c.ids: torch.tensor(c.logprobs).exp().item() for c in three}
    assert abs(sum(masses.values()) - 1) < 1e-5


def requests_of_one_call_may_have_options_of_their_own(build: Build, model: Any) -> None:
    kinds = [Sampling(12, 0.7), Sampling(5, 0), Sampling(20, 1.5, top_k=3), Sampling(9, 0.7, repetition_penalty=1.3)]
    asked = [Request(r.prompt_ids, r.seed, kinds[i % 4]) for i, r in enumerate(requests(*range(12)))]
    assert build(model).mixes
    together = build(model).generate(asked, Sampling(1))
    for kind in kinds:
        mine = [i for i, each in enumerate(asked) if each.sampling is kind]
        alone = build(model).generate([Request(asked[i].prompt_ids, asked[i].seed) for i in mine], kind)
        assert [together[i].ids for i in mine] == [c.ids for c in alone]
        gaps = [
            a - b
            for i, c in zip(mine, alone, strict=True)
            for a, b in zip(together[i].logprobs, c.logprobs, strict=True)
        ]
        assert max(map(abs, gaps)) < ROUNDING
        assert max(len(c.ids) for c in alone) <= kind.max_new_tokens
    assert {len(c.ids) for c in together} >= {5, 20}


def an_end_token_ends_the_completion(build: Build, model: Any) -> None:
    sampled = build(model).generate(requests(*range(8)), Sampling(30))
    common = Counter(token for c in sampled for token in c.ids[1:]).most_common(1)[0][0]
    for completion in build(model, eos=common).generate(requests(*range(8)), Sampling(30)):
        assert len(completion.ids) == len(completion.logprobs)
        assert completion.ids.count(common) == (completion.finish is Finish.STOP)
        # vLLM also stops at the end token that the model's files name.
        is_whole = len(completion.ids) == 30 or completion.ids[-1] == EOS
        assert completion.ids[-1] == common or (completion.finish is Finish.LENGTH and is_whole)


def a_hopeless_sequence_ends_at_a_look_and_the_others_keep_every_token(build: Build, model: Any) -> None:
    """A made-up criterion, so that a random model has both. Rows that are not looked at stand for rollouts."""
    engine, looks, ends = build(model), [], []

    def is_hopeless(ids: Any) -> bool:
        looks.append(len(ids))
        ends.append(sum(ids) % 3 == 0)
        return ends[-1]

    asked = [Request(tuple(range(10, 14 + seed % 4)), seed) for seed in range(12)]
    free = Sampling(2 * LOOK_TOKENS + 1, temperature=1.3, ignore_eos=True)
    watched = replace(free, is_hopeless=is_hopeless)
    whole = engine.generate(asked, free)
    mixed = [Request(r.prompt_ids, r.seed, watched if r.seed % 2 else None) for r in asked]
    done = engine.generate(mixed, free)
    ended = [c for c in done if c.finish is Finish.ENDED]
    assert len(ended) == sum(ends) and set(looks) <= {LOOK_TOKENS, 2 * LOOK_TOKENS}
    assert 0 < len(ended) < 6 and {len(c.ids) for c in ended} <= set(looks) if engine.ends_hopeless else not looks
    assert any(c.finish is Finish.LENGTH for c in done[1::2]), "some that are looked at live on"
    for c, every in zip(done, whole, strict=True):
        kept = len(c.ids) if c.finish is Finish.ENDED else 2 * LOOK_TOKENS + 1
        assert c.ids == every.ids[:kept] and len(c.logprobs) == kept
        assert max(abs(a - b) for a, b in zip(c.logprobs, every.logprobs, strict=False)) < ROUNDING
    # The next call is not disturbed by what was ended.
    again = engine.generate(asked, Sampling(4, temperature=1.3, ignore_eos=True))
    assert [c.ids for c in again] == [c.ids[:4] for c in whole]


def training_mode_and_checkpointing_are_restored(build: Build, model: Any) -> None:
    for checkpointing in (False, True):
        base = model.get_base_model()
        base.gradient_checkpointing_enable() if checkpointing else base.gradient_checkpointing_disable()
        for training in (True, False):
            model.train(training)
            engine = build(model)
            engine.wake()
            engine.generate(requests(1), Sampling(3))
            engine.sleep()
            assert model.training is training
            assert all(m.training is training for m in model.modules())
            assert base.is_gradient_checkpointing is checkpointing
    model.get_base_model().gradient_checkpointing_disable()


def sleeping_and_waking_may_be_repeated(build: Build, model: Any) -> None:
    engine, asked = build(model), requests(1, 2)
    first = engine.generate(asked, Sampling(6))
    for act in (engine.sleep, engine.sleep, engine.wake, engine.wake):
        act()
    assert engine.generate(asked, Sampling(6)) == first
    engine.sleep()
    assert engine.generate(asked, Sampling(6)) == first, "woken by the request"


CLAUSES: dict[str, Callable[[Build, Any], None]] = {
    clause.__name__: clause
    for clause in (
        a_sequence_depends_on_prompt_and_seed_alone,
        reported_log_probs_are_those_the_trainer_scores,
        the_current_adapter_is_applied,
        greedy_takes_the_likeliest_token,
        a_cut_distribution_reports_its_own_log_probs,
        requests_of_one_call_may_have_options_of_their_own,
        an_end_token_ends_the_completion,
        a_hopeless_sequence_ends_at_a_look_and_the_others_keep_every_token,
        training_mode_and_checkpointing_are_restored,
        sleeping_and_waking_may_be_repeated,
    )
}


def unsloth_model(folder: Path, *, four_bit: bool) -> Any:
    """Load a tiny model with Unsloth, with an adapter that changes it."""
    from mel_lite.engines.unsloth import load_unsloth
    from mel_lite.models.adapters import LoraSpec
    from mel_lite.models.load import ModelSpec

    spec = ModelSpec(str(folder), dtype="float32", load_in_4bit=four_bit)
    model = load_unsloth(spec, LoraSpec(r=4, alpha=8), vllm=False, max_seq_length=512, seed=1)
    install_scoring_head(model.get_base_model())
    set_lora(model, 0.3)
    return model


def unsloth_build(model: Any, *, eos: int = EOS) -> Engine:
    from mel_lite.engines.unsloth import is_unsloth, unsloth_engine

    assert is_unsloth(model)
    engine = unsloth_engine(model, step=lambda: 0, eos_ids=[eos], pad_id=PAD)
    assert engine.name == "unsloth"
    return engine


def main(folder: Path) -> dict[str, str]:
    found = {}
    for four_bit in (False, True):
        model = unsloth_model(folder, four_bit=four_bit)
        for name, clause in CLAUSES.items():
            try:
                clause(unsloth_build, model)
                problem = ""
            except Exception:
                problem = traceback.format_exc()
            found[f"{name}-{'4bit' if four_bit else 'fp32'}"] = problem
    return found


if __name__ == "__main__":
    results = main(Path(sys.argv[1]))
    print(json.dumps(results))
