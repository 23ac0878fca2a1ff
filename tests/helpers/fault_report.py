"""Write the tables of docs/reliability.md from JUnit files:
`python fault_report.py [--keep] faults.xml [more.xml] docs/reliability.md`.

Replaces everything between the two markers, and marks missed aims and faults whose tests did not all pass. With
`--keep`, rows that were not run stay as they are, for a run of some of the tests.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

BEGIN, END = "<!-- begin: written by make faults -->", "<!-- end: written by make faults -->"
NOT_RUN = "not run"

FAULTS: dict[str, tuple[str, str]] = {
    # number: (what is injected, test files or ids)
    "F1": ("SIGKILL at every file operation of a save", "faults/test_f01_f02_kills"),
    "F2": ("SIGKILL at random times", "faults/test_f01_f02_kills"),
    "F3": ("a cut at every boundary between phases", "faults/test_f03_f10_resume"),
    "F4": ("each file of a checkpoint truncated, or one bit flipped", "faults/test_f04_f05_f07_damage "
           "resilience/test_checkpoint_files"),
    "F5": ("all checkpoints damaged", "faults/test_f04_f05_f07_damage"),
    "F6": ("a full disk while saving", "faults/test_f06_full_disk"),
    "F7": ("rotation with odd step numbers, times and a best one", "faults/test_f04_f05_f07_damage"),
    "F8": ("SIGTERM and SIGINT in every phase, and a second one", "faults/test_f08_signals"),
    "F9": ("resume with another split, options, dataset, texts, dtype, base", "faults/test_f09_other_options"),
    "F10": ("resume in a later epoch of odd size", "faults/test_f03_f10_resume::test_no_prompt"),
    "F11": ("out of memory in a micro-batch", "faults/test_f11_f12_memory"),
    "F12": ("out of memory in generation", "faults/test_f11_f12_memory engines/test_hf::test_out_of_memory"),
    "F13": ("NaN or Inf in loss, gradient, logits, stale log-probs, a lesson", "faults/test_f13_not_finite"),
    "F14": ("a gradient 50 times the usual", "faults/test_f14_f15_f20_f22::test_a_spike"),
    "F15": ("rewards that are None, NaN, raise, or all equal", "faults/test_f14_f15_f20_f22::test_missing "
            "faults/test_f14_f15_f20_f22::test_a_reward"),
    "F16": ("runs that learn nothing, and other collapses", "resilience/test_collapse "
            "test_trainer::test_a_dataset_without "
            "export/test_merge::test_untrained"),
    "F17": ("hostile answers", "faults/test_f17_f18_f19_verifier verify/test_pool::test_honest"),
    "F18": ("verifier workers that die, fork, hang, write garbage", "verify/test_pool::test_each_attack "
            "verify/test_pool::test_too_many"),
    "F19": ("swapped arguments, threads", "verify/test_verifiers::test_gold_and_answer "
            "verify/test_pool::test_any_thread"),
    "F20": ("an engine that dies in a batch", "faults/test_f14_f15_f20_f22::test_an_engine "
            "faults/test_f14_f15_f20_f22::test_one_that faults/test_f20_engine_process"),
    "F21": ("a stale or doubled adapter in the engine; another base", "training/test_engine_probe "
            "faults/test_f20_engine_process::test_a_copy faults/test_f14_f15_f20_f22::test_a_sampler "
            "resilience/test_checkpoint_files::test_a_checkpoint_of_another"),
    "F22": ("a sampler that is not the policy", "faults/test_f14_f15_f20_f22::test_a_sampler "
            "faults/test_f14_f15_f20_f22::test_truncated faults/test_f14_f15_f20_f22::test_sampling "
            "faults/test_f14_f15_f20_f22::test_the_temperature engines/test_hf::test_reported"),
    "F23": ("odd tokenizers, empty and truncated completions", "faults/test_f23_f24_text "
            "integration/test_fuzz::test_a_padded "
            "training/test_packing models/test_chat::test_plain_text"),
    "F24": ("hostile meta-experiences", "faults/test_f23_f24_text lessons/test_leak_guard "
            "lessons/test_parsing::test_any "
            "models/test_chat::test_no_control"),
    "F25": ("exports: 4-bit base, tied head, existing folder, killed", "export/test_merge faults/test_f25_export"),
    "F26": ("pickles, links, paths that lead out, hostile model folders and adapters",
            "faults/test_f26_untrusted_files faults/test_f26_hostile_files_and_text "
            "models/test_load::test_pickled data/test_tasks::test_oversize"),
    "F27": ("side services that raise or hang, full disk for logs, closed terminal", "faults/test_f27_side_services"),
    "F28": ("two processes on one run, a clock that goes backwards, no write access",
            "faults/test_f28_one_run_one_process"),
}  # fmt: skip

NUMBERS: tuple[tuple[str, str, str, str], ...] = (
    # (what, property, aim, format)
    ("SIGKILL at random times", "kills", "100", "{:.0f}"),
    ("... of these during a resumed run", "resumes", "", "{:.0f}"),
    ("... committed checkpoints looked at afterwards", "checkpoints", "", "{:.0f}"),
    ("... of these damaged", "corrupt_checkpoints", "0", "{:.0f}"),
    ("... committed steps lost", "lost_steps", "0", "{:.0f}"),
    ("... resumed to the end, each in the state of the uninterrupted run (SHA-256)", "equal_ends", "all", "{:.0f}"),
    ("SIGKILL inside a save, one per file operation, each resumed to the same state", "kills_in_save", "all", "{:.0f}"),
    ("Commit of 100 MB (hash, flush, rename)", "commit_100mb_s", "< 0.5 s", "{:.2f} s"),
    ("Demo: one step (4 prompts x 8 completions, 135M model)", "demo_step_s", "", "{:.0f} s"),
    ("Demo: one save (33 MB, everything included)", "demo_save_s", "", "{:.2f} s"),
    ("Demo: saves, every other step, as share of the steps", "demo_save_share", "< 1 %", "{:.2%}"),
    ("Demo: SIGTERM in sampling to exit with a checkpoint", "demo_exit_s", "< 25 s", "{:.1f} s"),
    ("Demo: the same at worst, longest time between two polls plus a save", "demo_longest_s", "< 25 s", "{:.1f} s"),
    ("Tiny runs: signal to exit with a checkpoint, slowest of seven phases", "signal_to_exit_s", "< 25 s", "{:.1f} s"),
    ("40 answers, 30 of them hostile, 2 s deadline", "hostile_batch_s", "< 40 s", "{:.1f} s"),
    ("... honest ones judged right, of 10", "hostile_batch_right", "10", "{:.0f}"),
    ("Labeled answers", "labeled_answers", ">= 1500", "{:.0f}"),
    ("Agreement with them", "agreement", ">= 99.5 %", "{:.2%}"),
    ("Labeled answers to `math` and `numeric` questions", "math_verify_cases", "", "{:.0f}"),
    ("... agreement of math-verify alone", "math_verify_agreement", "", "{:.1%}"),
    ("Attacks on the verifier", "attacks", ">= 50", "{:.0f}"),
    ("... accepted", "attacks_accepted", "0", "{:.0f}"),
    ("Leak guard: labeled cases", "leak_corpus", ">= 400", "{:.0f}"),
    ("... recall", "leak_recall", ">= 99 %", "{:.1%}"),
    ("... false positives", "leak_false_positives", "<= 3 %", "{:.1%}"),
)


def read(junits: list[Path]) -> tuple[dict[str, list[str]], dict[str, float]]:
    """Read outcomes by test ("faults/test_x::test_y") and the largest value of every recorded property."""
    outcomes: defaultdict[str, list[str]] = defaultdict(list)
    numbers: dict[str, float] = {}
    for case in (case for junit in junits for case in ET.parse(junit).iter("testcase")):
        module = str(case.get("classname")).removeprefix("tests.").replace(".", "/")
        name = f"{module}::{str(case.get('name')).split('[')[0]}"
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[name].append(kinds[0] if kinds else "passed")
        for entry in case.iter("property"):
            key, value = str(entry.get("name")), float(str(entry.get("value")))
            numbers[key] = max(value, numbers.get(key, value))
    return dict(outcomes), numbers


def misses(value: float, aim: str) -> bool:
    """Return True when a figure misses its aim: `0`, `< 25 s`, `>= 99 %`. The tests themselves check the aim `all`."""
    if aim in ("", "all"):
        return False
    parts = re.fullmatch(r"(<=|>=|<|) ?([\d.]+)( %| s|)", aim)
    if parts is None:
        raise ValueError(f"The aim {aim!r} must be a number with an optional comparison (<, <=, >=) and unit (%, s).")
    relation, bound = parts[1], float(parts[2]) / (100 if parts[3] == " %" else 1)
    met = {"<": value < bound, "<=": value <= bound, ">=": value >= bound, "": value == bound}
    return not met[relation]


def tables(outcomes: dict[str, list[str]], numbers: dict[str, float]) -> str:
    lines = ["| | measured | aim |", "|---|---|---|"]
    for what, key, aim, form in NUMBERS:
        measured = form.format(numbers[key]) if key in numbers else NOT_RUN
        mark = " **(missed)**" if key in numbers and misses(numbers[key], aim) else ""
        lines.append(f"| {what} | {measured}{mark} | {aim} |")
    lines += ["", "| | injected | tests | result |", "|---|---|---|---|"]
    for number, (what, wanted) in FAULTS.items():
        found = [result for name, results in outcomes.items() for result in results if _is_of(name, wanted.split())]
        bad = [result for result in found if result in ("failure", "error")]
        passed = found.count("passed")
        result = NOT_RUN if not found else f"{len(bad)} failed" if bad else f"{passed} passed"
        tests = ", ".join(f"`{part}`" for part in wanted.split())
        lines.append(f"| {number} | {what} | {tests} | {result} |")
    return "\n".join(lines)


def _is_of(name: str, wanted: list[str]) -> bool:
    return any(name.startswith(part if "::" in part else f"{part}::") for part in wanted)


def main(junits: list[Path], page: Path, *, keep: bool = False) -> None:
    text = page.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    lines = tables(*read(junits)).splitlines()
    if keep:
        before = {_label(line): line for line in text[start:end].splitlines()}
        lines = [before.get(_label(line), line) if NOT_RUN in line else line for line in lines]
    page.write_text("\n".join([text[:start], *lines, text[end:]]))


def _label(line: str) -> str:
    return line.split("|")[1] if line.startswith("|") else line


if __name__ == "__main__":
    keeps = "--keep" in sys.argv
    *files, target = (Path(argument) for argument in sys.argv[1:] if argument != "--keep")
    main(files, target, keep=keeps)
