# Keylake's tasks. `make demo` and `make test` set everything up by themselves.

PYTHON ?= python3
VENV := .venv
# Test modules that run side by side. Each may start a cluster of some ten processes.
JOBS ?= 2
BIN := $(VENV)/bin
PACKAGES := shared keymanager safekeeper pageserver compute customercloud keylake
CHECKED := $(PACKAGES) tests benchmarks examples
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

# Some environments switch the cache of compiled modules off. Hundreds of processes start here, and each would compile
# Keylake anew: a quarter of its start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup docs docs-reference docs-metrics demo test test-again test-unit test-integration example lint fmt types check bench bench-keys fuzz-keys docs-roles lock up renew down logs clean docs-lifecycle docs-errors fault-matrix regression isolation console-test bench-revocation bench-simulation sim-consensus model-consensus crash-anywhere compose-test first-run

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Keylake needs Python 3.11 or newer; say which one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is not complete; on Debian: apt-get install python3-venv"; exit 1; }

# compat: a path, and not a finder of modules, whose own import each process would wait for.
EDITABLE := --quiet --disable-pip-version-check --no-deps --config-settings editable_mode=compat

# Versions and hashes are locked; the stamps make a second run cheap. UV=1 (CI): uv installs what the lock file $(1) has,
# held to the same hashes, with a quarter of pip's CPU. It does not read pip's settings; where it cannot, pip does.
pip = $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(1)
ifdef UV
install = $(call pip,requirements-uv.lock) && \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r $(1) || $(call pip,$(1))
else
install = $(call pip,$(1))
endif

$(VENV)/.runtime: $(BIN)/python requirements.lock pyproject.toml
	@echo "installing Keylake's dependencies into $(VENV) …"
	@$(call install,requirements.lock)
	@$(BIN)/python -m pip install $(EDITABLE) --no-build-isolation -e . 2>/dev/null || \
	  $(BIN)/python -m pip install $(EDITABLE) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	@echo "installing the tools for tests into $(VENV) …"
	@$(call install,requirements-dev.lock)
	@touch $@

setup: $(VENV)/.dev ## make the virtual environment with everything for work on Keylake

$(VENV)/.docs: $(VENV)/.runtime requirements-docs.lock
	@echo "installing the tools for the documentation into $(VENV) …"
	@$(call install,requirements-docs.lock)
	@touch $@

# Not --quiet: then MkDocs does not count warnings. Material says at each build that it will be succeeded by another tool.
docs: $(VENV)/.docs ## the documentation as a site, in build/site; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

demo: $(VENV)/.runtime ## the main job on an embedded local cluster, start to end, in about a minute
	@$(BIN)/keylake demo

# CI runs the two halves beside each other, so each has a cache of its own. Every test that is not of the first is of the
# second.
NO_SERVERS := tests/unit tests/property tests/vectors tests/simulation tests/simulation_wal
HALF_no-servers := $(NO_SERVERS)
HALF_servers := $(addprefix --ignore=,$(NO_SERVERS))
half = $(if $(HALF),-o cache_dir=.pytest_cache/$(HALF) $(or $(HALF_$(HALF)),$(error HALF is servers or no-servers)))

test: $(VENV)/.dev ## all tests, with every server that they need; JOBS=2 modules at a time, in a new order unless SEED=N
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder \
	  $(if $(SEED),--randomly-seed=$(SEED)) $(half)

# Failures stand in .pytest_cache. One that is gone when nothing else runs is printed as such, and still has a cause.
test-again: $(VENV)/.dev ## the tests that failed, once more, alone: tells a mistake from a machine that was too busy
	@$(BIN)/python -m pytest --last-failed --last-failed-no-failures none --maxfail 1 -rA $(half)

test-unit: $(VENV)/.dev ## the tests that start no server
	@$(BIN)/python -m pytest $(NO_SERVERS)

test-integration: $(VENV)/.dev ## the tests that start real processes
	@$(BIN)/python -m pytest tests/integration

example: $(VENV)/.dev ## the tests of examples/orders: how a service is tested against its customer's key
	@$(BIN)/python -m pytest -c examples/orders/pytest.ini --rootdir examples/orders examples/orders

console-test: $(VENV)/.dev ## the console in a real browser, through the whole story; PICTURES=docs/pictures keeps screenshots
	@KEYLAKE_PICTURES=$(PICTURES) $(BIN)/python -m pytest --override-ini addopts= -p no:randomly -ra tests/browser

lint: $(VENV)/.dev ## ruff
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)

fmt: $(VENV)/.dev ## format the code
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

types: $(VENV)/.dev ## mypy, strict
	@$(BIN)/mypy
	@MYPYPATH=examples/orders $(BIN)/mypy --strict examples/orders/app.py examples/orders/tests

check: lint types docs demo test ## what CI runs, but for the containers

bench: $(VENV)/.dev ## the figures of docs/benchmarks.md, as ratios against a peer in the same run (fleets and simulations: bench-*)
	@$(BIN)/python -m benchmarks

regression: $(VENV)/.dev ## SQL=…/src/test/regress: Postgres's own suite against an endpoint, then every page compared
	@$(BIN)/python -m benchmarks.regression $(or $(SQL),$(error SQL=DIRECTORY is missing: see docs/conformance.md))

isolation: $(VENV)/.dev ## SPECS=…/src/test/isolation: Postgres's isolation tests against an endpoint, as regression
	@$(BIN)/python -m benchmarks.regression $(or $(SPECS),$(error SPECS=DIRECTORY is missing: see docs/conformance.md))

docs-roles: $(VENV)/.dev ## docs/roles.md, from the services' own routes
	@$(BIN)/python -m keylake.roles_table > docs/roles.md

docs-lifecycle: $(VENV)/.dev ## docs/lifecycle.md, from the keymanager's table of states and events
	@$(BIN)/python -m keylake.lifecycle_page > docs/lifecycle.md

docs-errors: $(VENV)/.dev ## docs/errors.md, from the errors and the proxy's farewells
	@$(BIN)/python -m keylake.errors_table > docs/errors.md

docs-reference: $(VENV)/.dev ## docs/reference/, from the command line, the settings and the HTTP APIs themselves
	@$(BIN)/python -m keylake.reference docs/reference

docs-metrics: $(VENV)/.runtime ## docs/reference/metrics.md, from a cluster of its own
	@$(BIN)/python -m keylake.reference.metrics docs/reference/metrics.md

fault-matrix: $(VENV)/.dev ## parts in trouble while keys are revoked: all pairs; FAULTS=full, the whole product (half an hour, on a machine that has nothing else to do)
	@KEYLAKE_FAULT_MATRIX=$(or $(FAULTS),covering) $(BIN)/python -m pytest -p no:randomly -q -s tests/cluster_faults

bench-keys: $(VENV)/.dev ## the key side's figures: KMS calls, renewals per second, latency of unwrapping, 100,000 envelopes wrapped again, 10,000 instances
	@$(BIN)/python -m benchmarks keys rewrap
	@$(BIN)/python -m benchmarks.revocation --runs 0 --fleet 10000 --fleet-rounds 1

bench-revocation: $(VENV)/.dev ## revoke and restore with 20 computes and 10,000 simulated instances; ARGS="--runs 5 …"
	@$(BIN)/python -m benchmarks.revocation $(ARGS)

bench-simulation: $(VENV)/.dev ## keymanagers and key clients in a simulated world, SEEDS (default 10000) of them
	@$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),10000) --jobs $(JOBS)

compose-test: $(VENV)/.dev ## docker-compose.yml on a Docker engine (its own when none runs; root), start to end; see docs/compose.md
	@$(BIN)/python -m tests.compose

first-run: $(VENV)/.dev ## docs/first-run.md: the README's commands on bare machines, recorded; root, see docs/compose.md
	@$(BIN)/python -m tests.compose.first_run $(RUNS)

fuzz-keys: $(VENV)/.dev ## keys beside an oracle, through EXAMPLES lives (default 200) that CI has not seen
	@KEYLAKE_KEY_EXAMPLES=$(or $(EXAMPLES),200) $(BIN)/python -m pytest -q tests/integration/test_keys_state_machine.py

sim-consensus: $(VENV)/.dev ## 20,000 seeded runs of the elections' code (SEEDS=FROM:TO), or one with its history (SEED=N)
	@$(BIN)/python -m tests.simulation_wal $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000:21000) --jobs $(JOBS))

model-consensus: $(VENV)/.dev ## the elections' cores through the states of small worlds (docs/consensus.md)
	@$(BIN)/python -m tests.simulation_wal.model --deep

crash-anywhere: $(VENV)/.dev ## safekeeper, pageserver, rotating keymanager and compute manager, killed at every named step
	@KEYLAKE_ALL_FAILPOINTS=1 $(BIN)/python -m pytest -q tests/integration/test_safekeeper_failpoints.py \
	  tests/integration/test_pageserver_failpoints.py \
	  tests/integration/test_keymanager_failpoints.py
	@KEYLAKE_ALL_FAILPOINTS=1 $(BIN)/python -m pytest -q tests/cluster/test_durability.py \
	  -k "as_it_sends or manager_dies or manager_that_has_a_name or new_disk_takes"

lock: $(VENV)/.dev ## lock the newest versions that pyproject.toml allows
	@$(BIN)/python -m pip install --quiet --upgrade uv
	@echo uv | $(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 --no-header \
	  --no-annotate - -o requirements-uv.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
	  pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
	  --group dev pyproject.toml -o requirements-dev.lock
	@$(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
	  --group pyproject.toml:docs --constraints requirements-dev.lock -o requirements-docs.lock

up: ## the same services as containers; FUSE=1: computes on lazy volumes, which need /dev/fuse (docs/compose.md)
	$(COMPOSE) $(if $(FUSE),-f docker-compose.yml -f docker-compose.fuse.yml) up --build --detach
	@echo "Postgres clients connect to $$($(COMPOSE) port proxy 5432). The console, for whoever has this address:"
	@$(COMPOSE) exec -T console timeout 120 \
	  sh -c 'until test -s /run/keylake/console; do sleep 0.2; done; cat /run/keylake/console' || \
	  { echo "not there after two minutes; see what the others say: make logs"; exit 1; }

renew: ## new certificates for the containers: theirs last a year, and `provision` says when; data and keys stay
	$(COMPOSE) stop
	$(COMPOSE) run --rm --no-deps provision python -m keylake.provision certificates
	$(COMPOSE) up --detach

down: ## end them and remove their data
	$(COMPOSE) down --volumes --remove-orphans

logs: ## follow the containers' logs
	$(COMPOSE) logs --follow

clean: ## remove what the tasks above made here
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .keylake
