# make book | make train | make test | make clean -- each installs what it needs into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BOOK := _build/html/index.html

.PHONY: help install train book test clean

help:
	@echo "make book   render the book into $(BOOK)"
	@echo "make train  train a small ConvNeXt for three minutes and show what it learned"
	@echo "make test   style, unit tests, notebooks, book, and checks on the built pages"
	@echo "make clean  remove what was built, and the environment in $(VENV)"

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f'Python 3.10 or newer is needed, this is {v.major}.{v.minor}: make PYTHON=python3.12')"
	@echo "Installing into $(VENV), once; PyTorch is the largest part of the download."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -r requirements.txt -e .
	@touch $@

train: $(INSTALLED)
	$(BIN)/python -m convnext_min.train --recipe imagenette --model convnext_atto --output runs/imagenette --minutes 3

book: $(INSTALLED)
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "The book is in $(BOOK)"

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --ignore=tests/test_book.py
	CONVNEXT_MIN_BUDGET=ci OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --nbmake --nbmake-kernel=python3 --nbmake-timeout=600 notebooks
	$(MAKE) book
	$(BIN)/python -m pytest -q tests/test_book.py

clean:
	rm -rf $(VENV) _build build dist *.egg-info .pytest_cache .ruff_cache
