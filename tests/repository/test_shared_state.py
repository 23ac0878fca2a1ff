"""Private attributes that pass values between modules are counted: arguments and results should do that."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text() for folder in ("mel_lite", "kernels") for path in (ROOT / folder).rglob("*.py")}
MIXINS = "CleanStop AtomicCheckpoints MicroBatches JudgedRewards"


def uses(source: str) -> tuple[set[str], set[str]]:
    """Private attributes that a source writes (assigns, deletes, sets by name, or gives a class default) and reads."""
    written, read = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            (read if isinstance(node.ctx, ast.Load) else written).add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and each.value is not None and isinstance(each.target, ast.Name):
                    written.add(each.target.id)
                elif isinstance(each, ast.Assign):
                    written |= {target.id for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
                (read if node.func.id[:3] in ("get", "has") else written).add(str(name.value))
    return tuple({name for name in names if name.startswith("_") and name[:2] != "__"} for names in (written, read))


def shared(sources: dict[str, str]) -> dict[str, set[str]]:
    """Attributes written in one module and read in another that does not write them itself, with all their modules.

    In the trainer's mixins, which share one `self`, writing an attribute does not make it the module's own.
    """
    found = {name: uses(source) for name, source in sources.items()}
    mixins = {name for name, source in sources.items() if any(f"class {each}" in source for each in MIXINS.split())}
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for reader, (own, read) in found.items():
        for writer, (written, _) in found.items():
            same_object = {reader, writer} <= mixins
            for name in (read & written) - (set() if same_object else own):
                if reader != writer:
                    modules[name] |= {reader, writer}
    return dict(modules)


def test_few_private_attributes_are_shared() -> None:
    found = shared({str(path.relative_to(ROOT)): source for path, source in SOURCES.items()})
    assert len(found) <= 8, found


def test_the_count_sees_each_kind_of_sharing() -> None:
    one = "class CleanStop:\n    _a: int = 1\n    _c: int\n    def f(self): self._b = 2; setattr(self, '_d', 3)"
    other = "class MicroBatches:\n    def g(self): self._b = self._a + self._b + self._c; return getattr(self, '_d')"
    assert set(shared({"one": one, "other": other})) == {"_a", "_b", "_d"}
    alone = "class X:\n    def f(self): self._b = 1; return self._b"
    assert shared({"one": one, "alone": alone}) == {}


def test_the_trainer_lists_its_mixins_itself() -> None:
    tree = ast.parse((ROOT / "mel_lite" / "trainer.py").read_text())
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MELTrainer")
    names = [base.id for base in trainer.bases if isinstance(base, ast.Name)]
    assert names == [*MIXINS.split(), "GRPOTrainer"]


def test_train_crosses_two_overrides() -> None:
    defining = [
        str(path.relative_to(ROOT))
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name in ("MELTrainer", *MIXINS.split())
        for each in node.body
        if isinstance(each, ast.FunctionDef) and each.name == "train"
    ]
    assert sorted(defining) == ["mel_lite/resilience/checkpoints.py", "mel_lite/resilience/stop_cleanly.py"]
