# Enough for most: make demo, make slurm-demo, make test. Each sets up what is missing and can be run again at any time.
VENV ?= .venv
PYTHON := $(VENV)/bin/python

.PHONY: help setup setup-slurm setup-test demo slurm-demo test test-all lint types clean-demo

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## virtual environment with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt .ci/setup
	@.ci/setup $(VENV)

setup-slurm: setup
	@.ci/setup-system $(VENV) slurm

setup-test: setup  ## what the tests need besides: DeepSpeed, Slurm, ffcv and its system packages (apt-get, where permitted)
	@.ci/setup-system $(VENV)

demo: setup  ## prepare the digits, train with an interruption, evaluate, export, say what came out
	@$(PYTHON) -m launch.demo

slurm-demo: setup-slurm  ## a Slurm of four nodes on this machine: submit, preempt, kill a rank, watch the run finish
	@$(PYTHON) -m launch.slurm_demo

test: setup-test lint types  ## lint, types, and every test this machine can run
	@$(PYTHON) -m pytest

test-all: setup-test lint types  ## the same, with every combination of the exactness matrix: hours
	@DGT_FULL_MATRIX=1 $(PYTHON) -m pytest

lint: setup  ## ruff: rules and format
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .

types: setup  ## mypy over the public packages, and over what runs on the nodes
	@$(PYTHON) -m mypy
	@$(PYTHON) -m mypy --explicit-package-bases slurm

clean-demo:  ## forget the demo's run, so that it starts over
	rm -rf runs/dgt_nano_digits exports/dgt_nano_digits.safetensors
