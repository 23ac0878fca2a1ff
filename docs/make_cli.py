"""Write docs/cli.md from the commands of `mel-lite`: `python docs/make_cli.py`.

Names, defaults and texts come from the typer app. `--check` writes nothing and fails when the page is stale.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from click import Context

from mel_lite.cli.main import app

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# Command line

<!-- Made by `python docs/make_cli.py`; do not edit. -->

`mel-lite COMMAND --help` prints the same texts. Every option of a run that has no flag is set with
`--set section.key=value`; [configuration.md](configuration.md) lists all of them. Wrong input ends with one message and
exit code 2 ([exit codes](reliability.md#when-a-run-stops-by-itself)), not with a traceback.
"""


def commands(command: Any, path: str = "mel-lite") -> Iterator[tuple[str, Any]]:
    """Return (full name, command) of a command and of all below it, in the order of the app."""
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        if not sub.hidden:
            yield from commands(sub, f"{path} {name}")


def on_one_line(text: str | None) -> str:
    """Return a text without line breaks, and as the cell of a table."""
    return " ".join((text or "").replace("\b", "").split()).replace("|", chr(92) + "|").replace("<", "&lt;")


def is_argument(parameter: Any) -> bool:
    """Return True for a positional parameter."""
    return parameter.param_type_name == "argument"


def placeholder(parameter: Any) -> str:
    """Return how a positional parameter is written: `NAME`, `[NAME]` or `[NAME]...`."""
    name = (parameter.metavar or str(parameter.name)).upper()
    return (name if parameter.required else f"[{name}]") + ("..." if parameter.nargs == -1 else "")


def label(parameter: Any) -> str:
    """Return how a parameter is written: `--option VALUE`, `--a / --b` or `NAME`."""
    if is_argument(parameter):
        return f"`{placeholder(parameter)}`"
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    if parameter.secondary_opts:
        names += " / " + ", ".join(f"`{name}`" for name in parameter.secondary_opts)
    return names


def shown_default(parameter: Any, context: Context) -> str:
    """Return a default as one types it; nothing where there is none."""
    value = parameter.get_default(context, call=False)
    if parameter.required:
        return "required"
    missing = value is None or value is False or value == () or "UNSET" in repr(value).upper()
    return "" if missing or callable(value) else f"`{value}`"


def section(path: str, command: Any) -> str:
    """Return the part of the page about one command."""
    context = Context(command, info_name=path)
    about = inspect.cleandoc(command.help or "")
    if about and not about.endswith("."):
        about += "."
    parts = [f"{'#' * min(2 + path.count(' ') - 1, 3)} `{path}`", about]
    parameters = [p for p in command.get_params(context) if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = " ".join(placeholder(p) for p in parameters if is_argument(p))
    if not getattr(command, "commands", {}):
        parts.append(f"```\n{path}{' [OPTIONS]' if len(parameters) else ''}{' ' + arguments if arguments else ''}\n```")
    if parameters:
        lines = ["| option | default | meaning |", "|---|---|---|"]
        for p in parameters:
            lines.append(f"| {label(p)} | {shown_default(p, context)} | {on_one_line(p.help)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def page() -> str:
    """Return the whole page."""
    (_, root), *others = commands(typer.main.get_command(app))
    top = re.sub(r"^#+ .*\n+", "", section("mel-lite", root))
    return "\n".join([HEAD, top, *(section(path, command) for path, command in others)])


def main() -> int:
    """Write or check the page. Returns: exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
    if parser.parse_args().check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        if not fresh:
            print("docs/cli.md is out of date: run python docs/make_cli.py", file=sys.stderr)
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
