# make book | make train | make test | make clean -- each installs what it needs into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BOOK := _build/html/index.html

NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

.PHONY: help install train book test notebooks results figures clean

help:
	@echo "make book   render the book into $(BOOK)"
	@echo "make train  train a small ConvNeXt for three minutes and show what it learned"
	@echo "make test   style, unit tests, notebooks, book, and checks on the built pages"
	@echo "make notebooks  run the notebooks at the quick budget and keep what they print (NOTEBOOKS=... for some)"
	@echo "make results  let the pages say what the files of book/results say now"
	@echo "make figures  draw the figures of the pages and the README anew"
	@echo "make clean  remove what was built, and the environment in $(VENV)"

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f'Python 3.10 or newer is needed, this is {v.major}.{v.minor}: make PYTHON=python3.12')"
	@echo "Installing into $(VENV), once; PyTorch is the largest part of the download."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -r requirements.txt -e .
	@touch $@

train: $(INSTALLED)
	$(BIN)/python -m convnext_min.train --recipe imagenette-3min --model convnext_atto

# From nothing each time: what an earlier build left would hide warnings and dead links.
book: $(INSTALLED)
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book is in $(BOOK)"

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --ignore=tests/test_book.py
	CONVNEXT_MIN_BUDGET=ci OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --nbmake --nbmake-kernel=python3 --nbmake-timeout=600 notebooks
	$(MAKE) book
	$(BIN)/python -m pytest -q tests/test_book.py

notebooks: $(INSTALLED)
	$(BIN)/python book/execute.py $(NOTEBOOKS)

results: $(INSTALLED)
	$(BIN)/python book/execute.py --results $(NOTEBOOKS)
	$(BIN)/python book/figures/draw.py

figures: $(INSTALLED)
	$(BIN)/python book/figures/draw.py

clean:
	rm -rf $(VENV) _build build dist *.egg-info .pytest_cache .ruff_cache
