"""What calls take and give."""

from typing import Any

from tinsmith.types.inputs import (
    AdamOptimizerConfig,
    AdamParams,
    Datum,
    EncodedTextChunk,
    LoraConfig,
    LossFnType,
    ModelInput,
    ModelInputChunk,
    OptimizerConfig,
    OptimParams,
    SamplingParams,
)
from tinsmith.types.outputs import (
    Checkpoint,
    CheckpointsListResponse,
    CheckpointType,
    Cursor,
    ExternalWeightsUrlsResponse,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    LoadWeightsResponse,
    LossFnInputs,
    LossFnOutput,
    ModelData,
    ModelID,
    OptimStepResponse,
    ParsedCheckpointTinkerPath,
    RequestErrorCategory,
    RequestID,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    UnloadModelResponse,
    WeightsInfoResponse,
    WhoamiResponse,
)
from tinsmith.types.provenance import (
    PromptProvenanceSpan,
    ProvenanceSpans,
    SampledProvenanceSpan,
)
from tinsmith.types.requests import (
    ForwardBackwardInput,
    ForwardBackwardRequest,
    OptimStepRequest,
    SampleRequest,
)
from tinsmith.types.samples import (
    PromptAltTokens,
    SampledSequence,
    SampledTokens,
    SampleResponse,
    SamplingClientKind,
    StopReason,
    TopkLogprobs,
)
from tinsmith.types.tensor import TensorData, TensorDtype
from tinsmith.types.unsupported import (
    UNSUPPORTED,
    DimuonOptimizerConfig,
    DimuonParams,
    DmelChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    LossHandle,
)

__all__ = [
    "AdamOptimizerConfig",
    "AdamParams",
    "Checkpoint",
    "CheckpointType",
    "CheckpointsListResponse",
    "Cursor",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "DmelChunk",
    "EncodedTextChunk",
    "ExternalWeightsUrlsResponse",
    "ForwardBackwardInput",
    "ForwardBackwardOutput",
    "ForwardBackwardRequest",
    "GetInfoResponse",
    "GetSamplerResponse",
    "GetServerCapabilitiesResponse",
    "GetSessionResponse",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "ListSessionsResponse",
    "LoadWeightsResponse",
    "LoraConfig",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "LossHandle",
    "ModelData",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "OptimizerConfig",
    "ParsedCheckpointTinkerPath",
    "PromptAltTokens",
    "PromptProvenanceSpan",
    "ProvenanceSpans",
    "RequestErrorCategory",
    "RequestID",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SampledTokens",
    "SamplingClientKind",
    "SamplingParams",
    "SaveWeightsExternalResponse",
    "SaveWeightsForSamplerResponse",
    "SaveWeightsResponse",
    "StopReason",
    "SupportedModel",
    "TensorData",
    "TensorDtype",
    "TopkLogprobs",
    "TrainingRun",
    "TrainingRunsResponse",
    "UnloadModelResponse",
    "WeightsInfoResponse",
    "WhoamiResponse",
]


def __getattr__(name: str) -> Any:
    """A type of Tinker's that Tinsmith does not have: to name it is allowed, to make one is not."""
    if name in UNSUPPORTED:
        return UNSUPPORTED[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *UNSUPPORTED})
