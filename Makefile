# tritlstm: `make demo`, `make test`, `make bench`, `make lint`. Each first sets up .venv, once (.ci/setup).

PYTHON ?=
VENV ?= .venv
TORCH ?=
TRITON ?=
JOBS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
DESTDIR ?=
PREFIX ?= /usr/local
ENGINE ?= aot
IMAGES ?= none
FUZZ_SECONDS ?= 600

BIN = $(VENV)/bin
export PYTHON VENV TORCH TRITON CC

.PHONY: help demo test bench lint fuzz setup install check-system clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    train a character model on real text, draw its gates, verify it   DEMO_ARGS="--help"'
	@echo 'make test    run the tests               PYTEST_ARGS="tests/test_reference.py -k torch" JOBS=2'
	@echo 'make bench   run the benchmarks that fit this machine               BENCH_ARGS="--suite cpu"'
	@echo 'make lint    run ruff and mypy'
	@echo 'make setup   only what all of these do first: a virtual environment with torch and this package'
	@echo '             PYTHON=python3.12 VENV=.venv TORCH=2.13.0 TRITON=3.7.1'
	@echo 'make fuzz    fuzz the C library (needs clang)              FUZZ_SECONDS=600, for each of three targets'
	@echo 'make install the C library          PREFIX=/usr/local DESTDIR= ENGINE=aot|python|both IMAGES=none'
	@echo 'make clean   remove build products; the virtual environment stays'

demo: setup
	@$(BIN)/tritlstm demo $(DEMO_ARGS)

test: setup
	@$(BIN)/pytest -n $(JOBS) $(PYTEST_ARGS)

bench: setup
	@$(BIN)/tritlstm bench $(BENCH_ARGS)

# mypy wants a package to be one folder, so it is shown the four as they are once installed.
lint: setup
	@$(BIN)/ruff check .
	@rm -rf build/typing && mkdir -p build/typing/tritlstm
	@cd build/typing/tritlstm && ln -s ../../../tritlstm/* ../../../kernels ../../../capi ../../../benchmarks .
	@python="$$(cd $(BIN) && pwd)/python" && cd build/typing && \
		"$$python" -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p tritlstm

fuzz:
	@tests/fuzz/run $(FUZZ_SECONDS)

# The prefix can be moved, so what is built into DESTDIR is right in PREFIX.
install: setup
	@$(BIN)/tritlstm build-c "$(DESTDIR)$(PREFIX)" --engine $(ENGINE) --images $(IMAGES)

setup:
	@sh .ci/setup

check-system:
	@sh .ci/setup --check

clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find tritlstm kernels capi benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
