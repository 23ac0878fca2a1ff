"""Measure the CPU seconds from the start of a process to its first sampled token.

`PYTHONPATH=benchmarks python -m speed.startup`. Three programs load the demo's model, each in processes of its own that
take turns: transformers alone (`bare`), TRL's GRPOTrainer with a LoRA adapter (`trl`), and `mel-lite train --gpu cpu`
(`mel`). Those named `import-...` end after the imports of these three, and `import-peft` after PEFT's. `import` and
`help` are `import mel_lite` and `mel-lite --help`. Writes benchmarks/results/startup-cpu.json.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parents[1]
RESULT = HERE / "results" / "startup-cpu.json"
TRACKERS = ("mlflow", "trackio", "wandb")
"""Packages that TRL imports where they are installed, which `make venv` does not do."""


def _end(out: Path) -> NoReturn:
    """Write what was spent so far, and end the process without running what is left of it."""
    packages = sorted({name.partition(".")[0] for name in sys.modules})
    found = {"cpu_s": time.process_time(), "modules": len(sys.modules), "packages": packages}
    out.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def bare(out: Path) -> None:
    """Load the model with transformers and sample a token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mel_lite.models.demo import demo_model_dir

    folder = demo_model_dir(quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generate(**tokenizer("2 + 2 =", return_tensors="pt"), max_new_tokens=1)
    _end(out)


def trl(out: Path) -> None:
    """Start TRL's trainer and end with the first token that it samples."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from transformers.generation.logits_process import LogitsProcessorList
    from trl import GRPOConfig, GRPOTrainer

    from mel_lite.models.demo import demo_model_dir

    folder = str(demo_model_dir(quiet=True))
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
        trainer = GRPOTrainer(
            folder,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(scratch, per_device_train_batch_size=8, max_completion_length=64, **options),
            train_dataset=Dataset.from_list([{"prompt": "2 + 2 ="}]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
        )
        LogitsProcessorList.__call__ = lambda *_, **__: _end(out)  # type: ignore[method-assign]
        trainer.train()


def mel(out: Path) -> None:
    """Start a run of the demo without evaluation, and end with the first token that it samples."""
    from mel_lite.cli.main import main as command
    from mel_lite.cli.shared import loading

    with loading("loading"):
        from mel_lite.engines import hf
        from mel_lite.engines.seeded_sampler import SeededSampler

    class First(SeededSampler):
        def draw(self, *args: Any, **kwargs: Any) -> Any:
            super().draw(*args, **kwargs)
            _end(out)

    hf.SeededSampler = First  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = ["mel-lite", "train", "--gpu", "cpu", "--eval-dataset", "none", "--output-dir", f"{scratch}/run"]
        command()


def import_(out: Path) -> None:
    import mel_lite  # noqa: F401

    _end(out)


def help_(out: Path) -> None:
    from mel_lite.cli.main import app

    try:
        app(["--help"])
    except SystemExit:
        _end(out)


def import_bare(out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    _end(out)


def import_peft(out: Path) -> None:
    import peft  # noqa: F401

    _end(out)


def import_trl(out: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401

    _end(out)


def import_mel(out: Path) -> None:
    """Import what a run imports, as in the command."""
    from mel_lite.cli.shared import loading

    with loading("loading"):
        import mel_lite.run.train  # noqa: F401
    _end(out)


PROGRAMS = {
    "import": import_, "help": help_, "import-bare": import_bare, "import-peft": import_peft, "import-trl": import_trl,
    "import-mel": import_mel, "bare": bare, "trl": trl, "mel": mel,
}  # fmt: skip
WHO = tuple(PROGRAMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--only", nargs="*", choices=WHO, default=list(WHO))
    parser.add_argument("--one", choices=WHO, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.modules.update(dict.fromkeys(TRACKERS))  # an import of them fails, as where `make venv` installed
        PROGRAMS[arguments.one](arguments.json)
        return
    from speed import step

    for package in ("mel_lite", "kernels"):  # as pip does for the others
        compileall.compile_dir(HERE.parent / package, quiet=1)
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in arguments.only}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "one.json"
        for _ in range(arguments.repeats):
            for who in runs:
                command = [sys.executable, "-m", "speed.startup", "--one", who, "--json", str(out)]
                step.child(command, "mel", None, arguments.threads)
                found = json.loads(out.read_text())
                packages = found.pop("packages")
                print(who, found, flush=True)
                runs[who].append(found if runs[who] else found | {"packages": packages})
    arguments.json.write_text(json.dumps({"threads": arguments.threads, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
