# make demo    set up .venv, draw one prompt with several attentions, say where the picture is
# make test    set up .venv, then everything `make check` and `make gate` do
# make check   formatter, linter, types, tests: with VENV's tools, no set-up
# make gate    compile the Triton kernels for GPUs of both makers and judge the binaries
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out
# Worker processes of the tests and of the gate.
JOBS   ?= 2

.PHONY: demo test check gate clean

demo: $(VENV)/.demo-installed
	$(BIN)/vision-attn compare --out $(OUT)

test: $(VENV)/.test-installed
	$(MAKE) check gate

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS)

gate:
	$(BIN)/python -m vision_attn.kernels.aot --gate --processes $(JOBS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[diffusers]"
	touch $@

$(VENV)/.test-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
