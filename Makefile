# make book | make train | make test | make clean -- each installs what it needs into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BOOK := _build/html/index.html
PDF := _build/convnext-book.pdf

NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)

LOWEST := .venv-lowest
LOWEST_PYTHON ?= $(PYTHON)

.PHONY: help install train book pdf test test-lowest notebooks heads results figures address version release clean

help:
	@echo "make book         render the book into $(BOOK)"
	@echo "make pdf          print the whole book to $(PDF), where Chromium or Chrome is installed"
	@echo "make train        train a small ConvNeXt for three minutes and show what it learned"
	@echo "make test         check style, unit tests, notebooks, the book and its pages"
	@echo "make test-lowest  run the unit tests with the oldest supported versions, in $(LOWEST)"
	@echo "make notebooks    run the notebooks at the quick budget and keep their outputs (NOTEBOOKS=... for some)"
	@echo "make heads        bring the minutes to read at the head of each notebook up to date"
	@echo "make results      refresh the results shown in the notebooks and figures from book/results"
	@echo "make figures      redraw the figures of the pages and the README"
	@echo "make address URL=https://github.com/you/fork   rewrite the address of the repository everywhere"
	@echo "make version VERSION=1.2.3                     rewrite the version everywhere"
	@echo "make release      build the wheel, the source archive and the book into dist, with checksums"
	@echo "make clean        remove what was built, and the environments $(VENV) and $(LOWEST)"

install: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f'Python 3.10 or newer is needed, this is {v.major}.{v.minor}: make PYTHON=python3.12')"
	@echo "Installing into $(VENV), once; PyTorch is the largest part of the download."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --prefer-binary -r requirements.txt
	@touch $@

train: $(INSTALLED)
	$(BIN)/python -m convnext_min.train --recipe imagenette-3min --model convnext_atto

# From nothing each time: what an earlier build left would hide warnings and dead links.
book: $(INSTALLED)
	rm -rf _build
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "The book is in $(BOOK)"

pdf: $(INSTALLED)
	$(BIN)/jupyter-book build . --builder singlehtml
	$(BIN)/python book/pdf.py

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --ignore=tests/test_book.py
	CONVNEXT_MIN_BUDGET=ci OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --nbmake --nbmake-kernel=python3 --nbmake-timeout=600 notebooks
	$(MAKE) book
	$(BIN)/python -m pytest -q -n 2 tests/test_book.py

test-lowest: $(LOWEST)/installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2 --ignore=tests/test_book.py

$(LOWEST)/installed: requirements.txt pyproject.toml
	$(LOWEST_PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct -r requirements.txt
	@touch $@

notebooks: $(INSTALLED)
	$(BIN)/python book/execute.py $(NOTEBOOKS)

heads: $(INSTALLED)
	$(BIN)/python book/head.py $(NOTEBOOKS)

results: $(INSTALLED)
	$(BIN)/python book/execute.py --results $(NOTEBOOKS)
	$(BIN)/python book/figures/draw.py

figures: $(INSTALLED)
	$(BIN)/python book/figures/draw.py

address: $(INSTALLED)
	$(BIN)/python book/address.py --url "$(URL)"

version: $(INSTALLED)
	$(BIN)/python book/address.py --version "$(VERSION)"

release: book
	$(BIN)/python -m pip install --disable-pip-version-check --quiet build
	$(BIN)/python book/release.py

clean:
	rm -rf $(VENV) $(LOWEST) _build build dist *.egg-info .pytest_cache .ruff_cache
