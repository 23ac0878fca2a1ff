"""The runs of TRL's tests in processes of their own, and the comparison of their outcomes."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
SUITE = "tests/test_grpo_trainer.py"
CLASSES = ("GRPOTrainer", "MELTrainer")
Outcome = tuple[str, str]
"""`passed`, `failed` or `skipped`, and the first line of the reason."""


def copy_tests(source: Path, folder: Path) -> None:
    """Copy the tests away from `source`, whose own `trl` would be imported in place of the installed one."""
    if not (source / SUITE).is_file():
        raise SystemExit(
            f"{source} has no {SUITE}. Packages of TRL have no tests: give a checkout, such as that of "
            f"`git clone --depth 1 --branch v{version('trl')} https://github.com/huggingface/trl`."
        )
    (folder / "tests").mkdir()
    for file in (source / "tests").glob("*.py"):
        if file.name == Path(SUITE).name or not file.name.startswith("test_"):
            shutil.copy(file, folder / "tests")


def run_suite(name: str, folder: Path, logs: Path, options: Sequence[str]) -> dict[str, Outcome]:
    """Run the tests in `folder` with the class `name`. Returns the outcome of every test."""
    report, log = folder / f"{name}.xml", logs / f"{name}.log"
    paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PEER_SUITE_CLASS": name, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", SUITE, "-q", "--tb=short", "-p", "peer_suite.plugin", "-p", "no:cacheprovider",
        "--rootdir", str(folder), f"--junitxml={report}", *options,
    ]  # fmt: skip
    with log.open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        raise SystemExit(f"pytest wrote no report:\n{log.read_text()[-3000:]}")
    return outcomes(report)


def outcomes(report: Path) -> dict[str, Outcome]:
    """Read a junit report. Paths in reasons are cut to the file's name."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        key = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        found[key] = ("passed", "")
        for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (child := case.find(kind)) is not None:
                reason = " ".join((child.get("message") or "").split())
                found[key] = (outcome, re.sub(r"/(?:[\w.+-]+/)+", "", reason)[:300])
    return found


def only_passed(one: dict[str, Outcome], other: dict[str, Outcome]) -> dict[str, str]:
    """Return the tests that passed in `one` and failed in `other`, with the reason."""
    return {
        test: other[test][1]
        for test, (outcome, _) in one.items()
        if outcome == "passed" and other.get(test, ("", ""))[0] == "failed"
    }


def counts(tests: dict[str, Outcome]) -> dict[str, int]:
    """Return the number of tests with each outcome."""
    found = collections.Counter(outcome for outcome, _ in tests.values())
    return {outcome: found[outcome] for outcome in ("passed", "failed", "skipped")}


def summary(found: dict[str, dict[str, Outcome]]) -> str:
    """Return the counts of both classes and the reasons of every test that one of them fails."""
    lines = [f"{'class':12} passed failed skipped"]
    for name, tests in found.items():
        lines.append("{:12} {passed:6} {failed:6} {skipped:7}".format(name, **counts(tests)))
    theirs, ours = (found[name] for name in CLASSES)
    for name, only in zip(CLASSES, (only_passed(theirs, ours), only_passed(ours, theirs)), strict=True):
        lines.append(f"\npasses with {name} alone: {len(only)}")
        lines += [f"  {test}\n      {reason}" for test, reason in only.items()]
    both = [test for test, (outcome, _) in theirs.items() if outcome == "failed" == ours[test][0]]
    lines.append(f"\nfails with both: {len(both)}")
    lines += [f"  {test}\n      {theirs[test][1]}" for test in both]
    skipped = collections.Counter(reason for outcome, reason in theirs.values() if outcome == "skipped")
    lines.append(f"\nskipped: {skipped.total()}")
    lines += [f"  {count} x {reason}" for reason, count in skipped.most_common()]
    return "\n".join(lines)


def conditions(source: Path, chosen: str) -> dict[str, str]:
    """Return what the outcomes depend on: the versions of tests and packages, and the choice of tests."""
    stated = source / "VERSION"
    packages = {name: version(name) for name in ("trl", "transformers", "torch", "peft")}
    tests = stated.read_text().strip() if stated.is_file() else "unknown"
    return {"tests of TRL": tests, "chosen": chosen, "python": sys.version.split()[0], **packages}
