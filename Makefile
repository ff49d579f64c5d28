# The commands for working on MAGI Agent. `make` alone lists them.

.DEFAULT_GOAL := help
.PHONY: help setup test test-system test-vm fuzz soak lint bench demo deb deb-13 deb-proof clean

python := .venv/bin/python
beside_systemd := $(python) packaging/workbench/private_systemd.py --
# Most of a test's time is waiting for a server, so three processes keep two processors busy. Each has a manager of its
# own; only root can make these, and all others' tests share the one they have.
test_processes := $(if $(filter 0,$(shell id -u)),3,1)
side_by_side := --dist loadfile --no-loadscope-reorder --tx '$(test_processes)*popen//python=$(beside_systemd) $(python)'
releases_side_by_side := --dist loadgroup --tx '2*popen//python=$(beside_systemd) $(python)'

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## Make .venv and fetch a llama-server and two sample models, once
	@packaging/workbench/setup

test: setup ## Run all tests on a real systemd and a real llama-server; choose with ARGS='-k name'
	@packaging/workbench/test_packages
	@$(if $(strip $(ARGS)),$(beside_systemd) $(python) -m pytest $(ARGS),$(python) -m pytest $(side_by_side))

test-system: setup ## Install, upgrade, break and remove the package on booted Debian 12 and 13; one by ARGS='-k debian12'
	@packaging/roots/prepare
	@$(if $(strip $(ARGS)),$(beside_systemd) $(python) -m pytest,$(python) -m pytest $(releases_side_by_side)) \
		-o python_files='scenario_*.py' --timeout=300 -o faulthandler_timeout=290 tests/system $(ARGS)

test-vm: setup ## See the limits of memory hold in an emulated machine with a kernel of its own (ten minutes; outside CI)
	@packaging/roots/prepare-vm
	@$(python) -m pytest -o python_files='scenario_*.py' --timeout=900 -o faulthandler_timeout=890 tests/vm $(ARGS)

fuzz: export FUZZ_CASES ?= 100000
fuzz: export FUZZ_SEED := $(or $(FUZZ_SEED),$(shell date +%s))
fuzz: setup ## Read 100,000 damaged headers from a new seed, and make up other input; again as before by FUZZ_SEED=
	@$(python) -m pytest -s --timeout=3600 \
		-o faulthandler_timeout=0 -k "many_damaged or folder_of_damaged" tests/gguf tests/discovery $(ARGS)
	@$(beside_systemd) $(python) -m pytest --timeout=3600 -o faulthandler_timeout=0 --hypothesis-seed=$(FUZZ_SEED) \
		-m hypothesis tests $(ARGS)
	@MAGI_TEST_EXAMPLES=$${MAGI_TEST_EXAMPLES:-100} $(beside_systemd) $(python) -m pytest --timeout=3600 \
		-o faulthandler_timeout=0 tests/api/test_schema_conformance.py $(ARGS)

soak: setup ## Flood and upturn model folders for SOAK_MINUTES=3, 500 starts and stops, ten minutes of faults, 1,000 idle stops
	@MAGI_TEST_CYCLES=$${MAGI_TEST_CYCLES:-500} MAGI_TEST_FAULT_SECONDS=$${MAGI_TEST_FAULT_SECONDS:-600} \
		MAGI_TEST_IDLE_RACES=$${MAGI_TEST_IDLE_RACES:-1000} $(beside_systemd) $(python) -m pytest -s \
		-o faulthandler_timeout=0 tests/discovery/soak_watching.py tests/servers/test_cycles.py \
		tests/test_random_faults.py tests/gateway/test_idle_stops.py $(ARGS)

lint: setup ## Check style and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/mypy --explicit-package-bases --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls \
		tests packaging/workbench packaging/roots

bench: setup ## Measure, side by side; print tables and write build/bench.json
	@$(beside_systemd) $(python) tests/bench/run.py $(ARGS)

demo: setup ## Find two models, start one, ask it a question; stays up until Ctrl-C (DEMO_ONCE=1: only once)
	@$(python) packaging/workbench/demo.py

deb: ## Build the package for Debian 12 into dist
	@packaging/deb/build 12

deb-13: ## Build the package for Debian 13 into dist
	@packaging/deb/build 13

deb-proof: ## Build both packages into dist, each twice and differently; compare the bytes, run lintian on them
	@packaging/deb/prove-reproducible 12 13

clean: ## Remove what builds and runs leave; .venv and the fetched parts stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './.cache/*' -prune -exec rm -rf {} +
