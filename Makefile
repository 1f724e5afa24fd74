# make quickstart | test | test-cuda | chapter | lab | site | faults | bench | clean. Each makes .venv where it is missing; Python 3.11
# or newer is all it needs.
VENV := .venv
BIN  := $(VENV)/bin
CUDA_VENV := .venv-cuda
# The first interpreter that really starts and is new enough. Choose another: make PYTHON=/path/to/python3 ...
tested = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
newer  = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(tested)' 2>/dev/null && echo $$p && exit; done; \
	python3 -c '$(newer)' 2>/dev/null && echo python3)
checked = test -n "$(PYTHON)" && $(PYTHON) -c '$(newer)' || { echo "No Python 3.11 or newer found$(if $(PYTHON),: $(PYTHON) is older or \
	does not start). Install one, or say: make PYTHON=/path/to/python3 ..." >&2; exit 2; }
SHELL_SCRIPTS := .ci/run $(wildcard .github/scripts/*.sh docker/*.sh)
WORKFLOWS := $(wildcard .github/workflows/*.yml)

.PHONY: help quickstart test test-cuda chapter lint lab site faults bench readme clean
help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

$(BIN)/python:
	@$(checked)
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: $(BIN)/python settings.ini setup.py constraints.txt
	@echo "Installing mainrun_nb into $(VENV) (some minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# What only a part of the package needs: ray, trackio and transformers. Their tests skip where they are missing.
$(VENV)/.all: $(VENV)/.dev
	@echo "Installing every extra into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

# KaTeX's style sheet and fonts come from npm, in the version that sphinxcontrib-katex renders the formulas with.
$(VENV)/.site: $(VENV)/.runtime
	@command -v npm >/dev/null || { echo "No npm found, which brings KaTeX for the formulas. Install Node.js." >&2; exit 2; }
	@echo "Installing the tools of the site into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[site]'
	@npm install --silent --no-save --prefix $(VENV) katex@$$($(BIN)/python -c 'import sphinxcontrib.katex as k; print(k.katex_version)') || \
	  { echo "npm could not bring KaTeX: is its registry within reach?" >&2; exit 2; }
	@touch $@

quickstart: $(VENV)/.runtime  ## install, then train a tiny model on synthetic titles
	rm -rf runs/quickstart
	@$(BIN)/mainrun-train --config sweeps/base/quickstart.yaml --out runs/quickstart >/dev/null  # its line of JSON is for programs

test: lint  ## the linters, then every test on all cores (MAINRUN_SLOW=1 for the slow ones too, HN_TITLES=file for real titles)
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal $(ARGS)

# The CUDA build of PyTorch, some 5 GB, in an environment of its own: pip's usual index has it, a folder of local wheels may have another.
$(CUDA_VENV)/.done: settings.ini setup.py constraints.txt
	@$(checked)
	@command -v $${CXX:-c++} >/dev/null || { echo "make test-cuda: needs a C++ compiler (Debian: apt-get install g++)" >&2; exit 2; }
	$(PYTHON) -m venv $(CUDA_VENV) || { rm -rf $(CUDA_VENV); exit 1; }
	@echo "Installing the CUDA build of PyTorch into $(CUDA_VENV) (half a GB to fetch, minutes) ..."
	@PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null $(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e . pytest pytest-timeout
	@touch $@

test-cuda: $(CUDA_VENV)/.done  ## trainings on a pretended GPU, tests/cuda/README.md (ARGS=--all: the whole grid)
	$(CUDA_VENV)/bin/python tests/cuda $(ARGS)

chapter: $(VENV)/.dev  ## one chapter: its notebook, its module and the house rules, as in make chapter C=07
	@test -n "$(C)" || { echo "Which chapter? make chapter C=07" >&2; exit 2; }
	$(BIN)/python -m pytest tests/test_notebooks.py tests/test_layout.py -k "$(C)_ or is_what or private or star" $(ARGS)

lint: $(VENV)/.dev  ## the linters alone; none needs a network
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/check-jsonschema --quiet --builtin-schema custom.github-workflows-require-timeout $(WORKFLOWS)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(BIN)/hadolint docker/Dockerfile

# What Lab saves is brought into nbdev's form first, so that opening a chapter changes nothing that git sees.
lab: $(VENV)/.dev  ## JupyterLab on the chapters
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb \
	  --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter $(ARGS)

site: $(VENV)/.site  ## the chapters as a website: build/site/index.html
	rm -rf build/site build/doctrees
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs -d build/doctrees nbs build/site

faults: $(VENV)/.all  ## every fault of tests/faults/, with a table at the end
	$(BIN)/python tests/faults $(ARGS)

# What trains for hours, or compares what has to be made first, is asked for by its name.
BY_NAME := $(addprefix benchmarks/,recipes.py repetition.py far.py cased.py cuts.py commits.py width.py)
bench: $(VENV)/.all  ## every measurement of benchmarks/, one after the other
	@for f in $(filter-out benchmarks/_% $(BY_NAME),$(wildcard benchmarks/*.py)); do echo "== $$f"; $(BIN)/python $$f || exit 1; done

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	$(BIN)/nbdev-test nbs/index.ipynb --save
	$(BIN)/nbdev-clean --fname nbs/index.ipynb
	$(BIN)/python .github/scripts/readme.py README.md

clean:  ## build products and caches; runs and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . \( -path ./$(VENV) -o -path ./$(CUDA_VENV) \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf
