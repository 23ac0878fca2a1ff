# %% [markdown]
# # GRPO or MEL? A small comparison
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/%3Cowner%3E/mel-lite/blob/main/notebooks/05_grpo_vs_mel.ipynb)
#
# Lessons cost generated tokens. So the question is whether MEL beats GRPO *at equal generated tokens*, on held-out tasks, with an interval. This notebook trains both with the same seeds, prompts and token budget and compares them. On a CPU the budget is so small that it shows how the comparison works, and nothing about the methods. It was run on CPUs only; [The study](../docs/learning.md) has measured results.

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
import subprocess
import sys

import torch

gpu = torch.cuda.is_available()
settings = ["--gpu", "auto", "--seeds", "3", "--budget-tokens", "2000000", "--set", "data.eval=demo:test"]
if not gpu:
    print("No GPU: one seed per arm and a few hundred tokens of the demo model.")
    settings = ["--gpu", "cpu", "--seeds", "1", "--budget-tokens", "300"]
    small = {"train.num_generations": 4, "train.per_device_train_batch_size": 8, "eval.limit": 3, "eval.k": 2}
    small |= {"train.gradient_accumulation_steps": 1, "train.replay_control": "false", "export.format": "null"}
    settings += [part for key, value in small.items() for part in ("--set", f"{key}={value}")]

# %% [markdown]
# ## Train the arms
#
# Each run is a process of its own with a folder and a log under `comparison/`. The same command continues after a stop and does not repeat finished runs. More arms are one word each: `distill`, `rft`, or the controls such as `distill-none` ([list](../docs/report.md#training-arms-to-compare)).

# %%
command = [sys.executable, "-m", "mel_lite", "compare", "--arms", "grpo,mel", "--output", "comparison", *settings]
done = subprocess.run(command, capture_output=True, text=True)
print((done.stderr + done.stdout)[-5000:])
if done.returncode:
    raise SystemExit(f"The comparison stopped with exit code {done.returncode}; comparison/logs has the reason.")

# %% [markdown]
# ## Read the result
#
# Differences are paired by task and seed; the interval is a bootstrap over both. If it includes 0, the data do not say which arm is better. The curves have generated tokens on the x axis: lessons and replays are paid for.

# %%
from IPython.display import Image, display

display(Image("comparison/comparison.png", width=700))

# %%
import json
from pathlib import Path

found = json.loads(Path("comparison/comparison.json").read_text())
for sentence in [*found["conclusions"], *found["limits"]]:
    print("-", sentence)

# %% [markdown]
# ## A comparison that can tell something
#
# - Three seeds at least, and held-out tasks in the hundreds (`--set data.eval=held_out.jsonl --set eval.limit=200`).
# - A budget that lets GRPO converge, and a learning rate tuned for each arm. Nothing is tuned here.
# - `mel-lite probe` first: it says in minutes if lessons can help on your task at all.
