"""`mel-lite doctor`: check that this machine can train. Each check is one small function that also suggests a fix.

A missing GPU is not a failure. `fail` means that a run would break; `warn` means that it may break, or lose speed or
quality.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mel_lite.cli.machine import Facts, gather
from mel_lite.imports import install_command
from mel_lite.memory.formulas import GIB
from mel_lite.memory.plan import BUDGETS

if TYPE_CHECKING:
    from rich.table import Table

Outcome = Literal["ok", "warn", "fail"]

TESTED = {
    "torch": "2.13.0", "transformers": "5.17.0", "trl": "1.15.0", "peft": "0.21.2", "accelerate": "1.15.0",
    "datasets": "4.8.5", "bitsandbytes": "0.50.2", "triton": "3.7.1", "math-verify": "0.9.0", "gguf": "0.19.0",
}  # fmt: skip
"""Versions that were tested together, on a CPU."""
GPU_EXTRAS = {
    "unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "vllm": "0.32.0", "xformers": "0.0.35", "torchao": "0.18.0",
    "vllm-bnb-plugin": "0.0.3",
}  # fmt: skip
"""Optional packages, in versions that resolve together with TESTED."""
OPTIONAL = ("gguf", "triton")
PYTHON = ((3, 11), (3, 13))
"""Oldest supported Python, and the newest for which every package has wheels."""
MIN_CAPABILITY = (7, 0)
FULL_CAPABILITY = (7, 5)
"""Minimum compute capability for the Triton kernels and vLLM."""
CHECKPOINT_BYTES = 2 * GIB
"""Space for a few checkpoints and the experience store."""


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check."""

    name: str
    outcome: Outcome
    found: str
    fix: str = ""
    """Suggested fix; empty if none is needed."""


@dataclass(frozen=True, slots=True)
class Report:
    """Results of all checks."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        """True if any check failed."""
        return any(check.outcome == "fail" for check in self.checks)

    def to_json(self) -> str:
        """Return a JSON object: `failed` and `checks: [{name, outcome, found, fix}]`."""
        return json.dumps({"failed": self.failed, "checks": [asdict(check) for check in self.checks]}, indent=1)

    def as_table(self) -> Table:
        """Render one row per check, with the fix below the finding."""
        from rich.markup import escape
        from rich.table import Table

        colors = {"ok": "green", "warn": "yellow", "fail": "red"}
        table = Table(title="mel-lite doctor", show_header=False)
        for check in self.checks:
            text = escape(check.found) + (f"\n[bold]fix:[/] {escape(check.fix)}" if check.fix else "")
            table.add_row(check.name, f"[{colors[check.outcome]}]{check.outcome}[/]", text)
        return table


def examine(run_folder: Path, model: str | None = None) -> Report:
    """Run every check on this machine. `model` is the base whose 16-bit copy must fit on disk; default: Qwen3-8B."""
    facts = gather(run_folder, model or "Qwen/Qwen3-8B-Base", (*TESTED, *GPU_EXTRAS))
    return Report(tuple(check(facts) for check in CHECKS))


def check_python(facts: Facts) -> Check:
    """Fail below Python 3.11; warn above the newest version with wheels for every package."""
    found, (oldest, newest) = "{}.{}".format(*facts.python), PYTHON
    if facts.python < oldest:
        return Check("Python", "fail", found, "Install Python 3.11 and make a new virtual environment with it.")
    if facts.python > newest:
        fix = "Some packages of the GPU extra have no wheels for it. Use Python 3.11 to 3.13."
        return Check("Python", "warn", found, fix)
    return Check("Python", "ok", found)


def check_packages(facts: Facts) -> Check:
    """Check that every required package is installed, in a version that mel-lite's metadata allows."""
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
        return Check("required packages", "ok", "all installed, in supported versions")
    listing = ", ".join(f"{text} ({'missing' if version is None else version})" for text, version in wrong)
    wanted = " ".join(f"'{text.partition(';')[0].strip()}'" for text, _ in wrong)
    return Check("required packages", "fail", listing, f"pip install {wanted}")


def check_versions(facts: Facts) -> Check:
    """Warn about packages whose version differs from the set that was tested together."""
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
    """Check the optional GPU packages. unsloth cannot be imported without unsloth_zoo."""
    installed = {name: version for name in GPU_EXTRAS if (version := facts.packages.get(name)) is not None}
    if ("unsloth" in installed) != ("unsloth_zoo" in installed):
        fix = "pip install 'unsloth>=2026.10' 'unsloth_zoo>=2026.10'"
        return Check("GPU extra", "fail", "one of unsloth and unsloth_zoo is missing", fix)
    if installed:
        return Check("GPU extra", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))
    if facts.gpu is None:
        return Check("GPU extra", "ok", "not installed; not needed without a GPU")
    return Check("GPU extra", "ok", "not installed: generation uses transformers", install_command("gpu"))


def check_driver(facts: Facts) -> Check:
    """Check that the driver supports PyTorch's CUDA: a driver supports its own major version of CUDA and older ones."""
    name = "driver and CUDA"
    driver, built = facts.driver_cuda, facts.torch_cuda
    if driver is None:
        if built is None:
            return Check(name, "ok", "no NVIDIA driver, CPU build of PyTorch: use --gpu cpu")
        fix = "If the machine has an NVIDIA GPU, install its driver (in a container: start it with --gpus all)."
        return Check(name, "ok", f"no NVIDIA driver; PyTorch for CUDA {_dotted(built)} runs on the CPU", fix)
    text = f"driver for CUDA {_dotted(driver)}"
    if built is None:
        fix = f"Install PyTorch for CUDA {driver[0]}; see https://pytorch.org/get-started/locally."
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
    """Check that the card is new enough for the kernels, and that PyTorch has code for it."""
    name = "compute capability"
    if (gpu := facts.gpu) is None:
        return Check(name, "ok", "no GPU")
    major, minor = gpu.capability
    found = f"{gpu.name}: {major}.{minor}"
    if gpu.architectures and not any(_runs(code, gpu.capability) for code in gpu.architectures):
        fix = "Install a PyTorch built for it: a newer one for a new card, an older one for an old card."
        return Check(name, "fail", f"{found}, but PyTorch has code for {', '.join(gpu.architectures)} only", fix)
    if gpu.capability < MIN_CAPABILITY:
        return Check(name, "fail", found, "4-bit training needs 7.0 (V100) or newer. Use another card, or --gpu cpu.")
    if gpu.capability < FULL_CAPABILITY:
        fix = "Training works but is slower: fused log-probs run in torch instead of Triton, and vLLM is unavailable."
        return Check(name, "warn", found, fix)
    return Check(name, "ok", found)


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Return True if compiled `code` runs on a card of this capability.

    Machine code (`sm_86`) runs on its major version with the same or a higher minor version. PTX (`compute_86`) is
    translated for every newer card.
    """
    kind, _, digits = code.partition("_")
    digits = "".join(d for d in digits if d.isdigit())
    target = int(digits[:-1]), int(digits[-1])
    if kind == "sm":
        return target[0] == capability[0] and target[1] <= capability[1]
    return target <= capability


def check_bf16(facts: Facts) -> Check:
    """Warn if the card has no native bfloat16, so that float16 is needed."""
    if facts.gpu is None:
        return Check("bfloat16", "ok", "no GPU; training on a CPU uses float32")
    if facts.gpu.bf16:
        return Check("bfloat16", "ok", "supported natively")
    fix = "Use --gpu auto, or --set train.bf16=false --set train.fp16=true (like the 16gb preset)."
    return Check("bfloat16", "warn", f"{facts.gpu.name} does not support it natively", fix)


def check_memory(facts: Facts) -> Check:
    """Suggest the preset for this card."""
    if facts.gpu is None:
        return Check("GPU memory", "ok", "no GPU")
    total = facts.gpu.total_bytes
    presets = [preset for preset, needed in BUDGETS.items() if needed <= total]
    found = f"{total / GIB:.1f} GiB"
    if not presets:
        fix = "Below every preset: use mel-lite train --gpu 12gb --model Qwen/Qwen3-0.6B-Base and follow its advice."
        return Check("GPU memory", "warn", found, fix)
    return Check("GPU memory", "ok", f"{found}: --gpu {presets[-1]}")


def check_compiler(facts: Facts) -> Check:
    """Check for a C compiler, with which Triton compiles its launcher."""
    if facts.compiler is not None:
        return Check("C compiler", "ok", facts.compiler)
    if facts.gpu is None:
        return Check("C compiler", "ok", "none; only needed on a GPU")
    fix = "apt-get install gcc. Without it, fused log-probs run in torch and are slower."
    return Check("C compiler", "warn", "none, so Triton cannot compile its kernels", fix)


def check_kernels(facts: Facts) -> Check:
    """Check that `import kernels` finds Hugging Face's package or nothing: transformers and bitsandbytes import it."""
    origin = facts.kernels_origin
    if origin is None or {"site-packages", "dist-packages"} & set(Path(origin).parts):
        return Check("package `kernels`", "ok", "not shadowed" if origin is None else origin)
    fix = "Set PYTHONSAFEPATH=1 or start Python in another folder, and remove the checkout from PYTHONPATH."
    return Check("package `kernels`", "warn", f"`import kernels` finds {origin}, not Hugging Face's package", fix)


def check_import_order(facts: Facts) -> Check:
    """Check that TRL's released trainer can be loaded, and that no patching package was imported before."""
    if facts.trl_problem is not None:
        fix = "pip install 'trl>=1.15,<1.17' 'transformers>=5.3,<6'"
        return Check("TRL and import order", "fail", f"TRL's released trainer: {facts.trl_problem}", fix)
    if facts.loaded_early:
        fix = "It is imported when Python starts (sitecustomize.py, a .pth file). Remove that import."
        return Check("TRL and import order", "warn", f"{', '.join(facts.loaded_early)} was imported already", fix)
    return Check("TRL and import order", "ok", "MELTrainer builds on TRL's released trainer")


def check_compiled_cache(facts: Facts) -> Check:
    """Check that Unsloth's generated code was written by the installed versions."""
    name = "unsloth_compiled_cache"
    if (cache := facts.compiled_cache) is None:
        return Check(name, "ok", "none")
    fix = f"rm -r {cache} (it is regenerated when needed)"
    if facts.packages.get("unsloth") is None:
        return Check(name, "warn", f"{cache} is left over: unsloth is not installed", fix)
    if facts.compiled_for is None:
        return Check(name, "warn", f"{cache} does not record the versions that wrote it", fix)
    installed = {facts.packages.get(package) for package in ("unsloth", "unsloth_zoo", "transformers", "trl")}
    if stale := [version for version in facts.compiled_for if version not in installed]:
        return Check(name, "warn", f"{cache} was written by other versions ({', '.join(stale)})", fix)
    return Check(name, "ok", f"{cache}, written by the installed versions")


def check_disk(facts: Facts) -> Check:
    """Check the space for runs: checkpoints, and the base model in 16 bits for the export."""
    free = facts.run_free_bytes
    found = f"{free / GIB:.1f} GiB free for {facts.run_folder}"
    if free < CHECKPOINT_BYTES:
        return Check("disk for runs", "fail", found, "Free some space, or choose --output-dir on another disk.")
    if facts.model_bytes is None:
        return Check("disk for runs", "ok", f"{found}; the size of {facts.model} is unknown")
    needed = facts.model_bytes + CHECKPOINT_BYTES
    found = f"{found}; exporting {facts.model} takes {needed / GIB:.1f} GiB"
    if free < needed:
        fix = "Free some space, or skip the merged model (--set export.format=null) and export elsewhere later."
        return Check("disk for runs", "warn", found, fix)
    return Check("disk for runs", "ok", found)


def check_hub(facts: Facts) -> Check:
    """Check that the Hub cache contains the model, or has space for it. Offline mode needs the former."""
    where = f"cache {facts.hub_cache}"
    if facts.model_cached:
        return Check("Hugging Face Hub", "ok", f"{where} contains {facts.model}" + (", offline" * facts.offline))
    if facts.offline:
        fix = f"Unset HF_HUB_OFFLINE, or download the model while online: hf download {facts.model}"
        return Check("Hugging Face Hub", "warn", f"offline mode, and {facts.model} is not in the {where}", fix)
    if not facts.hub_writable:
        return Check("Hugging Face Hub", "fail", f"{where} cannot be written", "Set HF_HOME to a writable folder.")
    if facts.model_bytes is not None and facts.hub_free_bytes < facts.model_bytes:
        found = f"{where} has {facts.hub_free_bytes / GIB:.1f} GiB free; {facts.model} takes "
        fix = "Set HF_HOME to a folder on a larger disk, or free some space (hf cache ls, hf cache rm)."
        return Check("Hugging Face Hub", "warn", found + f"{facts.model_bytes / GIB:.1f} GiB", fix)
    found = f"{where}, {facts.hub_free_bytes / GIB:.1f} GiB free"
    if facts.hub_answers is False:
        fix = "Connect to the network (or set HTTPS_PROXY), give a local folder as --model, or use the demo model."
        return Check("Hugging Face Hub", "warn", f"{found}; the Hub cannot be reached, {facts.model} is missing", fix)
    return Check("Hugging Face Hub", "ok", found + (", online" if facts.hub_answers else ""))


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
