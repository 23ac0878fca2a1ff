"""Who may import whom: rooms import from their own layer or below, heavy packages live in one room each."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "types errors deferred files gpus imports intervals seeds signals text trl_compat kernels",
        "models data verify verifiers config option_checks",
        "engines recipe",
        "lessons templates evaluate memory",
        "training",
        "resilience report warmup hub export",
        "trainer",
        "run",
        "cli __main__",
    )
)
"""Packages and top-level modules of `mel_lite`; each imports from its own line or the ones above."""

ONE_ROOM = {
    "triton": "kernels",
    "unsloth": "engines.unsloth",
    "unsloth_zoo": "engines.unsloth",
    "vllm": "engines.unsloth",
    "wandb": None,
    "trackio": None,
    "matplotlib": "report.charts",
    "textual": "report.browser",
}
"""Heavy package -> the only room that may import it, inside functions or not; None = nobody (TRL logs for us)."""

HEAVY = (*ONE_ROOM, *"torch transformers trl peft accelerate datasets bitsandbytes pandas pyarrow".split())

NOT_LIGHT = frozenset("kernels config option_checks evaluate training resilience trainer".split()) | frozenset(
    """engines.buckets engines.decode engines.hf engines.merged engines.seeded_sampler engines.unsloth engines.vllm
    export.merge
    run.train run.progress run.load_model run.finish run.bench_step run.operations
    run.probe.run run.probe.gradients run.probe.lessons run.probe.measure report.browser
    run.tasks run.evaluations
    warmup.train""".split()
)
"""Packages and modules about tensors or TRL's classes. The others load no heavy package until a function runs."""


def room_files() -> dict[str, Path]:
    """Dotted room (below `mel_lite`, "" = the package itself) -> source file; kernels stand at the top of the tree."""
    files = {}
    for folder, prefix in ((ROOT / "mel_lite", ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == "mel_lite" and parts[0] in ("kernels", "configs"):
                continue  # the checkout shims
            name = prefix + ".".join(part for part in parts if part != "__init__")
            files[name.rstrip(".")] = path
    return files


FILES = room_files()


def imported(room: str, source: str) -> Iterator[str]:
    """Dotted modules a room's source imports anywhere, `from a import b` as both "a" and "a.b"."""
    is_package = room in FILES and FILES[room].name == "__init__.py"
    package = ["mel_lite", *room.split(".")] if room else ["mel_lite"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            base = ".".join(package[: len(package) - up]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(room: str) -> int:
    name = room.split(".")[0]
    for layer, rooms in enumerate(LAYERS):
        if name in rooms:
            return layer
    raise AssertionError(f"mel_lite.{room} has no layer: enter it in LAYERS of {Path(__file__).name}")


def inner_imports(room: str, source: str, rooms: set[str]) -> set[str]:
    """The rooms of ours that a room imports."""
    ours = {name.removeprefix("mel_lite.") for name in imported(room, source) if name.startswith("mel_lite.")}
    return (ours & rooms) - {room}


def breaches(room: str, source: str, rooms: set[str]) -> list[str]:
    """Every way in which one source file breaks the law, in words."""
    found = []
    names = list(imported(room, source))
    if room and any(name.split(".")[0] in ("kernels", "configs") for name in names):
        found.append("imports the top-level folder, not mel_lite.kernels or mel_lite.configs")
    for package in sorted({name.split(".")[0] for name in names} & set(ONE_ROOM)):
        allowed = ONE_ROOM[package]
        if allowed is None or not (room == allowed or room.startswith(f"{allowed}.")):
            found.append(f"imports {package}, which only {allowed or 'TRL'} may")
    if not room:
        return found  # the front door names the trainer for type checkers; it is run for real below
    for other in sorted(inner_imports(room, source, rooms)):
        if layer_of(other) > layer_of(room):
            found.append(f"layer {layer_of(room)} imports {other} of layer {layer_of(other)}")
    if room.split(".")[0] == "kernels":
        known = {"torch", "triton", *sys.stdlib_module_names}
        outside = [name for name in names if not name.startswith("mel_lite.kernels")]
        found += [f"kernels imports {name}" for name in outside if name.split(".")[0] not in known]
    return found


@pytest.mark.parametrize("room", FILES)
def test_every_room_keeps_the_law(room: str) -> None:
    assert breaches(room, FILES[room].read_text(), set(FILES)) == []


@pytest.mark.parametrize(
    ("room", "source", "breach"),
    [
        ("models.load", "from mel_lite.engines.base import Engine", "layer 1 imports engines.base of layer 2"),
        ("lessons.store", "from mel_lite import cli", "layer 3 imports cli of layer 8"),
        ("errors", "def f():\n    import mel_lite.lessons.store", "layer 0 imports lessons.store of layer 3"),
        ("engines.hf", "from ..trainer import MELTrainer", "layer 2 imports trainer of layer 6"),
        ("trainer", "if True:\n    import unsloth", "imports unsloth, which only engines.unsloth may"),
        ("training.metrics", "from wandb import log", "imports wandb, which only TRL may"),
        ("training.scoring", "import triton.language as tl", "imports triton, which only kernels may"),
        (
            "training.scoring",
            "from kernels import x",
            "imports the top-level folder, not mel_lite.kernels or mel_lite.configs",
        ),
        ("kernels", "from mel_lite.types import Pair", "kernels imports mel_lite.types"),
        ("kernels.api", "from .. import seeds", "kernels imports mel_lite.seeds"),
        ("kernels.api", "import numpy", "kernels imports numpy"),
    ],
)
def test_the_law_has_teeth(room: str, source: str, breach: str) -> None:
    rooms = {
        "cli",
        "engines.base",
        "engines.hf",
        "kernels",
        "kernels.api",
        "seeds",
        "lessons.store",
        "trainer",
        "types",
    }
    assert breach in breaches(room, source, rooms)


def test_rooms_do_not_import_in_circles() -> None:
    graph = {room: inner_imports(room, path.read_text(), set(FILES)) for room, path in FILES.items() if room}
    packages = {room for room in FILES if FILES[room].name == "__init__.py"}
    for room in graph:  # `import a.b` runs a first
        graph[room] -= packages if room.split(".")[0] in packages else set()
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
TEST_MODULES = {path.stem for path in TEST_FILES if path.stem.startswith("test_")}


def imported_tests(source: str) -> set[str]:
    """The imports of a source, anywhere and by any path, that lead to a test module."""
    return {name for name in imported("", source) if set(name.split(".")) & TEST_MODULES}


def test_no_test_module_is_imported_by_another() -> None:
    """What two of them need is in `tests/helpers` or a conftest."""
    assert len(TEST_MODULES) > 50
    found = {str(path.relative_to(ROOT)): imported_tests(path.read_text()) for path in TEST_FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from test_trainer import sums", {"test_trainer", "test_trainer.sums"}),
        ("def f():\n    import tests.engines.test_hf as hf", {"tests.engines.test_hf"}),
        ("from engines import test_hf", {"engines.test_hf"}),
        ("from .test_import_law import FILES", {"mel_lite.test_import_law", "mel_lite.test_import_law.FILES"}),
        ("from trainers import build\nimport test", set()),
    ],
)
def test_an_import_of_a_test_module_is_found(source: str, names: set[str]) -> None:
    assert imported_tests(source) == names


LOADER = """
import importlib, json, sys
heavy, loaded = json.loads(sys.argv[1]), {}
for module in json.loads(sys.argv[2]):
    importlib.import_module(module)
    if new := [name for name in heavy if name in sys.modules]:
        print(json.dumps([module, new]))
        break
"""


def loaded_by(modules: list[str]) -> str:
    """What a fresh Python prints when it imports `modules` in turn: the first that loads something heavy, and what."""
    command = [sys.executable, "-P", "-c", LOADER, json.dumps(HEAVY), json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_rooms_load_nothing_heavy() -> None:
    light = [room for room in FILES if room and not {room, room.split(".")[0]} & NOT_LIGHT]
    assert {"types", "lessons.store", "engines.base"} <= set(light)
    assert loaded_by(["mel_lite", *(f"mel_lite.{room}" for room in light)]) == ""
    assert "torch" in loaded_by(["mel_lite.kernels"])
