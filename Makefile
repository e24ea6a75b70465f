# Every target makes .venv on first use. `make PYTHON=python3.12 test` chooses the interpreter for that.
# `make BENCH=--resume bench` goes on with a benchmark that was stopped.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

.PHONY: help demo study test lint bench triton suite suite-sources

help:
	@echo "make demo    per-token plasticity study of the bundled checkpoint -> results/demo"
	@echo "make study   the plasticity study of the bundled checkpoints, controls and verdicts, 20 minutes -> results/study"
	@echo "make test    all tests but the slow ones (those: .venv/bin/python -m pytest -m slow)"
	@echo "make lint    ruff check, ruff format --check"
	@echo "make bench   time the models against a plain loop and their peers, 15 minutes -> docs/benchmarks.md"
	@echo "make triton  install Triton if there is none and test the GPU kernels without a GPU: interpreted, and compiled"
	@echo "make suite   run the model tests of Transformers on TTT models, the slow ones too; gets their sources first"

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=... chooses another" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): this takes minutes the first time."
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt -e '.[dev]' \
		| awk '/Downloading .*(MB|GB)|^Installing/ { print substr($$0, 1, 100); fflush() }'
	@touch $@

demo: $(READY)
	@$(BIN)/python scripts/run_inference.py --model model_cards/ttt-linear-tiny --dataset_type pydoc --max_steps 24 \
		--freeze all --freeze 0-1 --freeze 2-3 --exp_dir results --exp_name demo --overwrite
	@$(BIN)/python scripts/check_results.py results/demo
	@$(BIN)/python scripts/plot_results.py results/demo

# Goes on where it stopped. `make STUDY="--text a.txt --text b.txt --exp_name novels" study` reads other texts.
study: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m accelerate.commands.launch --config_file scripts/configs/two_cpu.yaml \
		scripts/study.py --processes 2 --setting small $(STUDY)

test: $(READY)
	@$(BIN)/python -m pytest -q

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

bench: $(READY)
	@$(BIN)/python -m benchmarks.run $(BENCH)
	@$(BIN)/python -m benchmarks.make_table

# A version whose compiled kernels tests/modeling_ttt/triton_baselines describes; PyTorch for CUDA brings its own.
triton: $(READY)
	@$(BIN)/python -c 'import triton' 2> /dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -q triton==3.7.1
	@$(BIN)/python -m pytest -q tests/modeling_ttt/test_scan_triton.py

suite-sources: $(READY)
	@$(BIN)/python tests/transformers_suite/fetch.py

suite: suite-sources
	@$(BIN)/python -m pytest -q -rs -m "slow or not slow" tests/transformers_suite
