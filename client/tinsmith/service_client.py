"""`ServiceClient`: the way into a cluster."""

import uuid
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tinsmith import _check, _loop
from tinsmith._connection import GIVE_UP_AFTER_S, Connection
from tinsmith._sessions import Session
from tinsmith._twins import async_twins
from tinsmith.addresses import address_of
from tinsmith.checkpoints import stored
from tinsmith.errors import unsupported
from tinsmith.futures import APIFuture, done
from tinsmith.keys import shown_of
from tinsmith.rest_client import RestClient, capabilities_of
from tinsmith.sampling_client import SamplingClient, SamplingClientFuture
from tinsmith.training_client import TrainingClient, TrainingClientFuture
from tinsmith.types import AdamOptimizerConfig, GetServerCapabilitiesResponse, LoraConfig
from tinsmith.types.losses import LossHandle, loss_of
from tinsmith.types.unsupported import Holder
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1 import types_pb2

PerDatumLossFn = Callable[..., tuple[Any, Mapping[str, Any]]]


@async_twins(
    *("create_lora_training_client", "create_full_training_client"),
    *("create_training_client_from_state", "get_training_client"),
    *("create_training_client_from_state_with_optimizer", "create_sampling_client"),
    "copy_weights",
    final=True,
)
class ServiceClient:
    """The way into a cluster. A context manager that closes its connections.

    Args:
        user_metadata: Kept with every model that is created.
        project_id: Ignored; there are no projects.
        base_url: `host:port` of the Training server, or `https://host:port` where the services, or
            a proxy in front of all of them, speak TLS (`tinsmith.channels` says whom it trusts);
            else `TINSMITH_ADDRESS`, else `TINKER_BASE_URL`, else 127.0.0.1:50051. It says where the
            other two services are, unless `TINSMITH_ADDRESS_SAMPLER` or
            `TINSMITH_ADDRESS_CHECKPOINT` does. Where there are several Samplers, calls are spread
            over them, and move when one dies.
        api_key: Shown with every call; else `TINSMITH_API_KEY`, the content of the file that
            `TINSMITH_API_KEY_FILE` names, or `TINKER_API_KEY`. Needed where the cluster has keys.
        display_name: Ignored.
        default_headers_overrides: Ignored; there are no HTTP headers.
        give_up_after_s: Seconds for which a call is repeated while nothing but failures comes. They
            start anew with every answer to another call of the same model or, for what belongs to
            no model, of the same service.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        give_up_after_s: float = GIVE_UP_AFTER_S,
        **kwargs: Any,
    ) -> None:
        if isinstance(user_metadata, str):
            message = "expected a mapping, got str; an address is given as base_url"
            raise _check.refuse("user_metadata", message)
        for name in kwargs:
            warnings.warn(f"ServiceClient ignores {name}", FutureWarning, stacklevel=2)
        self._user_metadata = _check.metadata(user_metadata)
        seconds = _check.real(give_up_after_s, "give_up_after_s")
        self._connection = Connection(address_of(base_url), seconds, shown=shown_of(api_key))
        self._session = Session()

    # --- clients ------------------------------------------------------------------------------

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        optimizer: AdamOptimizerConfig | None = None,
        *,
        expert_rank: int | None = None,
    ) -> TrainingClientFuture:
        """Create a model with a fresh adapter.

        Args:
            base_model: Name of a base model that the cluster holds; `org/model` and
                `org/model:variant` also mean one that it holds as `model`.
            rank: Of the adapter.
            seed: Of its first values; None draws one.
            train_mlp: Adapt the MLP projections.
            train_attn: Adapt the attention projections.
            train_unembed: Adapt the output head.
            user_metadata: Kept with the model.
            optimizer: Only AdamW.
            expert_rank: Of the adapter on each expert, at most `rank`; None shares `rank` out among
                the experts that a token passes through.
        """
        _check_optimizer(optimizer)
        checked = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        of_experts = _check.optional_whole(expert_rank, "expert_rank", 1, checked.rank)
        lora = types_pb2.LoraConfig(
            rank=checked.rank,
            seed=_check.seed(checked.seed, "seed"),
            train_mlp=checked.train_mlp,
            train_attn=checked.train_attn,
            train_unembed=checked.train_unembed,
            expert_rank=of_experts or 0,
        )
        return self._create(user_metadata, base_model=base_model, lora_config=lora)

    def create_full_training_client(
        self, base_model: str, user_metadata: Mapping[str, str] | None = None
    ) -> TrainingClientFuture:
        """Create a model that trains all weights of the base model, without an adapter.

        While it is called it has the trainer to itself: other models are suspended to disk
        meanwhile, and it is when one of them is called. Each such change loads the base model
        again.

        Args:
            base_model: Name of a base model that the cluster holds.
            user_metadata: Kept with the model.

        Raises:
            FailedPreconditionError: There are other models, and the service, which keeps nothing on
                disk, can suspend none (RANK_GROUP_TAKEN).
        """
        full = types_pb2.FullConfig()
        return self._create(user_metadata, base_model=base_model, full_config=full)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: AdamOptimizerConfig | None = None,
    ) -> TrainingClientFuture:
        """Create a model with a checkpoint's weights; its optimizer starts anew."""
        _check_optimizer(optimizer)
        return self._from_state(path, base_model, user_metadata, weights_access_token, False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClientFuture:
        """Create a model that goes on exactly where a TRAINING checkpoint was saved."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, True)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        token: str | None,
        with_optimizer: bool,
    ) -> TrainingClientFuture:
        if token is not None:
            raise unsupported("weights_access_token", "there are no access tokens yet")
        return self._create(
            user_metadata,
            base_model=base_model,
            checkpoint_path=stored(_check.text(path, "path")),
            with_optimizer=with_optimizer,
        )

    def get_training_client(self, model_id: str) -> TrainingClientFuture:
        """Go on with a model that exists, such as one whose script died.

        The new client goes on after the last call that the service was sent, once all of them have
        ended. A client that still uses the model hears of it: its next call fails with
        FailedPreconditionError (SEQ_ID_CONFLICT), and so do those after it.

        Args:
            model_id: `TrainingClient.model_id`; `RestClient.list_training_runs` has them too.

        Raises:
            NotFoundError: There is no such model.
        """
        return TrainingClient.attached(self._connection, _check.text(model_id, "model_id"))

    def _create(
        self, user_metadata: Mapping[str, str] | None, base_model: str | None, **fields: Any
    ) -> TrainingClientFuture:
        request = pb.CreateModelRequest(
            base_model=_check.optional_text(base_model, "base_model"),
            user_metadata={**self._user_metadata, **_check.metadata(user_metadata)},
            request_id=str(uuid.uuid4()),  # sent again, it is still one model
            model_id=self._session.next_model_id(),
            **fields,
        )

        async def build() -> TrainingClient:
            request.base_model = await self._connection.base_model_name(request.base_model)

            async def attempt() -> pb.CreateModelResponse:
                return await self._connection.training().CreateModel(request)

            response = await self._connection.retrying("create_training_client", attempt)
            return TrainingClient(self._connection, response.model)

        return TrainingClientFuture(_loop.run(build()))

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> SamplingClientFuture:
        """Sample from a SAMPLER checkpoint, or from a base model.

        Args:
            model_path: The checkpoint's path.
            base_model: Name of the base model; one of the two is needed.
            retry_config: Ignored; the client retries by itself.
            record_stability_info: Not supported.
        """
        if record_stability_info:
            raise unsupported("record_stability_info", "stable_reinforce is not supported")
        return SamplingClient.made(self._connection, model_path, base_model)

    def create_rest_client(self) -> RestClient:
        """A client for checkpoints and runs."""
        return RestClient(self._connection)

    def create_custom_loss(
        self, fn: PerDatumLossFn, input_ranks: Mapping[str, int]
    ) -> APIFuture[LossHandle]:
        """A loss for `TrainingClient.forward_backward_custom`; it runs in this process.

        Args:
            fn: Takes the logprobs of one datum (torch, float32, shaped like its `target_tokens`)
                and then those of its `loss_fn_inputs` that its parameters name; returns the scalar
                loss, which is summed over the data, and metrics `custom/<name>:sum` or `:mean`.
            input_ranks: Of each parameter: 0, 1 (`[T]`) or 2 (`[T, K]`).

        Raises:
            InvalidArgumentError: The function takes something else.
        """
        return done(loss_of(fn, input_ranks))

    def copy_weights(
        self,
        path: str,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copy a checkpoint; see `RestClient.copy_weights`."""
        rest = self.create_rest_client()
        return rest.copy_weights(
            path, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    # --- about the cluster --------------------------------------------------------------------

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """What the cluster can do; waits until it can do something."""
        return _loop.run(capabilities_of(self._connection)).result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """`get_server_capabilities` for coroutines."""
        return await APIFuture(_loop.run(capabilities_of(self._connection)))

    def get_console_url(self) -> str:
        """Not supported."""
        raise unsupported("get_console_url", "there is no page for a client")

    def get_telemetry(self) -> None:
        """None: there is no telemetry."""

    @property
    def holder(self) -> Any:
        """What `SamplingClient.create` and `AdminClient` take; all else that Tinker's has raises
        UnimplementedError."""
        return Holder(self._connection)

    def close(
        self,
        status: Literal["success", "errored", "interrupted"] = "success",
        detail: str | None = None,
    ) -> APIFuture[None]:
        """Close the connections of this client and of those made with it.

        Args:
            status: Ignored; there are no sessions.
            detail: Ignored.
        """
        return APIFuture(_loop.run(self._connection.close()))

    def __enter__(self) -> "ServiceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close().result()


def _check_optimizer(optimizer: object) -> None:
    if optimizer is not None and not isinstance(optimizer, AdamOptimizerConfig):
        raise unsupported("optimizer", f"{type(optimizer).__name__} is not supported")
