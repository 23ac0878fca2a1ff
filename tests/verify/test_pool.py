"""Verifier pool: no answer and no verifier may hang, crash or falsify a batch."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from answer_pairs import ATTACKS, PAIRS
from mel_lite.errors import ConfigError, VerifierError
from mel_lite.types import Verdict
from mel_lite.verify.pool import MAX_COMPLETION_CHARS, MAX_REFERENCE_CHARS, PoolStats, VerifyPool

ROOT = Path(__file__).resolve().parents[2]

Items = list[tuple[str, str, dict[str, Any]]]

RULES = """
import os, sys, time

def plain(completion, answer):
    return completion == answer

def hostile(completion, answer):
    if completion == "hang":
        time.sleep(600)
    if completion == "spin":
        sum(range(10**12))  # one C call: no signal handler of Python gets a turn
    if completion == "raise":
        raise RuntimeError("no such rule\\nsecond line")
    if completion == "exit":
        sys.exit(3)
    if completion == "die":
        os.kill(os.getpid(), 11)
    if completion == "eat":
        return bytearray(10**11) == b""
    if completion == "chat":
        print("right " * 20_000)
        sys.stdout.flush()
        os.write(1, b'{"id": 1, "verdict": "right"}\\n')
    if completion == "read":
        assert sys.stdin.read() == ""
    if completion == "garbage":
        for fd in range(3, 64):
            try:
                os.write(fd, b"{}\\n[1]\\n")
            except OSError:
                pass
        time.sleep(600)
    if completion == "fork":
        if os.fork() == 0:
            open(__file__ + ".fork", "w").write(str(os.getpid()))
            time.sleep(600)
        time.sleep(600)
    if completion == "huge file":
        with open("f", "wb") as file:
            for _ in range(100):
                file.write(bytes(2**20))
    return completion == answer

def where(completion, answer):
    return os.getcwd() == answer

def environment(completion, answer):
    return completion in os.environ

def level(completion, answer, level):
    return level == 3

def length(completion, answer):
    return len(completion) == int(answer)

def text(completion, answer):
    return "yes"

def slow(completion, answer):
    time.sleep(0.3)
    return True

def meet(completion, answer):
    open(os.path.join(answer, completion + ".here"), "w").close()
    while sum(name.endswith(".here") for name in os.listdir(answer)) < 3:
        time.sleep(0.01)
    return True
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with `rules_here.py`. As under a console script, it is not on `sys.path`."""
    (tmp_path / "rules_here.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pool() -> Iterator[Callable[..., VerifyPool]]:
    """Return a factory of pools, which are closed after the test."""
    made: list[VerifyPool] = []

    def make(name: str, **options: object) -> VerifyPool:
        made.append(VerifyPool(name, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.mark.slow
def test_honest_answers_are_right_among_hostile_ones(pool: Callable[..., VerifyPool], tmp_path: Path) -> None:
    before = children()
    honest = [(text, gold, verdict) for name, text, gold, verdict in PAIRS if name == "math"]
    items: Items = []
    expected: list[tuple[str, set[str]]] = []
    for i in range(max(len(honest), len(ATTACKS))):
        if i < len(ATTACKS):
            items.append((ATTACKS[i][1], ATTACKS[i][2], {}))
            expected.append((ATTACKS[i][0], {"right", "wrong", "abstain"} - {ATTACKS[i][3]}))
        if i < len(honest):
            items.append((*honest[i][:2], {}))
            expected.append((honest[i][0], {honest[i][2]}))
    math = pool("math", deadline_s=1.5)
    verdicts = math.verify(items)
    judged = [(*want, verdict) for want, verdict in zip(expected, verdicts, strict=True)]
    assert [(name, verdict) for name, allowed, verdict in judged if verdict not in allowed] == []
    assert 1 <= math.stats.timeouts <= 5  # at most the tower, the factorial and the expansion; never the honest ones
    assert math.stats.calls == len(items)
    math.close()
    assert eventually(lambda: children() == before)
    assert not list(tmp_path.rglob("hacked")) and not Path("hacked").exists()


@pytest.mark.parametrize(
    ("attack", "counted"),
    [
        ("hang", {"timeouts": 1, "respawns": 1}),
        ("spin", {"timeouts": 1, "respawns": 1}),
        ("fork", {"timeouts": 1, "respawns": 1}),
        ("raise", {"errors": 1}),
        ("exit", {"errors": 1}),
        ("huge file", {"errors": 1}),
        ("eat", {"errors": 1, "respawns": 1}),
        ("die", {"errors": 1, "respawns": 1}),
        ("garbage", {"errors": 1, "respawns": 1}),
    ],
)
def test_each_attack_costs_its_own_item_only(
    attack: str, counted: dict[str, int], rules: Path, pool: Callable[..., VerifyPool]
) -> None:
    before = children()
    hostile = pool("rules_here:hostile", workers=1, deadline_s=0.5 if "timeouts" in counted else 10.0)
    verdicts = hostile.verify([("a", "a", {}), (attack, attack, {}), ("b", "b", {}), ("c", "d", {})])
    assert verdicts == ["right", "abstain", "right", "wrong"]
    assert hostile.stats == PoolStats(**({"calls": 4, "timeouts": 0, "errors": 0, "respawns": 0} | counted))
    assert len(children() - before) == 1
    for forked in rules.glob("*.fork"):
        assert eventually(functools.partial(is_gone, int(forked.read_text())))
    assert attack != "fork" or list(rules.glob("*.fork"))
    hostile.close()
    assert eventually(lambda: children() == before)


def test_a_verifier_that_prints_cannot_write_verdicts_or_read_requests(
    rules: Path, pool: Callable[..., VerifyPool]
) -> None:
    chatty = pool("rules_here:hostile", workers=1)
    items: Items = [("chat", "no", {}), ("read", "read", {}), ("a", "a", {})]
    assert chatty.verify(items) == ["wrong", "right", "right"]
    assert chatty.stats == PoolStats(calls=3)


@pytest.mark.slow
def test_start_up_does_not_count_towards_the_deadline(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    Path("rules_here.py").write_text("import time\ntime.sleep(0.9)\n" + RULES)
    late = pool("rules_here:hostile", workers=1, deadline_s=0.3)
    assert late.verify([("hang", "x", {}), ("a", "a", {})]) == ["abstain", "right"]


def test_workers_run_in_parallel_and_keep_the_order(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    plain = pool("rules_here:plain", workers=3)
    items: Items = [(str(i), str(i - i % 3), {}) for i in range(60)]
    assert plain.verify(items) == ["right" if i % 3 == 0 else "wrong" for i in range(60)]
    meeting = pool("rules_here:meet", workers=3, deadline_s=30)
    assert meeting.verify([(str(i), str(rules), {}) for i in range(3)]) == ["right"] * 3


def test_worker_environment(rules: Path, pool: Callable[..., VerifyPool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert pool("rules_here:environment").verify([("HF_TOKEN", "", {}), ("PATH", "", {})]) == ["wrong", "right"]
    assert pool("rules_here:where").verify([("", str(rules), {})]) == ["wrong"]
    assert pool("rules_here:level").verify([("", "", {"level": 3, "date": object()})]) == ["right"]


def test_long_texts_are_cut_before_the_worker(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    items: Items = [
        ("x" * (MAX_COMPLETION_CHARS + 5), str(MAX_COMPLETION_CHARS), {}),
        ("x", "1" * (MAX_REFERENCE_CHARS + 1), {}),
    ]
    length = pool("rules_here:length")
    assert length.verify(items) == ["right", "abstain"]
    assert length.stats == PoolStats(calls=1)
    assert length.verify([]) == []


def test_a_broken_verifier_is_an_error_with_its_first_message(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    message = r"failed in 8 calls in a row.*RuntimeError: no such rule \(.*rules_here.py:13 in hostile\)"
    with pytest.raises(VerifierError, match=message):
        pool("rules_here:hostile").verify([("raise", "", {})] * 8)
    some = pool("rules_here:hostile", workers=1)
    assert some.verify([("a", "a", {})] + [("raise", "", {})] * 8) == ["right"] + ["abstain"] * 8
    few = pool("rules_here:hostile")
    assert few.verify([("raise", "", {})] * 7) == ["abstain"] * 7
    with pytest.raises(VerifierError, match="failed in 9 calls in a row"):  # small batches add up
        few.verify([("raise", "", {})] * 2)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("rules_here:nothing", RULES, "has no 'nothing'"),
        (
            "rules_here:plain",
            "import nowhere_at_all",
            "ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("rules_here:plain", "raise SystemExit('stop')", "stop"),
        (
            "rules_here:plain",
            "import os; os._exit(7)",
            r"3 worker processes in a row died .*\(exit code 7\)",
        ),
        ("rules_here:text", RULES, "'rules_here:text' returned str 'yes'"),
        ("nummeric", RULES, "Did you mean 'numeric'"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_or_used_is_an_error(
    name: str, source: str, message: str, rules: Path, pool: Callable[..., VerifyPool]
) -> None:
    Path("rules_here.py").write_text(source)
    before = children()
    with pytest.raises(VerifierError, match=message):
        pool(name).verify([("a", "a", {})])
    assert eventually(lambda: children() == before)


def test_too_many_lost_workers_stop_the_batch(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    with pytest.raises(VerifierError, match=r"lost 3 worker processes in one batch \(max_respawns = 2\)"):
        pool("rules_here:hostile", workers=1, max_respawns=2).verify([("die", "", {})] * 5)


def test_a_deadline_that_no_answer_meets_gives_a_warning(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    with pytest.warns(UserWarning, match=r"all 8 answers of this batch missed the deadline of 0.05 s"):
        assert pool("rules_here:slow", deadline_s=0.05).verify([("", "", {})] * 8) == ["abstain"] * 8


def test_a_worker_killed_while_idle_is_replaced_without_an_error(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    plain = pool("rules_here:plain", workers=2)
    before = children()
    plain.verify([("a", "a", {})] * 20)
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: children() == before)
    assert plain.verify([("a", "a", {})] * 20) == ["right"] * 20
    assert plain.stats.errors == 0 and plain.stats.respawns >= 1


def test_any_thread_may_verify(pool: Callable[..., VerifyPool]) -> None:
    numeric = pool("numeric")
    results: dict[int, list[Verdict]] = {}

    def work(i: int) -> None:
        results[i] = numeric.verify([(f"Answer: {n}", str(i), {}) for n in range(4)])

    for _ in range(2):  # workers outlive the threads they were started from
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {i: ["right" if n == i else "wrong" for n in range(4)] for i in range(4)}
        results.clear()
        time.sleep(0.2)
    assert numeric.stats == PoolStats(calls=32)


def test_an_interrupted_batch_leaves_a_usable_pool(rules: Path, pool: Callable[..., VerifyPool]) -> None:
    hostile = pool("rules_here:hostile", workers=1, deadline_s=30)
    assert hostile.verify([("a", "a", {})]) == ["right"]
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore SIGINT
    threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            hostile.verify([("hang", "x", {}), ("a", "b", {})])
    finally:
        signal.signal(signal.SIGINT, before)
    assert hostile.stats.timeouts == 0
    assert hostile.verify([("b", "b", {}), ("a", "b", {})]) == ["right", "wrong"]


def test_closing(rules: Path) -> None:
    before = children()
    with VerifyPool("rules_here:plain") as closed:
        assert children() == before  # no process starts before it is needed
        assert closed.verify([("a", "a", {})]) == ["right"]
        assert len(children() - before) == 1
    assert eventually(lambda: children() == before)
    closed.close()
    with pytest.raises(VerifierError, match="closed"):
        closed.verify([("a", "a", {})])
    forgotten = VerifyPool("rules_here:plain")
    forgotten.verify([("a", "a", {})])
    del forgotten
    gc.collect()  # may also close pools that earlier tests left open
    assert eventually(lambda: children() <= before)


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"deadline_s": 0.0}, {"deadline_s": float("nan")}, {"memory_bytes": 2**20}]
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        VerifyPool("numeric", **options)  # type: ignore[arg-type]


PARENT = """
import sys, threading, time
from mel_lite.verify.pool import VerifyPool
pool = VerifyPool("rules_here:hostile", workers=2, deadline_s=60)
pool.verify([("a", "a", {})] * 4)
threading.Thread(target=pool.verify, args=([("spin", "", {}), ("hang", "", {})],), daemon=True).start()
time.sleep(0.5)
print("busy", flush=True)
time.sleep(60)
"""


def test_busy_workers_die_with_a_killed_parent(rules: Path) -> None:
    Path("rules_here.py").write_text(RULES.replace("sum(range(10**12))", "while True: pass"))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "busy\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    assert eventually(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))


def test_workers_use_the_parents_copy_of_the_package(tmp_path: Path) -> None:
    """Workers need no installed package (`-S` hides site-packages) and do not import another copy that is installed."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "mel_lite", site / "mel_lite", ignore=shutil.ignore_patterns("__pycache__"))
    with (site / "mel_lite" / "verify" / "verifiers.py").open("a") as file:
        file.write("\nBUILT_IN['of-the-copy'] = lambda completion, answer: Verdict.RIGHT\n")
    code = f"""
import os, sys
sys.path.insert(0, "")
from mel_lite.verify.pool import VerifyPool
os.chdir({str(tmp_path)!r})
with VerifyPool("of-the-copy") as pool:
    print(*pool.verify([("Answer: 4", "5", {{}})]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=site, env=environment)
    assert (done.stdout, done.stderr) == ("right\n", "")
