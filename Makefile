# MEL-Lite. `make train` and `make test` work on a bare machine with Python 3.11 to 3.13 and make.
#
#   make train ARGS="--max-steps 2"      further options of `mel-lite train`
#   make test  ARGS="-k store -x"        further options of pytest
#   make test  WORKERS=0                 one test after another, in this process; default: two at once
#   make train TORCH_ARGS="..."          further options of `pip install torch`, such as an index of CPU-only wheels;
#                                        its files are taken as that index has them, all others by their locked hash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep -m1 -E '^torch==' requirements/torch.txt | cut -d' ' -f1)
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
LOCKED := --progress-bar off --no-deps --require-hashes

# Python must not put the repository root on sys.path: `kernels/` there would hide the Hub's package of that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help venv train test test-all faults lint format docs site wheel lock audit clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.installed  ## make .venv with the locked CPU packages and this checkout

train: venv  ## run MEL on a small model on the CPU, from download to exported model
	$(BIN)/mel-lite train --gpu cpu $(ARGS)

test: venv $(VENV)/.gym  ## run the fast tests
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not gpu" $(ARGS)

test-all: venv $(VENV)/.gym $(VENV)/.notebook $(VENV)/.track $(VENV)/.unsloth $(VENV)/.vllm $(VENV)/.deepspeed  ## run all tests that need no GPU, but for the exhaustive ones
	$(BIN)/python -m pytest $(SPREAD) -m "not gpu and not exhaustive" $(ARGS)

FAULTS := tests/faults $(addprefix tests/,$(addsuffix .py, \
    resilience/test_checkpoint_files test_recipe engines/test_hf resilience/test_collapse \
    training/test_engine_probe test_trainer export/test_merge verify/test_pool verify/test_verifiers \
    training/test_packing models/test_chat lessons/test_leak_guard lessons/test_parsing \
    lessons/test_analysis models/test_load data/test_tasks integration/test_fuzz resilience/test_state_files))

faults: venv $(VENV)/.gym  ## inject every fault and write the tables of docs/reliability.md (20 minutes)
	$(BIN)/python -m pytest -m "not gpu" -k "not on_thousands" -o junit_family=xunit1 --junitxml=build/faults.xml $(FAULTS) $(ARGS) \
	    ; status=$$?; $(BIN)/python tests/helpers/fault_report.py build/faults.xml docs/reliability.md && exit $$status

lint: venv  ## ruff, mypy and deptry
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p mel_lite -p kernels
	$(BIN)/deptry mel_lite kernels configs

format: venv  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv $(VENV)/.notebook  ## write the generated pages, figures and notebooks, then build the site
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_cli.py
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/tables.py
	$(BIN)/python notebooks/make.py
	@$(MAKE) --no-print-directory site

site: $(VENV)/.docs  ## build the documentation in build/site; a link or an anchor that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

wheel: venv  ## build dist/*.tar.gz and, from it, dist/*.whl
	$(BIN)/python -m build --no-isolation

lock: venv $(VENV)/.gym $(VENV)/.notebook $(VENV)/.track $(VENV)/.tools  ## write requirements/*.txt from what is installed in .venv (needs the package index)
	$(BIN)/python requirements/lock.py $(VENV)/tools/bin/uv $(ARGS)

audit: $(VENV)/.tools  ## look up known vulnerabilities of all locked packages (needs a vulnerability service)
	$(VENV)/tools/bin/pip-audit --strict --disable-pip --require-hashes $(foreach file,torch cpu gym notebook track unsloth vllm deepspeed docs tools,-r requirements/$(file).txt) $(ARGS)

clean:  ## remove everything made here: environment, builds, caches (not runs/)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps, so that a second call is instant and a failed install resumes at the failed step.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none found. Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; \
	    sys.exit(None if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}; set PYTHON=")'
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

# torch comes first. From the default index, or a folder of wheels, its file must have a locked hash; from an index that
# TORCH_ARGS names it is of a build whose hashes are not known here. The last line adds what that build requires in
# addition to the lock, such as the libraries of CUDA, in the versions that it names.
$(VENV)/.locked: requirements/torch.txt requirements/cpu.txt $(VENV)/.created
ifeq ($(strip $(TORCH_ARGS)),)
	$(PIP) download --progress-bar off --no-deps --dest $(VENV)/torch $(TORCH)
	$(PIP) install $(LOCKED) --no-index --find-links $(VENV)/torch -r requirements/torch.txt
	@rm -rf $(VENV)/torch
else
	$(PIP) install --progress-bar off --no-deps $(TORCH_ARGS) $(TORCH)
endif
	$(PIP) install $(LOCKED) -r requirements/cpu.txt
	$(PIP) install --progress-bar off $(TORCH_ARGS) $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.locked
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) check
	@touch $@

# One dependency of reasoning-gym is compiled. Without a C compiler the few tests that need it are skipped.
$(VENV)/.gym: requirements/gym.txt $(VENV)/.locked
	@if command -v cc >/dev/null; then \
	    set -x; $(PIP) install $(LOCKED) --no-build-isolation -r requirements/gym.txt; \
	else \
	    echo "no C compiler: tests that need reasoning-gym will be skipped"; \
	fi
	@touch $@

$(VENV)/.notebook: requirements/notebook.txt $(VENV)/.locked
	$(PIP) install $(LOCKED) -r requirements/notebook.txt
	@touch $@

$(VENV)/.track: requirements/track.txt $(VENV)/.locked
	$(PIP) install $(LOCKED) -r requirements/track.txt
	@touch $@

# The lock and audit tools have their own venv; running and testing need none of them.
$(VENV)/.tools: requirements/tools.txt $(VENV)/.created
	"$(PYTHON)" -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip --disable-pip-version-check install $(LOCKED) -r requirements/tools.txt
	@touch $@

$(VENV)/.docs: requirements/docs.txt $(VENV)/.created
	"$(PYTHON)" -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip --disable-pip-version-check install $(LOCKED) -r requirements/docs.txt
	@touch $@

# Outside site-packages: `pip check` and the other tests see an environment without them (tests/real_packages.py).
$(VENV)/.unsloth $(VENV)/.vllm: $(VENV)/.%: requirements/%.txt $(VENV)/.locked
	rm -rf $(VENV)/$*
	$(PIP) install $(LOCKED) --no-compile --target $(VENV)/$* -r requirements/$*.txt
	@touch $@

# A source distribution only; without its operators, which tests on CPUs do not need, it is built in seconds.
$(VENV)/.deepspeed: requirements/deepspeed.txt $(VENV)/.locked
	rm -rf $(VENV)/deepspeed
	DS_BUILD_OPS=0 $(PIP) install $(LOCKED) --no-build-isolation --no-compile --target $(VENV)/deepspeed -r requirements/deepspeed.txt
	@touch $@
