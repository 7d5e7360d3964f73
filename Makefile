# make ask   sets everything up and answers questions about a sample video, pruned and unpruned
# make test  sets everything up and runs the tests

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: ask test test-all check types setup clean

ask: $(INSTALLED)
	$(BIN)/python -m tokenprune.demos.first_run out

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not full"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy does not follow the mapping of folders in pyproject.toml: show it the packages as imported.
types: $(INSTALLED)
	rm -rf build/types
	mkdir -p build/types/tokenprune
	ln -s $(CURDIR)/tokenprune/* $(CURDIR)/adapters $(CURDIR)/demos $(CURDIR)/eval build/types/tokenprune/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p tokenprune

setup: $(INSTALLED)

# constraints.txt pins what the tests were run with; the library itself takes a range.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[audio,demo,eval,test]"
	touch $(INSTALLED)

clean:
	rm -rf .venv build out
