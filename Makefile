# Everything runs from .venv, which `make setup` fills with the locked versions. See each target's comment.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := setup
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# plugins/template is there to be copied, not to be installed: its test installs it for itself
PROJECTS := $(filter-out plugins/template,$(patsubst %/pyproject.toml,%,$(sort $(wildcard protos/pyproject.toml plugins/*/pyproject.toml clients/*/pyproject.toml))))

# compiled where that can be done, and never needed
HELPER := $(addprefix native/,pyproject.toml setup.py build_helper.py helper.c)

# run a command, print its output only when it fails
define quietly
@printf '%-14s' '$(1)'; out=$$($(2) 2>&1) || { status=$$?; echo FAILED; printf '%s\n' "$$out"; exit $$status; }; echo ok
endef

.PHONY: setup demo test check check-style check-types check-imports check-protos check-client bench publish mutants linearizability oracle sim explore journal crash deaths client protos protos-baseline man lock clean

# the virtual environment: locked packages, then our own distributions, editable
setup: $(READY)

$(READY): requirements.lock pyproject.toml $(PROJECTS:%=%/pyproject.toml) $(HELPER)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "rmemd needs Python 3.11 or newer as '$(PYTHON)'; name another one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments (no ensurepip)." >&2; \
		echo "On Debian and Ubuntu: apt-get install python3-venv. Or: make PYTHON=/path/to/another/python3" >&2; exit 1; }
	@echo "setup: virtual environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing the locked packages, which takes a minute the first time"
	@$(PIP) install -qq --require-hashes -r requirements.lock
	@echo "setup: installing rmemd and $(words $(PROJECTS)) more of our distributions, editable"
	@$(PIP) install -qq --no-deps --no-build-isolation -e . $(PROJECTS:%=-e ./%)
	@mkdir -p build
	@$(PIP) install -q --no-deps --no-build-isolation --force-reinstall ./native >build/helper.log 2>&1 || { \
		$(PIP) uninstall -qq --yes rmemd-helper 2>/dev/null || true; \
		echo "setup: the compiled helper does not build here, rmemd does without it (build/helper.log says why)"; }
	@touch $@
	@echo "setup: done"

# the whole argument in one go: make demo ARGS='--help'
demo: $(READY)
	@$(BIN)/rmem-demo $(ARGS)

# all checks, all tests on every core, then whether a ratio is worse: make test ARGS='-k migrate -n 0'
test: check
	@$(BIN)/python -m pytest -q --ignore=tests/bench -n auto --dist worksteal $(ARGS)
	@$(if $(ARGS),:,$(BIN)/python -m tests.bench.regressions)

# each tool says one word; `make -k check` goes on after a failure
check: check-style check-types check-imports check-protos check-client

check-style: $(READY)
	$(call quietly,ruff check,$(BIN)/ruff check --quiet)
	$(call quietly,ruff format,$(BIN)/ruff format --check)

check-types: $(READY)
	$(call quietly,mypy,$(BIN)/mypy)

check-imports: $(READY)
	$(call quietly,lint-imports,$(BIN)/lint-imports --no-logo)

# style of the .proto files, compatibility with the baseline, and committed code equal to what they give
check-protos: $(READY)
	$(call quietly,protos,PYTHON=$(BIN)/python protos/generate.sh check)

# the Python client's sync modules equal to what its asyncio modules give
check-client: $(READY)
	$(call quietly,client,$(BIN)/python clients/python/unasync.py --check)

# figures as ratios beside floors and peers, into build/bench.jsonl: make bench ARGS='--only session'
bench: $(READY)
	@$(BIN)/python -m tests.bench $(ARGS)

# put what the last whole `make bench` found into docs/performance.md
publish: $(READY)
	@$(BIN)/python -m tests.bench.publish

# concurrent histories of a daemon by both doors, decided, with wrong replies planted: RMEMD_HISTORIES=10000
linearizability: $(READY)
	@cd tests && ../$(BIN)/python -m linearizability

# the engine against the executable specification: make oracle STEPS=1000000
oracle: $(READY)
	@RMEMD_ORACLE_STEPS=$(or $(STEPS),200000) $(BIN)/python -m pytest -q tests/oracle $(ARGS)

# the whole engine in one thread, with faults, by seeds: make sim SEED=17, make sim NIGHTLY=1
sim: $(READY)
	@cd tests && NIGHTLY=$(NIGHTLY) ../$(BIN)/python -m simulation $(if $(SEED),--seed $(SEED)) $(ARGS)

# every state of a few pages, frames and VMs, to a fixpoint
explore: $(READY)
	@cd tests && ../$(BIN)/python -m simulation --explore only

# the journal of 10,000 operations, cut at every byte and with 10,000 bits flipped: make journal NIGHTLY=1
journal: $(READY)
	@cd tests && NIGHTLY=$(NIGHTLY) ../$(BIN)/python -m cuts

# 200 times kill -9 of the daemon, at any time and at every moment, under 8 clients: make crash NIGHTLY=1
crash: $(READY)
	@cd tests && NIGHTLY=$(NIGHTLY) ../$(BIN)/python -m crash

# 100 VMM processes killed in random states, some around a restart of the daemon: make deaths NIGHTLY=1
deaths: $(READY)
	@cd tests && NIGHTLY=$(NIGHTLY) ../$(BIN)/python -m deaths

# plant every bug of tests/planted/catalogue.py, each in a process of its own; its named check kills it
mutants: $(READY)
	@PYTHONPATH=tests $(BIN)/python -m planted.run $(ARGS)

# write the Python client's sync modules anew, from rmem_client/aio
client: $(READY)
	@$(BIN)/python clients/python/unasync.py

# format the .proto files and write protos/gen anew
protos: $(READY)
	@PYTHON=$(BIN)/python protos/generate.sh write

# accept the API as it is now: later changes must be compatible with it
protos-baseline: $(READY)
	@PYTHON=$(BIN)/python protos/generate.sh baseline

# man pages of every command of rmemctl and rmemd, into build/man: man -l build/man/rmemctl.1
man: $(READY)
	@rm -rf build/man
	@$(BIN)/python docs/man.py build/man

# each .in -> .lock, with hashes and without a word on where the packages came from
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip --disable-pip-version-check install -qq uv
	@for locked in requirements tests/bench/peers; do \
		echo "lock: resolving $$locked.in"; \
		env -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS build/lock/bin/uv pip compile --quiet --no-config \
			--universal --python-version 3.11 --generate-hashes --upgrade --no-header --no-annotate \
			--no-emit-index-url --no-emit-find-links $$locked.in --output-file $$locked.lock; \
	done
	@rm -rf build/lock

clean:
	rm -rf $(VENV) build dist native/build protos/.deps .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find rmemd native plugins protos clients tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
