"""Runs in separate processes, for tests with signals: a small server forks one per request.

The server imports torch once, so a run starts in 0.1 s instead of 5 s. `python fault_runs.py` reads one JSON request
per line: {"folder": ..., "options": {...}}, with the `options` of `build` and in addition
    resume           resume from the newest checkpoint
    slow_s           make every phase this long, in small pieces like real ones (tokens, verdicts)
    kill_at_event    SIGKILL the process at that file operation (1 is the first) of ...
    kill_in_save     ... the save of this step
It answers with the pid of the run, then with its exit status. A run writes `phase NAME STEP` lines to `phases.txt` and
its final state to `state.json`, both in `folder`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link")


class Farm:
    """Client of the server in the test process: one run at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, folder: Path, **options: Any) -> Run:
        assert self._server.stdin
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "phases.txt").unlink(missing_ok=True)
        self._server.stdin.write(json.dumps({"folder": str(folder), "options": options}) + "\n")
        self._server.stdin.flush()
        return Run(folder, int(self.answer()), self)

    def run(self, folder: Path, **options: Any) -> int:
        """Run to the end. Returns: the exit status, negative for a signal."""
        return self.start(folder, **options).wait()

    def answer(self) -> str:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the server of runs has died"
        return line.strip()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


class Run:
    """Run in progress."""

    def __init__(self, folder: Path, pid: int, farm: Farm) -> None:
        self.folder, self.pid, self._farm = folder, pid, farm

    def wait_for(self, phase: str, step: int, timeout_s: float = 300) -> None:
        """Wait until the run has entered a phase of a step."""
        give_up_s = time.monotonic() + timeout_s
        while f"phase {phase} {step}\n" not in self._phases():
            assert time.monotonic() < give_up_s, f"no {phase} {step} in:\n{self._phases()}\n{self.output()}"
            time.sleep(0.01)

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self) -> int:
        return int(self._farm.answer())

    def output(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text() if path.exists() else ""

    def _phases(self) -> str:
        path = self.folder / "phases.txt"
        return path.read_text() if path.exists() else ""


# ---- server ----


def serve() -> None:
    import trainers  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(Path(request["folder"]), request["options"])
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(folder: Path, options: dict[str, Any]) -> None:
    code = 1
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        train(folder, options)
        code = 0
    except KeyboardInterrupt as error:
        print("KeyboardInterrupt", error, file=sys.stderr)
        code = 130
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(folder: Path, options: dict[str, Any]) -> None:
    from trainers import build, run_state

    slow_s, resume = float(options.pop("slow_s", 0)), options.pop("resume", False)
    event, save = options.pop("kill_at_event", None), options.pop("kill_in_save", None)
    trainer = build(folder, **options)

    def say(phase: str) -> None:
        with (folder / "phases.txt").open("a") as file:
            file.write(f"phase {phase} {trainer.state.global_step}\n")

    if slow_s:
        slow_down(trainer, slow_s, say)
    if save is not None:
        watch_save(trainer, save, event, folder)
    say("ready")
    trainer.train(resume_from_checkpoint=resume or None)
    (folder / "state.json").write_text(json.dumps(run_state(trainer)))


def slow_down(trainer: Any, slow_s: float, say: Any) -> None:
    """Report every phase and extend it. Phases that poll for signals also poll while extended."""
    from mel_lite import signals

    def stretch(owner: Any, name: str, phase: Any, *, polls: bool) -> None:
        original = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            say(phase if isinstance(phase, str) else phase(*args))
            end_s = time.monotonic() + slow_s
            while time.monotonic() < end_s:
                time.sleep(0.01)
                if polls:
                    signals.poll()
            return original(*args, **kwargs)

        setattr(owner, name, slow)

    def generated(requests: Any, sampling: Any) -> str:
        if trainer._scored_step != trainer._step:  # set by the rewards of this batch
            return "rollout"
        writes = requests and trainer._tokenizer.decode(requests[0].prompt_ids).rstrip().endswith("## Bifurcation")
        return "analysis" if writes else "replay"

    trainer._scored_step = -1
    rewards = trainer._calculate_rewards

    def calculate_rewards(*args: Any) -> Any:
        result = rewards(*args)
        trainer._scored_step = trainer._step
        return result

    trainer._calculate_rewards = calculate_rewards
    stretch(trainer.engine.unmetered, "generate", generated, polls=True)
    stretch(trainer, "_calculate_rewards", "verify", polls=True)
    stretch(trainer, "_compute_loss", "forward", polls=False)
    stretch(trainer.accelerator, "backward", "backward", polls=False)
    stretch(trainer, "_commit", "save", polls=False)


def watch_save(trainer: Any, step: int, event: int | None, folder: Path) -> None:
    """Write the file operations of one save to `events.json`. Kill the process at the operation number `event`."""
    seen: list[str] = []
    is_open = False

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if not is_open:
            return
        writes = name == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or name in CHANGES:
            seen.append(f"{name} {args[0]}")
            if len(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    original = trainer._save_checkpoint

    def save_checkpoint(*args: Any) -> None:
        nonlocal is_open
        is_open = trainer.state.global_step == step
        original(*args)
        is_open = False

    trainer._save_checkpoint = save_checkpoint
    finish = trainer.train

    def train_and_note(*args: Any, **kwargs: Any) -> Any:
        result = finish(*args, **kwargs)
        (folder / "events.json").write_text(json.dumps(seen))
        return result

    trainer.train = train_and_note


@contextlib.contextmanager
def farm() -> Iterator[Farm]:
    server = Farm()
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    serve()
