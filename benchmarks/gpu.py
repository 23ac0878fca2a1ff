"""GPU measurements: the log-prob operator, a MEL step at full size within the memory of consumer cards, the engines.

`python benchmarks/gpu.py OUT` measures for at most --minutes, and at most 10 of them per part, most telling first. It
writes OUT/gpu.json and one log per part, and prints a table:

    kernel       the fused log-prob operator: errors, times and memory next to other implementations
    step-24gb    Qwen3-8B in 4 bits within the memory of a 24 GB card: peak and seconds of every phase at full length
    step-16gb    the same for Qwen3-4B on 16 GB
    step-12gb    the same for Qwen3-1.7B on 12 GB
    vllm-24gb    like step-24gb, with Unsloth and vLLM on the same weights
    vllm-16gb    like step-16gb, with Unsloth and vLLM
    vllm-12gb    like step-12gb, with Unsloth and vLLM
    engines      the checks of `gpu_engines.py`: Unsloth with bitsandbytes, and vLLM with shared weights

Weights are random, with the sizes of the real models; nothing is downloaded. Each part runs in a process of its own. If
one fails, its error is recorded and the others run. Parts that OUT/gpu.json has from an earlier call are kept. If
bitsandbytes is missing, weights stay in 16 bits, and the figures say so. `--dry-run` runs everything on a CPU with tiny
sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

STEPS = {f"{kind}-{gpu}": gpu for kind in ("step", "vllm") for gpu in ("24gb", "16gb", "12gb")}
WEIGHTS = {
    "kernel": 3, "step-24gb": 6, "vllm-24gb": 5, "engines": 4, "step-16gb": 3, "vllm-16gb": 3, "step-12gb": 2,
    "vllm-12gb": 2,
}  # fmt: skip
"""Parts in order, with their relative shares of the time."""
PART_S = 600.0
"""Most seconds of a part, so that each fits into one call where a machine is lent for ten minutes at a time."""
PARTS = tuple(WEIGHTS)
QUICK_S = 240.0
"""With less time than this, the engines are measured with small sizes."""
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "vllm", "triton")
GIB = 2**30


# ---- parent process: parts in order, each in a process of its own ----------------------------------------------------


def measure_all(out: Path, parts: list[str], minutes: float, dry_run: bool) -> dict[str, Any]:
    """Run the parts within the time, and return the figures or the error of each part."""
    end_s = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {"machine": machine(), "dry_run": dry_run, "parts": {}}
    if (file := out / "gpu.json").is_file():
        earlier = json.loads(file.read_text())
        same = earlier["dry_run"] == dry_run and earlier["machine"].get("gpu") == found["machine"].get("gpu")
        found["parts"] = earlier["parts"] if same else {}
    for i, part in enumerate(parts):
        # Time that earlier parts did not use is shared as well.
        seconds = (end_s - time.monotonic()) * WEIGHTS[part] / sum(WEIGHTS[name] for name in parts[i:])
        seconds = min(seconds, PART_S)
        found["parts"][part] = run_part(out, part, seconds, dry_run)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def run_part(out: Path, part: str, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Run one part in a process of its own, and return its figures or error."""
    if seconds < 20:
        return {"error": "not run: no time was left"}
    result, log = out / f"{part}.json", out / f"{part}.log"
    partial = out / f"gpu-{part}.json"  # written after each check or shape
    for old in (result, partial):
        old.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(out), "--part", part, "--seconds", f"{seconds - 10:.0f}"]
    start_s = time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that its child processes end with it.
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for file in (result, partial):
        if file.is_file():
            found = json.loads(file.read_text())
            break
    else:
        found = {}
    if code:
        ending = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        found.setdefault("error", f"exit code {code}: {ending}")
    return found | {"wall_s": round(time.monotonic() - start_s, 1)}


def machine() -> dict[str, Any]:
    """Return the versions, and the facts of the GPU."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    facts: dict[str, Any] = {"python": sys.version.split()[0], "packages": {name: version(name) for name in PACKAGES}}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
        facts |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    return facts


def table(found: dict[str, Any]) -> str:
    """Format the figures of all parts for a terminal."""
    lines = []
    for part, figures in found["parts"].items():
        lines.append(f"{part}: {figures.get('model', '')} {figures.get('wall_s', 0):.0f} s")
        if "error" in figures:
            lines.append(f"    {figures['error'].splitlines()[-1]}")
        for row in figures.get("phases", ()):
            if "error" in row:
                lines.append(f"    {row['name']:<10} {row['error'].splitlines()[0][:100]}")
                continue
            ratio = f"{row['measured_bytes'] / row['predicted_bytes']:.3f}" if row["predicted_bytes"] else "-"
            lines.append(
                f"    {row['name']:<12} predicted {row['predicted_bytes'] / GIB:6.2f}  measured "
                f"{row['measured_bytes'] / GIB:6.2f} GiB  ratio {ratio:>6}  {row['seconds_s']:7.2f} s  "
                f"{row.get('tokens_per_s') or 0:9.0f} tokens/s  share {row.get('share', 0):5.1%}"
                + "  LOWERED: it ran out of memory first"
                * row.get("lowered", False)
            )
        for shape in figures.get("shapes", ()):
            lines.append(f"    N {shape['rows']}, H {shape['width']}, V {shape['vocab']}, {shape['operator']}")
            lines += [f"        {contender(each)}" for each in shape["results"] if each["times_s"]]
        for check, stages in figures.get("checks", {}).items():
            outcomes = (f"{name} {'ok' if stage.get('ok') else 'FAILED'}" for name, stage in stages.items())
            lines.append(f"    {check}: {', '.join(outcomes)}")
    return "\n".join(lines)


def contender(result: dict[str, Any]) -> str:
    """Format median time, peak memory and error of one implementation."""
    error = result["logp_error"]
    return (
        f"{result['name']:<28} {1000 * statistics.median(result['times_s']):9.2f} ms  "
        f"{(result['peak_bytes'] or 0) / 2**20:8.0f} MiB  error {'-' if error is None else f'{error:.1e}'}"
    )


def kernel(out: Path, dry_run: bool) -> dict[str, Any]:
    """Return the report of the operator's benchmark; a part that is cut off keeps the shapes it measured."""
    bench = importlib.import_module("mel_lite.kernels.bench")
    shapes = [bench.Shape(64, 32, 512, "float32", operator=name) for name in ("logprobs", "kl")] if dry_run else None
    return dict(bench.run(None, shapes=shapes, rounds=2 if dry_run else 7, json_path=out / "gpu-kernel.json"))


def engines(out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Return the report of `gpu_engines.py`, which is in the same folder."""
    measure = importlib.import_module("gpu_engines").measure
    return dict(measure(out, dry_run or seconds < QUICK_S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for gpu.json and the logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--minutes", type=float, default=15.0, help="time limit for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="use tiny sizes, on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=120.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is None:
        found = measure_all(options.out, options.parts, options.minutes, options.dry_run)
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))
        return
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH excludes it
    file = options.out / f"{options.part}.json"
    try:
        if options.part == "kernel":
            made = kernel(options.out, options.dry_run)
        elif options.part == "engines":
            made = engines(options.out, options.seconds, options.dry_run)
        else:
            made = importlib.import_module("gpu_step").step(options.part, options.out, options.seconds, options.dry_run)
    except BaseException as error:
        traceback.print_exc()
        made = (json.loads(file.read_text()) if file.is_file() else {}) | {"error": f"{type(error).__name__}: {error}"}
    file.write_text(json.dumps(made, indent=1) + "\n")
    sys.exit("error" in made)


if __name__ == "__main__":
    main()
