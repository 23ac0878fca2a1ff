"""The tables of docs/reliability.md report a test run, including failures, missed aims and gaps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fault_report as report

ROOT = Path(__file__).resolve().parents[2]

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_f01_f02_kills" name="test_killed_around_the_commit">
  <properties><property name="kills" value="100"/></properties></testcase>
<testcase classname="tests.faults.test_f09_other_options" name="test_x[4-2]"/>
<testcase classname="tests.faults.test_f09_other_options" name="test_x[2-4]"><failure message="no"/></testcase>
<testcase classname="tests.faults.test_f08_signals" name="test_a[rollout]">
  <properties><property name="signal_to_exit_s" value="1.25"/></properties></testcase>
<testcase classname="tests.faults.test_f08_signals" name="test_a[save]">
  <properties><property name="signal_to_exit_s" value="2.5"/></properties></testcase>
<testcase classname="tests.faults.test_f28_one_run_one_process" name="test_y"><skipped/></testcase>
</testsuite></testsuites>"""


def row(page: str, start: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return line


def test_the_page_gets_what_the_run_said(tmp_path: Path) -> None:
    (tmp_path / "faults.xml").write_text(JUNIT)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([tmp_path / "faults.xml"], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert row(text, "| SIGKILL at random times |").endswith("| 100 | 100 |")
    assert "| 2.5 s |" in row(text, "| Tiny runs: signal"), "the slowest of all phases"
    assert "| not run |" in row(text, "| Attacks on the verifier")
    assert row(text, "| F1 ").endswith("| 1 passed |")
    assert row(text, "| F9 ").endswith("| 1 failed |")
    assert row(text, "| F28 ").endswith("| 0 passed |")
    assert row(text, "| F5 ").endswith("| not run |")


def test_a_run_of_some_tests_keeps_the_other_rows(tmp_path: Path) -> None:
    (tmp_path / "faults.xml").write_text(JUNIT)
    page = tmp_path / "page.md"
    before = report.tables({}, {"kills": 90.0, "attacks": 50.0})
    before = before.replace("damage` | not run |", "damage` | 6 passed |")
    page.write_text(f"before\n{report.BEGIN}\n{before}\n{report.END}\nafter\n")
    report.main([tmp_path / "faults.xml"], page, keep=True)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n|") and text.endswith(f"|\n{report.END}\nafter\n")
    assert row(text, "| SIGKILL at random times |").endswith("| 100 | 100 |"), "run again"
    assert "| 50 |" in row(text, "| Attacks on the verifier"), "not run again"
    assert row(text, "| F5 ").endswith("| 6 passed |") and row(text, "| F9 ").endswith("| 1 failed |")
    assert "| not run |" in row(text, "| F3 "), "never run"


@pytest.mark.parametrize(
    ("aim", "met", "missed"),
    [
        ("100", [100], [99, 101]),
        ("0", [0], [1]),
        ("< 0.5 s", [0.49], [0.5, 0.6]),
        ("< 1 %", [0.0099], [0.01]),
        (">= 99.5 %", [0.995, 1], [0.9949]),
        (">= 300", [300], [299]),
        ("<= 3 %", [0.03], [0.031]),
        ("all", [0], []),
        ("", [0], []),
    ],
)
def test_missed_aims_are_found(aim: str, met: list[float], missed: list[float]) -> None:
    assert [report.misses(value, aim) for value in [*met, *missed]] == [False] * len(met) + [True] * len(missed)


def test_missed_aims_are_marked_in_the_table() -> None:
    numbers = {"kills": 99.0, "lost_steps": 0.0, "commit_100mb_s": 0.71, "agreement": 0.9984}
    page = report.tables({}, numbers)
    assert row(page, "| SIGKILL at random") == "| SIGKILL at random times | 99 **(missed)** | 100 |"
    assert row(page, "| Commit of") == "| Commit of 100 MB (hash, flush, rename) | 0.71 s **(missed)** | < 0.5 s |"
    assert row(page, "| ... committed steps") == "| ... committed steps lost | 0 | 0 |"
    assert row(page, "| Agreement") == "| Agreement with them | 99.84% | >= 99.5 % |"
    assert page.count("missed") == 2 and page.count("| not run |") == len(report.NUMBERS) - 4 + len(report.FAULTS)


def test_every_aim_can_be_compared() -> None:
    for _, _, aim, _ in report.NUMBERS:
        report.misses(0, aim)
    with pytest.raises(ValueError, match="'about 3' must be a number"):
        report.misses(3, "about 3")


def labels(table: str) -> list[list[str]]:
    """Return the cells of each line without the measured one: column 2 of three, column 4 of four."""
    rows = [line.split("|")[1:-1] for line in table.strip().splitlines()]
    return [[cells[0], *cells[2:]] if len(cells) == 3 else cells[:3] for cells in rows]


def test_the_page_has_the_rows_of_the_report() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    written = page[page.index(report.BEGIN) + len(report.BEGIN) : page.index(report.END)]
    assert labels(written) == labels(report.tables({}, {}))


def names() -> set[str]:
    """Every test of the repository as the report names it."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        module = path.relative_to(ROOT / "tests").with_suffix("").as_posix()
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        found |= {f"{module}::{node.name}" for node in functions if node.name.startswith("test_")}
    return found


def test_every_fault_is_tested_by_tests_that_exist() -> None:
    assert list(report.FAULTS) == [f"F{n}" for n in range(1, 29)]
    known = names()
    for number, (_, wanted) in report.FAULTS.items():
        for part in wanted.split():
            assert any(report._is_of(name, [part]) for name in known), f"{number}: {part}"


@pytest.mark.parametrize("key", [key for _, key, _, _ in report.NUMBERS])
def test_every_figure_is_recorded_by_a_test(key: str) -> None:
    text = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path.name != Path(__file__).name)
    short = key.removeprefix("demo_")
    assert re.search(rf'"(?:demo_)?{short}"', text), key


def test_every_file_of_the_tables_is_run_by_make_faults() -> None:
    make = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"[a-z_/]+", make.split("FAULTS := ")[1].split("\n\n")[0]))
    files = {part.split("::")[0] for _, wanted in report.FAULTS.values() for part in wanted.split()}
    outside = {name for name in files if not name.startswith("faults/")}
    assert outside <= listed, outside - listed
