# `make` lists the targets. Everything installs into .venv; `make TARGET PYTHON=python` uses the active environment
# (conda, say) instead and installs nothing.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# How long threads spin before they sleep (GNU OpenMP). Its own choice, milliseconds, brings training on a CPU to a crawl
# as soon as another process wants a core; no spinning takes 1.26 times as long on an idle machine, this 1.08 times.
export GOMP_SPINCOUNT ?= 5000
# Freed memory stays with the process, in large pages (GNU C library): else a CPU spends a tenth of its time on having
# fresh pages cleared for every large tensor.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592

BASE_PYTHON ?= python3
# constraints.txt holds versions that were tested together. LATEST=1 takes the newest that requirements.txt allows
# instead, in an environment of its own: `make test LATEST=1`.
LATEST ?=
VENV := $(if $(LATEST),.venv-latest,.venv)
CONSTRAINTS := $(if $(LATEST),,--constraint constraints.txt)
ifeq ($(origin PYTHON),command line)
READY :=
else
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

# Quickstart: simulated pairs, or DATA=FOLDER in any layout that training takes. Each has its own folder (name and a checksum of
# the whole path), so that none mixes with another's run.
DATA ?=
QUOTED_DATA = '$(subst ','\'',$(value DATA))'
NAME_OF_DATA = $(shell basename -- $(QUOTED_DATA) | tr -c 'A-Za-z0-9._\n-' '_')-$(shell realpath -- $(QUOTED_DATA) | cksum | cut -c 1-4)
QUICKSTART := quickstart/$(if $(value DATA),$(NAME_OF_DATA),simulated)

.PHONY: help constraints test-lowest lint format test test-slow bench quickstart quickstart-data clean-quickstart .venv

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.][a-z.-]*:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.venv: $(READY)  ## environment with everything in requirements-dev.txt (LATEST=1: newest versions, in .venv-latest)

$(VENV)/.installed: requirements.txt requirements-dev.txt $(if $(LATEST),,constraints.txt)
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(BASE_PYTHON) is $$($(BASE_PYTHON) --version 2>&1 || true). Name another: make BASE_PYTHON=python3.12 .venv" >&2; \
	  exit 2; }
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt $(CONSTRAINTS)
	touch $@

constraints:  ## install the newest versions, run every test, then write them to constraints.txt
	rm -rf .venv-latest
	$(MAKE) LATEST=1 lint test-slow
	.venv-latest/bin/python -m pip freeze | sort --ignore-case > constraints.txt

# The oldest versions that are allowed, in an environment of its own: `make test-lowest LOWEST=FOLDER` puts it elsewhere.
# No test needs pre-commit, and pip would fetch a hundred versions of virtualenv to find one for it.
LOWEST ?= .venv-lowest
$(LOWEST)/.installed: requirements.txt requirements-dev.txt
	$(BASE_PYTHON) -m venv --clear $(LOWEST)
	sed -n '/^pre-commit/d; s/>=/==/p' $^ > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/python -m pip install --quiet -r $(LOWEST)/requirements.txt
	touch $@

test-lowest: $(LOWEST)/.installed  ## the fast tests with just the lower bounds of both requirements files
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(FAST_TESTS)

lint: $(READY)  ## ruff, codespell and mypy; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m codespell_lib
	$(PYTHON) -m mypy

format: $(READY)  ## ruff writes its fixes and the layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# One process for each core, one thread each: tests wait for starting commands more than for arithmetic.
FAST_TESTS = -m pytest -q -m "not slow and not gpu" --numprocesses auto --maxprocesses 8 --dist worksteal
test: $(READY)  ## the tests that run anywhere in minutes, on all cores
	OMP_NUM_THREADS=1 $(PYTHON) $(FAST_TESTS)

PRESET ?= cpu
bench: $(READY)  ## speed beside the way of SiT, minutes on an idle machine (PRESET=cpu or gpu); writes bench/
	$(PYTHON) benchmarks/bench.py --preset $(PRESET) --output bench/$(PRESET)

test-slow: $(READY)  ## every test; those that need a GPU skip without one
	$(PYTHON) -m pytest -q

# --- quickstart ------------------------------------------------------------------------------------------------------
# $(QUICKSTART)/train and $(QUICKSTART)/heldout each hold images/ and masks/, with simulated data instances/, too. Both
# ways of filling them may be repeated.

SIMULATE = $(PYTHON) make_masks.py simulate --render --image-size 128 --cell-size 20

quickstart-data: $(READY)
ifeq ($(value DATA),)
	$(SIMULATE) --output $(QUICKSTART)/train --count 240 --seed 0
	$(SIMULATE) --output $(QUICKSTART)/heldout --count 40 --seed 1
else
	@$(PYTHON) -m dataset.hold_out -- $(QUOTED_DATA) $(QUICKSTART)
endif

# A tiny model on pixels: no download, and minutes on a CPU. More STEPS give better images. Gray images of your own train
# better with CHANNELS=1.
STEPS ?= 800
CHANNELS ?= $(if $(value DATA),3,1)
# Simulated masks hold one id per cell, so that touching cells stay apart in the images and in their labels.
MASKS = $(if $(value DATA),masks,instances)
MASK_FLAGS = $(if $(value DATA),,--mask-type instances --num-classes 3)
RUN = $(QUICKSTART)/run-$(STEPS)
SAMPLES = $(QUICKSTART)/samples-$(STEPS)

quickstart: quickstart-data  ## data, training, samples, one number and one picture in about five minutes (DATA=FOLDER)
	$(PYTHON) train.py --preset quickstart --data-path $(QUICKSTART)/train/images --mask-path $(QUICKSTART)/train/$(MASKS) \
	  $(MASK_FLAGS) --in-channels $(CHANNELS) --max-steps $(STEPS) --sample-every 200 --ckpt-every 200 --log-every 20 \
	  --results-dir $(QUICKSTART) --run-name $(notdir $(RUN))
	$(PYTHON) sample_ddp.py ODE --ckpt $(RUN)/checkpoints/$$(printf %07d $(STEPS)).pt \
	  --data-path $(QUICKSTART)/heldout/images --mask-path $(QUICKSTART)/heldout/$(MASKS) --sample-dir $(SAMPLES)
	$(PYTHON) evaluate.py threshold $(SAMPLES)
	@echo "Look at $(SAMPLES)/contact_sheet.png: masks, synthetic images, real images."

clean-quickstart:  ## forget the quickstart's data, run and samples
	rm -rf quickstart
