"""F26: untrusted files. Only safetensors and JSON are loaded; a pickle is never opened.

Zip slip does not apply, since MEL-Lite unpacks no archive. The closest case, a name in a manifest that leads out of the
checkpoint folder, is tested here. tests/models/test_load.py tests `auto_map` and pickled base models.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import pickle
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import CheckpointError
from mel_lite.lessons.store import ExperienceStore
from mel_lite.resilience import checkpoint_files
from trainers import assert_learned, build, digest, trainable

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "mel_lite").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "code",
    "codeop",
}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load", "numpy.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load",
}  # fmt: skip


def dangers(source: str) -> Iterator[str]:
    """Return everything in a source file that could run code from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                yield f"calls {name}"
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "allow_pickle") and is_true:
                    yield f"passes {keyword.arg}=True"
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                    yield "passes trust_remote_code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_can_run_code_from_data(path: Path) -> None:
    found = set(dangers(path.read_text()))
    if path.name == "transport.py":
        found.remove("imports dill")  # copies a function of the user's own process into its workers, never from a file
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=True)",
        "def f(x):\n    return eval(x)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_search_finds_such_code(source: str) -> None:
    assert list(dangers(source))


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def unpickled(events: list[str] | None = None) -> list[str]:
    """Return the names that any unpickler in this process has looked up since the first call."""
    if not hasattr(unpickled, "seen"):
        seen: list[str] = []
        unpickled.seen = seen  # type: ignore[attr-defined]
        sys.addaudithook(lambda event, args: seen.append(str(args)) if event == "pickle.find_class" else None)
    return list(unpickled.seen)  # type: ignore[attr-defined]


STATE_PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
                 "training_args.bin")  # fmt: skip


def _plant(folder: Path, names: tuple[str, ...], canary: Path) -> None:
    for name in names:
        with (folder / name).open("wb") as file:
            pickle.dump(Canary(canary), file)


def test_a_run_writes_no_pickle_and_reads_none(tmp_path: Path) -> None:
    common = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path, max_steps=2, **common).train()
    run = tmp_path / "run"
    for path in (p for p in run.rglob("*") if p.is_file() and p.parent.name.startswith("checkpoint-")):
        assert path.suffix in (".json", ".safetensors", ".jinja", ".md"), path
        assert b"torch" not in path.read_bytes()[:64] and path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04")

    canary = tmp_path / "canary"
    _plant(run / "checkpoint-2", STATE_PICKLES, canary)
    before = unpickled()
    resumed = build(tmp_path, max_steps=3, **common)
    resumed.train(resume_from_checkpoint=True)
    assert_learned(resumed)
    assert unpickled() == before, "something was unpickled"
    assert not canary.exists()
    with (run / "checkpoint-2" / "optimizer.pt").open("rb") as file:
        pickle.load(file)
    assert canary.exists() and unpickled() != before, "the canary and the hook work"


def test_a_checkpoint_of_plain_trl_resumes_with_a_new_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has only pickled states: the weights are loaded, the pickles ignored, and a warning is logged."""
    common = {"save_strategy": "steps", "save_steps": 1}
    first = build(tmp_path, max_steps=1, **common)
    first.train()
    theirs = tmp_path / "theirs" / "checkpoint-1"
    (tmp_path / "run" / "checkpoint-1").rename(theirs.parent.mkdir() or theirs)
    for name in (checkpoint_files.MANIFEST, checkpoint_files.STATE, "optimizer.json", "optimizer.safetensors",
                 "scheduler.json", "rng_state.json", "rng_state.safetensors"):  # fmt: skip
        (theirs / name).unlink()
    canary = tmp_path / "canary"
    _plant(theirs, STATE_PICKLES, canary)
    resumed = build(tmp_path, max_steps=1, output_dir=tmp_path / "run2", **common)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.state_files"):
        resumed._load_from_checkpoint(str(theirs))
        resumed.create_optimizer_and_scheduler(1)
        resumed._load_optimizer_and_scheduler(str(theirs))
        resumed._load_scaler(str(theirs))
        resumed._load_rng_state(str(theirs))
    assert digest(trainable(resumed)) == digest(trainable(first)), "the weights were loaded"
    assert not resumed.optimizer.state_dict()["state"]
    assert "are pickles and are not loaded" in caplog.text and "optimizer.pt" in caplog.text
    assert not canary.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_in_a_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = tmp_path / "run" / "checkpoint-1"
    canary = tmp_path / "canary"
    _plant(saved, (name,), canary)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        build(tmp_path, max_steps=2).train(resume_from_checkpoint=str(saved))
    trainer.state.best_model_checkpoint = str(saved)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        trainer._load_best_model()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "sub/../../../secret"])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    run = tmp_path / "runs" / "run"
    staged = checkpoint_files.staging_folder(run) / "checkpoint-1"
    staged.mkdir()
    (staged / "weights.safetensors").write_bytes(b"w")
    saved = checkpoint_files.commit(staged, run, {"step": 1})
    (tmp_path / "runs" / "secret").write_text("x")
    manifest = json.loads((saved / checkpoint_files.MANIFEST).read_text())
    (saved / checkpoint_files.MANIFEST).write_text(json.dumps(manifest | {name: "0" * 64}))
    assert "leads out of the checkpoint" in str(checkpoint_files.problem(saved))


def test_a_link_out_of_the_checkpoint_is_damage(tmp_path: Path) -> None:
    staged = checkpoint_files.staging_folder(tmp_path) / "checkpoint-1"
    staged.mkdir()
    (staged / "weights.safetensors").write_bytes(b"w")
    saved = checkpoint_files.commit(staged, tmp_path, {"step": 1})
    outside = tmp_path / "outside"
    outside.write_bytes(b"w")
    (saved / "weights.safetensors").unlink()
    (saved / "weights.safetensors").symlink_to(outside)
    assert "leads out of the checkpoint" in str(checkpoint_files.problem(saved))


WRONG: dict[str, list[str]] = {
    "rng_state.json": ["null", "3", "{}", '{"__kind__": "dict", "items": [["python", 3], ["numpy", 4], ["cpu", 5]]}'],
    "optimizer.json": ["null", "[]", '{"__kind__": "dict", "items": [["state", 1], ["param_groups", []]]}'],
    "scheduler.json": ["3", '{"__kind__": "tensor", "name": "nowhere"}'],
    "trainer_state.json": ["[]", "{}", '{"global_step": "x"}', '{"unknown": 1}'],
    checkpoint_files.STATE: ["3", "[1]", '{"step": 1}', '{"step": 1, "micro_step": "x", "generated_tokens": 0}'],
}


def test_states_of_a_wrong_structure_are_rejected_with_a_message(tmp_path: Path) -> None:
    """Well-formed JSON of the wrong structure, with a matching manifest."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path, max_steps=1, **options).train()
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    trainer = build(tmp_path, max_steps=2, **options)
    trainer.create_optimizer_and_scheduler(2)
    loaders: dict[str, Any] = {"rng_state.json": trainer._load_rng_state}
    for name in ("optimizer.json", "scheduler.json"):
        loaders[name] = trainer._load_optimizer_and_scheduler
    for name, texts in WRONG.items():
        for text in texts:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "run")
            saved = tmp_path / "run" / "checkpoint-1"
            (saved / name).write_text(text)
            hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in saved.iterdir() if p.is_file()}
            del hashes[checkpoint_files.MANIFEST]
            (saved / checkpoint_files.MANIFEST).write_text(json.dumps(hashes))
            assert checkpoint_files.problem(saved) is None
            with pytest.raises(CheckpointError, match=f"{name} cannot be (used|read)"):
                if name in loaders:
                    loaders[name](str(saved))
                else:
                    trainer.train(resume_from_checkpoint=True)


def test_an_untrusted_store_cannot_call_functions(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "experiences.sqlite") as store:
        assert store._db.execute("PRAGMA trusted_schema").fetchone() == (0,)
    with ExperienceStore(tmp_path / "experiences.sqlite", read_only=True) as store:
        assert store._db.execute("PRAGMA trusted_schema").fetchone() == (0,)
        with pytest.raises(sqlite3.Error):
            store._db.execute("SELECT load_extension('x')")
