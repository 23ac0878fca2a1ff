"""Fixtures of the fault tests: a server that starts runs quickly, and an uninterrupted run to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_runs import Farm, farm
from trainers import step_log

COMMON: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
"""Options of every interrupted run: one checkpoint per step, of which two are kept."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests with whole runs in separate processes, which take seconds each."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "runs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def runs() -> Iterator[Farm]:
    with farm() as server:
        yield server


@pytest.fixture(scope="session")
def reference(runs: Farm, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Final state and metrics of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    assert runs.run(folder, **COMMON) == 0, (folder / "output.txt").read_text()
    return json.loads((folder / "state.json").read_text()), step_log(folder / "run")


@pytest.fixture()
def common() -> dict[str, Any]:
    return dict(COMMON)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Folder for a test; the run's own folder is `folder / "run"`."""
    return tmp_path
