# %% [markdown]
# # From an Unsloth GRPO notebook
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/%3Cowner%3E/mel-lite/blob/main/notebooks/04_from_unsloth_grpo.ipynb)
#
# An Unsloth GRPO notebook loads a model with `FastLanguageModel`, defines reward functions, and trains with TRL's `GRPOConfig` and `GRPOTrainer`. Two lines change: the import, and the name of the trainer's class with its config. Everything else, the reward functions included, stays.
#
# With a GPU it takes Unsloth's path. Without one it takes transformers and the demo model, and says so. It was run on CPUs only.

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
GPU_PACKAGES = ("unsloth", "unsloth_zoo", "cut_cross_entropy", "tyro", "torchao", "xformers")


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
FastLanguageModel = None
if not gpu:
    print("No GPU: transformers and the 135M demo model, one step on the CPU. Unsloth is not used.")
else:
    try:
        from unsloth import FastLanguageModel
    except Exception as problem:  # a version that does not fit this runtime raises many kinds of errors
        print(f"Unsloth does not load here ({problem}). The notebook goes on with transformers.")

# %% [markdown]
# ## The model, as in your notebook

# %%
max_seq_length = 1024
if FastLanguageModel is not None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        "unsloth/Qwen3-1.7B", max_seq_length=max_seq_length, load_in_4bit=True, fast_inference=False, max_lora_rank=16
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth")
else:
    from mel_lite.models.adapters import attach_adapter, find_adapter
    from mel_lite.models.load import ModelSpec, load_base, load_tokenizer

    spec = ModelSpec("demo", dtype="float32")
    tokenizer = load_tokenizer(spec)
    model = attach_adapter(load_base(spec), find_adapter("demo"), trainable=True)

# %% [markdown]
# ## The data, as in your notebook
#
# Prompts in chat form and a column with the answer. The packaged tasks need no download; put your `load_dataset(...)` here.

# %%
from mel_lite.data.tasks import load_tasks

dataset = load_tasks("demo", conversational=True)
dataset[0]

# %% [markdown]
# ## The reward functions, as in your notebook
#
# They keep TRL's signature and may be shaped. Right and wrong, from which pairs and lessons are made, come from the `verifier`, so a bonus for format cannot make a wrong answer right.

# %%
import re


def correctness_reward(completions, answer, **kwargs):
    """2 for the right number, else 0."""
    texts = [completion[0]["content"] for completion in completions]
    found = [re.findall(r"Answer:\s*(-?\d+)", text) for text in texts]
    return [2.0 if numbers and numbers[-1] == right else 0.0 for numbers, right in zip(found, answer, strict=True)]


def format_reward(completions, **kwargs):
    """A quarter for an answer line."""
    return [0.25 if "Answer:" in completion[0]["content"] else 0.0 for completion in completions]


# %% [markdown]
# ## The two lines
#
# ```diff
# - from trl import GRPOConfig, GRPOTrainer
# + from mel_lite import MELConfig as GRPOConfig, MELTrainer as GRPOTrainer
# ```
#
# and, so that lessons know what is right, one option of the config: `verifier`. The options below the line are for the demo on a CPU.

# %%
from mel_lite import MELConfig as GRPOConfig
from mel_lite import MELTrainer as GRPOTrainer

on_demo = dict(templates="demo", analysis_max_tokens=120, use_cpu=not gpu, bf16=False, gradient_checkpointing=False)
training_args = GRPOConfig(
    output_dir="runs/from-unsloth",
    verifier="numeric",
    learning_rate=5e-6 if gpu else 5e-5,
    per_device_train_batch_size=8 if gpu else 16,
    num_generations=8 if gpu else 4,
    max_completion_length=256 if gpu else 48,
    max_steps=50 if gpu else 1,
    logging_steps=1,
    seed=7,
    save_strategy="no",
    report_to="none",
    **({} if FastLanguageModel is not None else on_demo),
)
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=[correctness_reward, format_reward],
    args=training_args,
    train_dataset=dataset,
)
result = trainer.train()
# %% [markdown]
# ## What is new in the log
#
# TRL's metrics, and MEL-Lite's under `mel/`: how many groups had both a right and a wrong answer, how many lessons were written and kept, and the loss on them. [The glossary](../docs/metrics.md) explains each.

# %%
logs = trainer.state.log_history[0]
for name in ("reward", "mel/groups", "mel/mixed_groups", "mel/written", "mel/replay_valid", "mel/nll"):
    print(f"{name:20} {logs.get(name, 'none in this step')}")

# %% [markdown]
# ## Save, as in your notebook
#
# `model.save_pretrained` and `save_pretrained_merged` work as before. MEL-Lite's own export reloads what it wrote and compares it with the trained model.

# %%
from pathlib import Path

trainer.save_model("runs/from-unsloth/adapter")
print(*sorted(path.name for path in Path("runs/from-unsloth/adapter").iterdir()), sep="\n")
