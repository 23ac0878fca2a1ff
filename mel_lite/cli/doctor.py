"""`mel-lite doctor`: is this machine fit to train? One small check per way in which it may not be, each with its fix.

A missing GPU is no fault. `fail` means that something here would break a run; `warn`, that it may, or costs quality.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mel_lite.cli.machine import Facts, gather
from mel_lite.memory.formulas import GIB
from mel_lite.memory.plan import BUDGETS

if TYPE_CHECKING:
    from rich.table import Table

Outcome = Literal["ok", "warn", "fail"]

TESTED = {
    "torch": "2.13.0", "transformers": "5.17.0", "trl": "1.15.0", "peft": "0.21.2", "accelerate": "1.15.0",
    "datasets": "4.8.5", "bitsandbytes": "0.50.2", "triton": "3.7.1", "math-verify": "0.9.0", "gguf": "0.19.0",
}  # fmt: skip
"""Versions that were tested together on a CPU."""
GPU_EXTRAS = {
    "unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "vllm": "0.32.0", "xformers": "0.0.35", "torchao": "0.18.0",
    "vllm-bnb-plugin": "0.0.3",
}  # fmt: skip
"""Versions that resolve together with them; optional."""
OPTIONAL = ("gguf", "triton")
PYTHON = ((3, 11), (3, 13))
"""Oldest Python that works, newest for which every package has wheels."""
MIN_CAPABILITY = (7, 0)
FULL_CAPABILITY = (7, 5)
"""From here on the Triton kernels and vLLM run."""
CHECKPOINT_BYTES = 2 * GIB
"""Room for a few checkpoints and the experience store."""


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    outcome: Outcome
    found: str
    fix: str = ""
    """What to do; empty when nothing needs doing."""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one visit."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """True when a check failed."""
        return any(check.outcome == "fail" for check in self.checks)

    def to_json(self) -> str:
        """`failed` and `checks: [{name, outcome, found, fix}]` as a JSON object."""
        return json.dumps({"failed": self.failed, "checks": [asdict(check) for check in self.checks]}, indent=1)

    def as_table(self) -> Table:
        """A row per check, with its fix below what was found."""
        from rich.markup import escape
        from rich.table import Table

        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(title="mel-lite doctor", show_header=False)
        for check in self.checks:
            text = escape(check.found) + (f"\n[bold]fix:[/] {escape(check.fix)}" if check.fix else "")
            table.add_row(check.name, f"[{colours[check.outcome]}]{check.outcome}[/]", text)
        return table


def examine(run_folder: Path, model: str | None = None) -> Report:
    """Run every check on this machine. `model` is the base whose 16-bit copy must find room; default: Qwen3-8B."""
    facts = gather(run_folder, model or "Qwen/Qwen3-8B-Base", (*TESTED, *GPU_EXTRAS))
    return Report(tuple(check(facts) for check in CHECKS))


def check_python(facts: Facts) -> Check:
    """3.11 at least; beyond the newest with wheels for everything, a warning."""
    found, (oldest, newest) = "{}.{}".format(*facts.python), PYTHON
    if facts.python < oldest:
        return Check("Python", "fail", found, "Install Python 3.11 and make a new virtual environment with it.")
    if facts.python > newest:
        fix = "Not every package of the GPU extra has wheels for it. Use Python 3.11 to 3.13."
        return Check("Python", "warn", found, fix)
    return Check("Python", "ok", found)


def check_packages(facts: Facts) -> Check:
    """Everything required is there, in a version that mel-lite's metadata allows."""
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, facts.requirements):
        if requirement.name not in facts.packages or (requirement.marker and not requirement.marker.evaluate()):
            continue
        version = facts.packages[requirement.name]
        if version is None or not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append((str(requirement), version))
    missing = [name for name in TESTED if name not in OPTIONAL and facts.packages.get(name) is None]
    wrong += [(name, None) for name in missing if not any(text.startswith(name) for text, _ in wrong)]
    if not wrong:
        return Check("required packages", "ok", "all there, in supported versions")
    listing = ", ".join(f"{text} ({'missing' if version is None else version})" for text, version in wrong)
    wanted = " ".join(f"'{text.partition(';')[0].strip()}'" for text, _ in wrong)
    return Check("required packages", "fail", listing, f"pip install {wanted}")


def check_versions(facts: Facts) -> Check:
    """Which packages differ from the set that was tested together."""
    known = {**TESTED, **GPU_EXTRAS}
    other = {}
    for name, version in facts.packages.items():
        if version is not None and name in known and version.partition("+")[0] != known[name]:
            other[name] = f"{name} {version} (tested: {known[name]})"
    if not other:
        return Check("tested versions", "ok", "as tested together")
    wanted = " ".join(f"{name}=={known[name]}" for name in other)
    return Check("tested versions", "warn", ", ".join(other.values()), f"If something breaks: pip install {wanted}")


def check_extras(facts: Facts) -> Check:
    """The optional GPU packages; unsloth without its other half does not import."""
    there = {name: version for name in GPU_EXTRAS if (version := facts.packages.get(name)) is not None}
    if ("unsloth" in there) != ("unsloth_zoo" in there):
        fix = "pip install 'unsloth>=2026.10' 'unsloth_zoo>=2026.10'"
        return Check("GPU extra", "fail", "one of unsloth and unsloth_zoo is missing", fix)
    if there:
        return Check("GPU extra", "ok", ", ".join(f"{name} {version}" for name, version in there.items()))
    if facts.gpu is None:
        return Check("GPU extra", "ok", "not installed; without a GPU it is of no use")
    return Check("GPU extra", "ok", "not installed: generation uses transformers", "pip install 'mel-lite[gpu]'")


def check_driver(facts: Facts) -> Check:
    """PyTorch's CUDA and the driver fit: a driver serves every CUDA of its own major version and below."""
    name = "driver and CUDA"
    driver, built = facts.driver_cuda, facts.torch_cuda
    if driver is None:
        if built is None:
            return Check(name, "ok", "no NVIDIA driver, PyTorch for CPUs: use --gpu cpu")
        fix = "On a machine with an NVIDIA GPU, install its driver (in a container: start it with --gpus all)."
        return Check(name, "ok", f"no NVIDIA driver; PyTorch for CUDA {_dotted(built)} runs on the CPU", fix)
    text = f"driver for CUDA {_dotted(driver)}"
    if built is None:
        fix = f"Install PyTorch for CUDA {driver[0]} (https://pytorch.org/get-started/locally says how)."
        return Check(name, "fail", f"{text}, but PyTorch was built for CPUs", fix)
    text += f", PyTorch for CUDA {_dotted(built)}"
    if built[0] > driver[0]:
        fix = f"Update the NVIDIA driver to one for CUDA {built[0]}, or install a PyTorch for CUDA {driver[0]}."
        return Check(name, "fail", f"{text}: the driver is too old", fix)
    if facts.gpu is None:
        if facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
            hidden = f"{text}, but CUDA_VISIBLE_DEVICES={facts.visible_devices!r} hides every GPU"
            return Check(name, "warn", hidden, "Unset CUDA_VISIBLE_DEVICES.")
        fix = "Run `python -c 'import torch; torch.zeros(1).cuda()'` for the reason; after a driver update, reboot."
        return Check(name, "fail", f"{text}, but PyTorch finds no usable GPU", fix)
    return Check(name, "ok", text)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def check_capability(facts: Facts) -> Check:
    """The card is new enough for our kernels, and PyTorch has code for it."""
    name = "compute capability"
    if (gpu := facts.gpu) is None:
        return Check(name, "ok", "no GPU")
    major, minor = gpu.capability
    found = f"{gpu.name}: {major}.{minor}"
    if gpu.architectures and not any(_runs(code, gpu.capability) for code in gpu.architectures):
        fix = "Install a PyTorch built for it: newer for a new card, older for an old one."
        return Check(name, "fail", f"{found}, but PyTorch has code for {', '.join(gpu.architectures)}", fix)
    if gpu.capability < MIN_CAPABILITY:
        return Check(name, "fail", found, "4-bit training needs 7.0 (V100) or more. Use another card, or --gpu cpu.")
    if gpu.capability < FULL_CAPABILITY:
        fix = "The fused log-probs run in torch instead of Triton, and vLLM does not run: it works, slower."
        return Check(name, "warn", found, fix)
    return Check(name, "ok", found)


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Machine code (`sm_86`) serves its major version from its minor on; `compute_86` is translated for all newer."""
    kind, _, digits = code.partition("_")
    digits = "".join(d for d in digits if d.isdigit())
    made_for = int(digits[:-1]), int(digits[-1])
    if kind == "sm":
        return made_for[0] == capability[0] and made_for[1] <= capability[1]
    return made_for <= capability


def check_bf16(facts: Facts) -> Check:
    """bfloat16 in hardware, or float16 instead."""
    if facts.gpu is None:
        return Check("bfloat16", "ok", "no GPU; on a CPU training is in float32")
    if facts.gpu.bf16:
        return Check("bfloat16", "ok", "computed natively")
    fix = "--gpu auto sets it; else --set train.bf16=false --set train.fp16=true (as the 16gb preset does)."
    return Check("bfloat16", "warn", f"{facts.gpu.name} does not compute in it", fix)


def check_memory(facts: Facts) -> Check:
    """Which preset is for this card."""
    if facts.gpu is None:
        return Check("GPU memory", "ok", "no GPU")
    total = facts.gpu.total_bytes
    presets = [preset for preset, needed in BUDGETS.items() if needed <= total]
    found = f"{total / GIB:.1f} GiB"
    if not presets:
        fix = "Below every preset: mel-lite train --gpu 12gb --model Qwen/Qwen3-0.6B-Base, with the plan's advice."
        return Check("GPU memory", "warn", found, fix)
    return Check("GPU memory", "ok", f"{found}: --gpu {presets[-1]}")


def check_compiler(facts: Facts) -> Check:
    """Triton compiles a small launcher with the system's C compiler."""
    if facts.compiler is not None:
        return Check("C compiler", "ok", facts.compiler)
    if facts.gpu is None:
        return Check("C compiler", "ok", "none; needed on a GPU only")
    fix = "apt-get install gcc. Without it the fused log-probs run in torch, slower."
    return Check("C compiler", "warn", "none, so Triton cannot compile its kernels", fix)


def check_kernels(facts: Facts) -> Check:
    """`import kernels` must find Hugging Face's package or nothing; transformers and bitsandbytes ask for it."""
    origin = facts.kernels_origin
    if origin is None or {"site-packages", "dist-packages"} & set(Path(origin).parts):
        return Check("package `kernels`", "ok", "not shadowed" if origin is None else origin)
    fix = "Set PYTHONSAFEPATH=1 or start Python in another folder; take the checkout out of PYTHONPATH."
    return Check("package `kernels`", "warn", f"`import kernels` finds {origin}, not Hugging Face's package", fix)


def check_import_order(facts: Facts) -> Check:
    """MELTrainer gets TRL's released trainer, and nothing patches libraries behind the user's back."""
    if facts.trl_problem is not None:
        fix = "pip install 'trl>=1.15,<1.17' 'transformers>=5.3,<6'"
        return Check("TRL and import order", "fail", f"TRL's released trainer: {facts.trl_problem}", fix)
    if facts.loaded_early:
        fix = "Something imports it when Python starts (sitecustomize.py, a .pth file). Remove that."
        return Check("TRL and import order", "warn", f"{', '.join(facts.loaded_early)} was imported already", fix)
    return Check("TRL and import order", "ok", "MELTrainer builds on TRL's released trainer")


def check_compiled_cache(facts: Facts) -> Check:
    """Unsloth's generated code was made by the versions that are installed now."""
    name = "unsloth_compiled_cache"
    if (cache := facts.compiled_cache) is None:
        return Check(name, "ok", "none here")
    fix = f"rm -r {cache} (it is made again when needed)"
    if facts.packages.get("unsloth") is None:
        return Check(name, "warn", f"{cache} is left over: unsloth is not installed", fix)
    if facts.compiled_for is None:
        return Check(name, "warn", f"{cache} does not say what made it", fix)
    installed = {facts.packages.get(package) for package in ("unsloth", "unsloth_zoo", "transformers", "trl")}
    if stale := [version for version in facts.compiled_for if version not in installed]:
        return Check(name, "warn", f"{cache} was made by other versions ({', '.join(stale)})", fix)
    return Check(name, "ok", f"{cache}, of the installed versions")


def check_disk(facts: Facts) -> Check:
    """Room where runs are written: checkpoints, and at the end the base model in 16 bits."""
    free = facts.run_free_bytes
    found = f"{free / GIB:.1f} GiB free for {facts.run_folder}"
    if free < CHECKPOINT_BYTES:
        return Check("disk for runs", "fail", found, "Free some space, or choose --output-dir on another disk.")
    if facts.model_bytes is None:
        return Check("disk for runs", "ok", f"{found}; the size of {facts.model} is not known here")
    needed = facts.model_bytes + CHECKPOINT_BYTES
    if free < needed:
        fix = "Free some space, or skip the merged model (--set export.format=null) and export elsewhere later."
        return Check("disk for runs", "warn", f"{found}; {facts.model} takes {needed / GIB:.1f} to export", fix)
    return Check("disk for runs", "ok", f"{found}; {facts.model} takes {needed / GIB:.1f} to export")


def check_hub(facts: Facts) -> Check:
    """The Hub's cache can take the model, or has it already; offline mode needs the latter."""
    where = f"cache {facts.hub_cache}"
    if facts.model_cached:
        return Check("Hugging Face Hub", "ok", f"{where}, {facts.model} is in it" + (", offline" * facts.offline))
    if facts.offline:
        fix = f"Unset HF_HUB_OFFLINE, or fetch the model while online: hf download {facts.model}"
        return Check("Hugging Face Hub", "warn", f"offline mode, and {facts.model} is not in the {where}", fix)
    if not facts.hub_writable:
        return Check("Hugging Face Hub", "fail", f"{where} cannot be written", "Set HF_HOME to a folder of yours.")
    if facts.model_bytes is not None and facts.hub_free_bytes < facts.model_bytes:
        found = f"{where} has {facts.hub_free_bytes / GIB:.1f} GiB free, {facts.model} takes "
        fix = "Set HF_HOME to a folder on a larger disk, or free some space (hf cache ls, hf cache rm)."
        return Check("Hugging Face Hub", "warn", found + f"{facts.model_bytes / GIB:.1f}", fix)
    return Check("Hugging Face Hub", "ok", f"{where}, {facts.hub_free_bytes / GIB:.1f} GiB free, online")


CHECKS: tuple[Callable[[Facts], Check], ...] = (
    check_python,
    check_packages,
    check_versions,
    check_extras,
    check_driver,
    check_capability,
    check_bf16,
    check_memory,
    check_compiler,
    check_kernels,
    check_import_order,
    check_compiled_cache,
    check_disk,
    check_hub,
)
