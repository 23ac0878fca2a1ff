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
