"""Write the lock files from the environment this runs in: `python requirements/lock.py UV` (or `make lock`).

A lock file holds the exact version of every package the roots need, found by walking the installed metadata, and the
SHA-256 of every file the package index has of that version: any platform and Python can be installed with
`--require-hashes`. `uv` asks the index. `cpu.txt` needs no compiler; what only `reasoning-gym` needs is in `gym.txt`,
because one of its dependencies is compiled, and what only notebooks need is in `notebook.txt`.

`torch.txt` is apart, for torch has builds (CPU, CUDA, ROCm) on indexes of their own: it has the hashes of the default
index's files and, with `--torch-wheel FILE`, of the build that was tested. `tools.txt` is what locks and audits, and
`docs.txt` what builds the site.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent
CPU_ROOTS = ("setuptools", "mel-lite[demo,dev]", "tensorboard", "triton")
GYM_ROOTS = ("mel-lite[gym]",)
NOTEBOOK_ROOTS = ("mel-lite[notebook]",)
TRACK_ROOTS = ("mel-lite[track]",)
TOOL_ROOTS = ("pip-audit", "uv")
DOCS_ROOTS = ("mkdocs-material>=9.7,<10", "mkdocs<2", "mkdocstrings[python]>=1")
LINUX_ONLY = ("triton",)
PYTHON = "3.11"

HEADER = """\
# Made by `make lock`; do not edit. {what}
# Packages as Python 3.11 on Linux needs them; hashes of the files of all platforms and Pythons.
"""
ABOUT = {
    "torch": "Installed first, by itself: `pip install --no-deps --require-hashes -r requirements/torch.txt`.",
    "cpu": "The CPU environment of `make train` and `make test`, beside torch.",
    "gym": "What the `gym` extra adds to cpu.txt; needs a C compiler.",
    "notebook": "What the `notebook` extra adds to cpu.txt: a Jupyter kernel, and what runs notebooks in it.",
    "docs": "What `make site` builds the documentation with, in an environment of its own.",
    "track": "What the `track` extra adds to cpu.txt: trackio and Weights & Biases.",
    "tools": "What `make lock` and `make audit` run, in an environment of its own.",
}


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


def pins(versions: dict[str, str]) -> list[str]:
    """Requirement lines by name."""
    return [f"{n}=={versions[n]}" + ('; sys_platform == "linux"' if n in LINUX_ONLY else "") for n in sorted(versions)]


def hashed(uv: Path, wanted: list[str], *options: str) -> str:
    """`wanted` as lines with the hashes of all their files, as `uv` gets them from the index."""
    command = [str(uv), "pip", "compile", "-", "--generate-hashes", "--universal", "--python-version", PYTHON]
    quiet = ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    done = subprocess.run(
        [*command, *quiet, *options], input="\n".join(wanted), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def pinned(path: Path) -> list[str]:
    """The requirement lines of a lock file, without their hashes."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.removesuffix(" \\") for line in lines if "==" in line]


def with_wheel(text: str, wheel: Path | None) -> str:
    """`torch.txt` with the hash of one more build; without `wheel`, the one it has now is kept."""
    listed = set(re.findall(r"sha256:[0-9a-f]{64}", text))
    path = FOLDER / "torch.txt"
    before = re.search(r"^# tested: (sha256:[0-9a-f]{64})$", path.read_text() if path.exists() else "", re.MULTILINE)
    if wheel is not None:
        digest = f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    elif before and text.split()[0] in path.read_text():
        digest = before[1]
    else:
        return text
    more = "" if digest in listed else f" \\\n    --hash={digest}"
    return f"# tested: {digest}\n{text.rstrip()}{more}\n"


def main() -> None:
    """Write the lock files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uv", type=Path)
    parser.add_argument("--torch-wheel", type=Path)
    given = parser.parse_args()
    cpu = closure(CPU_ROOTS)
    gym, notebook, track = (
        {name: version for name, version in closure(roots).items() if name not in cpu}
        for roots in (GYM_ROOTS, NOTEBOOK_ROOTS, TRACK_ROOTS)
    )
    torch = {"torch": cpu.pop("torch")}
    for file, versions in (("torch", torch), ("cpu", cpu), ("gym", gym), ("notebook", notebook), ("track", track)):
        text = hashed(given.uv, pins(versions), "--no-deps")
        text = with_wheel(text, given.torch_wheel) if file == "torch" else text
        (FOLDER / f"{file}.txt").write_text(HEADER.format(what=ABOUT[file]) + text)
    # Not installed here: versions move only when they are deleted from the file.
    for file, wanted in (("tools", TOOL_ROOTS), ("docs", DOCS_ROOTS)):
        path = FOLDER / f"{file}.txt"
        path.write_text(HEADER.format(what=ABOUT[file]) + hashed(given.uv, [*wanted, *pinned(path)]))
    for beside in (FOLDER / "unsloth.txt", FOLDER / "vllm.txt", FOLDER / "deepspeed.txt"):
        about = [line for line in beside.read_text().splitlines() if line.startswith("#")]
        beside.write_text("\n".join([*about, hashed(given.uv, pinned(beside), "--no-deps")]))


if __name__ == "__main__":
    main()
