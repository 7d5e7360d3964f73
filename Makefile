# make ask   sets everything up and answers questions about a sample video, pruned and unpruned
# make test  sets everything up and runs the tests
# make test-versions  runs them on other releases of transformers: those that VERSIONS names
# make gpu   runs the tests that need a card, then a bench, where there is one and no network
# make gpu-wheels  fetches into .whl what such a machine may lack, to be copied with the checkout
# make test-backends  tests the libraries that can decode instead of ours; needs the system's FFmpeg

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

VERSIONS ?= 5.4 5.10 5.18 5.24

# Two workers of one thread each: tiny tensors gain nothing from more threads.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: ask test test-all test-versions test-backends check types gpu gpu-wheels setup clean

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

# Nothing is fetched and nothing of the system changed: its own Python runs, with the wheels of .whl
# and the packages as imported in front of what it has. Without PYTHONSAFEPATH the folder tokenprune/
# would come first, which lacks adapters, demos and eval.
PYTHON3 ?= python3
GPU_SECONDS ?= 540
GPU_TEST_SECONDS ?= 160
GPU_FLAGS ?=
GPU_PYTHON = env PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu-site:$(CURDIR)/build/gpu $(PYTHON3)

# The bench runs after failed tests too. It begins nothing in the last seconds, and what it has
# found by then is written; should it hang, it is ended. Results go to $OUT, or to eval/results.
gpu:
	@start=$$(date +%s); out=$${OUT:-$(CURDIR)/eval/results}; failed=; \
	rm -rf build/gpu build/gpu-site; mkdir -p build/gpu/tokenprune build/gpu-site "$$out"; \
	ln -s $(CURDIR)/tokenprune/* $(CURDIR)/adapters $(CURDIR)/demos $(CURDIR)/eval \
		build/gpu/tokenprune/; \
	test -z "$(wildcard .whl/*.whl)" || $(PYTHON3) -m pip install --quiet --no-index --no-deps \
		--no-compile --no-cache-dir --upgrade --target build/gpu-site $(wildcard .whl/*.whl) \
		|| failed="$$failed wheels"; \
	echo "== tests, written to $$out/gpu-tests.txt"; \
	FAIL_WITHOUT_GPU=1 timeout -k 5 $(GPU_TEST_SECONDS) $(GPU_PYTHON) -m pytest -m needs_gpu \
		-W default -p no:cacheprovider --import-mode=append --durations=10 \
		$$(grep -rl "mark.needs_gpu" --include="test_*.py" tests) > "$$out/gpu-tests.txt" 2>&1 \
		|| failed="$$failed tests"; \
	tail -n 40 "$$out/gpu-tests.txt"; \
	left=$$(( $(GPU_SECONDS) - $$(date +%s) + start )); \
	timeout -k 5 $$left $(GPU_PYTHON) -m tokenprune.eval.bench.gpu --out "$$out" \
		--budget $$(( left - 20 )) $(GPU_FLAGS) || failed="$$failed bench"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# For Python 3.12 on Linux, of the releases in constraints.txt. With the checkout, as git lists its
# files, they must be small enough to travel.
GPU_WHEELS ?= av num2words pytest-timeout
GPU_MIB ?= 60
GPU_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64

gpu-wheels: $(INSTALLED)
	rm -rf .whl
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation cp $(GPU_PLATFORMS:%=--platform %) --dest .whl \
		$(foreach name,$(GPU_WHEELS),$(shell grep "^$(name)==" constraints.txt || echo $(name)))
	@ls .whl; \
	size=$$( { git ls-files -co --exclude-standard; ls .whl/*; } | tar -cf - -T - | wc -c ); \
	mib=$$(( (size + 1048575) / 1048576 )); \
	test $$mib -lt $(GPU_MIB) || { echo "the checkout and .whl take $$mib MiB, and must take less" \
		"than $(GPU_MIB): fetch fewer (GPU_WHEELS), or take files out of the checkout"; exit 1; }; \
	echo "the checkout and .whl take $$mib MiB of $(GPU_MIB)"

setup: $(INSTALLED)

# constraints.txt pins what the tests were run with; the library itself takes a range.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[audio,demo,eval,test]"
	touch $(INSTALLED)

clean:
	rm -rf .venv build out
