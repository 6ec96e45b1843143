# What one does with podspan. `make help` lists it; the set-up happens by itself.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
READY := .venv/.ready
KERNELS ?= 6.1 6.12
CASES ?= 1000000
SEED ?= 1
ARGS ?=

.PHONY: help demo test check format lint test-unit fuzz test-netns test-browser test-peers \
	test-vm setup clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS="..." goes to pytest, KERNELS="6.1 ..." chooses for test-vm'
	echo 'CASES=... and SEED=... are for fuzz'

demo: $(READY) ## trace four services; ARGS=--serve shows the trace in a browser
	@if [ -e /sys/bus/event_source/devices/kprobe/type ]; then
		exec $(BIN)/podspan demo $(ARGS)
	fi
	echo "this kernel ($$(uname -r)) has no kprobes, so the demo runs in the VM"
	exec vagrant/vm run $(if $(findstring --serve,$(ARGS)),--forward 9411) -- \
		$(BIN)/podspan demo $(patsubst --serve,--serve=:9411,$(ARGS))

# Every tier runs, also after one that failed, and says its own summary.
test: $(READY) ## everything: lint, unit, fuzz, netns, browser, peers, VM
	@trap 'exit 130' INT TERM
	failed=
	for tier in lint test-unit fuzz test-netns test-browser test-peers test-vm; do
		echo "== $$tier"
		$(MAKE) $$tier || failed+=" $$tier"
	done
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi
	echo "== all passed"

check: lint test-unit ## lint and unit tests: before every commit

lint: $(READY) ## ruff and strict mypy
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy | sed 's#^\.venv/checked/podspan/##'

format: $(READY) ## put the Python into its form
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-unit: $(READY) ## no privilege
	@$(BIN)/pytest tests/unit $(ARGS)

fuzz: $(READY) ## CASES streams through the scanner and its reference, from SEED
	@$(BIN)/pytest tests/fuzz --cases='$(CASES)' --seed='$(SEED)' $(ARGS)

test-netns: $(READY) ## root, this kernel
	@$(BIN)/pytest tests/netns $(ARGS)

test-browser: $(READY) ## the viewer in Chromium; pictures in .venv/cache/screenshots
	@$(BIN)/pytest tests/browser $(ARGS)

test-peers: $(READY) ## real Zipkin and Jaeger, fed by the demo
	@$(BIN)/pytest tests/peers $(ARGS)

test-vm: $(READY) ## a boot for each of KERNELS
	@trap 'exit 130' INT TERM
	failed=
	for kernel in $(KERNELS); do
		echo "== kernel $$kernel"
		vagrant/vm run --kernel $$kernel -- \
			$(BIN)/python -m pytest tests/vm $(ARGS) || failed+=" $$kernel"
	done
	if [ -n "$$failed" ]; then echo "tests/vm failed on kernel$$failed"; exit 1; fi

setup: $(READY) ## install what is missing; every target does it by itself

# The system's Python sees Debian's bcc; the links give mypy the names of the packages.
$(READY): setup.py vagrant/packages.txt vagrant/provision.sh
	@vagrant/provision.sh
	echo "podspan: setting up .venv"
	/usr/bin/python3 -m venv --system-site-packages .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	mkdir -p .venv/checked/podspan
	for folder in agent bpf init; do
		ln -sfn ../../../$$folder .venv/checked/podspan/$$folder
	done
	touch $@

clean: ## remove .venv and caches; not the downloaded kernels
	rm -rf .venv build *.egg-info .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.ONESHELL:
