"""Load TRL's GRPO classes as released, even if other packages have rebound them.

On a GPU, `import unsloth` rebinds `trl.GRPOTrainer` and `trl.GRPOConfig` to generated classes. These are not subclasses
of TRL's classes, never call `_compute_loss`, score without gradients and have other defaults. MEL-Lite builds on the
released classes. If the public names were rebound, this module loads TRL's source files under private module names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mel_lite.errors import ConfigError

SUPPORTED = ("1.15", "1.17")
"""Half-open range of TRL versions whose GRPO extension points were checked."""


def _is_released(cls: type, module: str) -> bool:
    """Return True if `cls` was defined by TRL's own source file, not by a generated one.

    A generated class may copy the module name and the class name, but then it inherits from the class of that name.
    """
    inherits_name = any(base.__name__ == cls.__name__ for base in cls.__mro__[1:])
    return cls.__module__ == module and cls.__qualname__ == cls.__name__ and not inherits_name


def _load_source(name: str) -> ModuleType:
    """Execute TRL's `trl/trainer/<name>.py` under a private name, so that rebinding the public one has no effect."""
    private = f"trl.trainer._mel_lite_{name}"
    if private in sys.modules:
        return sys.modules[private]
    package = importlib.import_module("trl.trainer")
    path = Path(str(package.__file__)).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(private, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Register the module before executing it: dataclasses look up their module while they are built.
    sys.modules[private] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[private]
        raise
    return module


def _released(name: str, attribute: str) -> Any:
    public = importlib.import_module(f"trl.trainer.{name}")
    cls = getattr(public, attribute)
    if _is_released(cls, f"trl.trainer.{name}"):
        return cls
    return getattr(_load_source(name), attribute)


def check_trl_version() -> None:
    """Raise ConfigError if the installed TRL is outside the checked range."""
    import trl
    from packaging.version import Version

    low, high = map(Version, SUPPORTED)
    if not low <= Version(trl.__version__) < high:
        raise ConfigError(
            f"trl=={trl.__version__} is installed, but MEL-Lite's trainer was checked only with "
            f"trl>={SUPPORTED[0]},<{SUPPORTED[1]}. Install a supported version: pip install 'trl>=1.15,<1.17'."
        )


def released_grpo_trainer() -> Any:
    """Return `trl.GRPOTrainer` as TRL released it. Raises ConfigError for an unchecked TRL version."""
    check_trl_version()
    return _released("grpo_trainer", "GRPOTrainer")


def released_grpo_config() -> Any:
    """Return `trl.GRPOConfig` as TRL released it."""
    return _released("grpo_config", "GRPOConfig")
