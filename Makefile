# The whole ritual, the same here and in .ci/run. Needs Python 3.11 or newer and make; everything else goes into $(VENV).

VENV ?= .venv
COMPILERS ?= .venv-compilers
INTEGRATIONS ?= .venv-integrations
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do \
	$$p -c pass 2>/dev/null && echo $$p && exit; done; echo python3)
PHOTO ?= sparsevlm_jax/data/china.jpg
QUESTION ?= What is in the image?
REAL_MODEL ?= llava-hf/llava-1.5-7b-hf
ARGS ?=
# Seconds of CPU time that a default test may take; more where the machine is slow.
CPU_LIMIT ?= 10

.PHONY: help demo test test-all test-compilers test-integrations lint real clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make demo   ask the embedded model about three images, dense and pruned'
	@echo 'make test   run a short test suite (ARGS="-k name" goes to pytest)'
	@echo 'make test-all  run all of them'
	@echo 'make test-compilers  compile 7B models for an H100 and a TPU v5e (some gigabytes in $(COMPILERS); minutes)'
	@echo 'make test-integrations  lmms-eval and Ray (some gigabytes in $(INTEGRATIONS); minutes)'
	@echo 'make lint   ruff and pyright'
	@echo 'make real   ask $(REAL_MODEL) (downloads about 14 GB, needs as much memory)'
	@echo 'make clean  remove $(VENV), $(COMPILERS), $(INTEGRATIONS), caches and builds'

demo: $(VENV)/.installed
	$(VENV)/bin/sparsevlm demo $(ARGS)

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup --cpu-limit $(CPU_LIMIT) $(ARGS)

test-all: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadgroup -m "not exhaustive and not compilers" $(ARGS)

# In an environment of its own: with XLA's compilers for accelerators, without PyTorch. Not part of .ci/run.
test-compilers:
	@if $(MAKE) --no-print-directory $(COMPILERS)/.installed; then \
		JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 TPU_SKIP_MDS_QUERY=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
		$(COMPILERS)/bin/python -m pytest -m compilers -rs tests/test_compilers.py $(ARGS); \
	else echo 'skipped: $(COMPILERS) could not be made (the reason is above)'; fi

# Likewise: lmms-eval pins packages of its own. Elsewhere these tests are skipped.
test-integrations:
	@if $(MAKE) --no-print-directory $(INTEGRATIONS)/.installed; then \
		$(INTEGRATIONS)/bin/python -m pytest -rs tests/integrations $(ARGS); \
	else echo 'skipped: $(INTEGRATIONS) could not be made (the reason is above)'; fi

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

real: $(VENV)/.installed
	$(VENV)/bin/sparsevlm ask --model $(REAL_MODEL) --image $(PHOTO) --question "$(QUESTION)" $(ARGS)

clean:
	rm -rf $(VENV) $(COMPILERS) $(INTEGRATIONS) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is installed again only when pyproject.toml has changed. Editable, so that the checkout is what runs.
$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is not: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.created
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(VENV)/bin/python -m pip install --quiet --editable ".[$*]"
	@touch $@

$(COMPILERS)/.installed: pyproject.toml
	"$(PYTHON)" -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --editable ".[cuda12,tpu]" "pytest>=8.3,<9.2" hypothesis beartype psutil "pytest-xdist>=3.6"
	@touch $@

# It brings a torchvision for NVIDIA; beside a torch for CPUs that cannot be imported, and transformers would try to.
$(INTEGRATIONS)/.installed: pyproject.toml
	"$(PYTHON)" -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --editable ".[test,lmms-eval,ray]"
	@$(INTEGRATIONS)/bin/python -c 'import torchvision' 2>/dev/null || \
		$(INTEGRATIONS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
