# make demo    set up what that needs, make sample shards, embed them on local Ray, show what came out
# make test    set up, run every check and every test
# make check   the same without Ray, jobs and large models: what to run before each commit
# make docs    build the pages as a site in build/site; a broken link fails
# make setup   only set up: .venv with what requirements.lock pins

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-for-demo
# For the demo: your own images instead of its photos, other weights than DEFAULT, and where all it makes goes.
IMAGES ?=
WEIGHTS ?=
DEMO ?= demo
# With CI set, pytest prints complete differences, which takes minutes for embeddings. torch and NumPy use one thread in
# each process. The MALLOC variables make glibc return freed memory at once: without them a process keeps a GB of it.
# When a test process dies, the run ends and names its test: otherwise the others could wait for ever.
PYTEST := CI= OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=16777216 \
	$(BIN)/pytest --max-worker-restart 0
# Container images often set it. Without bytecode, each process would compile all tests and modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check docs lint lock clean

setup: $(STAMP)

# Says what comes, and makes the environment that it goes to.
define begin
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12" % v)'
	@echo "Installing into $(VENV): $(1), of which 4 GB are CUDA's libraries and Triton; minutes on a fast line"
	@test -e /proc/driver/nvidia/version || echo "No NVIDIA driver here: torch computes on the CPU. PyPI has no smaller build; docs/install.md has another way"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8'
endef

$(STAMP): requirements.lock pyproject.toml
	$(call begin,7.5 GB)
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

# What the demo needs, at the versions and hashes of the lock. An environment that has all of the lock stays.
$(DEMO_STAMP): requirements.lock pyproject.toml
	$(call begin,6.5 GB)
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraints requirements.lock \
		--requirements pyproject.toml --extra demo --extra index
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: $(if $(wildcard $(STAMP)),setup,$(DEMO_STAMP))
	@$(BIN)/python jobs/demo.py --output "$(DEMO)" $(if $(IMAGES),--images "$(IMAGES)") \
		$(if $(WEIGHTS),--weights "$(WEIGHTS)")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) --numprocesses 2 --dist worksteal -m 'not slow and not ray'

# A third process makes it only 5 % faster on two cores, and takes another GB.
test: lint
	$(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The packages of the extra are in no lock: nothing that is tested or installed needs them.
docs: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable '.[docs]'
	rm -rf build/pages
	mkdir -p build/pages
	for path in *.md docs examples infra benchmarks; do ln -s "$(CURDIR)/$$path" build/pages/; done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --extra dev --no-emit-package shard-embedder pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) $(DEMO) build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
