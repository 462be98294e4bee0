# make demo    the whole pipeline on the embedded data, on two CPU cores
# make test    the whole test suite, two files at a time
# make lint    format, style and types
# make bench   all benchmarks, on two idle cores; bench-quick only shows that they run
# make claims  the paper's claims in miniature, on two idle cores: two hours for all arms, two for the longer schedule,
#              one for single choices
# Each installs what it needs into .venv first; PYTHON names the interpreter to make it from.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: install demo test lint bench bench-quick claims format clean

install: $(VENV)/installed

# torch comes first: mmcv compiles its operators against it (about ten minutes, once; pip keeps the wheel) and leaves
# them out without a word where it is missing, hence the import that proves them. OpenCV comes last and headless: mmdet
# asks for the build that needs a desktop's libraries.
$(VENV)/installed: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  && command -v c++ >/dev/null \
	  || { echo "rmoe needs Python 3.11 or 3.12 with venv and a C++ compiler: apt-get install python3-venv python3-dev g++"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel ninja
	$(PIP) install -c constraints.txt torch torchvision
	MMCV_WITH_OPS=1 $(PIP) install -c constraints.txt --no-build-isolation onedl-mmcv
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --force-reinstall --no-deps opencv-python-headless
	$(VENV)/bin/python -c 'from mmcv.ops import RoIAlign, nms'
	touch $@

demo: install
	$(VENV)/bin/python launch/demo.py --work-dir work_dirs/demo

test: install
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench bench-quick: install
	set -e; for name in layer step training_cost scaling forecast targets; do \
	  $(VENV)/bin/python -m benchmarks.$$name $(if $(findstring quick,$@),--quick); done

claims: install
	$(VENV)/bin/python -m benchmarks.claims
	$(VENV)/bin/python -m benchmarks.claims --part again
	$(VENV)/bin/python -m benchmarks.claims --part long
	$(VENV)/bin/python -m benchmarks.claims --part ablation
	$(VENV)/bin/python -m benchmarks.tables

format: install
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf work_dirs .pytest_cache .mypy_cache .ruff_cache
