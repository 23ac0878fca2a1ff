"""Write the lock files from the environment this runs in: `python requirements/lock.py` (or `make lock`).

A lock file holds the exact version of every package the roots need, found by walking the installed metadata. `cpu.txt`
needs no compiler; what only `reasoning-gym` needs is in `gym.txt`, because one of its dependencies is compiled, and
what only notebooks need is in `notebook.txt`.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CPU_ROOTS = ("setuptools", "mel-lite[demo,dev]", "tensorboard", "triton")
GYM_ROOTS = ("mel-lite[gym]",)
NOTEBOOK_ROOTS = ("mel-lite[notebook]",)
LINUX_ONLY = ("triton",)

HEADER = """\
# Made by `make lock`; do not edit. {what}
# Python 3.11, Linux.
"""


def closure(roots: tuple[str, ...]) -> dict[str, str]:
    """Name -> public version of everything `roots` need here, mel-lite itself left out."""
    versions: dict[str, str] = {}
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while todo:
        wanted = todo.pop()
        for extra in ("", *wanted.extras):
            key = (canonicalize_name(wanted.name), extra)
            if key in seen:
                continue
            seen.add(key)
            found = distribution(wanted.name)
            versions[key[0]] = found.version.partition("+")[0]
            children = [Requirement(line) for line in found.requires or ()]
            todo += [r for r in children if r.marker is None or r.marker.evaluate({"extra": extra})]
    versions.pop("mel-lite")
    return versions


def lines(versions: dict[str, str]) -> list[str]:
    """Requirement lines by name, torch first: it is installed before, and by, itself."""
    names = sorted(versions, key=lambda name: (name != "torch", name))
    return [f"{n}=={versions[n]}" + ('; sys_platform == "linux"' if n in LINUX_ONLY else "") for n in names]


def main() -> None:
    """Write `cpu.txt`, `gym.txt` and `notebook.txt` beside this file."""
    folder = Path(__file__).parent
    cpu = closure(CPU_ROOTS)
    gym, notebook = (
        {name: version for name, version in closure(roots).items() if name not in cpu}
        for roots in (GYM_ROOTS, NOTEBOOK_ROOTS)
    )
    for file, what, versions in (
        ("cpu.txt", "The CPU environment of `make train` and `make test`.", cpu),
        ("gym.txt", "What the `gym` extra adds to cpu.txt; needs a C compiler.", gym),
        (
            "notebook.txt",
            "What the `notebook` extra adds to cpu.txt: a Jupyter kernel, and what runs notebooks in it.",
            notebook,
        ),
    ):
        (folder / file).write_text(HEADER.format(what=what) + "\n".join(lines(versions)) + "\n")


if __name__ == "__main__":
    main()
