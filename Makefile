PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.parlay-setup
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Build .venv with the parlay command in it

# torch goes first and by exact version: otherwise a newer build with gigabytes of CUDA packages may be chosen.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: Parlay needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@echo "setup 1/3: a virtual environment in $(VENV)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; install its venv package"; exit 1; }
	@echo "setup 2/3: $(TORCH) (the largest download)"
	@$(PIP) install $(TORCH) -c constraints.txt
	@echo "setup 3/3: Parlay and its other packages"
	@$(PIP) install -e '.[dev]' -c constraints.txt
	@touch $@
	@echo "setup: done, the command is $(VENV)/bin/parlay"

$(STAMP): TORCH = $(shell grep '^torch==' constraints.txt)

demo: setup ## Fetch the default model and watch Parlay bet
	@$(VENV)/bin/parlay pull smollm2-135m
	@$(VENV)/bin/parlay demo

serve: setup ## Serve the default model on http://127.0.0.1:8000
	@$(VENV)/bin/parlay serve

test: check ## Check the code and run the tests
	@scripts/test --ignore=tests/contracts # which the checks have run

check: setup ## Formatting, lint, types and contracts
	@scripts/check

clean: ## Remove .venv and everything else that was built here
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
