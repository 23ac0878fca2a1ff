"""Model cards: what they tell, what huggingface_hub reads of them, and what they must not show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from mel_lite.export.report import ExportReport, Fidelity, card
from mel_lite.hub import metadata
from mel_lite.hub.model_card import Kind, Subject, cell, fenced, model_card, run_of, write_run_cards
from mel_lite.models.load import ModelSpec
from mel_lite.report import figures
from mel_lite.report.runs import read_run
from run_folders import HOSTILE, lesson, make_run
from trainers import build


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", lessons=6, before=[1, 2] * 10, after=[3, 3] * 10)


def set_option(folder: Path, section: str, **options: object) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config[section] |= options
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_hub_reads_what_the_run_measured(run_dir: Path) -> None:
    set_option(run_dir, "data", train="owner/train:main", eval="owner/tests", eval_split="test")
    write_run_cards(run_dir)
    for file, library in ((run_dir / "README.md", "peft"), (run_dir / "adapter" / "README.md", "peft")):
        data = ModelCard.load(file).data
        assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
        assert (data.library_name, data.base_model_relation, data.datasets) == (library, "adapter", ["owner/train"])
        assert {"mel-lite", "grpo", "lora", "arxiv:2602.10224"} <= set(data.tags)
        name, results = model_index_to_eval_results(data.to_dict()["model-index"])
        measured, _ = figures.evaluation(read_run(run_dir).before, read_run(run_dir).after)
        assert name == "run" and [one.metric_type for one in results] == ["pass@1", "accuracy", "pass@4"]
        for result, measure in zip(results, measured, strict=True):
            assert (result.dataset_type, result.dataset_split) == ("owner/tests", "test")
            assert result.metric_value == pytest.approx(measure.after.value, abs=1e-4)
            low, high = result.metric_args["interval_95"]
            assert (low, high) == pytest.approx((measure.after.low, measure.after.high), abs=1e-4)
            assert measure.change is not None and measure.change.as_points() in file.read_text()


def test_a_card_tells_the_funnel_the_leaks_and_some_rules(run_dir: Path) -> None:
    text = model_card(Subject(Kind.ADAPTER, "run", "demo"), read_run(run_dir))
    assert "| analyses written | 24 | 100% |" in text and "| kept | 6 | 50% |" in text
    assert "1 of 5 parsed ones (20.0%) gave the answer away and were dropped." in text
    assert "```text\nRule-4: count down.\n```" in text
    assert "| LoRA rank, alpha | 8, 16 |" in text and "| learning rate | 5e-05 |" in text
    assert "a 4-bit conversion of [HuggingFaceTB/SmolLM2-135M-Instruct]" in text


def test_a_card_without_evaluation_says_so(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", lessons=0))
    text = model_card(Subject(Kind.ADAPTER, "run", "demo"), run)
    assert "nothing is known about the effect" in text and "## Meta-experiences" in text
    assert ModelCard(text).data.eval_results is None and "model-index" not in text
    assert "| Pass@1 (greedy) |" not in text and "Some rules" not in text
    without = model_card(Subject(Kind.ADAPTER, "mine", "demo"), None)
    assert "Algorithm: not recorded" in without and "Meta-experiences" not in without
    assert ModelCard(without).data.tags[0] == "mel-lite"


def test_an_evaluation_after_training_alone_is_shown(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", lessons=0, after=[2, 2] * 10))
    text = model_card(Subject(Kind.MODEL, "run", "demo"), run)
    assert "| Avg@4 | not measured | 50.0% [0.0%, 100.0%] |" in text
    assert [one.metric_value for one in ModelCard(text).data.eval_results] == [0.5, 0.5, 0.5]


def test_no_card_names_a_folder_of_this_machine(run_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "bases" / "My-Base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.org\n---\n")
    set_option(run_dir, "model", name=str(base))
    set_option(run_dir, "data", train=str(tmp_path / "secret" / "tasks.jsonl"), eval=str(tmp_path / "t.jsonl"))
    set_option(run_dir, "lora", start_from=str(tmp_path / "old" / "adapter"))
    write_run_cards(run_dir)
    text = (run_dir / "README.md").read_text()
    assert str(tmp_path) not in text and "secret" not in text
    assert "`My-Base`" in text and "| tasks | tasks.jsonl |" in text and "| started from adapter | adapter |" in text
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.license_name) == (None, "other", "mine")
    assert "path/to/My-Base" in text and "base_model_relation" not in text
    assert data.eval_results[0].dataset_type == "custom" and data.eval_results[0].dataset_name == "t.jsonl"


def test_an_unknown_license_is_no_license(tmp_path: Path) -> None:
    text = model_card(Subject(Kind.ADAPTER, "x", "nobody/unknown-base"), None)
    assert "license" not in ModelCard(text).data.to_dict() and "Its license was not found and applies" in text
    assert 'from_pretrained("nobody/unknown-base"' in text


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", lessons=1, hostile=True, before=[1] * 4, after=[1] * 4))
    text = model_card(Subject(Kind.RUN, "a | <b>", "demo"), run)
    outside = "".join(ModelCard(text).text.split("```")[::2])
    assert "<script>" in text and "<script>" not in outside and "\x1b" not in text and "<b>" not in outside
    assert fenced("```\n# Title") == "````text\n```\n# Title\n````"
    assert cell("a|b\n<i>") == "a\\|b &lt;i>" and HOSTILE not in outside
    assert len(fenced("x" * 5000)) < 1000


def test_a_checkpoints_card_has_no_evaluation_of_the_last_weights(run_dir: Path) -> None:
    for name, has in (("adapter", True), ("checkpoint-4", False)):
        (run_dir / name).mkdir(exist_ok=True)
        run = run_of(run_dir / name)
        assert run is not None and (run.after is not None) is has and run.rows
    assert run_of(run_dir) is None, "the folder above is no run"


def test_an_export_tells_the_run_and_how_faithful_it_is(run_dir: Path, tmp_path: Path) -> None:
    found = Fidelity(96, 1.5e-5, 3e-4, 0.9975, (True, True))
    report = ExportReport(
        tmp_path / "out", "merged-16bit", run_dir / "adapter", ModelSpec("Qwen/Qwen3-4B-Base"), "bfloat16", found
    )
    text = card(report)
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.base_model_relation) == (
        "transformers", "Qwen/Qwen3-4B-Base", "finetune",
    )  # fmt: skip
    assert "mean KL 1.5e-05 nats/token, same top token 99.75%" in text and "| Avg@4 |" in text
    assert 'pipeline("text-generation", model="OWNER/NAME")' in text and "lora" not in data.tags
    gguf = card(replace(report, format="q4_k_m"))
    assert "llama-cli -m qwen3-4b-base-q4_k_m.gguf" in gguf and "converted to q4_k_m by llama.cpp" in gguf
    assert ModelCard(gguf).data.base_model_relation == "quantized"
    adapter = card(replace(report, format="adapter", fidelity=None, dtype=None))
    assert ModelCard(adapter).data.library_name == "peft" and "## Export" not in adapter


def test_a_trainers_card_replaces_trls(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.store.add([lesson(1)])
    trainer.create_model_card(model_name="mine", dataset_name="owner/tasks", tags="extra")
    text = (tmp_path / "run" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.datasets == ["owner/tasks"] and data.tags[-1] == "extra" and "# mine" in text
    assert str(tmp_path) not in text and "None](" not in text and "nothing is known about the effect" in text
    assert "| LoRA rank, alpha |" in text and "- trl: 1." in text and "- device: CPU" in text
    assert "Rule-1: count down." in text, "a finished run shows its rules"


def test_dataset_specs_are_told_apart() -> None:
    assert metadata.dataset_hub_id("open-r1/DAPO-Math-17k-Processed:en") == "open-r1/DAPO-Math-17k-Processed"
    for local in ("demo", "demo:test", "data/tasks.jsonl", "./own/data", "reasoning-gym:chain_sum", None, "/a/b"):
        assert metadata.dataset_hub_id(local) is None
    assert metadata.shown_dataset("reasoning-gym:chain_sum") == "reasoning-gym:chain_sum"
    assert metadata.shown_dataset("held-out") == "held-out training tasks"
