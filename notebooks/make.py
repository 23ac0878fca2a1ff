"""Write the notebooks from their scripts: `python notebooks/make.py`, or with `--run NAME ...` run them as well.

A notebook is a pair: `NAME.py` (jupytext's percent format) is edited, `NAME.ipynb` is made from it and keeps the
outputs of cells that did not change. Badge and install cell are written into both: the badge from the repository's
address in mkdocs.yml, the cell from install_cell.py. `--check` writes nothing and fails when a file is stale.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat

FOLDER = Path(__file__).resolve().parent
INSTALL = FOLDER / "install_cell.py"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
UNSLOTH = ("unsloth", "unsloth_zoo", "cut_cross_entropy", "tyro", "torchao", "xformers")
"""What the notebook for users of Unsloth installs on a GPU. Their metadata caps packages that MEL-Lite needs newer."""
MOST_CHARACTERS = 6000
"""Longest text of one stored output."""


def repository() -> str:
    """Return the address of the repository."""
    found = re.search(r"^  repository: (\S+)$", (FOLDER.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert found is not None, "mkdocs.yml names the repository under extra"
    return found[1]


def sources() -> list[Path]:
    """Return the scripts of the notebooks, in their order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def badge(name: str) -> str:
    """Return the Markdown of a badge that opens a notebook in Colab."""
    place = repository().removeprefix("https://github.com/").replace("<", "%3C").replace(">", "%3E")
    return f"[![Open in Colab]({BADGE})](https://colab.research.google.com/github/{place}/blob/main/notebooks/{name}.ipynb)"


def install_cell(name: str) -> str:
    """Return the code of a notebook's install cell."""
    text = INSTALL.read_text(encoding="utf-8").rstrip("\n")
    text = re.sub(r'^REPOSITORY = ".*"$', f'REPOSITORY = "{repository()}"', text, flags=re.M)
    packages = f"({json.dumps(UNSLOTH)[1:-1]})" if "unsloth" in name else "()"
    return text.replace("GPU_PACKAGES = ()", f"GPU_PACKAGES = {packages}")


def notebook(path: Path) -> Any:
    """Return the notebook of a script, without outputs."""
    made = jupytext.read(path, fmt="py:percent")
    title, install = made.cells[0], made.cells[1]
    heading, _, rest = title.source.partition("\n")
    rest = re.sub(r"^\[!\[Open in Colab\].*$\n*", "", rest.strip(), flags=re.M)
    title.source = f"{heading}\n\n{badge(path.stem)}\n\n{rest}".rstrip()
    install.source = install_cell(path.stem)
    install.metadata = {"cellView": "form", "jupyter": {"source_hidden": True}}  # folded in Colab and JupyterLab
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number:02}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "accelerator": "GPU"}
    return made


def with_outputs(made: Any, path: Path) -> Any:
    """Return the notebook with the outputs that its file has for the same cells."""
    before = nbformat.read(path, as_version=4).cells if path.is_file() else []
    stored = {cell.source: cell for cell in before if cell.cell_type == "code"}
    for cell in made.cells:
        if cell.cell_type == "code" and cell.source in stored:
            cell.outputs, cell.execution_count = (stored[cell.source][key] for key in ("outputs", "execution_count"))
    return made


def texts(path: Path) -> dict[Path, str]:
    """Return what both files of a notebook should hold."""
    made = notebook(path)
    script = jupytext.writes(made, fmt="py:percent")
    script = re.sub(r"\A# ---\n.*?^# ---\n+", "", script, flags=re.S | re.M)
    target = path.with_suffix(".ipynb")
    return {path: script, target: nbformat.writes(with_outputs(made, target)) + "\n"}


def execute(path: Path, folder: Path, timeout_s: int = 3600) -> Any:
    """Run a notebook's file in a kernel of its own in `folder`, and return it with its outputs."""
    import nbclient

    made = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        made,
        timeout=timeout_s,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute(env=os.environ | {"PYTHONSAFEPATH": "1", "COLUMNS": "100"})


def tidy(made: Any, folder: Path) -> None:
    """Shorten outputs, and take out what differs from machine to machine."""
    for cell in made.cells:
        cell.metadata.pop("execution", None)
        # Progress bars and warnings of libraries come on stderr.
        kept = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for output in kept:
            for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                if key in holder:
                    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", holder[key]).replace(f"{folder}/", "")
                    text = "\n".join(line.rpartition("\r")[2].rstrip() for line in text.split("\n"))
                    cut = text[:MOST_CHARACTERS]
                    holder[key] = cut + ("" if cut == text else "\n... (shortened)\n")
        if "outputs" in cell:
            cell.outputs = [output for output in kept if output.get("text", "x").strip()]


def main() -> int:
    """Write, run or check the notebooks. Returns: exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="run these (01_quickstart, ...) and keep the outputs")
    parser.add_argument("--folder", type=Path, help="folder to run in, which keeps the runs; default: a temporary one")
    given = parser.parse_args()
    wanted = {path: text for source in sources() for path, text in texts(source).items()}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if given.check:
        for path in stale:
            print(f"{path.name} is out of date: run python notebooks/make.py", file=sys.stderr)
        return bool(stale)
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    for name in given.run or []:
        path = FOLDER / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)).resolve()
            made = execute(path, folder)
            tidy(made, folder)
        nbformat.write(made, path)
        path.write_text(texts(path.with_suffix(".py"))[path], encoding="utf-8")  # without the kernel's own metadata
    return 0


if __name__ == "__main__":
    sys.exit(main())
