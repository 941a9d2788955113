PYTHON ?= python3
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin

# Models are part of the repository or built from configurations: nothing is downloaded.
export HF_HUB_OFFLINE ?= 1

.PHONY: demo train scenes student test test-fast test-long test-full test-oldest test-wheel optimum wheel lint docs bench frontier tuning pruning switching drop-in package-tree
.NOTPARALLEL: # the targets share one environment

demo: $(VENV)/.installed-onnx,plots,pipelines
	$(RUN)/python examples/demo.py

# The small Stable Diffusion of examples/scenes. glibc is told to keep memory: returning it between
# steps costs time.
train: $(VENV)/.installed-plots,pipelines
	cd examples && MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
		$(RUN)/python -m scenes.train $(ARGS)

scenes: $(VENV)/.installed-plots,pipelines
	cd examples && $(RUN)/python -m scenes.save && $(RUN)/python -m scenes.quality --out scenes/model \
		&& $(RUN)/python -m scenes.card

student: $(VENV)/.installed-plots,pipelines,tuning
	cd examples && MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
		$(RUN)/python -m scenes.student $(ARGS) && $(RUN)/python -m scenes.card

bench: $(VENV)/.installed-bench,pipelines
	$(RUN)/python -m benchmarks.overhead $(ARGS)

frontier: $(VENV)/.installed-bench,onnx,pipelines,plots
	$(RUN)/python -m benchmarks.frontier $(ARGS)

# Tests trace small models, which is Python: a process per core, each with one thread.
# A process begins with half of the folders, so that what their tests share is made once, and takes over tests of the
# other at the end.
PYTEST := OMP_NUM_THREADS=1 $(RUN)/pytest -n auto --dist worksteal

test: $(VENV)/.installed-test
	$(PYTEST)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not (slow or long or full)"

test-long: $(VENV)/.installed-test
	$(PYTEST) -m "long or hypothesis" --hypothesis-profile thorough

test-full: $(VENV)/.installed-test
	$(RUN)/pytest -m full

# The oldest versions that pyproject.toml allows, in an environment of their own. On a machine without a GPU, name a CPU
# build: PIP_FIND_LINKS=wheels make test-oldest OLDEST="torch==2.13.0". They warn of much that is mended since.
OLDEST ?=
ifdef PIP_FIND_LINKS
test-oldest: export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
test-oldest: $(VENV)/bin/python
	$(RUN)/python -m pip install -q uv
	$(RUN)/uv venv -q --allow-existing --python $(RUN)/python $(VENV)-oldest
	$(RUN)/uv pip install -q --python $(VENV)-oldest/bin/python --resolution lowest-direct -e ".[test]" $(OLDEST)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -m "not (slow or long or full)" -o filterwarnings=ignore $(ARGS)

# optimum loads exported pipelines. It wants older versions of transformers and diffusers, hence an environment that sees
# the packages of $(VENV) behind those.
OPTIMUM_VENV := .venv-optimum
optimum: $(VENV)/.installed-test
	$(RUN)/python -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install -q --no-deps "optimum-onnx>=0.1" "optimum>=2" "transformers>=4.57,<4.58" \
		"diffusers>=0.35,<0.36" "huggingface_hub>=0.34,<1" "tokenizers>=0.22,<0.23"
	$(RUN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(OPTIMUM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth
	SDGRAPH_OPTIMUM=$(CURDIR)/$(OPTIMUM_VENV)/bin/python OMP_NUM_THREADS=1 $(RUN)/python -m pytest \
		tests/exporters/test_whole_pipelines.py -m long $(ARGS)

# A source distribution, and the wheel that is built from it, in dist/.
wheel: $(VENV)/.installed-test,dev
	rm -rf dist
	$(RUN)/python -m build

# The wheel, in an environment of its own that sees nothing of this checkout, runs the README's quick start.
WHEEL_VENV := .venv-wheel
test-wheel: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install -q -c constraints.txt "$$(echo dist/*.whl)[onnx,pipelines,plots]" pytest hypothesis
	cd $(WHEEL_VENV) && bin/python -c "import sdgraph.passes; assert 'site-packages' in sdgraph.passes.__file__"
	$(WHEEL_VENV)/bin/sdgraph passes PruneBlocks
	OMP_NUM_THREADS=1 $(WHEEL_VENV)/bin/pytest -q tests/project/test_docs.py -k "run_in_order and README"

tuning: $(VENV)/.installed-bench,pipelines,tuning
	$(RUN)/python -m benchmarks.tuning $(ARGS)

pruning: $(VENV)/.installed-bench,pipelines,plots,pruning,tuning
	$(RUN)/python -m benchmarks.pruning $(ARGS)

switching: $(VENV)/.installed-bench,pipelines,plots,pruning
	$(RUN)/python -m benchmarks.switching $(ARGS)

# diffusers' own pipeline tests with our UNet in the place of theirs: make drop-in ARGS=path/to/diffusers
drop-in: $(VENV)/.installed-test,bench
	$(RUN)/python -m benchmarks.drop_in $(ARGS)

# mypy, import-linter and the API reference see the folders as the package they are installed as; see [tool.mypy].
TYPED := build/typed/sdgraph
package-tree:
	rm -rf $(TYPED) && mkdir -p build/typed && cp -rp sdgraph build/typed/ && cp -rp passes exporters $(TYPED)/

# The site, in build/site: nothing is downloaded, and a warning is an error.
docs: $(VENV)/.installed-docs package-tree
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

lint: $(VENV)/.installed-test,dev package-tree
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	cd build/typed && $(RUN)/lint-imports $(CURDIR)/.importlinter
	cd build/typed && $(RUN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras; a change of either file installs anew.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@
