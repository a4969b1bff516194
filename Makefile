# make demo     see the whole thing work on this machine       make install   everything that tests need
# make check    format, lint, types, import order              make test      everything that must be true
# make format   mend what can be mended by machine             make clean     remove what the others made
# make gates    compile every CUDA kernel with both families of NVRTC, 146 MB more, and hold it to its limits, for the
#               GPU generations GATES (all that are known; 3 CPU-minutes each)
#
# PIP_ARGS is passed to pip, PYTEST_ARGS to pytest, DEMO_ARGS to the demonstration.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
DEMO_ARGS ?=
BIN = $(VENV)/bin
EXTRAS = faiss-cpu,train,lora,clip,serve,browser,dev
DEMO_EXTRAS =
SOURCES = pyproject.toml constraints.txt .ci/install

.PHONY: install demo check format test gates clean

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	.ci/install "$(PYTHON)" "$(VENV)" "$(EXTRAS)" $(PIP_ARGS)
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: $(SOURCES)
	.ci/install "$(PYTHON)" "$(VENV)" "$(DEMO_EXTRAS)" $(PIP_ARGS)
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/vlm demo $(DEMO_ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

gates: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[kernels-ci]"
	VLM_ALL_NVRTC=1 VLM_GATES="$(GATES)" $(BIN)/python -m pytest -n 2 --dist load tests/kernels/test_nvrtc_gates.py \
	    tests/ops/cuda/test_nvrtc.py

clean:
	rm -rf $(VENV) dist build demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vlm eval data_tools kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
