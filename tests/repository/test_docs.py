"""Pages: figures and options are generated; links, files, commands and scripts are real."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from click import Context

from mel_lite.cli.main import app
from mel_lite.templates import render
from mel_lite.verifiers import get_verifier
from tiny_models import save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def script(path: str) -> ModuleType:
    """Load a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it is run as a script
    module = script("benchmarks/tables.py")
    monkeypatch.undo()
    return module


@pytest.fixture(scope="module")
def configuration() -> ModuleType:
    return script("docs/make_configuration.py")


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/kernels.md",
        "docs/learning.md",
        "docs/learning-rounds.md",
        "docs/memory.md",
        "docs/method.md",
        "docs/performance.md",
        "docs/which-card.md",
    ],
)
def test_pages_quote_the_raw_results(tables: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert page in tables.PAGES and tables.MARK.search(text)
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    changed = text.replace("MiB where full logits take", "MiB where  full logits take")
    assert changed != text and tables.filled(changed) == text
    with pytest.raises(KeyError):
        tables.filled("<!-- figures nothing -->\n<!-- /figures -->")


MARKDOWN = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", ".github/**/*.md", "mel_lite/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """The page without fenced blocks, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_local_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "mailto:")):
            continue
        place, _, fragment = target.partition("#")
        linked = (path.parent / place).resolve() if place else path
        assert linked.exists(), f"{relative(path)}: {target}"
        assert not fragment or fragment in anchors(linked), f"{relative(path)}: {target}"


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_named_files_exist(path: Path) -> None:
    folders = "mel_lite|kernels|tests|benchmarks|docs|configs|requirements|notebooks"
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*[\w/])", text):
        assert (ROOT / name).exists() or (path.parent / name).exists(), f"{relative(path)}: {name}"


def commands() -> dict[str, set[str]]:
    """Every command of `mel-lite` with its options."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, path: str) -> None:
        parameters = command.get_params(Context(command))
        found[path] = {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "mel-lite")
    return found


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_commands_in_pages_exist(path: Path) -> None:
    known = commands()
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"(?:^|`|= |-m )mel[-_]lite ([^`\n#]+)", text, re.MULTILINE):
        names = ["mel-lite"]
        words = line.split()
        while words and " ".join([*names, words[0]]) in known:
            names.append(words.pop(0))
        used = {word.partition("=")[0].rstrip(".,;:)") for word in words if word.startswith("--")}
        assert len(names) > 1 or used, f"{relative(path)}: mel-lite {line} is no command"
        assert used <= known[" ".join(names)], f"{relative(path)}: mel-lite {line}"


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_targets_of_make_in_pages_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets, f"{relative(path)}: {named - targets}"


@pytest.mark.parametrize(("page", "most"), [("README.md", 130), ("CONTRIBUTING.md", 120)])
def test_front_pages_stay_short(page: str, most: int) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= most


def test_the_architecture_page_has_the_table_of_the_import_law() -> None:
    tree = ast.parse((ROOT / "tests/repository/test_import_law.py").read_text(encoding="utf-8"))
    (law,) = [node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LAYERS"]
    layers = [node.value for node in ast.walk(law) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert block.splitlines() == [" ".join(layer.split()) for layer in layers]


def test_the_architecture_page_names_every_package_and_mixin() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE))
    packages = {path.parent.name for path in ROOT.glob("mel_lite/*/__init__.py")} - {"configs", "kernels"}
    assert rows >= packages and len(packages) > 10
    tree = ast.parse((ROOT / "mel_lite/trainer.py").read_text(encoding="utf-8"))
    (trainer,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MELTrainer"]
    *mixins, base = [ast.unparse(parent) for parent in trainer.bases]
    assert base == "GRPOTrainer" and all(f"`{mixin}`" in page for mixin in mixins) and mixins


def overrides() -> dict[str, set[str]]:
    """The methods of `GRPOTrainer` that `MELTrainer` and each of its mixins define, by class."""
    from mel_lite.trainer import GRPOTrainer, MELTrainer

    ours = MELTrainer.__mro__[: MELTrainer.__mro__.index(GRPOTrainer)]
    return {
        each.__name__: {
            name
            for name, value in vars(each).items()
            if callable(value) and hasattr(GRPOTrainer, name) and not name.startswith("__")
        }
        for each in ours
    }


def test_the_architecture_page_lists_every_method_of_trl_that_is_overridden() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("## Seams of TRL")[1].split("\n## ")[0]
    listed: dict[str, list[str]] = {}
    for class_name, methods in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE):
        listed.setdefault(class_name, []).extend(re.findall(r"`(\w+)`", methods))
    assert {name: sorted(methods) for name, methods in listed.items()} == {
        name: sorted(methods) for name, methods in overrides().items()
    }


def test_every_name_on_the_api_page_can_be_imported() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    names = [re.sub("^kernels", "mel_lite.kernels", name) for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    found = {name: pkgutil.resolve_name(name) for name in names}
    assert found["mel_lite.verifiers.get_verifier"] is get_verifier and found["mel_lite.templates.render"] is render
    assert len(found) > 20 and all(getattr(each, "__doc__", None) for each in found.values())


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("docs/tasks.md", "right wrong\n"),
        ("docs/prompts.md", "<|im_start|>user\nWhat is 3 plus 2?<|im_end|>\n<|im_start|>assistant\n\n"),
    ],
)
def test_scripts_without_a_trainer_print_what_the_page_says(
    page: str, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: tiny_tokenizer())
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.M)
    exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_the_readme_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, but with a tiny model, short answers and no GPU."""
    (script,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    tree = ast.parse(script)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "MELConfig":
            smaller = dict(
                use_cpu=True,
                bf16=False,
                max_steps=1,
                max_completion_length=8,
                analysis_max_tokens=64,
                report_to="none",
                seed=3,
            )
            call.keywords += [ast.keyword(name, ast.Constant(value)) for name, value in smaller.items()]
        for keyword in call.keywords:
            if keyword.arg == "model":
                keyword.value = ast.Constant(str(save_tiny(tmp_path / "tiny", "qwen3")))
    rows = [{"prompt": f"What is {a} + 1?", "answer": str(a + 1)} for a in range(8)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), "README.md", "exec"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1 and trainer.args.with_meta_experience
    assert {type(layer).__name__ for layer in trainer.model.modules()} >= {"LoraModel"}
    assert (tmp_path / "runs/mine/metrics.jsonl").is_file()


def test_the_page_of_options_is_what_the_code_has(configuration: ModuleType) -> None:
    assert configuration.PAGE.read_text(encoding="utf-8") == configuration.page(), (
        "run python docs/make_configuration.py"
    )


def test_every_option_and_every_registered_name_has_a_row_with_a_meaning(configuration: ModuleType) -> None:
    from mel_lite.config import MELConfig
    from mel_lite.lessons.internalise import INTERNALISATIONS
    from mel_lite.recipe import SECTIONS
    from mel_lite.verify.verifiers import BUILT_IN

    rows = [line for line in configuration.page().splitlines() if line.startswith("| `")]
    named = Counter(line.split("`")[1] for line in rows)
    wanted = Counter(field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind))
    wanted += Counter([*MELConfig.__annotations__, *INTERNALISATIONS, *BUILT_IN])
    assert named == wanted
    assert all(len(line.rstrip("| ").split(" | ")[-1]) > 4 for line in rows)
    (row,) = (line for line in rows if line.startswith("| `leak_policy` "))
    assert row.startswith("| `leak_policy` | `reject`, `redact`, `off` | `reject` | Treatment of a meta-experience ")


def test_an_option_without_a_text_is_noticed(configuration: ModuleType) -> None:
    """`field_docs` reads sources, so the class must be one of a file."""
    from mel_lite.evaluate import PromptScore

    assert configuration.field_docs(PromptScore) == {}
    with pytest.raises(KeyError, match="prompt_hash"):
        configuration.section("score", PromptScore)
