# `make demo` and `make test` work on a fresh clone: each makes .venv, installs what it needs and builds the kernels.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(shell find csrc -type f)
PIP := $(PY) -m pip --disable-pip-version-check
RUN := bench/out/latest.json

export PATH := $(abspath $(VENV))/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-slow bench gpu gpu-static lint sanitize docs wheel release-check clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(PY)  ## make .venv, with PYTHON (default python3)
$(PY):
	$(PYTHON) -m venv $(VENV)

# The package is installed without its kernels, which the next rule builds in place, and only what changed of them.
$(INSTALLED): $(PY) pyproject.toml
	$(PIP) install torch torchvision "setuptools>=77" ninja
	KAFOPS_BUILD_CPU=0 KAFOPS_BUILD_CUDA=0 $(PIP) install --quiet --no-build-isolation -e ".[models,attacks,test,bench,lint,docs]"
	@touch $@

build: $(BUILT)  ## install torch and all else that is needed into .venv, and build the kernels in place
$(BUILT): $(INSTALLED) setup.py $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -c "import kafops, torch; print('kafops:', kafops.backends.explain(torch.empty(1)))"
	@touch $@

demo: build  ## train, attack and compare three small networks, and write runs/demo/report.html
	$(PY) -m models demo $(ARGS)

test: build  ## run the tests, two files at a time (ARGS="-k name" for some)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: build  ## run the tests that need many GB or many minutes
	$(PY) -m pytest -m slow $(ARGS)

bench: build  ## time every row of the table and write bench/results (ARGS=--quick to try it)
	@mkdir -p $(dir $(RUN))
	$(PY) -m pytest bench --benchmark-json=$(RUN) --benchmark-columns=median,iqr,rounds $(ARGS)
	$(PY) -m bench.report $(RUN)

gpu: build  ## on a CUDA device: test, time, write bench/results, in 8 minutes (ARGS=--quick: in 3)
	$(PY) -m bench.gpu $(ARGS)

gpu-static: $(INSTALLED)  ## compile all GPU kernels and check their machine code, without a GPU
	$(PY) -m bench.gpu_static $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

sanitize: $(INSTALLED)  ## run the kernels' tests under AddressSanitizer and UBSan
	tests/sanitize.sh $(PY) $(ARGS)

docs: build  ## build the documentation, build/site/index.html, and run its examples; needs no network
	$(PY) -m sphinx -W --keep-going -q -b doctest -c docs . build/doctest
	$(PY) -m sphinx -W --keep-going -q -b html -c docs . build/site
	@cp docs/site.html build/site/index.html
	@echo "the documentation: build/site/index.html"

wheel: build  ## build dist/*.whl and the source distribution
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PY) setup.py --quiet sdist
	@ls -l dist

release-check: build  ## build what a release publishes, and install it in fresh environments (Python 3.10 and 3.13)
	$(PIP) install --quiet "build>=1.2" "twine>=6"
	tests/release.sh $(PY)

clean:  ## remove what was built, .venv too
	rm -rf build dist *.egg-info $(VENV) bench/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f kafops/*.so
