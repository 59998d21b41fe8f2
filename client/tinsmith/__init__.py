"""Tinsmith's client: a training API for language models, shaped like Tinker's.

    import tinsmith

    service = tinsmith.ServiceClient(base_url="127.0.0.1:50051")
    trainer = service.create_lora_training_client(base_model, rank=16).result()
    trainer.forward_backward(data, "cross_entropy")
    trainer.optim_step(tinsmith.AdamParams(learning_rate=1e-4)).result()
    sampler = trainer.save_weights_and_get_sampling_client().result()

Scripts written for Tinker run with `import tinsmith as tinker`. The generated gRPC stubs, with
everything that the service can do, are in `tinsmith.v1`.
"""

from tinsmith import errors, types
from tinsmith.errors import (
    AlreadyExistsError,
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    ConflictError,
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InternalServerError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestFailedError,
    ResourceExhaustedError,
    TinkerError,
    TinsmithError,
    UnavailableError,
    UnimplementedError,
    UnprocessableEntityError,
)
from tinsmith.futures import APIFuture
from tinsmith.rest_client import RestClient
from tinsmith.sampling_client import SamplingClient
from tinsmith.service_client import ServiceClient
from tinsmith.training_client import TrainingClient
from tinsmith.types import (
    AdamOptimizerConfig,
    AdamParams,
    Checkpoint,
    CheckpointType,
    Datum,
    DimuonOptimizerConfig,
    DimuonParams,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    LoraConfig,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TensorData,
    TensorDtype,
    TrainingRun,
)

__title__ = "tinsmith"
__version__ = "0.1.0"

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AlreadyExistsError",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "Checkpoint",
    "CheckpointType",
    "ConflictError",
    "DataLossError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "FailedPreconditionError",
    "ForwardBackwardOutput",
    "InternalError",
    "InternalServerError",
    "InvalidArgumentError",
    "LoraConfig",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestFailedError",
    "ResourceExhaustedError",
    "RestClient",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TinsmithError",
    "TrainingClient",
    "TrainingRun",
    "UnavailableError",
    "UnimplementedError",
    "UnprocessableEntityError",
    "__title__",
    "__version__",
    "errors",
    "types",
]
