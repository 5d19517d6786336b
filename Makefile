# make test: sets up .venv and runs the tests; make test-all: the slow rest too; make lint; make format.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
HALF = $(VENV)/.half-made
NEEDS = requirements.txt requirements-demo.txt requirements-diffusers.txt requirements-plots.txt \
	requirements-sweep.txt requirements-ray.txt requirements-dev.txt

.PHONY: setup test test-all lint format

setup: $(STAMP)

$(STAMP): $(NEEDS)
	{ test ! -e $(HALF) && $(BIN)/python -m pip --version >/dev/null 2>&1; } || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	touch $(HALF)
	$(BIN)/python -m pip install --disable-pip-version-check $(NEEDS:%=-r %) || { rm -f $(HALF); exit 1; }
	rm -f $(HALF)
	touch $(STAMP)

# As many tests at once, each on one thread: on two cores that takes half the time of one test on both. Those of Ray,
# which starts workers of its own, come last and alone.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ALONE = tests/test_sweep_ray.py

test: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile --ignore $(ALONE)
	$(PYTEST) $(ALONE)

test-all: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile --ignore $(ALONE) -m ""
	$(PYTEST) $(ALONE) -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
