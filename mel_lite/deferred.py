"""Import libraries without the packages that they import at once and that most runs never use.

PEFT imports bitsandbytes, which compiles functions and so loads torch's compiler: a fifth of the CPU time from the
start of a process to its first rollout. TRL imports the trackers that are installed. transformers and TRL both read the
metadata of all installed packages.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

NAMES = ("bitsandbytes", "mlflow", "trackio")
"""Packages that the first use of a name in them imports. (TRL looks into wandb and pandas when it is imported.)"""
QUANTIZED = "bitsandbytes"


class _Deferred(ModuleType):
    """Stands for a package until a name is looked up in it."""

    def __getattr__(self, name: str) -> Any:
        if type(sys.modules.get(self.__name__)) is _Deferred:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def deferring(names: Sequence[str] = NAMES) -> Iterator[None]:
    """Inside the block, an import of one of these packages gives a module that loads the package on first use.

    After the block, an import gives the package itself. A package that is loaded already, or not installed, is left as
    it is. Which distributions have which packages is found out once for all blocks. Inside the block, no garbage is
    collected: a collection visits everything that was imported before, and hardly any of it ever becomes garbage.
    """
    collects = gc.isenabled()
    gc.disable()
    scan = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = _distributions
    for name in names:
        if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
            sys.modules[name] = module = _Deferred(name)
            # `find_spec` reads the one; `inspect` reads the other of all modules to find the source of a function.
            module.__spec__, module.__file__ = spec, spec.origin
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = scan
        for name in names:
            if type(sys.modules.get(name)) is _Deferred:
                del sys.modules[name]
        if collects:
            gc.enable()


_scan = functools.cache(importlib.metadata.packages_distributions)


def _distributions() -> Mapping[str, list[str]]:
    return {package: list(names) for package, names in _scan().items()}


@contextmanager
def building_plain_layers() -> Iterator[None]:
    """Inside the block, PEFT builds LoRA layers without importing bitsandbytes if nothing else has.

    A model with layers of bitsandbytes has loaded it. Without it, PEFT would only find that no layer is one of them.
    """
    from peft.tuners.lora import model

    answers = {name: getattr(model, name) for name in ("is_bnb_available", "is_bnb_4bit_available")}
    for name, answer in answers.items():
        setattr(model, name, functools.partial(_is_loaded_and, answer))
    try:
        yield
    finally:
        for name, answer in answers.items():
            setattr(model, name, answer)


def _is_loaded_and(answer: Callable[[], bool]) -> bool:
    return type(sys.modules.get(QUANTIZED)) is ModuleType and answer()
