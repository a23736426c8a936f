# make demo   set up everything, train a text-to-emoji model from random weights on the CPU, open it with stock diffusers
# make test   set up everything, pass the checks and the tests
# make check  lint, format, types, spelling
# make docs   the handbook as pages, docs/_build/html/index.html
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check docs
demo: .venv/installed
	ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py configs/demo.yaml checkpoint.resume=auto
	$(BIN)/python benchmarks/common/open_with_stock.py runs/demo/pipeline runs/demo/grid.png

test: .venv/installed check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell

docs: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W -n -b html docs docs/_build/html

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[openmoji,test,dev]'
	touch $@
