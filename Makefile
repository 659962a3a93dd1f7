# make demo, make test: from a fresh clone to pictures, to a tested package. `make help` lists all.
#
#   PYTHON=python3.12           the interpreter that makes .venv (default: python3)
#   FASTLORA_CUDA=on|off|auto   CUDA kernels (default: auto, where nvcc is found)
#   FASTLORA_CUDA_ARCHS=90      GPUs to compile for (default: the ones here, else all generations)
#   ARGS="..."                  further arguments of the program that a target runs
PYTHON ?= python3
ARGS ?=
python := .venv/bin/python
cpp := find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: help environment demo test bench gpu sanitize cuda-check lint format doctor lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

environment:  ## make or update .venv: pinned packages, fastlora built in place
	@"$(PYTHON)" tools/environment.py .venv

demo: environment  ## train, sample, verify, time; writes out/report.html
	@.venv/bin/fastlora demo $(ARGS)

test: environment  ## the whole test suite
	@$(python) -m pytest $(ARGS)

bench: environment  ## the benchmarks and the table of comparisons
	@$(python) -m bench $(ARGS)

gpu:  ## on a machine with an NVIDIA GPU: build, test, benchmark, write bench/results (ONLY=fold)
	@"$(PYTHON)" tools/gpu.py $(if $(ONLY),--only $(ONLY)) $(ARGS)

sanitize: environment  ## loops and emulated kernels under AddressSanitizer and UBSan
	@$(python) tools/sanitize.py $(ARGS)

cuda-check:  ## compile the CUDA kernels for all GPUs; registers, shared memory, spills
	@"$(PYTHON)" tools/cuda_check.py $(ARGS)

doctor: environment  ## what was built, what is missing
	@.venv/bin/fastlora doctor $(ARGS)

lint:  ## ruff, clang-format, pyright
	@"$(PYTHON)" tools/environment.py .venv lint
	@status=0; \
	$(python) -m ruff check . || status=1; \
	$(python) -m ruff format --check . || status=1; \
	$(cpp) | xargs .venv/bin/clang-format --dry-run --Werror || status=1; \
	$(python) -m pyright || status=1; \
	exit $$status

format:  ## rewrite the sources in the style that `make lint` checks
	@"$(PYTHON)" tools/environment.py .venv lint
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .
	@$(cpp) | xargs .venv/bin/clang-format -i

lock: environment  ## pin what requirements/*.in name (needs uv on the PATH)
	@cd requirements && for name in main lint; do \
	  uv pip compile -q --universal --python-version 3.10 --no-header --no-annotate $$name.in \
	    | grep -vE '^(nvidia|cuda|triton)' > $$name.new && mv $$name.new $$name.txt || exit 1; done

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist out .pytest_cache .ruff_cache .hypothesis .benchmarks fastlora.egg-info fastlora/_*.so
