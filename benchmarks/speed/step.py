"""Compare one GRPO update of MEL-Lite with TRL's: `PYTHONPATH=benchmarks python -m speed.step --trl FOLDER`.

Both trainers get the same model, adapter, prompts, completions and rewards (`step_subject.py`). Each measurement is a
process of its own, and the trainers take turns. Operations are counted by torch's flop counter; memory is the peak of
the process. FOLDER holds the newest TRL that runs on a CPU: `pip install --no-deps --target FOLDER trl`. Without
--trl, only MEL-Lite is measured. Results are added to benchmarks/results/step-cpu.json; a case that is there already is
measured again only with --again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from speed.step_subject import Case

HERE = Path(__file__).resolve().parents[1]
RESULT = HERE / "results" / "step-cpu.json"
SMOL = Case(group_size=4)
QWEN = Case("qwen3", hidden=512, group_size=4)
START = Case(shortest_tokens=64)
SMALL = Case("qwen3", layers=2, hidden=256, vocab=8192, groups=2, group_size=4)

CASES: dict[str, list[Case]] = {
    "targets": [
        SMOL,
        QWEN,
        replace(SMOL, flat_groups=2),
        replace(QWEN, flat_groups=2),
        replace(SMOL, flat_groups=0),
        replace(SMOL, checkpointing=True),
        START,
    ],
    "scaling": [
        SMALL,
        *(replace(SMALL, group_size=size) for size in (8, 16)),
        *(replace(SMALL, longest_tokens=tokens) for tokens in (128, 256)),
        *(replace(SMALL, vocab=vocab) for vocab in (32768, 151936)),
        *(replace(SMALL, hidden=hidden) for hidden in (512, 768)),
        *(replace(SMALL, groups=groups) for groups in (4, 8)),
    ],
}
"""Cases by name of the set."""


def processor() -> str:
    """Return the name of the processor, or its architecture where the system gives no name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def child(command: list[str], who: str, trl: Path | None, threads: int) -> None:
    """Run a program whose TRL is that of `trl` for TRL's trainer, and this environment's for ours."""
    paths = [str(HERE), *([str(trl)] if who == "trl" else []), str(HERE.parent)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-3000:]}")


def run(who: str, case: Case, folder: Path, trl: Path | None, threads: int) -> dict[str, Any]:
    """Measure one step in a process of its own; return its result."""
    command = [sys.executable, "-m", "speed.step_subject", who, json.dumps(asdict(case)), str(folder)]
    child([*command, "--threads", str(threads)], who, trl, threads)
    return dict(json.loads((folder / "result.json").read_text()))


def difference(ours: Path, theirs: Path) -> float:
    """Return |g - g'| / |g'| of the gradients of all weights together."""
    got, expected = load_file(ours), load_file(theirs)
    assert got.keys() == expected.keys() and expected
    squares = [
        ((got[name] - grad).double().square().sum().item(), grad.double().square().sum().item())
        for name, grad in expected.items()
    ]
    off, norm = (sum(column) for column in zip(*squares, strict=True))
    assert norm > 0
    return float((off / norm) ** 0.5)


def measure(case: Case, trl: Path | None, repeats: int, threads: int) -> dict[str, Any]:
    """Measure a case with both trainers in turn; return every result and the difference of the gradients."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "mel": []}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {who: Path(scratch) / who for who in runs}
        for _ in range(repeats):
            for who in runs if trl is not None else ("mel",):
                runs[who].append(run(who, case, folders[who], trl, threads))
                print(case.name, who, {k: v for k, v in runs[who][-1].items() if k != "versions"}, flush=True)
        gradient = "gradient.safetensors"
        error = None if trl is None else difference(folders["mel"] / gradient, folders["trl"] / gradient)
    return {"case": asdict(case), "runs": runs, "gradient_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder with TRL's package")
    parser.add_argument("--cases", choices=list(CASES), default="targets")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases in the set")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure cases again that have a result")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    report: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"cases": []}
    report["machine"] = {"processor": processor(), "threads": arguments.threads}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = CASES[arguments.cases]
    for case in [chosen[i] for i in arguments.only or range(len(chosen))]:
        known = [each for each in report["cases"] if each["case"] == asdict(case)]
        if known and not arguments.again:
            continue
        found = measure(case, arguments.trl, arguments.repeats, arguments.threads)
        report["cases"] = [each for each in report["cases"] if each["case"] != asdict(case)] + [found]
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
