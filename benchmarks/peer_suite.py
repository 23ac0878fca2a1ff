"""Run TRL's own tests of GRPOTrainer on MELTrainer, and on TRL's class: `python benchmarks/peer_suite.py TRL_SOURCE`.

TRL_SOURCE is a checkout of TRL, or any folder with its `tests/`. The tests run on the installed TRL, without a network:
random models and a few lines of text stand in for the Hub's. Tests of images, vLLM and GPUs are left out. Prints
passed, failed and skipped for both classes, and the reason for each test that passes with only one of them.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SUITE = "tests/test_grpo_trainer.py"
CLASSES = ("trl", "mel-lite")
TEXT_ONLY = "not VLM and not vllm and not Slow and not liger"


def copy_tests(source: Path, target: Path) -> None:
    """Copy the tests away from `source`, whose own `trl` would be imported in place of the installed one."""
    if not (source / SUITE).is_file():
        raise SystemExit(f"{source} has no {SUITE}. Give a checkout of TRL.")
    target.mkdir()
    for file in source.glob("tests/*.py"):
        if file.name == Path(SUITE).name or not file.name.startswith("test_"):
            shutil.copy(file, target)


def run_suite(name: str, folder: Path, options: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Run the tests with one class. Returns: test -> (outcome, first line of the reason)."""
    report = folder / f"{name}.xml"
    environment = os.environ | {
        "PEER_SUITE_CLASS": name, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", SUITE, "-q", "--tb=short", "-p", "peer_suite_plugin", "-p", "no:cacheprovider",
        "--rootdir", str(folder), f"--junitxml={report}", *options,
    ]  # fmt: skip
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        raise SystemExit(f"pytest wrote no report:\n{(folder / f'{name}.log').read_text()[-3000:]}")
    return outcomes(report)


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Read a junit report. Returns: test -> (passed, failed or skipped; first line of the reason)."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        key = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        found[key] = ("passed", "")
        for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (child := case.find(kind)) is not None:
                found[key] = (outcome, " ".join((child.get("message") or "").split())[:300])
    return found


def summary(found: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Return the counts of both classes and the tests on which they differ, with the reason."""
    lines = [f"{'class':10} passed failed skipped"]
    for name, tests in found.items():
        counts = collections.Counter(outcome for outcome, _ in tests.values())
        lines.append(f"{name:10} {counts['passed']:6} {counts['failed']:6} {counts['skipped']:7}")
    theirs, ours = (found[name] for name in CLASSES)
    for title, one, other in (
        ("passes with TRL's class alone", theirs, ours),
        ("passes with MELTrainer alone", ours, theirs),
    ):
        only = [test for test, (outcome, _) in one.items() if outcome == "passed" and other[test][0] == "failed"]
        lines.append(f"\n{title}: {len(only)}")
        lines += [f"  {test}\n      {other[test][1]}" for test in only]
    both = collections.Counter(
        reason for test, (outcome, reason) in theirs.items() if outcome == "failed" == ours[test][0]
    )
    lines.append(f"\nfails with both: {sum(both.values())}")
    lines += [f"  {count} x {reason}" for reason, count in both.most_common()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkout of TRL")
    parser.add_argument("-k", default=TEXT_ONLY, help=f"pytest's choice of tests (default: {TEXT_ONLY!r})")
    parser.add_argument("--out", type=Path, help="folder to keep reports and logs in (default: none is kept)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_tests(arguments.source, folder / "tests")
        environment = os.environ | {"PEER_SUITE_CLASS": "trl", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        build = f"import sys; sys.path.insert(0, {str(HERE)!r}); import pathlib, peer_suite_plugin; "
        build += f"peer_suite_plugin.fill_cache(pathlib.Path({str(folder / 'hub' / 'hub')!r}))"
        subprocess.run([sys.executable, "-c", build], env=environment, check=True)
        found = {name: run_suite(name, folder, ["-k", arguments.k]) for name in CLASSES}
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            for file in (*folder.glob("*.xml"), *folder.glob("*.log")):
                shutil.copy(file, arguments.out)
    print(summary(found))


if __name__ == "__main__":
    main()
