"""The documentation site: generated pages, the glossary of metrics, links out of docs/, and scripts that run."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from trl import GRPOTrainer

from lesson_banks import bank_of
from mel_lite.training.metrics import FUNNEL_COUNTS, GradientMeter
from mel_lite.types import Group
from tiny_models import save_tiny

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def script(path: str) -> ModuleType:
    """Load a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- command line ----


def test_the_page_of_commands_is_what_the_code_has() -> None:
    make_cli = script("docs/make_cli.py")
    page = make_cli.PAGE.read_text(encoding="utf-8")
    assert page == make_cli.page(), "run python docs/make_cli.py"
    surface = json.loads((ROOT / "tests/cli/cli_surface.json").read_text())
    headings = re.findall(r"^#+ `(mel-lite.*)`$", page, re.MULTILINE)
    assert set(surface) - {"mel-lite"} == set(headings) and len(headings) == len(set(headings))
    train = page.split("## `mel-lite train`\n")[1].split("\n## ")[0]
    assert "| `--gpu`" in train and "| `--max-steps`" in train and "mel-lite train [OPTIONS]\n" in train
    assert "| `--k`" in page and "| `8` | Samples per task for Avg@k and Pass@k. |" in page


# ---- metrics ----

NAME = re.compile(r"(?:mel|time)/[a-z_]+(?<!_)")


def constants() -> Iterator[ast.AST]:
    """Every node of every module of the package."""
    for path in (ROOT / "mel_lite").rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def logged() -> tuple[set[str], set[str]]:
    """Names of metrics written out in the code, and the f-strings that make others, with `{}` for their fields."""
    names, made, phases = set(), set(), set()
    for node in constants():
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            if re.fullmatch(r"(?:mel|time)/[a-z_{}]+", text):
                made.add(text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            names.add(node.value)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if re.search(r"(^|[._])clock(\.rest)?$", ast.unparse(node.func)):
                phases.add(str(node.args[0].value))
    return names | {f"time/{phase}_s" for phase in phases}, made


def entries() -> list[str]:
    """Names that the glossary explains, in its order."""
    return re.findall(r"^\| `([\w/]+)` \| .{9,} \|$", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_glossary_has_every_metric_of_the_code_and_no_other() -> None:
    names, made = logged()
    # What the f-strings make; a new one needs a line here.
    assert made == {"mel/{}", "mel/bank_{}", "mel/grad_norm_{}", "time/{}_s"}
    group = Group("3 zap 7?", "0", (), answer="4")
    bank = bank_of(("zap", "plus")).metrics([group])
    assert bank["mel/bank_size"] == bank["mel/bank_taught_share"] == 1
    names |= {*FUNNEL_COUNTS, *bank, *(f"mel/grad_norm_{term}" for term in GradientMeter.TERMS)}
    explained = entries()
    assert len(explained) == len(set(explained)), "a metric has two entries"
    assert {name for name in explained if name.startswith(("mel/", "time/"))} == names


def test_the_glossary_has_every_metric_of_trl() -> None:
    source = inspect.getsource(inspect.getmodule(GRPOTrainer) or GRPOTrainer)
    names = set(re.findall(r"\[f?\"([\w/{}]+)\"\]\.append\(", source))
    assert {"reward", "completions/mean_length", "rewards/{reward_func_name}/mean"} <= names and len(names) > 25
    assert {name.replace("{reward_func_name}", "NAME") for name in names} <= set(entries())


def test_the_glossary_has_every_metric_that_stored_runs_logged() -> None:
    explained, seen = set(entries()), set()
    for path in (ROOT / "tests/resilience/old_runs").rglob("metrics.jsonl"):
        seen |= {name for line in path.read_text().splitlines() for name in json.loads(line)}
    assert len(seen) > 40
    assert {re.sub(r"^rewards/\w+/", "rewards/NAME/", name) for name in seen} <= explained


# ---- links ----


def test_links_out_of_the_docs_lead_to_the_repository() -> None:
    hooks = script("docs/site_hooks.py")
    text = (
        "[a](../README.md) [b](tasks.md#verifiers) [c](../missing.md) [d](https://x.y/../README.md) [e](#top)\n"
        "```text\n[f](../README.md)\n```\n[g](../CONTRIBUTING.md#tests) [h](../docs/tasks.md)"
    )
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    config = SimpleNamespace(extra={"repository": "https://host.example/<owner>/mel-lite"})
    found = hooks.on_page_markdown(text, page=page, config=config, files=None)
    there = "https://host.example/%3Cowner%3E/mel-lite/blob/main"
    assert found == (
        f"[a]({there}/README.md) [b](tasks.md#verifiers) [c](../missing.md) [d](https://x.y/../README.md) [e](#top)\n"
        f"```text\n[f](../README.md)\n```\n[g]({there}/CONTRIBUTING.md#tests) [h](../docs/tasks.md)"
    )


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


# ---- scripts ----

SMALLER = dict(
    use_cpu=True, bf16=False, max_steps=1, max_completion_length=8, analysis_max_tokens=16, save_strategy="no",
    report_to="none", seed=3, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
)  # fmt: skip
"""Options that replace those of a page's script, so that it takes a second on a CPU."""


def scripts(page: str) -> list[str]:
    """The Python blocks of a page that build a trainer."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "Trainer(" in block]


class TransformersModel:
    """What `FastLanguageModel` does, by transformers and PEFT and with a tiny model."""

    folder = ""

    @classmethod
    def from_pretrained(cls, _: str, **options: Any) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert options["load_in_4bit"] and options["max_lora_rank"] == 32
        return AutoModelForCausalLM.from_pretrained(cls.folder), AutoTokenizer.from_pretrained(cls.folder)

    @staticmethod
    def get_peft_model(model: Any, *, use_gradient_checkpointing: str, **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def run(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page's script in `folder` with a tiny model and few steps; returns its names."""
    tree = ast.parse(block)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "MELConfig":
            call.keywords = [given for given in call.keywords if given.arg not in SMALLER]
            call.keywords += [ast.keyword(name, ast.Constant(value)) for name, value in SMALLER.items()]
        for given in call.keywords:
            if given.arg == "model" and isinstance(given.value, ast.Constant):
                given.value = ast.Constant(str(folder / "tiny"))
    TransformersModel.folder = str(save_tiny(folder / "tiny", "qwen3"))
    tree.body = [node for node in tree.body if ast.unparse(node) != "from unsloth import FastLanguageModel"]
    rows = [{"prompt": f"What is {a} + 1?", "question": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(8)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"FastLanguageModel": TransformersModel, "tasks": None}
    if "train_dataset=tasks" in block:
        from datasets import Dataset

        names["tasks"] = Dataset.from_list(rows)
    exec(compile(ast.fix_missing_locations(tree), "page", "exec"), names)
    return names


def test_the_script_from_trl_changes_names_and_adds_a_verifier() -> None:
    before, after = (
        block.replace("GRPO", "MEL").replace("runs/grpo", "runs/mel").splitlines() for block in scripts("from-trl.md")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert sum("import" in line for line in changed) == 2  # the line with both names
    added = " ".join(line[2:].strip() for line in changed if line[0] == "+" and "import" not in line)
    removed = " ".join(line[2:].strip() for line in changed if line[0] == "-" and "import" not in line)
    flat = re.sub(r"\(\s+|\s+\)", lambda match: match[0].strip(), added)
    assert flat == removed.replace('"runs/mel", ', '"runs/mel", verifier="numeric", ')


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), [("from-trl.md", 1), ("from-unsloth.md", 0)])
def test_the_scripts_for_movers_train(page: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(scripts(page)[number], tmp_path, monkeypatch)["trainer"]
    assert trainer.state.global_step == 1
    assert (tmp_path / "runs" / "mel" / "adapter" / "adapter_model.safetensors").is_file()
    assert trainer.args.verifier in ("numeric", "math") and trainer.args.with_meta_experience
    assert {type(layer).__name__ for layer in trainer.model.modules()} >= {"LoraModel"}


@pytest.mark.slow
def test_the_script_with_an_own_reward_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = scripts("rewards.md")
    trainer = run(block, tmp_path, monkeypatch)["trainer"]
    trainer.train()
    logged_step = trainer.state.log_history[0]
    assert 0.19 < logged_step["rewards/short/mean"] <= 0.2 and logged_step["mel/groups"] == 1
