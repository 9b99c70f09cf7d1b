# Two commands: `make demo` and `make test`. Each makes the environment first if it is not there.
PYTHON ?= python3
BIN := .venv/bin
SERIES ?=
ONESHOT ?=

.PHONY: demo setup test check format docs clean

demo: setup
	$(BIN)/keyslice demo $(if $(SERIES),"$(SERIES)") $(if $(ONESHOT),--oneshot)

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python is %d.%d, expected 3.11 or later" % sys.version_info[:2]'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

test: setup
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv
