# make demo: install and run the quickstart    make test: install and run every test
# make lowest: what touches the libraries most, with the oldest versions of them that pyproject.toml allows
# make mutants: takes each wait for a copy out of the product in turn; the simulated GPU must find it
# make bench: speed and memory beside other trainers; make bench ARGS="--list" names the cases
# make table: plans popular bases on common cards anew: the table in README.md and a recipe for each; some minutes
# make gpu-suite: everything that needs a GPU, in stages; see tests/benchmarks/gpu_suite/command.py
# make offline-wheels: what a GPU machine without a network may lack, into build/wheels, to be taken there
# Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NUM_WORKERS ?= 2
CONSTRAINTS := constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

LOWEST := build/lowest-versions.txt
LOWEST_TESTS := tests/test_recipe.py tests/test_recipe_yaml.py tests/test_wheel.py tests/files tests/data \
  tests/adapter tests/quant/test_quantize.py tests/walk/test_optimizer.py tests/model/test_probe.py \
  tests/weights/test_bitsandbytes_checkpoint.py tests/parity/test_families.py tests/parity/test_peft.py \
  tests/runs/test_resume.py tests/runs/test_sources_in_runs.py tests/export/test_merge.py \
  tests/train/test_launch.py tests/plan/test_request.py tests/plan/test_report.py

# gpu-suite takes the wheels, where they are, beside what PYTHON has; else it makes .venv like the others.
WHEELS := build/wheels
SITE := build/gpu-site
OUT := build/gpu-suite
SUITE := -m benchmarks.gpu_suite --out $(OUT) $(if $(ONLY),--only $(ONLY)) \
  $(if $(AGAIN),--again) $(if $(STOP_AFTER),--stop-after $(STOP_AFTER)) $(if $(DRY),--dry)

.DELETE_ON_ERROR:
.PHONY: demo test lowest mutants lint clean bench table gpu-suite offline-wheels

demo: $(VENV)/.installed
	$(BIN)/python recipes/quickstart/demo.py

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(NUM_WORKERS) $(TESTS)

lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=$(LOWEST) TESTS="$(LOWEST_TESTS)"

mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/simulated_runs/test_mutants.py -v

bench: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(ARGS)

table: $(VENV)/.installed-dev
	$(BIN)/python .ci/card_table.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ifeq ($(wildcard $(WHEELS)/*.whl),)
gpu-suite: $(VENV)/.installed-dev
	PYTHONPATH=tests $(BIN)/python $(SUITE)
else
gpu-suite: $(SITE)/.installed
	PATH="$(CURDIR)/$(SITE)/bin:$$PATH" PYTHONPATH="$(CURDIR):$(CURDIR)/tests:$(CURDIR)/$(SITE)" \
	  $(PYTHON) $(SUITE) --commit "$$(cat $(WHEELS)/COMMIT)"
endif

offline-wheels: $(VENV)/.created
	$(BIN)/python .ci/offline_wheels.py $(WHEELS)

clean:
	rm -rf $(VENV) .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is made last: an install that was interrupted starts again.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@

$(LOWEST): pyproject.toml constraints.txt .ci/lowest_versions.py | $(VENV)/.created
	mkdir -p build
	$(BIN)/python .ci/lowest_versions.py > $@

$(SITE)/.installed: $(wildcard $(WHEELS)/*.whl)
	rm -rf $(SITE)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
	  --target $(SITE) $^
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or later is needed, and $(PYTHON) is not that: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
