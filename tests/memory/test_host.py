"""Plans for a run on the CPU: the memory that is stated or free, and the tokens of a pass that it holds."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mel_lite.errors import ConfigError
from mel_lite.gpus import cpu_budget_bytes, preset_of
from mel_lite.memory import formulas, host
from mel_lite.memory.host import WORTH_BYTES
from mel_lite.memory.plan import find_gpu, plan, plan_for, shape_for
from mel_lite.memory.predict import predict
from mel_lite.memory.search import CPU_TOKENS, changed
from mel_lite.memory.workload import workload
from mel_lite.recipe import resolve

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have 16 GB of memory, 10 of them free."""
    memory = SimpleNamespace(total=16 * GB, available=10 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def planned(gpu: str, *overrides: tuple[str, Any]) -> tuple[Any, Any]:
    recipe, made, reason = plan_for(gpu, None, list(overrides), run_here=True)
    assert made is not None, reason
    return recipe, made


def test_the_budget_is_what_is_stated_or_free() -> None:
    assert find_gpu("cpu", run_here=True).budget_bytes == find_gpu("cpu").budget_bytes == 10 * GB
    assert find_gpu("cpu-4gb", run_here=True).budget_bytes == find_gpu("CPU:4GB").budget_bytes == 4 * GB
    assert find_gpu("cpu-12gb", run_here=True).budget_bytes == 10 * GB, "no more than is free here"
    assert find_gpu("cpu-64gb").budget_bytes == 64 * GB, "for another machine"
    assert preset_of("cpu-4gb") == ("cpu", "") and cpu_budget_bytes("cpu") is None
    with pytest.raises(ConfigError, match="neither a preset nor a known card"):
        find_gpu("cpu-4")


def test_the_budget_decides_the_tokens_of_a_pass() -> None:
    """More memory never gives fewer tokens, and a plan that fits stays within the budget."""
    keep = ("train.gradient_checkpointing", False)
    found = []
    for budget in range(12, 41):
        # Without lessons, whose longest takes more tokens than any of the choices.
        recipe = resolve(preset="cpu", overrides=[keep, ("train.algorithm", "grpo")])
        options: dict[str, Any] = {"budget_bytes": budget * GB // 10, "pinned": (keep[0],)}
        made = plan(recipe, shape_for(recipe), gpu="cpu", **options)
        assert made.fits == (made.peak_bytes <= options["budget_bytes"])
        found.append((made.choices["train.max_micro_batch_tokens"], made.fits))
    assert found == sorted(found), found
    assert found[0] == (min(CPU_TOKENS), False) and found[-1] == (max(CPU_TOKENS), True)
    assert len({tokens for tokens, _ in found}) > 2


def test_the_demo_fits_three_gigabytes_without_checkpointing() -> None:
    recipe, made = planned("cpu-3gb")
    assert made.fits and made.peak_bytes <= 3 * GB and recipe.train["max_micro_batch_tokens"] == max(CPU_TOKENS)
    assert recipe.train["gradient_checkpointing"] is False
    assert "optim" not in recipe.train, "no optimizer state is in 8 bits on a CPU"
    assert [phase.name for phase in made.phases][-1] == "export" and made.phases[-1].bytes < made.peak_bytes


def test_less_memory_costs_time_first_and_is_refused_last() -> None:
    recipe, made = planned("cpu-2gb")
    assert made.fits and made.peak_bytes <= 2 * GB and recipe.train["gradient_checkpointing"] is True
    _, made = planned("cpu-1gb")
    assert not made.fits
    needed = -(-made.peak_bytes // GB)
    assert f"there are 0.9 GiB. Give it {needed} GB (--gpu cpu-{needed}gb)" in made.refusal()
    assert planned(f"cpu-{needed}gb")[1].fits, "the advice holds"


def test_a_pinned_budget_that_does_not_fit_is_refused_with_one_that_does() -> None:
    options = (("train.max_micro_batch_tokens", 65536), ("train.per_device_train_batch_size", 512))
    recipe, made = planned("cpu-3gb", *options, ("train.gradient_checkpointing", False))
    assert not made.fits and recipe.train["max_micro_batch_tokens"] == 65536
    advice = next(line for line in made.advice if line.startswith("--set train.max_micro_batch_tokens="))
    tokens = int(advice.partition("=")[2])
    fitting = (("train.max_micro_batch_tokens", tokens), options[1], ("train.gradient_checkpointing", False))
    assert planned("cpu-3gb", *fitting)[1].fits


def test_what_is_counted_on_a_cpu() -> None:
    """Float32 weights, the libraries in place of a CUDA context, and the merged weights while sampling."""
    recipe, made = planned("cpu")
    shape = shape_for(recipe)
    rollout = next(phase for phase in made.phases if phase.name == "rollout")
    assert rollout.parts["weights"] == 4 * (formulas.linear_parameters(shape) + formulas.other_parameters(shape))
    assert rollout.parts["merged weights"] == 4 * (formulas.linear_parameters(shape) + shape.vocab * shape.hidden)
    assert all("CUDA and allocator" not in phase.parts for phase in made.phases)
    on_gpu = workload(changed(recipe, use_cpu=False), shape)
    assert "merged weights" not in predict(on_gpu)[1].parts


HOLES = """
from mel_lite.memory.host import WORTH_BYTES, return_freed_memory
def rss():
    return 4096 * int(open("/proc/self/statm").read().split()[1])
blocks = [bytearray(100_000) for _ in range(8 * WORTH_BYTES // 400_000)]
kept = blocks[::16]
before = rss()
del blocks
held = rss()
print(return_freed_memory(), before - held, held - rss(), sum(map(len, kept)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_between_blocks_go_back_to_the_system() -> None:
    """512 MB in blocks of 100 kB, of which every sixteenth is kept: malloc cannot shrink its heap past these."""
    done = subprocess.run([sys.executable, "-P", "-c", HOLES], capture_output=True, text=True, check=True)
    returned, by_itself, given_back, _ = done.stdout.split()
    assert returned == "True" and int(given_back) > WORTH_BYTES > int(by_itself)


def test_a_few_free_bytes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    glibc = SimpleNamespace(
        mallinfo2=lambda: SimpleNamespace(fordblks=WORTH_BYTES - 1), malloc_trim=lambda _: pytest.fail("not worth it")
    )
    monkeypatch.setattr(host, "_glibc", lambda: glibc)
    assert host.return_freed_memory() is False
    monkeypatch.setattr(host, "_glibc", lambda: None)  # another C library
    assert host.return_freed_memory() is False
