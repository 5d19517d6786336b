# make test: sets up .venv and runs the tests; make test-all: the slow rest too; make lint; make format.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
NEEDS = requirements.txt requirements-demo.txt requirements-diffusers.txt requirements-plots.txt \
	requirements-sweep.txt requirements-ray.txt requirements-dev.txt

.PHONY: setup test test-all lint format

setup: $(STAMP)

$(STAMP): $(NEEDS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(NEEDS:%=-r %)
	touch $(STAMP)

test: setup
	$(BIN)/python -m pytest -q

test-all: setup
	$(BIN)/python -m pytest -q -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
