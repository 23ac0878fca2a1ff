# %% [markdown]
# # Read the lessons of a run
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/%3Cowner%3E/mel-lite/blob/main/notebooks/03_read_the_lessons.ipynb)
#
# Every meta-experience of a run is kept, also those that were dropped, with the reason. This notebook browses the newest run in `runs/`, groups its rules by their words, and writes them as a dataset. Without a run it first trains the demo for one step.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Install MEL-Lite where it is missing
# The same cell is in every notebook: make.py copies it from install_cell.py.
import importlib
import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

SOURCE = ""  # a checkout, a wheel or an address; empty: the checkout that holds this notebook, else REPOSITORY
REPOSITORY = "https://github.com/<owner>/mel-lite"
# Installed without their dependencies, and only with a GPU:
GPU_PACKAGES = ()


def source():
    """The thing to install, as pip takes it."""
    folders = (Path("mel-lite").resolve(), Path.cwd(), *Path.cwd().parents)
    here = [folder for folder in folders if (folder / "mel_lite/__init__.py").is_file()]
    if not (SOURCE or here) and "<" in REPOSITORY:
        raise SystemExit("No checkout was found. Clone MEL-Lite into a folder mel-lite, or set SOURCE; then rerun.")
    return SOURCE or (str(here[0]) if here else f"git+{REPOSITORY}")


def pins():
    """What pip must not replace: torch, which matches the driver, and all that this session has already imported."""
    owners, loaded = packages_distributions(), {name.partition(".")[0] for name in list(sys.modules)}
    torch = {"torch", "torchaudio", "torchvision", "triton"}
    names = {dist for module in (loaded | torch) & owners.keys() for dist in owners[module]} - {"mel-lite"}
    return {name: version(name) for name in names}


def pip_install(*arguments):
    """Run pip, and return its exit code."""
    return subprocess.call([sys.executable, "-m", "pip", "install", "--quiet", *arguments])


def install():
    """Install MEL-Lite with this session's versions, or say what to do."""
    wanted, kept, pinned = f"mel-lite[demo] @ {source()}", pins(), Path("mel-lite-pins.txt")
    if Path(source()).exists():
        wanted = f"{source()}[demo]"
    pinned.write_text("".join(f"{name}=={value}\n" for name, value in kept.items()))
    failed = pip_install(wanted, "--constraint", str(pinned))
    pinned.unlink()
    if failed and pip_install(wanted):
        raise SystemExit("pip could not install MEL-Lite; its reason is above. Try a new session with Python 3.11+.")
    if failed:
        moved = ", ".join(sorted(name for name, value in kept.items() if version(name) != value))
        raise SystemExit(f"Installed, but this session has loaded other versions ({moved}). Restart it, then run all.")
    importlib.invalidate_caches()


if importlib.util.find_spec("mel_lite") is None:
    install()
if GPU_PACKAGES and shutil.which("nvidia-smi") and importlib.util.find_spec("unsloth") is None:
    pip_install("--no-deps", *GPU_PACKAGES)

# %%
from pathlib import Path

from rich.console import Console

console = Console(width=100, force_jupyter=False, force_terminal=False)
stores = sorted(Path("runs").glob("*/experiences.sqlite"), key=lambda path: path.stat().st_mtime)
if not stores:
    import torch

    from mel_lite.recipe import resolve
    from mel_lite.run.train import train

    use_cpu = not torch.cuda.is_available()
    print(f"No run in runs/: one step of the demo model, on the {'CPU' if use_cpu else 'GPU'}.")
    few = {"train.max_steps": 1, "train.use_cpu": use_cpu, "data.eval": None, "export.format": None}
    recipe = resolve(preset="cpu", overrides=list(few.items()))
    train(recipe, Path("runs/lessons"), resume=False, console=console, preset="cpu")
    stores = [Path("runs/lessons/experiences.sqlite")]
run = stores[-1].parent
print(run)

# %% [markdown]
# ## What became of them
#
# One row per meta-experience: written, then parsed, then checked for leaks of the answer, then proved by a replay. `mel-lite experiences list` and `mel-lite experiences browse` show the same in a terminal.

# %%
from mel_lite.lessons.store import ExperienceStore

store = ExperienceStore(run / "experiences.sqlite", read_only=True)
rows = store.list()
for row in rows[-12:]:
    print(f"{row.id:4}  step {row.step:3}  {row.status:12}  {row.reason[:70]}")
print({str(status): count for status, count in store.funnel().items() if count})

# %% [markdown]
# ## One in full
#
# Both solutions, the step where they part, the rule, and the replays with the meta-experience in the prompt. Choose another `id`, or search: `store.search("zig")`.

# %%
from mel_lite.models.chat import question_text

kept = store.list(status="kept")
if rows:
    chosen = (kept or rows)[-1]
    print(question_text(chosen.prompt))
    print(f"\n--- WRONG\n{chosen.wrong_text}\n\n--- RIGHT\n{chosen.right_text}")
    print(f"\n--- THE MODEL'S ANALYSIS\n{chosen.analysis}")
    for verdict, text in zip(chosen.replay_verdicts, chosen.replay_texts, strict=True):
        print(f"\n--- REPLAY with it in the prompt: {verdict}\n{text}")
else:
    print("This run wrote none: no group had both a right and a wrong answer.")

# %% [markdown]
# ## Rules of the same content
#
# Rules are alike when BM25 finds one by the words of the other at half of its own score or more. It compares words, not meanings. Many rules in one group mean that the run keeps writing the same lesson.

# %%
import bm25s

rules = [row for row in rows if row.heuristic]
words = bm25s.tokenize([row.heuristic for row in rules], stopwords="en", return_ids=False, show_progress=False)
used = [number for number, found in enumerate(words) if found]
groups = []
if used:
    index = bm25s.BM25(method="lucene")
    index.index([words[number] for number in used], show_progress=False)
    scores = {number: dict(zip(used, index.get_scores(words[number]), strict=True)) for number in used}
    for number in used:
        for group in groups:
            if scores[number][group[0]] >= 0.5 * scores[number][number]:
                group.append(number)
                break
        else:
            groups.append([number])
for group in sorted(groups, key=len, reverse=True)[:10]:
    share = sum(rules[number].status == "kept" for number in group) / len(group)
    print(f"{len(group):3} rules, {share:4.0%} kept: {' '.join(rules[group[0]].heuristic.split())}")

# %% [markdown]
# ## A dataset
#
# As JSONL or parquet, with everything that is known of each. `datasets` reads it back. Read the texts before you publish them: they quote your prompts and answers.

# %%
from datasets import load_dataset

written = store.export("experiences.jsonl")
print(written, "rows in experiences.jsonl")
if written:
    dataset = load_dataset("json", data_files="experiences.jsonl", split="train")
    helpful = dataset.filter(lambda row: row["status"] == "kept")
    print(helpful.num_rows, "kept;", ", ".join(dataset.column_names[:12]), "...")
store.close()
