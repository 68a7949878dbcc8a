# From a fresh clone to a trained model: `make train`. `make` lists the commands.
# Needs python3 (3.11 or 3.12) and a package index; pip's settings (index, proxy, cache) apply.

PYTHON ?= python3
RUN ?= configs/tiny.toml
GPUS := $(shell ls /dev 2>/dev/null | grep -c '^nvidia[0-9][0-9]*$$')
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
SET ?=
TESTS ?=
SEEDS ?= 1,2,3
MINUTES ?= 10
SEED ?= 0

PY := .venv/bin/python
CONSTRAINTS := configs/constraints.txt
INSTALL := $(PY) tools/install.py .venv/setup.log --constraint $(CONSTRAINTS)
# Tests without data or a process group: they take seconds.
QUICK_TESTS := tests/system/test_imports.py tests/config tests/test_run_directory.py \
	tests/launcher/test_topology.py tests/metrics/test_recorder.py tests/inspect/test_compare.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train train-seq2seq finetune ablations test test-long check torture soak exactness monitor docs format clean

help:  ## list these commands
	@echo 'make train    set up, prepare the embedded corpus, train $(RUN) on $(RANKS) ranks; a second call resumes'
	@echo 'make train-seq2seq  the same for an encoder-decoder on pairs: configs/seq2seq.toml'
	@echo 'make finetune  train a small model, fine-tune it to classify, compare it with TF-IDF and regression'
	@echo 'make ablations  the variants of benchmarks/ablations over seeds 1, 2, 3 (hours; a stopped run goes on):'
	@echo '              tables and curves in runs/ablations (SEEDS=1,2 chooses others)'
	@echo 'make test     set up, install the development tools, run all tests except the long ones, two at a time'
	@echo '              (TESTS=... selects tests)'
	@echo 'make test-long  the long tests, which make test leaves out (TESTS=... selects tests)'
	@echo 'make check    set up, check format, lint and types, run the quick tests: under 3 minutes'
	@echo 'make torture  thousands of kills, power cuts and flipped bits in checkpoints (minutes)'
	@echo 'make soak     MINUTES of training under kills, stops, full disks, flipped bits and other faults at random'
	@echo 'make exactness  every engine setting against plain torch (hours; a stopped run goes on);'
	@echo '              writes benchmarks/support.md at the end'
	@echo 'make monitor  a local Prometheus on the runs beside that of $(RUN): rules, alerts, and where the dashboards go'
	@echo 'make docs     build the site of the documents, warnings are errors: site/index.html'
	@echo 'make setup    create .venv with the packages that training needs'
	@echo 'make format   format the code'
	@echo 'make clean    remove .venv and caches; data/ and runs/ stay'
	@echo
	@echo 'SET="training.steps=300 schedule.decay_steps=200" is a shorter run of make train: settings without spaces.'
	@echo 'RUN=path.toml and RANKS=n choose another run; PYTHON=/path/to/python3.12 chooses the interpreter.'

setup: .venv/installed

# A stamp is written only after success, so an interrupted set-up goes on where it stopped. Training needs the first
# stamp only; the second adds the development tools.
.venv/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
		echo "set-up: PYTHON = $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -1); Python 3.11 or 3.12 is needed."; \
		echo "        Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "set-up: $(PYTHON) cannot make virtual environments (no module venv or ensurepip)."; \
		echo "        On Debian or Ubuntu: apt-get install python3-venv"; exit 1; } >&2
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		echo '[1/3] creating .venv'; $(PYTHON) -m venv --clear .venv; }
	@echo '[2/3] installing torch (200 MB for the CPU build, several GB with CUDA)'
	@$(INSTALL) "$$(sed -n '/^torch==/p' $(CONSTRAINTS))"
	@echo '[3/3] installing the rest (about 90 packages)'
	@$(INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo '[dev] installing the development tools (about 30 packages)'
	@$(INSTALL) --editable '.[dev]'
	@touch $@

train: .venv/installed
	@$(PY) -m bigmodel prepare "$(RUN)"
	@$(PY) -m bigmodel launch local "$(RUN)" --ranks $(RANKS) $(foreach one,$(SET),--set '$(one)')

train-seq2seq:
	@$(MAKE) --no-print-directory train RUN=configs/seq2seq.toml

finetune: .venv/installed
	@$(PY) -c 'import sklearn' 2>/dev/null || $(INSTALL) --editable '.[finetune]'
	@$(PY) -m tools.finetune --ranks $(RANKS)

# The first comment line of a file of variants is its command.
ablations: .venv/installed
	@for file in benchmarks/ablations/*.toml; do \
		run=$$(sed -n '1s/.*tools\.ablate \([^ ]*\).*/\1/p' $$file); \
		$(PY) -m tools.ablate $$run --variants $$file --seeds $(SEEDS) \
			--out runs/ablations/$$(basename $$file .toml) || failed=1; \
	done; exit $${failed:-0}

test: .venv/installed-dev
	@$(PY) -m pytest $(if $(TESTS),$(TESTS),--numprocesses 2 --dist loadfile)

test-long: .venv/installed-dev
	@$(PY) -m pytest -m long $(TESTS)

check: .venv/installed-dev
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(PY) -m pytest --quiet $(QUICK_TESTS)

torture: .venv/installed-dev
	@$(PY) -m tools.torture

soak: .venv/installed-dev
	@$(PY) -m tools.soak --minutes $(MINUTES) --seed $(SEED)

exactness: .venv/installed-dev
	@$(PY) -m tools.exactness

monitor: .venv/installed
	@$(PY) -m tools.monitor "$(RUN)"

docs: .venv/installed
	@$(INSTALL) --editable '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo 'site/index.html'

format: .venv/installed-dev
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find kernels launcher bigmodel tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
