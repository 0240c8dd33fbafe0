# Every target runs in .venv, which make builds by itself; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
URL ?= memory://
BROKER ?= rabbitmq
SEED ?= $(shell date +%s)
MESSAGES ?= 50000
FAULTS ?= 10
INPUTS ?= 100000

BIN := .venv/bin
STAMP := .venv/.installed
BENCH := .venv/.bench
SUPPLY := $(BIN)/python -m unibus_contracts.supply
CODE := $(wildcard src adapters contracts tests examples benchmarks)

# `up` prints NAME=value lines once every broker answers; assigned first so that its failure is not lost in the eval.
BROKERS := urls=$$($(SUPPLY) up); set -a; eval "$$urls"; set +a

.NOTPARALLEL:
.PHONY: help demo demo-all test unit saboteurs contracts integration chaos chaos-million fuzz brokers-up brokers-down cluster-up cluster-down cluster-test lint types bench bench-check bench-page checks lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: $(STAMP) ## the orders example; URL=amqp://... for a real broker (default memory://)
	@$(BIN)/python -m examples.orders --url "$(URL)"

demo-all: $(STAMP) ## the orders example in memory and on each broker of the supply, and its numbers side by side
	@trap '$(SUPPLY) down' EXIT; $(BROKERS); \
	$(BIN)/python -m examples.orders.everywhere memory:// "$$UNIBUS_TEST_RABBITMQ_URL" "$$UNIBUS_TEST_KAFKA_URL" "$$UNIBUS_TEST_REDIS_URL" "$$UNIBUS_TEST_SQS_URL"

# The brokers start beside the checks that need none; `brokers-up` waits for them, and says what went wrong. They go down
# whatever happened before, Ctrl-C included; the status is that of the checks, then that of the reports.
test: $(STAMP) ## everything: lint, types, unit tests, saboteurs, then contracts and integration on real brokers
	@rm -rf reports; shopt -s nullglob; \
	$(SUPPLY) up >/dev/null 2>&1 & starting=$$!; \
	stop() { wait $$starting || :; $(SUPPLY) down; }; trap stop EXIT; \
	status=0; $(MAKE) --no-print-directory checks || status=$$?; \
	trap - EXIT; stop || status=$$?; \
	$(BIN)/python -m unibus_contracts.summary reports/*.json || status=$$?; \
	exit $$status

checks: lint types unit saboteurs brokers-up contracts integration

unit: $(STAMP) ## unit tests: core on the memory adapter, no broker; and those of the example adapter
	$(BIN)/pytest tests/unit examples/adapter_sqlite/tests -n 3 --dist worksteal

saboteurs: $(STAMP) ## proof that the contracts catch: each broken adapter by those that are meant to, none that never does
	$(BIN)/python -m unibus_contracts.saboteurs

contracts: $(STAMP) ## the contract suite on the memory adapter, the example adapter and each broker of the supply, Kafka by both engines; the answers must be those pinned
	@$(BIN)/python -m unibus_contracts sqlite:///reports/contracts.db -n 6 --unibus-pin=examples/adapter_sqlite/answers
	@$(BROKERS); $(BIN)/python -m unibus_contracts memory:// "$$UNIBUS_TEST_RABBITMQ_URL" "$$UNIBUS_TEST_KAFKA_URL" "$${UNIBUS_TEST_KAFKA_URL/kafka:/kafka+confluent:}" "$$UNIBUS_TEST_REDIS_URL" "$$UNIBUS_TEST_SQS_URL" -n 6 --unibus-pin=contracts/unibus_contracts/answers

# A file at a time, since the tests of one share brokers; in the order of their names, else those of few long tests come last.
integration: $(STAMP) ## adapters on real brokers, faults included
	@$(BROKERS); $(BIN)/pytest tests/integration -n 4 --dist loadfile --no-loadscope-reorder

chaos: $(STAMP) ## work under faults on a broker of its own: BROKER=kafka SEED=7 MESSAGES=50000 FAULTS=10 (or MINUTES=5), and its history judged; CLUSTER=1: on three nodes
	$(BIN)/python -m unibus_contracts.chaos $(BROKER) $(if $(CLUSTER),--cluster) --seed $(SEED) --messages $(MESSAGES) --faults $(FAULTS) $(addprefix --minutes ,$(MINUTES))

chaos-million: $(STAMP) ## the same with 1,000,000 messages and 24 faults drawn from the seed: BROKER=redis SEED=7; half an hour to an hour and a half
	$(BIN)/python -m unibus_contracts.chaos $(BROKER) --seed $(SEED) --messages 1000000 --faults 24

fuzz: $(STAMP) ## foreign input for every decoder, mutated: INPUTS=100000 of each, SEED=7; `make test` runs 4,000 with seed 1
	UNIBUS_TEST_FUZZ_INPUTS=$(INPUTS) UNIBUS_TEST_FUZZ_SEED=$(SEED) $(BIN)/pytest tests/unit/test_fuzz.py -k documented -rP -n 2

brokers-up: $(STAMP) ## start the test brokers, or find those of UNIBUS_TEST_*_URL; prints NAME=value lines
	@$(SUPPLY) up

brokers-down: $(STAMP) ## stop what brokers-up started
	@$(SUPPLY) down

cluster-up: $(STAMP) ## start three that are one: BROKER=rabbitmq, kafka or redis; prints the URL with all hosts
	@$(SUPPLY) cluster-up --only $(BROKER)

cluster-down: $(STAMP) ## stop what cluster-up started
	@$(SUPPLY) cluster-down

# Eleven servers and their faults: not in `make test`, since beside other tests they wait for each other.
cluster-test: $(STAMP) ## nodes of three are killed under work, and used again when they are back
	$(BIN)/pytest tests/clusters

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy $(CODE)

bench: $(BENCH) ## throughput and latency beside the raw clients and other libraries, 25 minutes; reports/bench.json
	@mkdir -p reports
	$(BIN)/python -m benchmarks --json reports/bench.json

bench-check: $(BENCH) ## has a ratio fallen below the committed floor by more than its noise? What has a goal only, 10 minutes
	@mkdir -p reports
	$(BIN)/python -m benchmarks --headline --json reports/bench-check.json --check benchmarks/floor.json

bench-page: $(BENCH) ## tables and plots of docs/performance.md, and the floor, from reports/bench.json: after a run on an idle machine
	$(BIN)/python -m benchmarks.page reports/bench.json
	$(BIN)/python -m benchmarks.floor reports/bench.json

lock: ## resolve the newest versions into constraints.txt
	rm -rf .venv && $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,bench]'
	$(BIN)/pip freeze --exclude-editable > constraints.txt
	rm -rf .venv

clean: ## remove what make has built (brokers first: make brokers-down)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis reports

$(STAMP): pyproject.toml constraints.txt examples/adapter_sqlite/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "unibus needs Python 3.11 or newer; $(PYTHON) is missing or older. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' --editable examples/adapter_sqlite
	@touch $@

$(BENCH): $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
