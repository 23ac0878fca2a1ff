"""Compare sampling on the transformers engine with TRL's default path.

`PYTHONPATH=benchmarks python -m speed.generation --trl FOLDER`. The workload is a step of the demo: its warm-started
model, 4 prompts with 8 completions of at most 64 tokens. Each measurement is a process of its own, which samples a
token first, and the trainers take turns. A token counts up to the end of its completion. FOLDER holds TRL, as in
`step.py`. Writes benchmarks/results/generation-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mel_lite.run.operations import flop_counter
from speed import step, step_subject
from speed.step_subject import Case

RESULT = step.HERE / "results" / "generation-cpu.json"


def warm_started(model: Any, case: Case) -> Any:
    """Return the demo's model with its warm-start adapter."""
    from peft import PeftModel

    from mel_lite.models.adapters import find_adapter

    torch.manual_seed(case.seed)
    return PeftModel.from_pretrained(model, find_adapter("demo"), is_trainable=True)


def measure(who: str, folder: Path, *, count: bool) -> dict[str, Any]:
    """Sample one step's completions with one trainer; return tokens, peak memory, and operations or seconds.

    Counting operations takes time per operator, so it is done in a run of its own.
    """
    step_subject.adapted = warm_started
    case = Case()
    trainer = {"trl": step_subject.trl_trainer, "mel": step_subject.mel_trainer}[who](case, folder / "run")
    prompts = [row["prompt"] for row in trainer.train_dataset for _ in range(case.group_size)]
    prompt_ids, *_ = trainer._tokenize_prompts(prompts)
    if who == "trl":
        base = type(trainer).__mro__[1]

        def sample() -> list[Any]:
            return list(base._generate_single_turn(trainer, prompt_ids, None, {}, case.group_size)[0])
    else:
        from mel_lite.engines.base import Request, Sampling
        from mel_lite.training.assemble import build_engine

        engine = build_engine(trainer)

        def sample() -> list[Any]:
            requests = [Request(tuple(ids), i) for i, ids in enumerate(prompt_ids)]
            return [each.ids for each in engine.generate(requests, Sampling(case.longest_tokens))]

    if who == "trl":
        trainer.model.generate(torch.tensor(prompt_ids[:1]), max_new_tokens=1)
    else:  # compares a few log-probs, once per run
        engine.generate([Request(tuple(prompt_ids[0]), 0)], Sampling(1))
    counter = flop_counter()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    with counter if count else nullcontext():
        lengths = [len(ids) for ids in sample()]
    spent = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}
    found = {"operations": counter.get_total_flops()} if count else spent
    lengths_found = {"tokens": sum(lengths), "longest_tokens": max(lengths)}
    return lengths_found | found | {"peak_bytes": step_subject.peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with TRL's package")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--one", choices=["trl", "mel"], help=argparse.SUPPRESS)
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        with tempfile.TemporaryDirectory() as scratch:
            arguments.json.write_text(json.dumps(measure(arguments.one, Path(scratch), count=arguments.count)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "mel": []}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "one.json"
        for count in (True, *[False] * arguments.repeats):
            for who in runs if arguments.trl is not None else ("mel",):
                command = [sys.executable, "-m", "speed.generation", "--one", who, "--json", str(out)]
                command += ["--count"] * count
                step.child([*command, "--threads", str(arguments.threads)], who, arguments.trl, arguments.threads)
                runs[who].append(json.loads(out.read_text()))
                print(who, runs[who][-1], flush=True)
    report = {"threads": arguments.threads, "runs": runs}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
