"""The whole road with the real model, engine, verifier workers and command line; nothing scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import cold_mel_lite_command
from mel_lite.lessons.store import ExperienceStore
from mel_lite.models.adapters import attach_adapter
from mel_lite.models.demo import demo_model_dir
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.resilience import checkpoint_files

pytestmark = pytest.mark.slow

SMALL = (
    "--max-steps=2",
    "--set=train.num_generations=4",
    "--set=train.per_device_train_batch_size=8",
    "--set=train.gradient_accumulation_steps=1",
    "--set=train.save_steps=1",
    "--set=train.grad_norm_every=1",
    "--set=eval.limit=4",
    "--set=eval.k=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of the demo preset, made smaller, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = cold_mel_lite_command("train", "--gpu", "cpu", "--output-dir", folder, *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def _steps(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def test_the_funnel_is_not_empty_and_something_was_learned(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    steps = _steps(folder)
    assert [row["step"] for row in steps] == [1, 2]
    total = {name: sum(row.get(name) or 0 for row in steps) for name in set().union(*steps)}
    assert total["mel/groups"] == 4 and total["mel/mixed_groups"] > 0
    assert total["mel/written"] == total["mel/pairs"] > 0
    assert sum(row["grad_norm"] for row in steps) > 0
    lora_b = {n: w for n, w in load_file(folder / "adapter" / "adapter_model.safetensors").items() if "lora_B" in n}
    start = load_file(folder / "checkpoint-1" / "adapter_model.safetensors")
    assert lora_b and any(w.any() for w in lora_b.values())
    assert any(not torch.equal(w, start[n]) for n, w in lora_b.items()), "the second step changed nothing"


def test_the_run_folder_and_the_summary_are_complete(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    for name in ("config.yaml", "experiences.sqlite", "completions", "adapter", "eval/before.json", "eval/after.json"):
        assert (folder / name).exists(), name
    assert [p.name for p in checkpoint_files.committed(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for text in ("Evaluation", "Pass@1 (greedy)", "Funnel of this run", "meta-experience", "merged"):
        assert text in printed, text


def test_every_meta_experience_can_be_browsed(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with ExperienceStore(folder / "experiences.sqlite", read_only=True) as store:
        rows = store.list()
    listed = cold_mel_lite_command("experiences", "list", "--run", folder).stdout
    assert f"{len(rows)} meta-experiences" in listed
    parsed = next(row for row in rows if row.heuristic)
    shown = cold_mel_lite_command("experiences", "show", parsed.id, "--run", folder).stdout
    assert all(part in shown for part in ("question", "bifurcation", "critique", "heuristic"))
    assert "analysis as sampled" not in shown, "the analysis is shown once"
    exported = folder.parent / "lessons.jsonl"
    cold_mel_lite_command("experiences", "export", exported, "--run", folder)
    assert [json.loads(line)["id"] for line in exported.read_text().splitlines()] == [row.id for row in rows]


def test_the_merged_model_answers_as_the_adapter_model_in_plain_transformers(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    report = json.loads((folder / "merged-16bit" / "export_report.json").read_text())
    assert report["fidelity"]["mean_kl_nats"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-16bit", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged-16bit")
    adapted = attach_adapter(load_base(ModelSpec("demo", dtype="float32")), folder / "adapter")
    chat = [{"role": "user", "content": "What is 3 + 4 - 2? Think briefly, then finish with `Answer: <number>`."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    texts = [
        tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
        for model in (merged, adapted)
    ]
    assert texts[0] == texts[1]


def test_a_killed_run_resumes_where_it_stopped(finished: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = finished
    folder = tmp_path / "killed"
    command = [str(Path(sys.executable).with_name("mel-lite")), "train", "--gpu", "cpu", "--output-dir", str(folder)]
    process = subprocess.Popen([*command, *SMALL], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    give_up_s = time.monotonic() + 1800
    while not (folder / "checkpoint-1" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < give_up_s, process.communicate()[1]
        time.sleep(0.2)
    time.sleep(1.5)  # into the second step
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter").exists()

    done = cold_mel_lite_command("train", "--resume", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    for name in ("adapter/adapter_model.safetensors", "checkpoint-2/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    digests = []
    for run in (whole, folder):
        with ExperienceStore(run / "experiences.sqlite", read_only=True) as store:
            digests.append(store.digest())
    assert digests[0] == digests[1]
    assert [row["step"] for row in _steps(folder)] == [1, 2]


def test_demo_model_loads_without_traps() -> None:
    folder = demo_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
