# Starling cookbook. `make run` and `make test` set everything up by themselves.

PYTHON   ?= python3
VENV     ?= .venv
PRESET   ?= small
PIP_ARGS ?=
ARGS     ?=
REPO     ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Tests and the tiny preset need no model hub; asking one would only hide a mistake.
OFFLINE := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv run test test-slow bench-reward bench-losses bench-apa \
        bench-rollout lab lint format freeze badges clean

help:  ## list the targets
	@echo 'Usage: make TARGET [VARIABLE=value ...]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-13s %s\n", $$1, $$2}' Makefile
	@echo 'Variables:'
	@echo '  PRESET     small (default) or tiny'
	@echo '  ARGS       more options of notebooks/run.py, e.g. ARGS="--only 01 02"'
	@echo '  REPO       owner/name on GitHub, for make badges'
	@echo '  PYTHON     the Python 3.11+ that makes the environment (python3)'
	@echo '  PIP_ARGS   extra options for pip install, e.g. an index of CPU builds'

venv: $(STAMP)  ## make .venv and install the tested set; nothing to do when done

# The stamp is the last step: an interrupted install leaves none and is repeated.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'Python 3.11 or newer is needed, but "$(PYTHON)" is missing or older.' \
	       'Name another: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo '$(VENV) holds a Python older than 3.11: remove it and try again.' >&2; \
	  exit 1; }
	$(PY) -m pip install $(PIP_ARGS) -r requirements.txt
	$(PY) -m pip install --no-deps --no-build-isolation -e .
	@touch $@

run: $(STAMP)  ## execute notebooks 01-05 and print their key figures
	$(PY) notebooks/run.py --preset $(PRESET) $(ARGS)

test: lint  ## lint, fast tests, notebooks on the tiny preset
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile \
	  -m 'not slow and not notebook'
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup \
	  -m 'notebook and not slow'

test-slow: $(STAMP)  ## tests that need SmolLM2, kills or second processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m slow

bench-reward: $(STAMP)  ## speed of reward training, TRL beside ours (hours)
	$(OFFLINE) $(PY) tests/benchmarks/bench_reward.py --learn 16 $(ARGS)
	$(OFFLINE) $(PY) tests/benchmarks/bench_reward.py --data nectar_sample $(ARGS)

bench-losses: $(STAMP)  ## MLE_K against MLE_2, and reading of endings (two hours)
	$(OFFLINE) $(PY) tests/benchmarks/study_reward.py losses $(ARGS)
	$(OFFLINE) $(PY) tests/benchmarks/study_reward.py endings $(ARGS)

bench-apa: $(STAMP)  ## APA, PPO, AWR, RLOO, DPO, SFT, three seeds (hours; resumable)
	$(OFFLINE) $(PY) tests/benchmarks/study_apa.py $(ARGS)

bench-rollout: $(STAMP)  ## one iteration and its parts, TRL's RLOO beside ours
	$(OFFLINE) $(PY) tests/benchmarks/bench_rollout.py $(ARGS)

lab: $(STAMP)  ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab notebooks

lint: $(STAMP)  ## ruff, notebooks included
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(STAMP)  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# Platform-bound packages (CUDA libraries) and build tags (+cpu) are left out, so that
# the set installs on any machine. environment.yml gets the same list.
freeze:  ## write requirements.txt and environment.yml from .venv
	@{ echo '# The exact set the notebooks were tested with. Rewritten by: make freeze'; \
	  $(PY) -m pip freeze --all --exclude-editable \
	    --exclude pip --exclude starling-cookbook \
	  | grep -vE '^(nvidia-|cuda-|triton==)' | sed -E 's/\+[a-z0-9.]+$$//'; \
	} > requirements.txt.tmp
	@grep -q '^torch==' requirements.txt.tmp || { \
	  echo 'pip freeze named no torch: is $(VENV) complete?' >&2; exit 1; }
	@if grep -nE ' @ |://' requirements.txt.tmp; then \
	  echo 'These packages come from a path or an address: fix $(VENV).' >&2; \
	  exit 1; fi
	@mv requirements.txt.tmp requirements.txt
	@{ printf '# The same set for conda. Rewritten by: make freeze\n'; \
	  printf 'name: starling-cookbook\nchannels:\n  - conda-forge\n'; \
	  printf 'dependencies:\n  - python=3.11\n  - pip\n  - pip:\n'; \
	  grep -v '^#' requirements.txt | sed 's/^/      - /'; } > environment.yml.tmp
	@mv environment.yml.tmp environment.yml
	@if [ -f $(STAMP) ]; then touch $(STAMP); fi

# pyproject.toml gets another address, nothing that would have to be installed anew.
badges: $(STAMP)  ## point badges and links at a repository: REPO=owner/name
	@$(PY) notebooks/badges.py '$(REPO)'
	@touch $(STAMP)

clean:  ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info *.tmp
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) \
	  -type d -exec rm -rf {} +
