# The names of these targets are a contract with README.md; CI calls the same ones.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
MODEL ?=
DATA_DIR ?=
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help up install install-dev check quick test bench clean

help:  ## what these targets do
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

up: install  ## set up, then run the whole platform on this machine   [PORT=8000 MODEL=... DATA_DIR=... TORCH_INDEX=URL]
	@exec $(BIN)/springtide up --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(if $(DATA_DIR),--data-dir $(DATA_DIR))

install: $(VENV)/.installed  ## only set up .venv
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.py
	@$(PYTHON) scripts/install.py $(VENV) engine "$(TORCH_INDEX)"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PYTHON) scripts/install.py $(VENV) engine,dev,postgres "$(TORCH_INDEX)"
	@touch $@

check: install-dev  ## lint, types, import contract, unit tests (under 3 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2 -m "not servers and not e2e and not model"

test: check  ## everything: check, then the tests with real servers, real weights and whole platforms
	$(BIN)/python -m pytest -q -n 2 -m "servers and not e2e and not model"
	$(BIN)/python -m pytest -q -m "e2e or model"

bench: install-dev  ## the benchmarks (half an hour): tables, and JSON under build/
	@mkdir -p build
	$(BIN)/springtide bench api --json build/bench-api.json
	$(BIN)/springtide bench engine --json build/bench-engine.json
	$(BIN)/springtide bench fleet --json build/bench-fleet.json

clean:  ## remove what make made (not the data dir)
	rm -rf $(VENV) build *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
