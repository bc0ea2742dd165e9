# Every target installs what it lacks: as root on Debian also Debian's packages (bindep.txt). `make help` lists them.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
DEMO_ARGS ?=

.PHONY: help venv test unit lab demo lint docs bench genconfig clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

venv: ## the virtualenv with the package and the tools of tests and documentation
	@tools/bootstrap test docs

test: ## lint and every test but the long real cells, in under 15 minutes
	@tools/bootstrap test lab
	@$(BIN)/python tools/run_tests.py lint unit cell -- $(PYTEST_ARGS)

unit: ## the tests that need neither root nor real hosts
	@tools/bootstrap test lab
	@$(BIN)/python tools/run_tests.py unit -- $(PYTEST_ARGS)

lab: ## every real cell, in under 60 minutes
	@tools/bootstrap test lab
	@$(BIN)/python tools/run_tests.py lab -- $(PYTEST_ARGS)

demo: ## two real hosts, real guests, from boot to delete; without root: the same in one process
	@tools/bootstrap test lab
	@if why=$$(tools/bootstrap-check-lab); then $(BIN)/compute-worker-demo $(DEMO_ARGS); else \
	  echo "make demo: $$why; showing the same in one process, on the fake driver"; \
	  $(BIN)/compute-worker-demo --embedded $(DEMO_ARGS); fi

lint: ## ruff and mypy --strict
	@tools/bootstrap test
	@$(BIN)/python tools/run_tests.py lint

docs: ## doc/build/html; a warning is an error
	@tools/bootstrap docs
	@$(BIN)/sphinx-build -q -E -W --keep-going -b html doc/source doc/build/html
	@echo "see doc/build/html/index.html"

bench: ## every benchmark, one after the other
	@tools/bootstrap test lab
	@shopt -s nullglob; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

genconfig: ## etc/compute-worker.conf.sample
	@tools/bootstrap test
	@$(BIN)/oslo-config-generator --config-file etc/config-generator.conf

clean: ## remove what the other targets made
	rm -rf $(VENV) .tox build dist doc/build .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
