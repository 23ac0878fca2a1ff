"""Measure the start models of the learning study: `python benchmarks/learning/learning_subject_measure.py`.

Per regime: the share of samples that are right on the question alone, with one true rule, with all true rules, and with
a right solution in the prompt. Writes benchmarks/results/learning/subject.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from study import SUBJECTS

from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.lessons.prompts import Templates, load_templates, question_prompt, replay_prompt
from mel_lite.models.load import ModelSpec, eos_ids, load_base, load_tokenizer
from mel_lite.types import Group

OUT = Path(__file__).resolve().parents[1] / "results" / "learning" / "subject.json"
QUESTIONS, SAMPLES, MAX_TOKENS = 100, 4, 80


NOTES: dict[str, Callable[[Any, str], str | None]] = {
    "plain": lambda subject, question: None,
    "one rule": lambda subject, question: subject.true_rules(question, 1),
    "all rules": lambda subject, question: subject.true_rules(question),
    "right solution": lambda subject, question: subject.true_solution(question),
}


@lru_cache
def loaded(folder: Path) -> tuple[HFEngine, Any, Templates]:
    """Return a start model's engine, tokenizer and prompts."""
    spec = ModelSpec(str(folder), dtype="float32")
    model, tokenizer = load_base(spec), load_tokenizer(spec)
    engine = HFEngine(
        model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id, max_cache_tokens=2_000_000
    )
    return engine, tokenizer, load_templates(str(folder / "templates.yaml"))


def share(regime: str, note: Callable[[Any, str], str | None]) -> float:
    """Return the share of samples that are right with these notes in the prompt."""
    subject = SUBJECTS[regime]
    engine, tokenizer, templates = loaded(subject.MODEL)
    tasks = [task for task in subject.questions(regime, "tune")[:QUESTIONS] for _ in range(SAMPLES)]
    requests = []
    for seed, (question, _) in enumerate(tasks):
        group, text = Group([{"role": "user", "content": question}], "", ()), note(subject, question)
        plain = question_prompt(group, tokenizer)
        requests.append(Request(plain if text is None else replay_prompt(group, text, tokenizer, templates), seed))
    done = engine.generate(requests, Sampling(MAX_TOKENS))
    texts = [tokenizer.decode(list(each.ids), skip_special_tokens=True) for each in done]
    return sum(subject.strict(text, answer) for text, (_, answer) in zip(texts, tasks, strict=True)) / len(tasks)


def main() -> None:
    found = {regime: {name: share(regime, note) for name, note in NOTES.items()} for regime in SUBJECTS}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"questions": QUESTIONS, "samples": SAMPLES, "right": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
