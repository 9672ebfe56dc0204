# Everything runs in .venv, which `make setup` builds from the versions in constraints.txt. Needs Python 3.11 or newer and make.
.PHONY: setup demo test test-slow check fmt fmt-check lint types shapes bench bench-rewards train-bundled own-fashion
.NOTPARALLEL:

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Threads that spin while they wait make torch up to a hundred times slower on a machine that does something else too.
export OMP_WAIT_POLICY := PASSIVE

# Quick tests through every stage, run once more with every annotated shape checked. Those that hand in wrong shapes on purpose
# have "refuse" in their names, and are left out: the checker would be faster than our own errors.
SHAPE_TESTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,noise preview embedder experts gate accumulator decision \
	calibration bounds certify economic policy scorer trajectory scalar_model scalar_posterior scalar_scorer records calibrate)))

demo: setup ## the main job on the bundled pipeline: pictures, curves and numbers in demo-out
	$(BIN)/moe-artifacts demo --out demo-out

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("moe-artifacts needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

test: setup
	$(BIN)/python -m pytest -q

test-slow: setup ## with Ray, which nothing else needs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scale]'
	$(BIN)/python -m pytest -q -m slow

check: fmt-check lint types shapes test ## what CI runs

fmt: setup
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --quiet --fix .

fmt-check: setup
	$(BIN)/ruff format --quiet --check .

lint: setup
	$(BIN)/ruff check --quiet .

types: setup
	$(BIN)/mypy --no-error-summary

shapes: setup
	$(BIN)/python -m pytest -q --jaxtyping-packages=moe_artifacts,beartype.beartype -k "not refuse" $(SHAPE_TESTS)

bench: setup ## every table on the bundled pipeline
	$(BIN)/python -m training.evaluate
	$(BIN)/python -m training.evaluate --steps 12,25,50 --schedulers ddim,dpm,euler-a,unipc
	$(BIN)/python -m benchmarks.headroom
	$(BIN)/python -m benchmarks.twins --schedulers euler-a
	$(BIN)/python -m benchmarks.compatibility --pipeline fashion
	$(BIN)/python -m benchmarks.compatibility
	$(BIN)/python -m benchmarks.compatibility --docs docs/compatibility.md
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.savings
	$(BIN)/python -m benchmarks.guidance
	$(BIN)/python -m benchmarks.readme

REWARDS ?= ../shared/data/reward_trajectories.npz
bench-rewards: setup ## every table on published FLUX and SDXL scores, which are not shipped: REWARDS=FILE.npz
	for name in certification policy posterior siblings best_of_n; do \
		$(BIN)/python -m benchmarks.$$name --data $(REWARDS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.scale_policy
	$(BIN)/python -m benchmarks.readme

train-bundled: setup ## the bundled default from scratch, at most 4 hours on 2 cores; stages that are done are skipped
	$(BIN)/python -m training.recipes bundled
	$(BIN)/python -m training.show

own-fashion: setup ## a scorer for the bundled pipeline from nothing but prompts, as for a pipeline of one's own; stages that are done are skipped
	$(BIN)/python -m training.recipes own-fashion
