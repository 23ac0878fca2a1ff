# %% [markdown]
# # Your own task on a 24 GB card
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/%3Cowner%3E/mel-lite/blob/main/notebooks/02_your_task_on_24gb.ipynb)
#
# Your data, your verifier defined in a cell, a memory plan before anything is loaded, training, and a resume after a stop. With a GPU it trains Qwen3-8B in 4 bits with the preset `24gb`. Without one it runs the same cells with the 135M demo model for two steps, so that you can read every stage first. It was run on CPUs only.

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
import torch

gpu = torch.cuda.is_available()
preset = "24gb" if gpu else "cpu"
print(
    torch.cuda.get_device_name() if gpu else "No GPU: the demo model on the CPU, one step and one more after a resume."
)

# %% [markdown]
# ## Your data
#
# A file with one `prompt` and one `answer` per line. Columns of other names, CSV, parquet and the Hub work, too ([data and verifiers](../docs/tasks.md)). The questions here have made-up words that no model knows. Only the verifier can tell what they mean, so there is something to learn.

# %%
import json
import operator
import random
from pathlib import Path

MEANING = {"lum": operator.add, "zig": operator.add, "pom": operator.sub, "vex": operator.sub}


def question(rng):
    """A question and its answer, worked from left to right."""
    a, b, c = (rng.randint(1, 9) for _ in range(3))
    first, second = rng.sample(sorted(MEANING), 2)
    total = MEANING[second](MEANING[first](a, b), c)
    prompt = f"What is {a} {first} {b} {second} {c}? Write one step per line, then `Answer: <number>`."
    return {"prompt": prompt, "answer": str(total)}


rng = random.Random(7)
rows = [question(rng) for _ in range(232)]
for name, part in (("tasks.jsonl", rows[:200]), ("held_out.jsonl", rows[200:])):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in part))
rows[0]

# %% [markdown]
# ## Your verifier
#
# A function of the completion, the answer, and any column of your data that its signature names. It returns `"right"`, `"wrong"`, or `"abstain"` where it cannot tell. It runs in worker processes with a deadline, so a hanging one costs a second, not the run. Try it on answers before a model is trained on it.

# %%
import re


def last_answer(completion, answer):
    """Right if the last `Answer: <number>` is the reference; several different answers are an abstention."""
    found = {int(number) for number in re.findall(r"Answer:\s*(-?\d+)", completion)}
    if len(found) > 1:
        return "abstain"
    return "right" if found == {int(answer)} else "wrong"


for text in ("3 + 4 = 7\nAnswer: 7", "Answer: 8", "Answer: 7 or Answer: 8", "seven"):
    print(f"{last_answer(text, '7'):8} {text!r}")

# %% [markdown]
# ## The plan
#
# What the run needs in every phase on a card of 24 GB, computed from the sizes of the model and the batch. Nothing is loaded. A plan that does not fit says which option to change.

# %%
from rich.console import Console

from mel_lite.memory.plan import plan_for
from mel_lite.run.display import plan_view

console = Console(width=100, force_jupyter=False, force_terminal=False)
_, planned, _ = plan_for("24gb", None, [])
console.print(plan_view(planned))

# %% [markdown]
# ## Train
#
# A preset, and what differs from it. [Every option](../docs/configuration.md) can be set here. `__main__:last_answer` is the function of the cell above; it is copied into the worker processes.

# %%
from mel_lite.recipe import resolve
from mel_lite.run.train import train

run = Path("runs/my-task")
mine = [
    ("data.train", "tasks.jsonl"),
    ("data.eval", "held_out.jsonl"),
    ("train.verifier", "__main__:last_answer"),
    ("train.save_steps", 10),
]
small = [
    ("train.save_steps", 1),
    ("train.num_generations", 4),
    ("train.per_device_train_batch_size", 8),
    ("train.gradient_accumulation_steps", 1),
    ("train.replay_control", False),
    ("eval.limit", 3),
    ("eval.k", 2),
    ("export.format", None),
]


def run_for(steps, *, resume):
    """Train up to a number of optimizer steps. On a GPU the plan fits the batch to the card first."""
    options = [*mine, *([] if gpu else small), ("train.max_steps", steps)]
    if gpu:
        recipe, made, _ = plan_for(preset, None, options, run_here=True)
        budget = None if made is None else made.budget_bytes
    else:
        recipe, budget = resolve(preset=preset, overrides=options), None
    train(recipe, run, resume=resume, console=console, preset=preset, budget_bytes=budget)


run_for(60 if gpu else 1, resume=False)

# %% [markdown]
# ## Resume
#
# A run that was stopped, or should be longer, continues from its newest complete checkpoint. Checkpoints are hashed; a damaged one is set aside and the one before it is used. In a terminal: `mel-lite train --resume --output-dir runs/my-task`.

# %%
run_for(120 if gpu else 2, resume=True)

# %% [markdown]
# ## The result
#
# The run folder has the adapter, every meta-experience, the metrics, and `report.html`, a page to open in a browser. Two steps on the CPU cannot show a gain: look at the width of the intervals.

# %%
for path in sorted(run.iterdir()):
    print(path.name)

# %% [markdown]
# Next: [what the lessons say](03_read_the_lessons.ipynb), and [whether they help](05_grpo_vs_mel.ipynb).
