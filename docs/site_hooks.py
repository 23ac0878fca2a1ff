"""Hooks of MkDocs: links to files outside docs/ become links to the repository, since the site has only the pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(?!\w+:|#)([^()\s#]+)((?:#[^()\s]*)?\))")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Return the page with its links out of docs/ turned into addresses. A missing file stays, for the strict check."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    repository = config.extra["repository"].replace("<", "%3C").replace(">", "%3E")

    def address(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target.startswith(("docs/", "..")) or not (ROOT / target).exists():
            return match[0]
        return f"{match[1]}{repository}/blob/main/{target}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(address, part) for i, part in enumerate(parts))
