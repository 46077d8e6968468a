# `make demo` sets up and trains the embedded default; `make test` sets up and runs the tests.
# Both make .venv and install what they need the first time, and are quiet about it unless it fails.

PYTHON ?= python3
BIN := .venv/bin
RUN := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python

.PHONY: demo test lint clean

demo: .venv/base
	$(RUN) train.py --config=configs/digits.py --workdir=runs/digits
	$(RUN) sample.py --workdir=runs/digits --num_per_class=100
	@echo "Look at runs/digits: samples.png, scales.png, reconstructions.png, curves_*.png"

test: .venv/test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

.venv/base: setup.py
	@$(call install,.)

.venv/test: setup.py
	@$(call install,.[test])

clean:
	rm -rf .venv

# Makes .venv if need be and installs the project with the given extras; shows the log on failure.
define install
	echo "Installing into .venv (a few minutes the first time)"; \
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || exit 1; \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '$(1)' > .venv/install.log 2>&1 \
	  || { cat .venv/install.log; exit 1; }; \
	touch $@
endef
