"""`TrainingClient`: trains one model, call by call."""

import importlib.util
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from tinsmith import _check, _loop
from tinsmith._calls import Calls
from tinsmith._check import refuse
from tinsmith._connection import Connection
from tinsmith._custom_loss import CustomLossFn
from tinsmith._lane import Lane, attach
from tinsmith._leases import new_lease_id
from tinsmith._lifetime import ModelLifetime
from tinsmith._tokenizer import fetch_tokenizer, load_tokenizer
from tinsmith._twins import async_twins
from tinsmith._weights import Weights
from tinsmith.checkpoints import EXTERNAL_PREFIX, shown, stored
from tinsmith.errors import unsupported
from tinsmith.futures import APIFuture, ClientFuture, CustomLossFuture
from tinsmith.sampling_client import SamplingClient, SamplingClientFuture
from tinsmith.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFnType,
    ModelData,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2


@async_twins(
    *("forward", "forward_backward", "forward_backward_custom", "optim_step"),
    *("save_state", "load_state", "load_state_with_optimizer", "save_weights_for_sampler"),
    *("save_weights_and_get_sampling_client", "create_sampling_client", "save_weights_external"),
    final=False,
)
class TrainingClient(ModelLifetime):
    """Trains one model: an adapter with its optimizer state on the cluster.

    Made by `ServiceClient`. Calls return futures at once; their effects follow the order of the
    calls, so any number may be under way. A lost connection or a restarting service delays
    them: each is sent again under its number, and counts once. As a context manager it deletes the
    model at the end, see `close`.

    Attributes:
        model_id: The model's id.
    """

    def __init__(
        self, connection: Connection, model: pb.Model, next_seq_id: int | None = None
    ) -> None:
        self._connection = connection
        self._model = model
        self._lane = Lane(connection, model.model_id, next_seq_id or model.next_seq_id)
        self._calls = Calls(connection, model.model_id, self._lane)
        self._tokenizer: Any = None
        self._saves = 0
        self._moving: Callable[[], Weights | None] = lambda: None
        """The weights of all clients that are "inflight"; they live as long as one of those."""
        self.model_id = model.model_id

    @classmethod
    def attached(cls, connection: Connection, model_id: str) -> "TrainingClientFuture":
        """A client for a model that exists, which goes on after its last call."""

        async def build() -> TrainingClient:
            return cls(connection, *await attach(connection, model_id))

        return TrainingClientFuture(_loop.run(build()))

    # --- computing ----------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute losses and logprobs without gradients; arguments as `forward_backward`."""
        data = data_of(data)
        return APIFuture(self._calls.compute(data, loss_fn, loss_fn_config, backward=False))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Compute a loss and add its gradients to those that wait for `optim_step`.

        Args:
            data: Examples. The loss is summed over their tokens, never averaged.
            loss_fn: Name of a built-in loss.
            loss_fn_config: Its settings, such as `{"clip_low_threshold": 0.8}`.

        Raises:
            InvalidArgumentError: At once for what the client can see, else from the future.
        """
        data = data_of(data)
        return APIFuture(self._calls.compute(data, loss_fn, loss_fn_config, backward=True))

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: CustomLossFn,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
    ) -> CustomLossFuture[ForwardBackwardOutput]:
        """Add the gradients of any differentiable function of the logprobs. Needs torch.

        Args:
            data: Examples; each needs `target_tokens`, other inputs stay in this process.
            loss_fn: Takes the data and a list of their logprobs (torch, float32, `(N,)` or
                `(N, K)` each) and returns the scalar loss and a mapping of metrics. It runs on a
                thread of its own. If it raises, the future raises that, nothing was added, and
                the client goes on.
            loss_type_input: Ignored; Tinker had it.

        Returns:
            A future that also unpacks as `loss, metrics`. `loss:sum` is the custom loss,
            `surrogate_loss:sum` what the service computed in its stead.
        """
        if not callable(loss_fn):
            raise refuse("loss_fn", f"expected a function, got {type(loss_fn).__name__}")
        if importlib.util.find_spec("torch") is None:
            raise ImportError("forward_backward_custom needs torch: pip install torch")
        return CustomLossFuture(self._calls.custom(data_of(data), loss_fn))

    def optim_step(
        self,
        optim_params: AdamParams | None = None,
        *,
        adam_params: AdamParams | None = None,
    ) -> APIFuture[OptimStepResponse]:
        """Apply one AdamW step with the waiting gradients and clear them.

        Args:
            optim_params: The step's settings.
            adam_params: Another name for it; exactly one of the two is needed.
        """
        if optim_params is not None and adam_params is not None:
            raise ValueError("optim_step: pass optim_params or adam_params, not both")
        params = optim_params if optim_params is not None else adam_params
        if params is None:
            raise TypeError("optim_step: optim_params is missing")
        if not isinstance(params, AdamParams):
            raise unsupported("optim_params", f"{type(params).__name__} is not supported, AdamW is")
        values = {each.name: getattr(params, each.name) for each in fields(AdamParams)}
        message = pb.OptimStepRequest(adam_params=types_pb2.AdamParams(**values))

        def read(response: pb.OptimStepResponse) -> OptimStepResponse:
            return OptimStepResponse(dict(response.metrics))

        return APIFuture(self._calls.unary("optim_step", "OptimStep", message, read))

    # --- saving and loading -------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer state under a name, to go on training from.

        Args:
            name: Letters, digits, `.`, `_`, `-`; up to 128.
            ttl_seconds: Seconds until it is deleted; None: never.
            overwrite: Replace a checkpoint of this name, else that is an error.
            user_metadata: Kept with it.
        """
        return self._save(
            "save_state",
            types_pb2.CHECKPOINT_KIND_TRAINING,
            _named(name),
            ttl_seconds,
            overwrite,
            user_metadata,
            lambda response: SaveWeightsResponse(response.checkpoint_path),
        )

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save weights under a name, to sample from; arguments as `save_state`."""
        if (given := _named(name)).startswith(EXTERNAL_PREFIX):
            why = f"names that begin with {EXTERNAL_PREFIX!r} are those of save_weights_external"
            raise refuse("name", why, "INVALID_NAME")
        return self._save(
            "save_weights_for_sampler",
            types_pb2.CHECKPOINT_KIND_SAMPLER,
            given,
            ttl_seconds,
            overwrite,
            user_metadata,
            lambda response: SaveWeightsForSamplerResponse(response.checkpoint_path),
        )

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: Sequence[str] | None = None,
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Save weights for programs elsewhere: a folder for PEFT, or for transformers.

        `RestClient.get_external_weights_urls` gives a URL for each file of it, and
        `RestClient.download_checkpoint` the folder.

        Args:
            name: As in `save_state`; up to 119 characters.
            ttl_seconds: Likewise.
            age_encryption_recipients: Not supported.
        """
        if age_encryption_recipients:
            why = "files are not encrypted here; download them over TLS"
            raise unsupported("age_encryption_recipients", why)
        return self._save(
            "save_weights_external",
            types_pb2.CHECKPOINT_KIND_SAMPLER,
            f"{EXTERNAL_PREFIX}{_named(name)}",
            ttl_seconds,
            False,
            None,
            lambda response: SaveWeightsExternalResponse(shown(response.checkpoint_path)),
        )

    def _save(
        self,
        what: str,
        kind: types_pb2.CheckpointKind.ValueType,
        name: str,
        ttl_seconds: int | None,
        overwrite: bool,
        user_metadata: Mapping[str, str] | None,
        result: Callable[[pb.SaveCheckpointResponse], Any],
        lease_id: str = "",
    ) -> APIFuture[Any]:
        message = pb.SaveCheckpointRequest(
            kind=kind,
            name=name,
            ttl=_check.optional_ttl(ttl_seconds),
            overwrite=_check.flag(overwrite, "overwrite"),
            user_metadata=_check.metadata(user_metadata),
            lease_id=lease_id,
        )
        future = self._calls.unary(what, "SaveCheckpoint", message, result)
        return APIFuture(future)

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Replace the weights by a TRAINING checkpoint's; the optimizer starts anew."""
        return self._load(path, weights_access_token, with_optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Replace weights and optimizer state by a TRAINING checkpoint's."""
        return self._load(path, weights_access_token, with_optimizer=True)

    def _load(
        self, path: str, token: str | None, *, with_optimizer: bool
    ) -> APIFuture[LoadWeightsResponse]:
        if token is not None:
            raise unsupported("weights_access_token", "there are no access tokens yet")

        message = pb.LoadCheckpointRequest(
            checkpoint_path=stored(_check.text(path, "path")), with_optimizer=with_optimizer
        )

        def read(response: pb.LoadCheckpointResponse) -> LoadWeightsResponse:
            return LoadWeightsResponse(response.checkpoint_path, self.model_id)

        return APIFuture(self._calls.unary("load_state", "LoadCheckpoint", message, read))

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClientFuture:
        """Save the weights as they are now, under no lasting name, and sample from them.

        Args:
            name: Ignored, as in Tinker.
            retry_config: Ignored; the client retries by itself.
            record_stability_info: Not supported.
            kind: "snapshot": the client keeps these weights. "inflight": it goes on to those of
                every later "inflight" save of this client; what it samples at that moment ends with
                the weights that it was begun with.
        """
        if record_stability_info:
            raise unsupported("record_stability_info", "stable_reinforce is not supported")
        if kind not in ("snapshot", "inflight"):
            raise refuse("kind", f"{_check.shown(kind)} is not 'snapshot' or 'inflight'")
        if self._is_full:
            message = "a model that trains all weights is not served; save it and download it"
            raise unsupported("save_weights_and_get_sampling_client", message)
        lease_id = new_lease_id()
        saved = self._save(
            "save_weights",
            types_pb2.CHECKPOINT_KIND_SAMPLER,
            "",
            None,
            False,
            None,
            lambda response: response,
            lease_id,
        )
        self._saves += 1
        turn = self._saves

        async def build() -> SamplingClient:
            made = await saved
            path, digest = made.checkpoint_path, made.digest
            moving = self._moving() if kind == "inflight" else None
            if moving is not None:
                moving.move(path, digest, lease_id, turn)
                return SamplingClient(self._connection, self._model.base_model, moving)
            moves = kind == "inflight"
            weights = Weights(self._connection, path, digest, lease_id, moves=moves)
            if moves:
                self._moving = weakref.ref(weights)
            return SamplingClient(self._connection, self._model.base_model, weights)

        return SamplingClientFuture(_loop.run(build()))

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> SamplingClientFuture:
        """Sample from a SAMPLER checkpoint."""
        if record_stability_info:
            raise unsupported("record_stability_info", "stable_reinforce is not supported")
        return SamplingClient.opened(self._connection, self._model.base_model, model_path)

    # --- about the model ----------------------------------------------------------------------

    @property
    def _is_full(self) -> bool:
        return self._model.WhichOneof("tuning") == "full_config"

    def get_info(self) -> GetInfoResponse:
        """What the model is; asks nobody."""
        name = self._model.base_model
        return GetInfoResponse(
            model_id=self.model_id,
            model_data=ModelData(model_name=name, tokenizer_id=name),
            is_lora=not self._is_full,
            lora_rank=self._model.lora_config.rank or None,
            model_name=name,
        )

    async def get_info_async(self) -> GetInfoResponse:
        """`get_info` for coroutines."""
        return self.get_info()

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer. Needs transformers; downloads once."""
        if self._tokenizer is None:
            fetch = fetch_tokenizer(self._connection, self._model.base_model)
            self._tokenizer = load_tokenizer(_loop.run(fetch).result())
        return self._tokenizer


class TrainingClientFuture(ClientFuture[TrainingClient], TrainingClient):  # type: ignore[misc]
    """A future that is used as the client, too."""


def data_of(data: object) -> list[Datum]:
    """The data of a call, from any collection or iterator."""
    if isinstance(data, Datum | str | Mapping) or not isinstance(data, Iterable):
        raise refuse("data", f"expected a list of Datum, got {type(data).__name__}")
    return list(data)


def _named(name: object) -> str:
    """A name, which the service would else give itself."""
    if not (given := _check.text(name, "name")):
        raise refuse("name", "must not be empty", "MISSING_FIELD")
    return given
