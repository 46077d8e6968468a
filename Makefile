# `make demo` sets up and trains the embedded default; `make test` sets up and runs the tests;
# `make check-gpu` compiles what a GPU runs, on a machine that has none; `make docs` builds the site in build/docs.
# Each makes a virtual environment and installs what it needs the first time, quietly unless that fails.
# `make demo LOCKED=1` installs the exact versions of requirements/demo.txt, with their hashes; `make lock` writes it.
# PYTHON=python3.12 chooses another Python; an environment of a different one is removed and made again.
# UV=PATH installs with that uv, in a third of pip's CPU time; pip takes over where uv finds no packages.

PYTHON ?= python3
VENV ?= .venv
GPU_VENV ?= .venv-gpu
DOCS_VENV ?= .venv-docs
TESTS ?= tests
UV ?=
LOCKED ?=
RUN = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/python
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error PYTHON=$(PYTHON) does not run)
endif

# Where it is set, as in containers, every process would compile all it imports from source: 7 s of CPU time each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format check-gpu docs lock clean

demo: $(VENV)/$(if $(LOCKED),locked,base)-$(VERSION)
	$(RUN) train.py --config=configs/digits.py --workdir=runs/digits
	$(RUN) sample.py --workdir=runs/digits --num_per_class=100
	$(RUN) evaluate.py samples --samples=runs/digits/samples.npz --data=digits
	@echo "Look at runs/digits: samples.png, scales.png, reconstructions.png, curves_*.png"

test: $(VENV)/test-$(VERSION) lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/test-$(VERSION)
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy --no-error-summary

format: $(VENV)/test-$(VERSION)
	$(VENV)/bin/ruff check --fix-only --quiet .
	$(VENV)/bin/ruff format .

check-gpu: $(GPU_VENV)/plan-gpu-$(VERSION)
	$(GPU_VENV)/bin/python -m benchmarks.check_gpu

docs: $(DOCS_VENV)/docs-$(VERSION)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

$(VENV)/base-$(VERSION): pyproject.toml setup.py
	@$(call install,$(VENV),-e '.',$@)

$(VENV)/test-$(VERSION): pyproject.toml setup.py
	@$(call install,$(VENV),-e '.[test]',$@)

$(GPU_VENV)/plan-gpu-$(VERSION): pyproject.toml setup.py
	@$(call install,$(GPU_VENV),-e '.[plan-gpu]',$@)

# The extra `docs` alone: mkdocstrings reads the sources, and imports nothing of them.
DOCS_EXTRA = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(DOCS_VENV)/docs-$(VERSION): pyproject.toml
	@$(call install,$(DOCS_VENV),$(shell $(PYTHON) -c '$(DOCS_EXTRA)'),$@)

# The packages first; then var_jax, which is built with the setuptools among them.
$(VENV)/locked-packages-$(VERSION): requirements/demo.txt
	@$(call install,$(VENV),--require-hashes -r requirements/demo.txt,$@)

$(VENV)/locked-$(VERSION): $(VENV)/locked-packages-$(VERSION) pyproject.toml setup.py
	@$(call install,$(VENV),--no-deps --no-build-isolation -e .,$@)

BUILD_REQUIRES = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")
lock:
	$(PYTHON) -c '$(BUILD_REQUIRES)' | $(or $(UV),uv) pip compile --quiet --upgrade --universal \
	  --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command 'make lock' \
	  --output-file requirements/demo.txt pyproject.toml -

clean:
	rm -rf $(VENV) $(GPU_VENV) $(DOCS_VENV)

# install(environment, arguments of pip, stamp): shows the installer's log on failure.
define install
	echo "Installing into $(1) (a few minutes the first time)"; \
	have=$$($(1)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null); \
	test "$$have" = "$(VERSION)" || { rm -rf $(1) && $(PYTHON) -m venv $(1); } || exit 1; \
	{ { test -n "$(UV)" && $(UV) pip install --python $(1)/bin/python $(2); } \
	  || $(1)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile $(2); } \
	  > $(1)/install.log 2>&1 || { cat $(1)/install.log; exit 1; }; \
	touch $(3)
endef
