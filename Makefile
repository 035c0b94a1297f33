# make demo and make test need nothing but Python 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= build/demo

.PHONY: demo test test-fast check format bench peers agreement fixture docs clean

demo: $(VENV)/.base            ## trace the embedded model and open-able report in build/demo
	$(BIN)/upriver demo --out $(OUT)

test: $(VENV)/.dev             ## all unit tests
	$(BIN)/python -m pytest -n auto

test-fast: $(VENV)/.dev        ## without the slow ones
	$(BIN)/python -m pytest -n auto -m "not slow"

check: $(VENV)/.dev            ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev            ## speed of the trace against plain training steps, in one run
	$(BIN)/python benchmarks/scan.py

peers: $(VENV)/.dev            ## speed, memory and scores against Kronfluence and Bergson, in environments of their own
	$(BIN)/python benchmarks/peers/run.py

agreement: $(VENV)/.others     ## scores beside those of Kronfluence and curvlinops, run here; prints a table
	$(BIN)/python -m pytest -s tests/test_agreement.py

fixture: $(VENV)/.others       ## scores of Kronfluence 1.0.1 that tests/test_kronfluence.py compares with
	OMP_NUM_THREADS=1 $(BIN)/python tests/make_kronfluence_fixture.py

docs: $(VENV)/.dev             ## what documents hold that a command prints and no machine decides
	$(BIN)/python tests/architectures.py > docs/architectures.md
	$(BIN)/python benchmarks/blocks.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,check,studies,gguf]"
	touch $@

# The two programs would bring other versions of what the tests run with, so what they need is named here.
$(VENV)/.others: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt einops opt_einsum linear_operator accelerate scikit-learn
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps kronfluence==1.0.1 curvlinops-for-pytorch==3.0.1 \
		einconv backpack-for-pytorch unfoldNd
	touch $@

clean:
	rm -rf build $(VENV)
