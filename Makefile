# Targets carry `##` help; `make` alone prints it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROTO_SERVICES := $(shell cd protos && find tinsmith -name '*_service.proto' | sort)
PROTOS := $(shell cd protos && find tinsmith -name '*.proto' | sort)

.PHONY: protos
protos: ## Regenerate the Python stubs in client/ from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=client --mypy_out=quiet:client $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=client --mypy_grpc_out=quiet:client $(PROTO_SERVICES)
