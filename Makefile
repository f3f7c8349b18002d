# Every target but help and clean first brings .venv up to date, which takes no time when it is.
# DIRTYLOG_REQUIRE=kvm,... in the environment turns tests that would be skipped into failures: see CONTRIBUTING.md.
BIN := .venv/bin

.PHONY: help setup check test demo bench fuzz lab soak clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-7s %s\n", $$1, $$2}' Makefile

setup:  ## make .venv, with all that the other targets need (PYTHON=... chooses the interpreter)
	@PYTHON='$(PYTHON)' tools/setup

check: setup  ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: check  ## check, then the whole test suite
	$(BIN)/pytest

demo: setup  ## migrate a running guest between two processes and show it
	$(BIN)/python examples/live_migration.py

bench: setup  ## compare with QEMU; installs Debian's qemu-system-x86 where there is no QEMU
	@command -v qemu-system-x86_64 >/dev/null || tools/apt-install qemu-system-x86
	$(BIN)/python benchmarks/versus_qemu.py

soak: setup  ## test all trackers against writers that never rest, for hours (SOAK='--seconds 10s' or other options)
	$(BIN)/python tools/soak.py $(SOAK)

fuzz: setup  ## fuzz the parsers of what peers and files say; FUZZ='--seconds 10min' or other options
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	$(BIN)/python -m tools.fuzz $(FUZZ)

shuttle: setup  ## send a running guest back and forth 200 times, in ways chosen at random (SHUTTLE='--moves 1000' or other options)
	$(BIN)/python tools/shuttle.py $(SHUTTLE)

lab: setup  ## run the trackers' and the KVM machine's tests on a second kernel, in emulation; LAB='...' passes options
	$(BIN)/python -m tools.lab $(LAB)

clean:  ## remove .venv and all that the tools left
	rm -rf .venv .fuzz .lab .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
