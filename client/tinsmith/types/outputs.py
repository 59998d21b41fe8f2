"""What comes back from calls but samples, which `samples` has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from tinsmith._check import text
from tinsmith.errors import InvalidArgumentError
from tinsmith.types._values import Value
from tinsmith.types.inputs import AdamOptimizerConfig

CheckpointType = Literal["training", "sampler"]
ModelID = str


@dataclass(frozen=True, eq=False)
class ForwardBackwardOutput(Value):
    """Result of forward, forward_backward and forward_backward_custom.

    Unpacks as `loss, metrics`.

    Attributes:
        loss_fn_outputs: One mapping per datum; `logprobs`, float32, is shaped like its
            `target_tokens`, as numpy array, torch tensor or TensorData: what the datum was of.
        metrics: Values named `name:reduction`; `loss:sum` is always there.
    """

    loss_fn_outputs: list[Mapping[str, Any]]
    metrics: dict[str, float]
    loss_fn_output_type: str = "TensorData"

    @property
    def loss(self) -> float:
        """`metrics["loss:sum"]`."""
        return self.metrics["loss:sum"]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.loss, self.metrics))


@dataclass(frozen=True, eq=False)
class OptimStepResponse(Value):
    """`grad_norm:last` is the global L2 norm before clipping, `step:last` counts the steps."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True, eq=False)
class SaveWeightsResponse(Value):
    """`path` names the checkpoint."""

    path: str
    type: str = "save_weights"


@dataclass(frozen=True, eq=False)
class SaveWeightsForSamplerResponse(Value):
    """`path` names the checkpoint."""

    path: str


@dataclass(frozen=True, eq=False)
class LoadWeightsResponse(Value):
    """`path` names what was loaded."""

    path: str | None = None
    model_id: str | None = None


@dataclass(frozen=True, eq=False)
class ModelData(Value):
    """What a model is built on."""

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True, eq=False)
class GetInfoResponse(Value):
    """What a TrainingClient's model is."""

    model_id: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)


@dataclass(frozen=True, eq=False)
class SupportedModel(Value):
    """A base model that the cluster holds."""

    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True, eq=False)
class GetServerCapabilitiesResponse(Value):
    """What the cluster can do."""

    supported_models: list[SupportedModel]


@dataclass(frozen=True, eq=False)
class Cursor(Value):
    """Where a page lies in the whole list."""

    offset: int
    limit: int
    total_count: int


@dataclass(frozen=True, eq=False)
class Checkpoint(Value):
    """What is known of a checkpoint; `checkpoint_id` is `weights/<name>` or so."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    """Always False: checkpoints have no owners yet."""
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, eq=False)
class CheckpointsListResponse(Value):
    """Checkpoints, newest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@dataclass(frozen=True, eq=False)
class ParsedCheckpointTinkerPath(Value):
    """The parts of `tinsmith://<run>/<weights|sampler_weights>/<name>`."""

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
        kinds: dict[str, CheckpointType] = {"weights": "training", "sampler_weights": "sampler"}
        scheme, _, rest = text(tinker_path, "tinker_path").partition("://")
        parts = rest.split("/")
        valid = scheme in ("tinsmith", "tinker") and len(parts) == 3 and all(parts)
        if not valid or parts[1] not in kinds:
            message = (
                f"path: {tinker_path!r} is not tinsmith://<run>/<weights|sampler_weights>/<name>"
            )
            raise InvalidArgumentError(message, field="path", reason="INVALID_NAME")
        return cls(tinker_path, parts[0], kinds[parts[1]], f"{parts[1]}/{parts[2]}")


@dataclass(frozen=True, eq=False)
class TrainingRun(Value):
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
class TrainingRunsResponse(Value):
    """Models, newest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


@dataclass(frozen=True, eq=False)
class WeightsInfoResponse(Value):
    """What a checkpoint's adapter is."""

    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: AdamOptimizerConfig = field(default_factory=AdamOptimizerConfig)
