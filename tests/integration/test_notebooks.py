"""Notebooks are pairs with small stored outputs, and run from top to bottom in a real Jupyter kernel, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The script that writes the notebooks."""
    pytest.importorskip("jupytext", reason="the notebook extra is not installed")
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- files ----


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_of_one_run(path: Path) -> None:
    """A notebook was run as a whole, or not since its cells changed; `make.py --run NAME` runs it."""
    text = path.read_text(encoding="utf-8")
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 5 and len({cell["id"] for cell in cells}) == len(cells)
    counts = [cell["execution_count"] for cell in code]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert counts in (list(range(1, len(code) + 1)), [None] * len(code)), "run python notebooks/make.py --run"
    assert bool(outputs) == (counts[0] is not None) and all(output["output_type"] != "error" for output in outputs)
    assert len(text) < MOST_BYTES
    assert not re.findall(r"(?<![\w.:/])/(?:tmp|root|home|work|usr)/[\w./-]+", text), "paths of a machine"


def test_both_files_of_a_notebook_are_what_make_writes(make: ModuleType) -> None:
    sources = make.sources()
    assert [path.with_suffix(".ipynb") for path in sources] == NOTEBOOKS and len(sources) == 5
    for source in sources:
        for path, text in make.texts(source).items():
            assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python notebooks/make.py"
        title, install = make.notebook(source).cells[:2]
        assert f"/blob/main/notebooks/{source.stem}.ipynb)" in title.source and make.BADGE in title.source
        assert install.source == make.install_cell(source.stem)
        assert ("unsloth_zoo" in install.source) == ("unsloth" in source.stem)


def test_a_changed_cell_loses_its_output_and_the_others_keep_theirs(make: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "06_new.py"
    cells = ["# %% [markdown]\n# # New\n", "# %%\n# install\n", "# %%\nprint(1)\n", "# %%\nprint(2)\n"]
    source.write_text("\n".join(cells))
    for path, text in make.texts(source).items():
        path.write_text(text)
    stored = json.loads(source.with_suffix(".ipynb").read_text())
    for number, cell in enumerate(stored["cells"][2:], start=1):
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": [f"{number}\n"]}]
        cell["execution_count"] = number
    source.with_suffix(".ipynb").write_text(json.dumps(stored))
    source.write_text(source.read_text().replace("print(2)", "print(3)"))
    again = json.loads(make.texts(source)[source.with_suffix(".ipynb")])["cells"]
    assert [cell.get("outputs", []) for cell in again[2:]] == [stored["cells"][2]["outputs"], []]
    assert again[3]["source"] == ["print(3)"] and again[3]["execution_count"] is None


def test_stored_outputs_are_tidied(make: ModuleType, tmp_path: Path) -> None:
    import nbformat

    text = f"\x1b[1mbold\x1b[0m {tmp_path}/runs/a  \nold\rnew\n" + "x" * 2 * make.MOST_CHARACTERS
    streams = (("stderr", "a progress bar"), ("stdout", text), ("stdout", "\n"))
    outputs = [nbformat.v4.new_output("stream", name=name, text=each) for name, each in streams]
    cell = nbformat.v4.new_code_cell(outputs=outputs)
    cell.metadata["execution"] = {"iopub.execute_input": "now"}
    make.tidy(made := nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    (output,) = made.cells[0].outputs
    found = output["text"]
    assert found.startswith("bold runs/a\nnew\nxx") and found.endswith("x\n... (shortened)\n")
    assert len(found) < make.MOST_CHARACTERS + 30 and not made.cells[0].metadata


# ---- the install cell ----


def install_cell() -> dict[str, Any]:
    """Names of the install cell, which has nothing to install here."""
    names: dict[str, Any] = {}
    exec(compile((FOLDER / "install_cell.py").read_text(encoding="utf-8"), "install_cell.py", "exec"), names)
    return names


def test_the_install_cell_finds_a_checkout_or_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = install_cell()
    with pytest.raises(SystemExit, match=r"^No checkout was found\. Clone MEL-Lite into a folder mel-lite, or set"):
        cell["source"]()
    cell["REPOSITORY"] = "https://host.example/us/mel-lite"
    assert cell["source"]() == "git+https://host.example/us/mel-lite"
    (tmp_path / "mel-lite" / "mel_lite").mkdir(parents=True)
    (tmp_path / "mel-lite" / "mel_lite" / "__init__.py").touch()
    assert cell["source"]() == str(tmp_path / "mel-lite")
    (tmp_path / "mel-lite" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "mel-lite" / "notebooks")
    assert cell["source"]() == str(tmp_path / "mel-lite")
    cell["SOURCE"] = "mel_lite-0.1.0-py3-none-any.whl"
    assert cell["source"]() == "mel_lite-0.1.0-py3-none-any.whl"


def test_the_install_cell_keeps_what_the_session_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is replaced: it would need the package index. Its first call fails as on a Colab with other pins."""
    monkeypatch.chdir(tmp_path)
    cell = install_cell() | {"SOURCE": "git+https://host.example/us/mel-lite"}
    assert "numpy" in sys.modules
    calls: list[tuple[str, ...]] = []
    pinned: dict[str, str] = {}
    exits = [1, 0]

    def pip(*arguments: str) -> int:
        if "--constraint" in arguments:
            lines = Path(arguments[-1]).read_text().splitlines()
            pinned.update(line.split("==") for line in lines)  # type: ignore[arg-type]
        calls.append(arguments)
        return exits[len(calls) - 1]

    names: dict[str, Any] = {}
    exec(compile((FOLDER / "install_cell.py").read_text(encoding="utf-8"), "install_cell.py", "exec"), names)
    names |= {"SOURCE": cell["SOURCE"], "pip_install": pip}
    real: Callable[[str], str] = names["version"]
    names["version"] = lambda name: "0.1" if name == "numpy" and len(calls) == 2 else real(name)
    with pytest.raises(SystemExit, match=r"other versions \(numpy\)\. Restart it, then run all\.$"):
        names["install"]()
    wanted = "mel-lite[demo] @ git+https://host.example/us/mel-lite"
    assert calls == [(wanted, "--constraint", "mel-lite-pins.txt"), (wanted,)]
    assert pinned["torch"] == version("torch") and pinned["numpy"] == version("numpy") and "mel-lite" not in pinned
    assert not (tmp_path / "mel-lite-pins.txt").exists()
    calls.clear()
    exits[:] = [1, 1]
    with pytest.raises(SystemExit, match=r"^pip could not install MEL-Lite; its reason is above\."):
        names["install"]()


# ---- in a kernel ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all notebooks, in their order: the third reads the runs of those before it."""
    return tmp_path_factory.mktemp("notebooks")


def said(make: ModuleType, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook; returns everything that its cells printed."""
    pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = make.execute(FOLDER / f"{name}.ipynb", folder)
    outputs = [output for cell in made.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def steps_of(run: Path) -> list[int]:
    """Steps of the logs with a loss."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_quickstart_runs(make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(make, "01_quickstart", folder, monkeypatch)
    assert "No GPU: two steps" in text and "Pass@1 (greedy)" in text and "faithful" in text
    assert "WRONG" in text and "WHAT THE MODEL WRITES" in text
    run = folder / "runs" / "quickstart"
    assert (run / "merged-16bit" / "model.safetensors").is_file() and (run / "adapter" / "mel_lite.json").is_file()
    from mel_lite.lessons.store import ExperienceStore

    with ExperienceStore(run / "experiences.sqlite", read_only=True) as store:
        rows = store.list()
    assert rows and any(row.nll_after is not None for row in rows)
    assert all(row.nll_after < row.nll_before for row in rows if row.nll_after is not None and row.nll_before)


@pytest.mark.slow
def test_your_task_trains_with_the_verifier_of_a_cell_and_resumes(
    make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(make, "02_your_task_on_24gb", folder, monkeypatch)
    assert "No GPU: the demo model" in text and "predicted GPU memory: Qwen/Qwen3-8B-Base on 24gb" in text
    assert re.search(r"right +'3 \+ 4 = 7\\nAnswer: 7'", text) and "abstain  'Answer: 7 or Answer: 8'" in text
    run = folder / "runs" / "my-task"
    assert steps_of(run) == [1, 2] and (run / "checkpoint-2").is_dir() and (run / "report.html").is_file()
    assert "verifier: __main__:last_answer" in (run / "config.yaml").read_text()


@pytest.mark.slow
def test_lessons_are_read_grouped_and_exported(make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(make, "03_read_the_lessons", folder, monkeypatch)
    rows = [json.loads(line) for line in (folder / "experiences.jsonl").read_text().splitlines()]
    assert f"{len(rows)} rows in experiences.jsonl" in text and rows
    grouped = [int(count) for count in re.findall(r"^ *(\d+) rules,", text, re.MULTILINE)]
    assert sum(grouped) == sum(bool(row["heuristic"]) for row in rows)


@pytest.mark.slow
def test_the_notebook_for_users_of_unsloth_takes_the_other_path_on_a_cpu(
    make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(make, "04_from_unsloth_grpo", folder, monkeypatch)
    assert "No GPU: transformers and the 135M demo model" in text and "Unsloth is not used." in text
    assert re.search(r"^mel/groups +4\.0$", text, re.MULTILINE)
    assert re.search(r"^mel/written +[1-4]\.0$", text, re.MULTILINE), "no lesson to show"
    run = folder / "runs" / "from-unsloth"
    assert steps_of(run) == [1] and (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_both_arms_are_trained_and_compared(make: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(make, "05_grpo_vs_mel", folder, monkeypatch)
    found = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["grpo", "mel"]
    assert found["conclusions"] and all(sentence in text for sentence in found["conclusions"])
    assert all(steps_of(folder / "comparison" / f"{arm}-0") for arm in ("grpo", "mel"))
