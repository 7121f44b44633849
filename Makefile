# Every target builds its own .venv from nothing; on Linux with MLX's CPU backend, on a Mac with Metal's.
PYTHON ?= python3
BIN := .venv/bin
BACKEND := $(if $(filter Darwin,$(shell uname -s)),,cpu)
comma := ,
extras = $(if $(strip $(BACKEND)$(1)),[$(subst $() $(),$(comma),$(strip $(BACKEND) $(1)))])

.PHONY: demo test slow metal tune hostile kills lint parity peers docs docs-options docs-output clean

# The main job, offline: calibrate -> quantize -> generate -> bench on the shipped model and bytes.
demo: .venv/demo
	PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/demo.sh

test: .venv/dev
	$(BIN)/python -m pytest -n 2 -m "not slow and not peers"

# Checks of more than a minute; MARLIN_HELDOUT names a folder of held-out bytes for the quality ones.
slow: .venv/dev
	$(BIN)/python -m pytest -m slow

# Every Metal kernel in the emulator, all variants and checks (Debian: clang-19, libclang-rt-19-dev).
metal: .venv/dev
	$(BIN)/python -m pytest -n 2 tests/metal

# 6,000 damaged and hostile inputs, 3 seeds; what became of each kind goes into docs/hostile.md.
hostile: .venv/dev
	$(BIN)/python -m tests.hostile.run --inputs 2000 --seeds 1 2 3 --workers 2 --table docs/hostile.md

# 200 kills over the whole run of each command that writes, two runs on one output, a full disk.
kills: .venv/dev
	$(BIN)/python -m tests.hostile.kills --kills 200 --table docs/hostile.md

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Which way of multiplying packed weights is the fastest on this machine: measured in a minute or two, kept beside the kernels.
tune: .venv/demo
	$(BIN)/python -m marlin_cli.ops.tune

# The same numbers as the implementations that checkpoints come from.
parity: .venv/peers
	$(BIN)/python -m pytest -m peers

# Speeds beside other packages, as the table of docs/results.md; a stopped run goes on, and `rm peers.jsonl` begins a new one.
peers: .venv/peers
	$(BIN)/python benchmarks/peers.py --results peers.jsonl --markdown docs/results.md

# The documentation as a site in build/docs; its pages ask no other server for anything.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tables of options and fields, and the picture of the house, from the code.
docs-options: .venv/dev
	$(BIN)/python -m tools.options
	$(BIN)/python -m tools.fields
	$(BIN)/python -m tools.house

# Runs the commands of README and docs, and writes what they say below them (3 minutes of one core); read the difference.
docs-output: .venv/peers
	$(BIN)/python -m tools.outputs

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".$(call extras)"
	touch $@

.venv/dev: .venv/demo
	$(BIN)/python -m pip install --quiet --editable ".$(call extras,dev)"
	touch $@

# torch comes first, at a version that has a CPU build: a plain `torch` brings gigabytes of CUDA.
.venv/peers: .venv/dev
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".$(call extras,dev peers)"
	touch $@

.venv/docs: .venv/demo
	$(BIN)/python -m pip install --quiet --editable ".$(call extras,docs)"
	touch $@

clean:
	rm -rf .venv demo-output build
