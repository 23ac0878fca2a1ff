# %% [markdown]
# # MEL-Lite in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/%3Cowner%3E/mel-lite/blob/main/notebooks/01_quickstart.ipynb)
#
# Meta-Experience Learning ([arXiv 2602.10224](https://arxiv.org/abs/2602.10224)): the model compares a right and a wrong answer of its own, finds the step where they diverge, and writes a meta-experience with a rule for next time. It validates the meta-experience by retrying the question with it in the prompt, and trains on those that pass, next to GRPO.
#
# It takes a GPU if there is one, and else the CPU; it was run on CPUs only. On both it trains a 135M demo model on its small domain, chains of numbers and made-up words whose meaning only the reward tells, so that every stage can be read. The last cell says what to change for a model and data of your own.

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
steps = 20 if gpu else 2
print(torch.cuda.get_device_name() if gpu else "No GPU: two steps on the CPU, about three minutes.")

# %% [markdown]
# ## A model, and questions with answers
#
# The base is frozen and a LoRA adapter is trained. The demo starts from a warmed-up adapter, because the model as released can neither follow the task nor write an analysis.

# %%
from mel_lite.data.tasks import load_tasks
from mel_lite.models.adapters import attach_adapter, find_adapter
from mel_lite.models.load import ModelSpec, load_base, load_tokenizer

spec = ModelSpec("demo", dtype="float32")
tokenizer = load_tokenizer(spec)
model = attach_adapter(load_base(spec), find_adapter("demo"), trainable=True)
train_tasks = load_tasks("demo", conversational=True)
test_tasks = load_tasks("demo:test", limit=32 if gpu else 4, conversational=True)
train_tasks[0]

# %% [markdown]
# ## The trainer is TRL's
#
# `MELConfig` has every option of `trl.GRPOConfig`. `verifier` decides which answers are right. `replay_control` also tries each question without the meta-experience, to measure what it adds.

# %%
from pathlib import Path

from mel_lite import MELConfig, MELTrainer

run = Path("runs/quickstart")
trainer = MELTrainer(
    model=model,
    args=MELConfig(
        str(run),
        verifier="numeric",
        replay_control=True,
        max_steps=steps,
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_completion_length=64,
        templates="demo",
        analysis_max_tokens=120,
        analysis_temperature=0.7,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not gpu,
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=train_tasks,
    processing_class=tokenizer,
)

# %% [markdown]
# ## Before

# %%
from mel_lite.evaluate import evaluate

measure = dict(k=4 if gpu else 2, max_new_tokens=64)
before = evaluate(trainer.engine, tokenizer, test_tasks, trainer.judge, **measure)
print(before.pass_at_1, before.avg_at_k)

# %% [markdown]
# ## A few steps

# %%
result = trainer.train()
# %% [markdown]
# ## One meta-experience from beginning to end
#
# Every meta-experience is in the run's store, kept or not. The first cell lists all of them with their status. The next ones show one: the wrong and the right rollout of one group, what the model wrote about them, and its answers with that in the prompt.

# %%
from mel_lite.lessons.store import ExperienceStore
from mel_lite.types import Status

store = ExperienceStore(run / "experiences.sqlite", read_only=True)
for row in store.list():
    print(row.id, row.status, row.reason)

# %%
experience = next(iter(store.list(status=Status.KEPT) or store.list()), None)
if experience is None:
    print("No group had both a right and a wrong answer. Run a few more steps.")
else:
    print(experience.prompt[-1]["content"])
    print("\nWRONG\n" + experience.wrong_text)
    print("\nRIGHT\n" + experience.right_text)
    print("\nWHAT THE MODEL WRITES ABOUT THEM\n" + experience.analysis)

# %%
if experience is not None:
    for verdict, text in zip(experience.replay_verdicts, experience.replay_texts, strict=True):
        print(f"REPLAY with the meta-experience in the prompt: {verdict}\n{text}\n")
    print("without it:", *experience.control_verdicts)
    print("NLL before and after its update:", experience.nll_before, experience.nll_after)

# %% [markdown]
# ## After
#
# A few steps on a few questions run the full pipeline and cannot show a gain: look at the width of the intervals.

# %%
after = evaluate(trainer.engine, tokenizer, test_tasks, trainer.judge, **measure)
from rich.console import Console

from mel_lite.run.display import comparison_table

Console(width=100, force_jupyter=False, force_terminal=False).print(comparison_table(before, after))

# %% [markdown]
# ## Save the adapter, merge it into the base, and check the merged model against it

# %%
from mel_lite.export.merge import export

trainer.save_model(str(run / "adapter"))
report = export(run / "adapter", run / "merged-16bit")
Console(width=100, force_jupyter=False, force_terminal=False).print(report.as_table())

# %% [markdown]
# ## Your own model and data
#
# - `ModelSpec("Qwen/Qwen3-1.7B", load_in_4bit=True)` instead of the demo, and a fresh adapter: leave out `attach_adapter` and pass `MELTrainer(..., peft_config=LoraConfig(...))`.
# - `load_tasks("questions.jsonl", conversational=True)`: one `prompt` and one `answer` per line; or a Hub id.
# - `verifier="math"`, longer `max_completion_length` and `analysis_max_tokens`.
#
# Or, without a notebook: `mel-lite train --gpu 16gb --dataset questions.jsonl`.
