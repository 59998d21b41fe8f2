"""What comes back from calls but samples, which `samples` has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from tinsmith._check import shown, text
from tinsmith.errors import InvalidArgumentError, unsupported
from tinsmith.types._values import Response
from tinsmith.types.inputs import AdamOptimizerConfig
from tinsmith.types.tensor import TensorData

CheckpointType = Literal["training", "sampler", "external"]
CHECKPOINT_TYPES: Mapping[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""By what stands before the name in a path."""
ModelID = str
RequestID = str
LossFnInputs = dict[str, TensorData]
LossFnOutput = dict[str, TensorData]
_NO_CONSOLE = "there is no page for it"


class RequestErrorCategory(StrEnum):
    """Whom `RequestFailedError.category` blames."""

    Unknown = "unknown"
    Server = "server"
    User = "user"


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput(Response):
    """Result of forward, forward_backward and forward_backward_custom.

    Unpacks as `loss, metrics`.

    Attributes:
        loss_fn_outputs: One mapping per datum; `logprobs`, float32, is shaped like its
            `target_tokens`.
        metrics: Values named `name:reduction`; `loss:sum` is always there.
    """

    loss_fn_output_type: str
    loss_fn_outputs: list[LossFnOutput]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """`metrics["loss:sum"]`."""
        return self.metrics["loss:sum"]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.metrics))


@dataclass(frozen=True, eq=False)
class OptimStepResponse(Response):
    """`grad_norm:last` is the global L2 norm before clipping, `step:last` counts the steps."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, eq=False)
class SaveWeightsResponse(Response):
    """`path` names the checkpoint."""

    path: str
    type: str | None = "save_weights"

    def get_console_url(self) -> str:
        """Not supported."""
        raise unsupported("get_console_url", _NO_CONSOLE)


@dataclass(frozen=True, eq=False)
class SaveWeightsForSamplerResponse(Response):
    """`path` names the checkpoint."""

    path: str
    type: str | None = None

    def get_console_url(self) -> str:
        """Not supported."""
        raise unsupported("get_console_url", _NO_CONSOLE)

    def get_playground_url(self) -> str:
        """Not supported."""
        raise unsupported("get_playground_url", _NO_CONSOLE)


@dataclass(frozen=True, eq=False)
class SaveWeightsExternalResponse(Response):
    """`path` names the exported weights."""

    path: str
    type: str | None = None


@dataclass(frozen=True, eq=False)
class ExternalWeightsUrlsResponse(Response):
    """Where to get each file of exported weights, by its name, and until when."""

    urls: dict[str, str]
    expires: datetime


@dataclass(frozen=True, eq=False)
class CheckpointArchiveUrlResponse(Response):
    """Where to get a checkpoint as a tar, and until when."""

    url: str
    expires: datetime


@dataclass(frozen=True, eq=False)
class LoadWeightsResponse(Response):
    """`path` names what was loaded."""

    path: str | None = None
    model_id: str | None = None
    type: str | None = None


@dataclass(frozen=True, eq=False)
class UnloadModelResponse(Response):
    """`model_id` names what was deleted."""

    model_id: str
    type: str | None = None


@dataclass(frozen=True, eq=False)
class ModelData(Response):
    """What a model is built on."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True, eq=False)
class GetInfoResponse(Response):
    """What a TrainingClient's model is."""

    model_data: ModelData
    model_id: str
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)
    type: str | None = None


@dataclass(frozen=True, eq=False)
class SupportedModel(Response):
    """A base model that the cluster holds."""

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool | None = None
    sampleable: bool | None = None


@dataclass(frozen=True, eq=False)
class GetServerCapabilitiesResponse(Response):
    """What the cluster can do."""

    supported_models: list[SupportedModel]


@dataclass(frozen=True, eq=False)
class Cursor(Response):
    """Where a page lies in the whole list."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, eq=False)
class Checkpoint(Response):
    """What is known of a checkpoint; `checkpoint_id` is `weights/<name>` or so."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    """Whether it was published, which is a mark and changes nothing of who may read it."""
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, eq=False)
class CheckpointsListResponse(Response):
    """Checkpoints, newest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, eq=False)
class ParsedCheckpointTinkerPath(Response):
    """The parts of `tinsmith://<run>/<weights|sampler_weights|external_weights>/<name>`."""

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Read a path; `tinker://` is taken too.

        Raises:
            InvalidArgumentError: It is no such path.
        """
        kinds = CHECKPOINT_TYPES
        scheme, _, rest = text(tinker_path, "tinker_path").partition("://")
        parts = rest.split("/")
        valid = scheme in ("tinsmith", "tinker") and len(parts) == 3 and all(parts)
        if not valid or parts[1] not in kinds:
            known = "|".join(kinds)
            message = f"path: {shown(tinker_path)} is not tinsmith://<run>/<{known}>/<name>"
            raise InvalidArgumentError(message, field="path", reason="INVALID_NAME")
        return cls(tinker_path, parts[0], kinds[parts[1]], f"{parts[1]}/{parts[2]}")


@dataclass(frozen=True, eq=False)
class TrainingRun(Response):
    """A model on the cluster."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, eq=False)
class TrainingRunsResponse(Response):
    """Models, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, eq=False)
class WeightsInfoResponse(Response):
    """What a checkpoint's adapter is."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)


@dataclass(frozen=True, eq=False)
class ListSessionsResponse(Response):
    """Ids, newest first."""

    sessions: list[str]


@dataclass(frozen=True, eq=False)
class GetSessionResponse(Response):
    """What was made in a session."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


@dataclass(frozen=True, eq=False)
class GetSamplerResponse(Response):
    """What a sampler samples from."""

    sampler_id: str
    base_model: str
    model_path: str | None = None


@dataclass(frozen=True, eq=False)
class CurrentCheckpointStorageUsageItem(Response):
    """What the checkpoints of one owner take; nothing here has a price."""

    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    project_id: str | None = None
    org_user_urn: str | None = None
    user_email: str | None = None
    user_name: str | None = None
    estimated_monthly_cost_usd: float | None = None


@dataclass(frozen=True, eq=False)
class CurrentCheckpointStorageUsageResponse(Response):
    """What checkpoints take, by owner."""

    data: list[CurrentCheckpointStorageUsageItem]
    effective_rate_usd_per_gigabyte_month: float | None = None


@dataclass(frozen=True, eq=False)
class WhoamiResponse(Response):
    """Whom the servers take the caller for."""

    user_urn: str
    org_urn: str
    email: str | None = None
