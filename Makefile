# `make test` from a clean checkout needs Python 3.11 or later and nothing else: the environment, .venv, is made
# here. Where a Python 3.12 is found, .venv312 holds the newest JAX and the Pallas tests run there too.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env site demo test test-versions test-compile test-gpu test-multi-gpu lint hub bench clean

# test-gpu and bench run in an environment that is already there: the one with the CUDA builds of torch and jax.
PYTHON ?= python3
# Nothing is byte-compiled beforehand: an import does that for what it needs.
PIP_INSTALL := -m pip install --no-compile --quiet --disable-pip-version-check --no-input
on_gpu := PYTHONPATH=. XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON)

# $(call find_python,CANDIDATES,CONDITION): prints the first one that really runs, can make an environment, and fits.
find_python = for p in $(1); do \
  if "$$p" -c 'import ensurepip, sys, venv; sys.exit(not ($(2)))' >/dev/null 2>&1; then echo "$$p"; break; fi; done
# $(call install,VENV,CONSTRAINTS,EXTRAS): the same command again changes nothing.
install = $(1)/bin/python $(PIP_INSTALL) --constraint $(2) setuptools && \
  $(1)/bin/python $(PIP_INSTALL) --constraint $(2) --no-build-isolation --editable '.[$(3)]'

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: ## make or update the environments
	@$(MAKE) --silent --jobs=2 .venv/.installed .venv312/.installed

.venv/.installed: pyproject.toml requirements/cpu-jax-0.10.txt requirements/jax-models.txt
	@if ! .venv/bin/python -c '' 2>/dev/null; then \
	  python="$$($(call find_python,python3.11 python3 python3.12 python3.13,sys.version_info >= (3$(comma) 11)))"; \
	  if [ -z "$$python" ]; then echo "make: expected Python 3.11 or later with venv on PATH, found none" >&2; exit 1; fi; \
	  echo "making .venv with $$("$$python" --version)"; "$$python" -m venv .venv; fi
	@echo "installing into .venv (requirements/cpu-jax-0.10.txt)"
	@$(call install,.venv,requirements/cpu-jax-0.10.txt,triton$(comma)pallas$(comma)flax$(comma)equinox$(comma)test$(comma)models$(comma)bench$(comma)lint$(comma)docs)
	@.venv/bin/python $(PIP_INSTALL) --no-deps --requirement requirements/jax-models.txt
	@touch $@

# Never fails for want of an interpreter: the newest JAX is an addition. Its packages are unpacked while those of .venv
# are, each at the version of the list; the checkout itself is installed by one pip at a time.
.venv312/.packages: requirements/cpu-jax-0.12.txt requirements/jax-models-3.12.txt
	@if ! .venv312/bin/python -c '' 2>/dev/null; then \
	  python="$$($(call find_python,python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12,sys.version_info[:2] == (3$(comma) 12)))"; \
	  if [ -z "$$python" ]; then echo "no Python 3.12 found: the Pallas tests run under one JAX only"; exit; fi; \
	  echo "making .venv312 with $$("$$python" --version)"; "$$python" -m venv .venv312; fi; \
	echo "installing into .venv312 (requirements/cpu-jax-0.12.txt)"; \
	.venv312/bin/python $(PIP_INSTALL) --no-deps $(addprefix --requirement ,$^); touch $@

.venv312/.installed: pyproject.toml .venv312/.packages .venv/.installed
	@if [ -e .venv312/.packages ]; then \
	  $(call install,.venv312,requirements/cpu-jax-0.12.txt,pallas$(comma)flax$(comma)equinox$(comma)test) && touch $@; fi

comma := ,

demo: .venv/.installed ## the same serving batches through Triton, Pallas and the oracle
	.venv/bin/python -m oracle demo

test: env ## the whole suite on a CPU; ONLY="core triton" for some of it
	.venv/bin/python tests/run_groups.py $(ONLY)

test-gpu: ## the tests marked gpu, with PYTHON=the interpreter that holds the CUDA builds
	$(on_gpu) tests/run_groups.py --gpu $(ONLY)

test-multi-gpu: ## sharded runs on two or more GPUs, one process and one communicator a GPU
	NCCL_NVLS_ENABLE=0 $(on_gpu) -m pytest --gpu tests/triton/test_multi_gpu.py
	NCCL_NVLS_ENABLE=0 $(on_gpu) -m pytest --gpu tests/pallas/test_multi_gpu.py

.venv-cuda/.installed: requirements/cuda-compile.txt
	@python="$$($(call find_python,python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3.12,sys.version_info[:2] == (3$(comma) 12)))"; \
	if [ -z "$$python" ]; then echo "make: expected a Python 3.12, found none" >&2; exit 1; fi; \
	echo "making .venv-cuda with $$("$$python" --version)"; "$$python" -m venv .venv-cuda
	@.venv-cuda/bin/python $(PIP_INSTALL) --constraint $< --requirement $<
	@touch $@

test-compile: .venv-cuda/.installed ## Pallas kernels compiled to machine code for an H100, with no GPU
	PATH="$(CURDIR)/$$(echo .venv-cuda/lib/python3*/site-packages/nvidia/cu13/bin):$$PATH" \
	  .venv-cuda/bin/python -m pytest tests/pallas/test_compile.py tests/pallas/test_compile_backward.py \
	  tests/pallas/test_compile_serving.py

# Triton's wheel alone, laid over .venv: 0.3 GB and a minute. PyTorch likewise, from its index of CPU builds; where that
# is out of reach the torch of .venv stays, since the build on PyPI brings gigabytes of CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
only := $(PIP_INSTALL) --no-deps --only-binary :all:
.versions/%/.installed: requirements/%.txt .venv/.installed
	@rm -rf $(@D) && mkdir -p $(@D)
	@echo "installing into $(@D) ($<)"
	@.venv/bin/python $(only) --target $(@D) "$$(grep ^triton== $<)"
	@.venv/bin/python $(only) --target $(@D) --retries 1 --index-url $(TORCH_CPU_INDEX) "$$(grep ^torch== $<)" 2>/dev/null \
	  || echo "no CPU build of $$(grep ^torch== $<) at $(TORCH_CPU_INDEX): the torch of .venv stays"
	@touch $@

# What depends on the version: the interpreter, the compiler, the launchers, operators.
VERSION_TESTS := launch recall tracing compile compile_serving compile_backward compile_prologue compile_overlap
test-versions: .versions/oldest/.installed .versions/newest/.installed ## the Triton twin's core under the oldest and the newest PyTorch and Triton
	@for pair in oldest newest; do export PYTHONPATH=.versions/$$pair OMP_NUM_THREADS=1; \
	  .venv/bin/python -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'; \
	  TRITON_INTERPRET=1 .venv/bin/python -m oracle run --impl triton_impl.adapter:adapter --device cpu --tier core; \
	  for name in $(VERSION_TESTS); do .venv/bin/python -m pytest -q tests/triton/test_$$name.py; done; done

lint: .venv/.installed ## ruff (rules and format) and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

site: .venv/.installed ## the documentation site, into build/site
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

hub: .venv/.installed ## the layout of the `kernels` hub in build/hub, which transformers loads from that path
	.venv/bin/python -m hub.build build/hub

bench: ## benchmarks, with PYTHON=the interpreter that holds the CUDA builds; BENCH="options"
	$(on_gpu) -m benchmarks.run $(BENCH)

clean: ## remove reports, caches and build output; the environments stay (rm -r .venv .venv312)
	rm -rf reports build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
