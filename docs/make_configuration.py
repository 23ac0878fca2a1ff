"""Write docs/configuration.md from the option classes: `python docs/make_configuration.py`.

Names, types, defaults and texts of options come from the dataclasses (a docstring below a field, or its help text);
internalizations and verifiers come from their registries. `--check` writes nothing and fails when the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mel_lite.config import MELConfig
from mel_lite.gpus import GPU_PRESETS
from mel_lite.lessons.internalise import INTERNALISATIONS
from mel_lite.recipe import SECTIONS
from mel_lite.verify.verifiers import BUILT_IN

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Made by `python docs/make_configuration.py`; do not edit. -->

A run is described by a recipe: a YAML file of the sections below. `mel-lite train --gpu PRESET` starts from a preset,
`--config FILE` from your own file, or from a packaged one by its name (`bank`, docs/internalisation.md); with both, the
file wins. `--set section.key=value` and the other flags win over both. An unknown section or key is an error that names
the nearest known one. `mel-lite train --dry-run` checks everything and prints the resolved recipe.

Presets: {presets}. `None` in a text below is `null` in YAML.
"""
TRAIN = """\
## `train`

Options of `MELConfig`. It is TRL's `GRPOConfig` with the fields below, so every option of `GRPOConfig` and of
transformers' `TrainingArguments` can be set here, too. In Python: `MELConfig(output_dir, option=value, ...)`.
"""
INTERNALISATION = """\
## Internalization

Values of `train.internalisation`. A dotted path (`package.module:Name`) names your own subclass of
`mel_lite.lessons.internalise.Internalisation`.
"""
VERIFIERS = """\
## Verifiers

Values of `train.verifier` and `mel-lite eval --verifier`. A dotted path (`package.module:function`) names your own
function, `f(completion, answer, **columns)`. It returns a `Verdict`, its text (`right`, `wrong`, `abstain`) or a bool;
any other value is an error. In Python, the function itself is a value too; lambdas and functions of `__main__` work.

Built-in ones read what follows the last thought (`train.think_tags`); your own function gets the whole completion.

A *marked* answer is `\\boxed{...}`, `<answer>...</answer>`, `#### ...` or a phrase such as "the answer is ...".
"""


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line."""
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            assert isinstance(following.value, ast.Constant)
            found[node.target.id] = " ".join(str(following.value.value).split())
    return found


def type_name(hint: Any) -> str:
    """Return a type in words: `int or null`, or the values of a Literal."""
    if hint is NoneType:
        return "null"
    if get_origin(hint) is Literal:
        return listed(get_args(hint))
    if get_origin(hint) in (Sequence, list):
        return "list"
    if get_args(hint):
        values = [value for member in get_args(hint) if get_origin(member) is Literal for value in get_args(member)]
        others = [type_name(member) for member in get_args(hint) if get_origin(member) is not Literal]
        return " or ".join([*([listed(values)] if values else []), *others])
    return "function" if hint is Callable else str(hint.__name__)


def listed(values: Sequence[str]) -> str:
    """Return texts as code, separated by commas."""
    return ", ".join(f"`{value}`" for value in values)


def default_of(option: Field[Any]) -> str:
    """Return a field's default as YAML writes it."""
    if option.default is MISSING:
        return "required"
    special = {None: "null", True: "true", False: "false"}
    shown = special.get(option.default) if isinstance(option.default, bool | None) else option.default
    return f"`{shown}`"


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    """Return a Markdown table of options."""
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(cell.replace('|', chr(92) + '|') for cell in rest)} |" for name, *rest in rows]
    return "\n".join(lines) + "\n"


def section(name: str, kind: type) -> str:
    """Return the part of the page about one section of a recipe."""
    hints, docs = get_type_hints(kind), field_docs(kind)
    about = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    rows = ((f.name, type_name(hints[f.name]), default_of(f), docs[f.name]) for f in fields(kind))
    return f"## `{name}`\n\n{about}\n\n{table(rows)}"


def train() -> str:
    """Return the part of the page about MELConfig's own options."""
    own = [f for f in fields(MELConfig) if f.name in MELConfig.__annotations__]
    hints = get_type_hints(type("Own", (), {"__annotations__": MELConfig.__annotations__}), {"Callable": Callable})
    types = {f.name: listed(f.metadata.get("choices", ())) or type_name(hints[f.name]) for f in own}
    rows = ((f.name, types[f.name], default_of(f), f.metadata["help"]) for f in own)
    return f"{TRAIN}\n{table(rows)}"


def registry(entries: Mapping[str, Any], heading: str) -> str:
    """Return a Markdown table of a registry: the first two paragraphs of each entry's docstring."""
    lines = [f"| name | {heading} |", "|---|---|"]
    for name, entry in entries.items():
        about = " ".join(" ".join((inspect.getdoc(entry) or "").split("\n\n")[:2]).split())
        lines.append(f"| `{name}` | {about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    presets = ", ".join(f"`{name}`" for name in GPU_PRESETS)
    parts = [section(name, kind) for name, kind in SECTIONS.items()]
    parts += [train(), f"{INTERNALISATION}\n{registry(INTERNALISATIONS, 'loss')}"]
    parts += [f"{VERIFIERS}\n{registry(BUILT_IN, 'rule')}"]
    return "\n".join([HEAD.format(presets=presets), *parts])


def main() -> int:
    """Write or check the page. Returns: exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
    if parser.parse_args().check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        if not fresh:
            print("docs/configuration.md is out of date: run python docs/make_configuration.py", file=sys.stderr)
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
