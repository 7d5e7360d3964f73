# make ask   sets everything up and answers questions about a sample video, pruned and unpruned
# make test  sets everything up and runs the tests
# make test-versions  runs them on other releases of transformers: those that VERSIONS names
# make test-backends  tests the libraries that can decode instead of ours; needs the system's FFmpeg

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

VERSIONS ?= 5.4 5.10 5.18 5.24

# Two workers of one thread each: tiny tensors gain nothing from more threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: ask test test-all test-versions test-backends check types setup clean

ask: $(INSTALLED)
	$(BIN)/python -m tokenprune.demos.first_run out

test: $(INSTALLED)
	$(PYTEST) -m "not full"

test-all: $(INSTALLED)
	$(PYTEST)

# Each release lies in a folder of its own, in front of what .venv has.
test-versions: $(VERSIONS:%=build/versions/%)
	@failed=; for version in $(VERSIONS); do \
		echo "== transformers $$version"; \
		PYTHONPATH=$(CURDIR)/build/versions/$$version $(PYTEST) -m "not full" \
			|| failed="$$failed $$version"; \
	done; \
	test -z "$$failed" || { echo "failed on transformers$$failed"; exit 1; }

# Up to 5.10 transformers wants other companions than those of constraints.txt.
build/versions/5.4 build/versions/5.10: COMPANIONS = "huggingface_hub<2" "tokenizers<0.23"
build/versions/%: $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ "transformers==$*.*" $(COMPANIONS)

test-backends: build/backends
	FAIL_WITHOUT_BACKENDS=1 PYTHONPATH=$(CURDIR)/build/backends \
		$(BIN)/python -m pytest tests/media/test_backends.py

# They are not installed with the others: where they do not load, nothing else should suffer.
build/backends: $(INSTALLED)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ decord torchcodec

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
