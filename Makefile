# Two commands: `make reproduce` and `make test`. Both set everything up first.
PYTHON     ?= python3
VENV       := .venv
BIN        := $(VENV)/bin
EXPERIMENT ?= demo
DEVICE     ?= auto
PRECISION  ?= 32-true
DATA_ROOT  ?=
CORES      ?= 0

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: reproduce test lab install docs clean-notebooks bench help

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("scaleprotoseg needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[repro,lite0,segformer,deploy,dev]'
	touch $@

install: $(VENV)/.installed  ## virtual environment with everything

reproduce: install  ## train, explain and report EXPERIMENT (default: demo); continues an interrupted run
	$(BIN)/scaleprotoseg reproduce --experiment $(EXPERIMENT) --cores $(CORES) --device $(DEVICE) --precision $(PRECISION) $(if $(DATA_ROOT),--data-root '$(DATA_ROOT)')

test: install    ## all tests but the slow ones, the smoke graph and every notebook
	$(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: install     ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=.

docs: install    ## run the chapters and keep their outputs; README.md from nbs/index.ipynb
	$(BIN)/python nbs/run_chapters.py
	$(BIN)/python nbs/run_chapters.py index.ipynb results.ipynb speed.ipynb cluster.ipynb
	$(BIN)/python nbs/render_readme.py

clean-notebooks: install  ## what to run before a commit: clean, export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

bench: install   ## speed and memory beside a black box and the published loops; results in figures/benchmarks
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/clustering.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/projection.py
	$(BIN)/python benchmarks/network.py
	$(BIN)/python benchmarks/interpretability.py
	$(BIN)/python benchmarks/partscapes.py
	$(BIN)/python benchmarks/sweep.py
