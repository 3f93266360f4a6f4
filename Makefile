# Everything runs from .venv, which the targets make by themselves. A repeat without changes needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv --quiet

SYNC := $(UV) pip sync --python $(BIN)/python --require-hashes

# With the development packages there, the other targets use them too: they hold all of the runtime's.
INSTALLED := $(VENV)/.installed-$(if $(wildcard $(VENV)/.packages-dev),dev,runtime)

# Some images keep Python from writing bytecode; every process would compile its modules again, which takes seconds.
export PYTHONDONTWRITEBYTECODE :=

LINTS := "ruff check ." "ruff format --check ." "mypy" "lint-imports --no-logo"

# Two for two cores: many tests wait, but the longest start whole systems, and three of those are too much at once.
# tests/conftest.py says which stay together, and which go first.
PYTEST := pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test chaos bench lint lock clean
.DEFAULT_GOAL := demo

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/magnatronic demo

# What the lints say comes after what pytest says, beside which they run.
test: $(VENV)/.installed-dev $(VENV)/kafka.aot
	@said=$$(mktemp); ($(call run_all,$(LINTS))) > $$said 2>&1 & lints=$$!; \
	($(call run_all,"$(PYTEST)")); tests=$$?; \
	wait $$lints; lints=$$?; cat $$said; rm $$said; exit $$((tests || lints))

# The long run: faults against a million events. tests/chaos/__main__.py lists the options, such as CHAOS_BROKERS=3.
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos

lint: $(VENV)/.installed-dev
	@$(call run_all,$(LINTS))

bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench

# Keeps the pins that still fit; `make lock UV_FLAGS=--upgrade` takes the newest of all. The runtime's lock takes its
# versions from the development lock, so that what is tested is what runs.
COMPILE = $(UV) pip compile --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
  --custom-compile-command "make lock" $(UV_FLAGS)

lock: $(VENV)/.uv
	$(COMPILE) requirements/bootstrap.in -o requirements/bootstrap.txt > /dev/null
	$(COMPILE) pyproject.toml requirements/build.in --extra dev --extra bench -o requirements/dev.txt > /dev/null
	$(COMPILE) pyproject.toml requirements/build.in -c requirements/dev.txt -o requirements/runtime.txt > /dev/null

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist

$(VENV)/.uv: requirements/bootstrap.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Magnatronic needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

# What uv knows already is taken without asking the network.
$(VENV)/.packages-%: requirements/%.txt $(VENV)/.uv
	@echo "installing $<"
	@$(SYNC) --offline $< 2> /dev/null || $(SYNC) $<
	@touch $@

$(VENV)/.installed-%: $(VENV)/.packages-% pyproject.toml
	@$(UV) pip install --python $(BIN)/python --offline --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/kafka.aot: requirements/dev.txt tests/support/java_cache.py magnatronic/broker/jars.json \
  magnatronic/broker/node.py | $(VENV)/.installed-dev
	@echo "preparing Java"
	@$(BIN)/python -m tests.support.java_cache

.SECONDARY:

# Runs every check, then says which of them failed.
define run_all
PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH; failed=; \
for check in $(1); do \
  printf '\n==> %s\n' "$$check"; \
  $$check || failed="$$failed\n  $$check"; \
done; \
if [ -n "$$failed" ]; then printf "\nfailed:$$failed\n"; exit 1; fi; \
printf '\nall checks passed\n'
endef
