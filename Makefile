# make demo    trains a small AFA on a generated data set and prints what each step of the method gains
# make test    the test suite         make test-slow   with the tests that take minutes
# make bench   the benchmarks         make lint        ruff
# make docs    the documentation, as a site in build/site
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests side by side, and one more than there are cores, for some wait; WORKERS= runs them one after the other.
WORKERS ?= -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 8 --dist worksteal

# What --no-compile leaves uncompiled is compiled once, when it is first imported, and not in each of the suite's many
# processes, even where the environment asks for no bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow bench lint docs clean

# Installed again whenever something that is compiled changes. Python files are used in place. Of all that torch brings
# a tenth is ever imported, and compiled then: --no-compile saves a minute. `pip install -e '.[test,real,serve]'` in two
# parts at a time: one core unpacks torch while the others compile the kernels.
NATIVE := $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py build_backend.py pyproject.toml

$(VENV)/installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python tests/support/requirements.py > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --no-compile --no-deps -e . & kernels=$$!; \
	  $(BIN)/python -m pip install --quiet --no-compile -r $(VENV)/requirements.txt; others=$$?; \
	  wait $$kernels && exit $$others
	$(BIN)/python -m pip install --quiet --no-compile 'afa[test,real,serve]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/afa demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(WORKERS)

test-slow: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile 'afa[export,docs]'
	AFA_EMULATE=all $(BIN)/python -m pytest $(WORKERS) -m ''

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-compile 'afa[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build $(VENV)/installed afa_kernels/_native*.so
