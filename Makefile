# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet
# One thread a process: tests and demo run several processes, which would otherwise fight for the cores.
export OMP_NUM_THREADS ?= 1
# DeepSpeed finds its launcher and ninja by PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# $(call requirement,NAME): NAME with its range, as pyproject.toml has it.
requirement = $(shell sed -n 's/^ *"\($(1)[<>=][^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-quick test test-all check docs bench clean

help:  ## list the targets
	@echo "targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "  make%-12s %s\n", substr($$1, 2), $$2}'

venv: $(VENV)/.comm-built  ## make .venv with the project in it (about 4 minutes the first time)

demo: venv  ## build a small dataset, train on 2 ranks, evaluate: about 2 minutes
	$(VENV)/bin/python -m cosmos_scale.demo --out demo_out

demo-quick: venv  ## the demo, shortened
	$(VENV)/bin/python -m cosmos_scale.demo --quick --out demo_quick_out

# A worker takes a file at a time: what its tests share, such as the training of several ranks, is made once. Three
# workers fill two cores: many tests wait, for a limit of time or for another host.
test: $(VENV)/.test-extras venv  ## the tests, without the slow ones
	$(VENV)/bin/python -m pytest -q -n 3 --dist loadfile -m "not slow and not gpu"

test-all: $(VENV)/.test-extras venv  ## all tests that need no GPU
	$(VENV)/bin/python -m pytest -q -n 3 --dist loadfile -m "not gpu"

check: $(VENV)/.test-extras  ## format, lint, types (for Python 3.10, 3.11 and 3.12)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	set -e; for version in 3.10 3.11 3.12; do $(VENV)/bin/mypy --python-version $$version; done

docs: $(VENV)/.project  ## write docs/config.md anew, from the config's types and descriptions
	$(VENV)/bin/python -m cosmos_scale.config.reference > docs/config.md.tmp
	mv docs/config.md.tmp docs/config.md

bench: $(VENV)/.test-extras venv  ## run every benchmark: some minutes; numbers go to bench_out/NAME.json
	@mkdir -p bench_out
	@# A benchmark is a file with a main. It runs alone, so it has all cores.
	@set -e; for file in $$(grep -l '__name__ == "__main__"' benchmarks/*.py); do \
		env -u OMP_NUM_THREADS $(VENV)/bin/python "$$file" --json "bench_out/$$(basename "$$file" .py).json"; \
	done

clean:  ## remove what tests, demos and builds wrote; .venv and runs/ stay
	rm -rf build dist *.egg-info demo_out demo_quick_out bench_out soak_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks cosmos_scale kernels tests tools -name __pycache__ -prune -exec rm -rf {} +

# The environment, one stamp a stage, so that a second call does nothing.

$(VENV)/.torch:
	@echo "Making $(VENV) with $$($(PYTHON) --version), then installing torch (several GB) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=68,<81" wheel packaging "$(call requirement,ninja)" \
		"$(call requirement,torch)" "$(call requirement,torchvision)"
	@touch $@

# DeepSpeed's own build reads torch, so it comes second and sees the environment. Its kernels are built when first used.
$(VENV)/.deepspeed: $(VENV)/.torch
	@echo "Installing DeepSpeed ..."
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation "$(call requirement,deepspeed)"
	@touch $@

$(VENV)/.project: $(VENV)/.deepspeed pyproject.toml setup.py
	@echo "Installing cosmos-scale and what it needs ..."
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-extras: $(VENV)/.project
	@echo "Installing what the tests need ..."
	$(PIP) --no-build-isolation --editable ".[test]"
	@# Evaluation is compared with its code, which needs none of the large packages that it asks for.
	$(PIP) --no-deps "clip-benchmark>=1.6.2,<2"
	@touch $@

$(VENV)/.comm-built: $(VENV)/.project
	$(VENV)/bin/cosmos-scale setup
	@touch $@
