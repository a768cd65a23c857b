# Needs Python >= 3.11, git and make. Everything is installed into .venv, once.
#
#     make demo          a small model learns something new: what it learned and what it forgot (FULL=1: the whole run;
#                        TARGET=flags: a harder task)
#     make test          all tests (ARGS='-k pico' picks some)
#     make check         format, lint, types, tests, every example in the docs: what a change must pass
#     make results       makes everything in results/: hours, goes on where it was stopped, readable at any time; what a
#                        file has is kept, so remove the file to measure all of it again
#     make clean         removes .venv and everything that is generated

.DEFAULT_GOAL := help
.PHONY: help demo test check results clean

BIN := .venv/bin
ARGS ?=
TARGET ?=
# One process for each processor, four at most: each takes a gigabyte. What a module makes once, one of them makes.
WORKERS := -n logical --maxprocesses 4 --dist loadscope

help:
	@sed -n 's/^#     //p' Makefile

demo: .venv/.installed
	$(BIN)/lorasculpt demo $(if $(filter-out 0 no false,$(FULL)),--full) $(if $(TARGET),--target $(TARGET))

test: .venv/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

# Tests treat warnings as errors (pyproject.toml). The last line runs every `>>>` example in docstrings and pages.
check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS) --doctest-modules --doctest-glob='*.md' $(wildcard README.md) src docs tests $(ARGS)

# A stamp is newer than what it was made from; with the tools installed, the plain demo has all it needs as well.
.venv/.installed: pyproject.toml constraints.txt
	@test -e .venv/.installed-dev && test .venv/.installed-dev -nt pyproject.toml && test .venv/.installed-dev -nt constraints.txt || scripts/setup
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	@scripts/setup dev
	@touch $@

results: .venv/.installed-dev
	$(BIN)/lorasculpt demo knows
	$(BIN)/lorasculpt demo results
	$(BIN)/lorasculpt demo results --target flags
	$(BIN)/lorasculpt demo results --others
	$(BIN)/lorasculpt demo results --target tasks
	$(BIN)/lorasculpt demo results --target sequence
	$(BIN)/lorasculpt demo study
	$(BIN)/python scripts/results

clean:
	rm -rf .venv build dist demo-run .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
