# The two commands of the README are `make demo` and `make test`. Each makes its own virtual environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= runs/demo
ARGS   ?=

.PHONY: demo test lint types format docs clean help

demo: $(STAMP)  ## Train, attribute, retrain, compare on embedded digits; writes an HTML report (QUICK=1: short form)
	$(BIN)/byline demo --out $(OUT) $(if $(QUICK),--quick) $(ARGS)

test: $(STAMP)  ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types
	$(BIN)/mypy

format: $(STAMP)  ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## Build the documentation as a site, into site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# torch first and alone: the constraint keeps the version that everything else was resolved with. The stamp is
# written last, so that an install which was interrupted is finished by the next call, and a done one is instant.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[docs]' -c constraints.txt
	touch $@

clean:  ## Remove what the tools left behind, not the environment and not the runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache dist site
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## List these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 10
