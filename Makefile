# Every target sets up what it needs. Variables: make test PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
VENV_TRL ?= .venv-trl
VENV_WHEEL ?= .venv-wheel
# Where torch comes from; empty means pip's own index.
TORCH_INDEX ?=

PIP_TORCH = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
SELECTED = tests/ops tests/losses tests/models tests/rollout tests/tracking tests/trainers
# Two workers share the machine, so each test process computes with one thread; demo and bench take all cores.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: venv demo test test-slow test-oldest test-newest test-portable check format bench docs wheel-test clean

venv: $(VENV)/.ready

# $(call environment,DIRECTORY,CONSTRAINTS,WHAT TO INSTALL): torch first, from its own index, then the rest
define environment
	$(PYTHON) -c 'import sys; sys.exit("posttrain needs Python 3.10 or newer: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q -c $(2) $(PIP_TORCH)
	$(1)/bin/python -m pip install -q -c $(2) $(3)
	touch $(1)/.ready
endef

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt,-e '.[dev]')

$(VENV_OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(call environment,$(VENV_OLDEST),constraints-oldest.txt,-e '.[dev]')

$(VENV_TRL)/.ready: constraints.txt
	$(call environment,$(VENV_TRL),constraints.txt,trl==1.16.0 peft psutil)

demo: $(VENV)/.ready
	$(VENV)/bin/posttrain demo
	@echo 'posttrain is in $(VENV)/bin; on your path it is after:  source $(VENV)/bin/activate'

test: $(VENV)/.ready
	$(PYTEST) $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/.ready
	$(PYTEST) $(VENV)/bin/python -m pytest -q -m "slow and not gpu"

test-oldest: $(VENV_OLDEST)/.ready
	$(PYTEST) $(VENV_OLDEST)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not long" $(wildcard $(SELECTED))

# With whatever is newest on the index, constraints aside: made anew at every call.
test-newest:
	rm -rf $(VENV_NEWEST)
	$(PYTHON) -m venv $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python -m pip install -q $(PIP_TORCH)
	$(VENV_NEWEST)/bin/python -m pip install -q --upgrade -e '.[dev]'
	$(PYTEST) $(VENV_NEWEST)/bin/python -m pytest -q -n 2 --dist worksteal

# What must hold on every system, in the Python that is active: also on Windows, where an environment has no bin.
PORTABLE = tests/test_platforms.py tests/test_io.py tests/test_floors.py tests/cli/test_strange_text.py tests/cli/test_recipe.py tests/cli/test_values.py \
	tests/tracking tests/watch tests/losses tests/data tests/trainers/test_settings.py tests/trainers/test_sft.py tests/trainers/test_grpo_step.py
test-portable:
	$(PYTHON) -m pip install -q -c constraints.txt $(PIP_TORCH)
	$(PYTHON) -m pip install -q -c constraints.txt -e '.[dev]'
	$(PYTEST) $(PYTHON) -m pytest -q -m "not slow and not gpu and not long and not browser" $(PORTABLE)

check: $(VENV)/.ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# The site, from docs/*.md and docstrings, in build/docs: no network once its libraries are there. Fails for a link that leads nowhere.
PUBLIC = posttrain $(addprefix posttrain., types methods evaluate evaluation policy export memory data.formats data.convert data.mixture losses.policy losses.preference losses.sft ops)
docs: $(VENV)/.ready
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(VENV)/bin/python -m mkdocs build --strict --quiet
	$(VENV)/bin/pdoc $(PUBLIC) -o build/docs/reference
	$(VENV)/bin/python docs/links.py build/docs

bench: $(VENV)/.ready $(VENV_TRL)/.ready
	$(VENV)/bin/python benchmarks/grpo_vs_trl.py --trl-python $(VENV_TRL)/bin/python
	$(VENV)/bin/python benchmarks/dpo_vs_trl.py --trl-python $(VENV_TRL)/bin/python
	$(VENV)/bin/python benchmarks/sft_vs_trl.py --trl-python $(VENV_TRL)/bin/python
	$(VENV)/bin/python benchmarks/demo.py
	$(VENV)/bin/python benchmarks/controls.py
	$(VENV)/bin/python benchmarks/readme.py

# The built wheel, alone in a clean environment and outside the source tree.
wheel-test: $(VENV)/.ready
	rm -rf dist build $(VENV_WHEEL)
	$(VENV)/bin/python -m pip wheel -q --no-deps -w dist .
	$(call environment,$(VENV_WHEEL),constraints.txt,dist/posttrain-*.whl)
	cd / && $(abspath $(VENV_WHEEL))/bin/python -c 'import posttrain; assert "site-packages" in posttrain.__file__, posttrain.__file__; print(posttrain.__version__)'
	cd / && $(abspath $(VENV_WHEEL))/bin/posttrain --help > /dev/null
	printf '{"question": "What is 2 + %d?", "answer": "#### %d"}\n' 1 3 2 4 3 5 4 6 > $(VENV_WHEEL)/rows.jsonl
	cd $(VENV_WHEEL) && bin/posttrain grpo gsm8k-tiny --data.train=rows.jsonl --train.max_steps=1 --train.max_completion_length=16 --train.output_dir=run
	test -s $(VENV_WHEEL)/run/run.sqlite

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache
