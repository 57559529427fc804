# Every target makes .venv by itself. pip's own configuration (files, PIP_* variables) applies unchanged.

# The first Python of 3.11 or newer that really starts; override with `make PYTHON=…`.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Extra words for every `pip install`, for example PIP_ARGS="--extra-index-url https://…".
PIP_ARGS ?=
# Words handed on to `vllm serve` and to pytest.
ARGS ?=
# Test processes side by side. Each holds two small engines at most; their work is single-threaded.
WORKERS ?= 2
# Another vLLM series to test with: its Python files over the installed compiled parts.
VLLM ?=
# Where PyTorch publishes its CPU wheels, if pip's own configuration does not lead to them (see pytorch.org).
TORCH_CPU_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
# Linux CPU builds of PyTorch carry the local version +cpu; other systems have no CUDA builds to tell them from.
TORCH := torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)
GPU := $(shell command -v nvidia-smi 2>/dev/null)

# Nothing here talks to a model hub, and nothing reports usage.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# Which tests; all of them where it is empty.
TIER ?=
TIERS := unit engine server gpu

.PHONY: help setup demo quality bench gpu test coverage mutants serve dist docs lint
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

setup: $(READY) ## create .venv with vLLM and this package

demo: $(READY) ## ask a routed and a dense server about a picture, compare KV memory and time to first token
	@$(OFFLINE) $(BIN)/python -m benchmarks.demo $(ARGS)

quality: $(READY) ## ask dense, routed and downsampled servers the same questions, compare (ARGS="--quick" for a trial)
	@$(OFFLINE) $(BIN)/python -m benchmarks.quality $(ARGS)

bench: $(READY) ## measure routed engines against stock vLLM, about 40 minutes (ARGS="--quick" for a trial)
	@$(OFFLINE) $(BIN)/python -m benchmarks.bench $(ARGS)

gpu: $(READY) ## on a machine with a GPU: is it right and how fast, in one report (ARGS="--trial" for a trial on CPU)
	@$(OFFLINE) $(BIN)/python -m benchmarks.gpu $(ARGS)

test: $(READY) ## run the tests (TIER=unit, engine, server or gpu; ARGS="-k name"; VLLM=0.33 for a preview with that vLLM)
	$(if $(filter-out $(TIERS),$(TIER)),$(error TIER=$(TIER) is unknown. Choose one of: $(TIERS)))
	@$(OFFLINE) OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	  $(if $(VLLM),PYTHONPATH="$$($(BIN)/python -m versions.overlay $(VLLM))") \
	  $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder \
	  $(if $(TIER),-m $(TIER)) $(ARGS)

coverage: ## run the tests (TIER=unit for the quick ones), show which lines of the package they ran
	@$(MAKE) --no-print-directory test ARGS="--cov --cov-report=term:skip-covered $(ARGS)"

mutants: $(READY) ## spoil the package in small ways: each must make a test fail (ARGS="--only NAME" or "--list")
	@$(OFFLINE) OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m tests.mutants $(ARGS)

serve: $(READY) ## serve the demo's model, for example ARGS="--reroute-schedule pdrop --port 8000"
	@$(OFFLINE) $(BIN)/vllm serve benchmarks/grounding/model --max-model-len 2048 $(ARGS)

dist: $(READY) ## build wheel and sdist under .local/dist, install each in an empty environment, run the command there
	@$(BIN)/python -m build --outdir .local/dist .
	@for made in .local/dist/*.whl .local/dist/*.tar.gz; do \
	  rm -rf .local/dist/try && $(PYTHON) -m venv .local/dist/try && \
	  .local/dist/try/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $$made && \
	  .local/dist/try/bin/vllm-reroute --version && .local/dist/try/bin/vllm-reroute schedules > /dev/null || exit 1; done

docs: $(READY) ## build the documentation site under .local/site; a broken link fails
	@$(BIN)/python -c "import mkdocstrings_handlers.python, material" 2>/dev/null || $(INSTALL) --quiet -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python docs/build_site.py

lint: $(READY) ## check style and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/mypy

$(READY): pyproject.toml $(wildcard cpu_env/*.py cpu_env/*.pth)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version) (about ten seconds)"
	@$(PYTHON) -m venv $(VENV) || { echo "This Python has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
ifdef GPU
	@echo "[2/3] nvidia-smi found: installing vLLM for CUDA (several GB)"
	@$(INSTALL) -e ".[cuda,test]"
else
	@echo "[2/3] no nvidia-smi: installing PyTorch and vLLM for CPU (a few minutes the first time)"
	@$(INSTALL) $(if $(TORCH_CPU_INDEX),--extra-index-url "$(TORCH_CPU_INDEX)") "$(TORCH)" || { \
	  echo "pip found no CPU build of PyTorch. Name PyTorch's CPU wheel index: make setup TORCH_CPU_INDEX=URL" >&2; exit 1; }
	@$(INSTALL) ./cpu_env
endif
	@echo "[3/3] installing vllm-reroute and what its tests need"
	@$(INSTALL) -e ".[$(if $(GPU),cuda,cpu),test]"
	@touch $@
	@echo "Ready: $(BIN)/vllm"
