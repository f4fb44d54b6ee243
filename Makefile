# One word for each task; `make help` lists them. Environments are made on first use. Each remembers in a stamp file what was
# installed from pyproject.toml, so a second run installs nothing and needs no network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Its code is that of protobuf 5.29, the oldest supported; a newer one's is refused there.
GRPC_TOOLS := 1.71
PIP := -m pip --disable-pip-version-check --quiet
BUILD := $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE))
REVISION = --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Everything shares one environment and, in tests, one machine's cores.
.NOTPARALLEL:

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.stamp-demo ## serve an example image, read it back as tensors, write a picture of it
	$(BIN)/ome-tensor demo

.PHONY: test
test: $(VENV)/.stamp-test ## run the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: check
check: $(VENV)/.stamp-check proto-check locks-check audit ## lint, formatting, types, generated code, locks, licences, known vulnerabilities
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: fmt
fmt: $(VENV)/.stamp-check ## mend what ruff can mend, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: bench
bench: $(VENV)/.stamp-test ## measure the engine, the stream, its peers on the wire (those that are installed), and the import
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.PHONY: bench-datasets
bench-datasets: $(VENV)/.stamp-test ## measure crops in one stream, a dataset larger than memory, and uploads under kill -9
	$(BIN)/python -m benchmarks.crops
	$(BIN)/python -m benchmarks.budget
	$(BIN)/python -m benchmarks.uploads

.PHONY: bench-training
bench-training: $(VENV)/.stamp-test ## measure training datasets, epochs under kill -9, and two servers of which one is killed
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.epoch_kills
	$(BIN)/python -m benchmarks.replicas

.PHONY: bench-containers
bench-containers: $(VENV)/.stamp-test image ## measure what a container costs (wants a Docker engine)
	$(BIN)/python -m benchmarks.containers

.PHONY: exactly-once
exactly-once: $(VENV)/.stamp-test ## read a thousand random epochs, over ranks, workers, checkpoints (CASES=1000)
	OME_TENSOR_CASES=$(or $(CASES),1000) $(BIN)/python -m pytest -q tests/integration/test_training.py -k every_sample_of_an_epoch --timeout 1800

.PHONY: fuzz
fuzz: $(VENV)/.stamp-test ## feed damaged files to the readers (FUZZ_SECONDS=600)
	$(BIN)/python -m tests.unit.fuzz_readers $(or $(FUZZ_SECONDS),600)

.PHONY: fuzz-port
fuzz-port: $(VENV)/.stamp-test ## send a server whatever there is, requests and raw bytes (FUZZ_INPUTS=1000000)
	$(BIN)/python -m tests.fuzz --seconds 3600 --inputs $(or $(FUZZ_INPUTS),1000000)

.PHONY: fuzz-coverage
fuzz-coverage: $(VENV)/.stamp-test ## coverage-guided fuzzing of codecs and readers, twenty minutes (wants atheris, see tests/unit/fuzz_codecs.py)
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m tests.unit.fuzz_codecs messages -max_total_time=720 -timeout=30
	$(BIN)/python -m tests.unit.fuzz_codecs readers -max_total_time=720 -timeout=30 -rss_limit_mb=4096

.PHONY: faults
faults: $(VENV)/.stamp-test ## cut, damage, silence, kill, fill: each fault for a while, under each kind of read (FAULT_SECONDS=15)
	$(BIN)/python -m tests.integration.faults --seconds $(or $(FAULT_SECONDS),15)

.PHONY: load
load: $(VENV)/.stamp-test ## 256 streams on one server (LOAD_SECONDS=600)
	$(BIN)/python -m benchmarks.load --seconds $(or $(LOAD_SECONDS),600)

.PHONY: soak
soak: load faults fuzz fuzz-port fuzz-coverage ## all that takes long: load, faults, fuzz; an hour and a half

.PHONY: proto
proto: .venv-proto/.stamp-$(GRPC_TOOLS) ## regenerate the code of the wire contract
	PYTHON=.venv-proto/bin/python proto/generate.sh

.PHONY: proto-check
proto-check: .venv-proto/.stamp-$(GRPC_TOOLS) ## fail where the committed generated code is not current
	PYTHON=.venv-proto/bin/python proto/generate.sh --check

.PHONY: test-floor
test-floor: .venv-floor/.stamp ## test the library on the oldest versions it allows
	.venv-floor/bin/python -m pytest -m "not slow" tests/unit tests/integration

.PHONY: locks
locks: .venv-supply/.stamp ## resolve the lock files of the images anew, keeping versions (UPGRADE=1 for the newest)
	.venv-supply/bin/python deploy/lockfiles.py write --uv .venv-supply/bin/uv $(if $(UPGRADE),--upgrade)

.PHONY: locks-check
locks-check: $(VENV)/.stamp-check ## fail where the lock files are not what pyproject.toml asks for, or a licence is not allowed
	$(BIN)/python deploy/lockfiles.py check
	$(BIN)/python deploy/licences.py check

.PHONY: licences
licences: .venv-supply/.stamp ## list the licence of every locked package in deploy/LICENSES.md
	.venv-supply/bin/python deploy/licences.py write .venv-supply/wheels

.PHONY: audit
audit: .venv-supply/.stamp ## ask for known vulnerabilities of what is locked (REQUIRED=1: fail where nobody answers)
	.venv-supply/bin/python deploy/audit.py $(if $(REQUIRED),--required)

.PHONY: sbom
sbom: .venv-supply/.stamp ## write bills of materials of the images into dist/ (SBOM_PYTHON=3.12, the base image's)
	.venv-supply/bin/python deploy/sbom.py $(SBOM_PYTHON)

.PHONY: image
image: ## build the server's container image (BASE_IMAGE=… for another base)
	docker build $(BUILD) $(REVISION) --target server --tag ome-tensor .

.PHONY: image-client
image-client: ## build the image for training nodes, with PyTorch (a CPU build of it may lie in wheels/)
	docker build $(BUILD) $(REVISION) --target client-torch --tag ome-tensor-client-torch .

.PHONY: secrets
secrets: ## make a certificate and tokens for docker-compose.yml (HOSTS="images.lab 10.0.0.7")
	deploy/make_secrets.sh "$(or $(IMAGE),ome-tensor)" "$(or $(SECRETS),secrets)" localhost 127.0.0.1 server $(HOSTS)

.PHONY: clean
clean: ## remove environments, caches and build products
	rm -rf .venv .venv-proto .venv-floor .venv-supply build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find wheels -name '*.whl' -delete
	find tensor proto client server deploy tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments ---------------------------------------------------------------------------------------------------

define new-environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "ome-tensor needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Use: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python $(PIP) install --upgrade pip
endef

$(BIN)/python:
	$(call new-environment,$(VENV))

# The environment for tests, and the one for checks, hold all that the demo needs: where one of them is current, so is the demo's.
$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/python
	@[ $(VENV)/.stamp-test -nt pyproject.toml ] || [ $(VENV)/.stamp-check -nt pyproject.toml ] || { \
	  echo "installing ome-tensor[server,image] into $(VENV)"; \
	  $(BIN)/python $(PIP) install --editable '.[server,image]'; }
	@touch $@

$(VENV)/.stamp-check: pyproject.toml | $(BIN)/python
	@echo "installing ome-tensor[server,image,dev] into $(VENV)"
	@$(BIN)/python $(PIP) install --editable '.[server,image,dev]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(BIN)/python
	@echo "installing ome-tensor[test] into $(VENV): PyTorch, JAX and upstream, some minutes the first time"
	@$(BIN)/python $(PIP) install --editable '.[test]'
	@touch $@

# An environment of its own: the generator wants protobuf < 6.
.venv-proto/.stamp-$(GRPC_TOOLS):
	$(call new-environment,.venv-proto)
	.venv-proto/bin/python $(PIP) install 'grpcio-tools==$(GRPC_TOOLS).*'
	@touch $@

# An environment of its own: these tools want what they want, and nothing of the project.
.venv-supply/.stamp: deploy/supply-tools.txt
	$(call new-environment,.venv-supply)
	.venv-supply/bin/python $(PIP) install --requirement deploy/supply-tools.txt
	@touch $@

.venv-floor/.stamp: pyproject.toml tests/floor-requirements.txt
	$(call new-environment,.venv-floor)
	.venv-floor/bin/python $(PIP) install --requirement tests/floor-requirements.txt
	.venv-floor/bin/python $(PIP) install --no-deps --editable .
	.venv-floor/bin/python -m pip check
	@touch $@
