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
from tinsmith.admin_client import AdminClient
from tinsmith.errors import (
    AlreadyExistsError,
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    ConflictError,
    DataLossError,
    ExperimentalWarning,
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
from tinsmith.sampling_client import SamplingClientFuture as BackcompatSamplingClientFuture
from tinsmith.service_client import PerDatumLossFn, ServiceClient
from tinsmith.training_client import TrainingClient
from tinsmith.training_client import TrainingClientFuture as BackcompatTrainingClientFuture
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
    LossHandle,
    ModelID,
    ModelInput,
    ModelInputChunk,
    OptimParams,
    OptimStepRequest,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleRequest,
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
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AdminClient",
    "AlreadyExistsError",
    "AuthenticationError",
    "BackcompatSamplingClientFuture",
    "BackcompatTrainingClientFuture",
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
    "ExperimentalWarning",
    "FailedPreconditionError",
    "ForwardBackwardOutput",
    "InternalError",
    "InternalServerError",
    "InvalidArgumentError",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "RequestFailedError",
    "ResourceExhaustedError",
    "RestClient",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
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
