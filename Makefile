# A fresh machine needs python3 (3.11 or newer) and, once, the network to install.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# The text of the benchmarks: downloaded, or a file of yours. The directory of their results.
TEXT   ?= tinyshakespeare
RESULTS ?= bench-results

# The page that ends `make demo` shows how the heads read this text. Its repetitions would show an induction head.
TEXT_OF_REPLAY = Alice said to the Cat, and the Cat said to Alice that the Queen

# Processes that run tests, each on one thread. One that has nothing left takes tests from another. A quarter of the time, a test
# waits for something else than a core, so three processes suit two cores.
JOBS   ?= 3
PYTEST  = $(BIN)/pytest --numprocesses $(JOBS) --dist worksteal
LINTED  = src tests benchmarks docs examples exercises

.PHONY: demo check test coverage lint bench soak fuzz docs clean

demo: $(VENV)/.demo
	$(BIN)/mygpt train --config configs/quickstart.yaml --out runs/demo --overwrite true
	$(BIN)/mygpt generate --model runs/demo --prompt "Alice was" --max_new_tokens 300 --seed 1
	@$(BIN)/mygpt explain runs/demo "$(TEXT_OF_REPLAY)" --replay --out runs/demo/replay.html > /dev/null
	@echo "Open this page in a browser to see how the model learned: $(CURDIR)/runs/demo/replay.html"

# While working: format, lint, types and the fast tests, in about three minutes.
check: lint
	$(PYTEST) -m "not slow"

# Before a change is merged: all tests.
test: lint
	$(PYTEST)

# Which lines of src the tests run. Measuring takes half as long again as the tests alone.
coverage: $(VENV)/.dev
	$(PYTEST) --cov --cov-report term

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/all.py --out $(RESULTS) --text $(TEXT)

soak: $(VENV)/.dev
	$(BIN)/python tests/soak.py
	$(BIN)/python tests/soak_ranks.py
	$(BIN)/python tests/soak_server.py

# Every reader of files with a hundred times as many damaged ones as `make test` tries, counted.
fuzz: $(VENV)/.dev
	MYGPT_FUZZ=100 $(BIN)/pytest tests/test_hostile_files.py

docs: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --quiet --jobs auto docs build/docs
	@echo "build/docs/index.html"

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing MyGPT and PyTorch in $(VENV). This takes a few minutes and shows no progress."
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plots]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .coverage* src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
