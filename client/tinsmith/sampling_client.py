"""`SamplingClient`: samples from a base model or a checkpoint."""

import functools
import queue
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tinsmith import _check, _handle, _loop, tensors
from tinsmith._connection import CHECKPOINT, SAMPLER, Connection
from tinsmith._convert import delta_from_pb, model_input_to_pb, sampling_params_to_pb
from tinsmith._leases import new_lease_id
from tinsmith._replicas import Work
from tinsmith._samples import Given, Samples
from tinsmith._tokenizer import fetch_tokenizer, load_tokenizer
from tinsmith._twins import async_twins
from tinsmith._weights import Weights
from tinsmith.checkpoints import stored
from tinsmith.errors import InvalidArgumentError, unsupported
from tinsmith.futures import ClientFuture, WaitableFuture
from tinsmith.keys import shown_of
from tinsmith.types import (
    ModelInput,
    SampledTokens,
    SampleResponse,
    SamplingParams,
    TensorData,
)
from tinsmith.types.samples import nan_to_none
from tinsmith.types.tensor import target_tokens
from tinsmith.types.unsupported import Holder
from tinsmith.v1 import checkpoint_service_pb2
from tinsmith.v1 import sampler_service_pb2 as pb

if TYPE_CHECKING:
    from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceAsyncStub

SEED_BITS = 62
WHOLE = (("tinsmith-gather-s", "10"),)
"""Nobody sees a token of `sample` before the last one is there. A message is sent all the same now
and then: what lies between may take a connection that says nothing for minutes for a dead one."""
INT32_MAX = 2**31 - 1

T = TypeVar("T")


@async_twins("sample", "compute_logprobs", final=True)
class SamplingClient:
    """Samples from one set of weights, which never change under it.

    Where the checkpoint's name is given to other weights, this client still gets its own while the
    Sampler holds them, and else a FailedPreconditionError (CHECKPOINT_REPLACED); a new client has
    the new ones.

    Made by `ServiceClient` or `TrainingClient`; may be pickled, and keeps its settings but for the
    key, which the other process has from its environment.

    Weights that were saved without a name live as long as a client holds them, this one or a copy
    in another process: until it is closed or collected as garbage. After that they go in about a
    second if their model has newer ones or is deleted; within a minute if this client was pickled,
    since a copy may be on its way, or its process was killed. A process that sleeps, or has no
    network, for half a minute or longer holds nothing meanwhile: if its weights went, calls raise
    NotFoundError (CHECKPOINT_NOT_FOUND). So they may after a loss of power at the Checkpoint
    server, or DataLossError. Weights that are to stay need a name
    (`save_weights_for_sampler`).
    """

    def __init__(self, connection: Connection, base_model: str, weights: Weights) -> None:
        self._connection = connection
        self._base_model = base_model
        self._weights = weights
        self._tokenizer: Any = None

    @property
    def model_path(self) -> str | None:
        """The checkpoint's path, or None for the base model itself."""
        return self._weights.now.path

    @classmethod
    def opened(
        cls, connection: Connection, base_model: str, model_path: str
    ) -> "SamplingClientFuture":
        """A client for a checkpoint, after a look whether it is there."""
        model_path = stored(_check.text(model_path, "model_path"))
        lease_id = new_lease_id()
        request = checkpoint_service_pb2.GetCheckpointRequest(
            checkpoint_path=model_path, lease_id=lease_id
        )

        async def build() -> SamplingClient:
            async def ask() -> checkpoint_service_pb2.GetCheckpointResponse:
                return await (await connection.checkpoint()).GetCheckpoint(request)

            found = await connection.retrying("create_sampling_client", ask, service=CHECKPOINT)
            checkpoint = found.checkpoint
            base = await connection.base_model_name(base_model) or checkpoint.base_model
            weights = Weights(connection, model_path, checkpoint.digest, lease_id)
            return cls(connection, base, weights)

        return SamplingClientFuture(_loop.run(build()))

    @classmethod
    def made(
        cls, connection: Connection, model_path: str | None, base_model: str | None
    ) -> "SamplingClientFuture":
        """A client for a checkpoint or for a base model.

        Raises:
            InvalidArgumentError: It is said of neither (MISSING_FIELD).
        """
        if model_path is not None:
            return cls.opened(connection, base_model or "", model_path)
        if base_model is None:
            message = "create_sampling_client: pass model_path or base_model"
            raise InvalidArgumentError(message, field="model_path", reason="MISSING_FIELD")
        name = _check.text(base_model, "base_model")

        async def build() -> SamplingClient:
            held = await connection.base_model_name(name)
            return cls(connection, held, Weights(connection, None))

        return SamplingClientFuture(_loop.run(build()))

    def close(self) -> None:
        """Let go of the weights at once, rather than when this client is collected as garbage."""
        self._weights.close()

    def __reduce__(self) -> Any:
        self._weights.hand_on()
        path, digest = self._weights.now
        return _rebuild, (self._connection.settings, self._base_model, path, digest)

    def get_sampler_handle(self) -> str:
        """What `from_sampler_handle` makes a client of, in any process; letters, digits, - and _.

        It has the cluster's address in it, and no key. Weights without a name are to be opened
        within a minute after this client is gone.
        """
        self._weights.hand_on()
        path, digest = self._weights.now
        settings = self._connection.settings
        return _handle.written(settings, self._base_model, path, digest)

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> "SamplingClient":
        """A client for what another one samples from.

        Args:
            handle: Of `get_sampler_handle`.
            api_key: As in `ServiceClient`.

        Raises:
            InvalidArgumentError: It is none (also a ValueError).
        """
        return _rebuild(*_handle.read(_check.text(handle, "handle")), api_key)

    @staticmethod
    def create(
        holder: Any,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        sampling_session_id: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
    ) -> "SamplingClientFuture":
        """As `ServiceClient.create_sampling_client`.

        Args:
            holder: `ServiceClient.holder`.
            model_path: The checkpoint's path.
            base_model: Name of the base model.
            sampling_session_id: What `get_sampler_handle` gave, in place of the two.
            retry_config: Ignored; the client retries by itself.
            record_stability_info: Not supported.
        """
        if not isinstance(holder, Holder):
            raise _check.refuse("holder", "expected ServiceClient.holder")
        if record_stability_info:
            raise unsupported("record_stability_info", "stable_reinforce is not supported")
        if sampling_session_id is None:
            return SamplingClient.made(holder.connection, model_path, base_model)
        _, base, path, digest = _handle.read(_check.text(sampling_session_id, "handle"))

        async def build() -> SamplingClient:
            return SamplingClient(holder.connection, base, Weights(holder.connection, path, digest))

        return SamplingClientFuture(_loop.run(build()))

    def on_queue_state_change(self, queue_state: Any, queue_state_reason: str | None) -> None:
        """Tinker calls this; nobody does here: the log says what a call waits for."""

    def get_telemetry(self) -> None:
        """None: there is no telemetry."""

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> WaitableFuture[SampleResponse]:
        """Sample continuations of a prompt.

        Args:
            prompt: P tokens.
            num_samples: How many, at least 1.
            sampling_params: How to draw; None: the defaults.
            include_prompt_logprobs: Also return the prompt's logprobs, at temperature 1.
            topk_prompt_logprobs: Number of most likely tokens to return at each position, too.
            topk_sample_logprobs: Number of most likely tokens to return with each sampled one.
            target_prompt_logprobs: Tokens whose logprobs to return: int64 `(P - 1, K)`, dense or
                sparse, as a TensorData. Row i is for prompt position i + 1; -1 is no token.
            prompt_alt_tokens_k: Number of tokens to draw at each prompt position but the first, at
                the temperature of `sampling_params`, from all tokens.
            prompt_logprobs_last_n: Only the last so many positions of `include_prompt_logprobs`,
                which must be set, and `topk_prompt_logprobs`; 1 to P - 1. None: all.

        Raises:
            InvalidArgumentError: At once for what the client can see, else from the future.
        """
        request = self._request(prompt, num_samples, sampling_params)
        request.include_prompt_logprobs = _check.flag(
            include_prompt_logprobs, "include_prompt_logprobs"
        )
        for name, count in (
            ("topk_prompt_logprobs", topk_prompt_logprobs),
            ("topk_sample_logprobs", topk_sample_logprobs),
            ("prompt_alt_tokens_k", prompt_alt_tokens_k),
        ):
            setattr(request, name, _check.whole(count, name, 0, INT32_MAX))
        if prompt_logprobs_last_n is not None:
            if not request.include_prompt_logprobs:
                why = "needed by prompt_logprobs_last_n"
                raise _check.refuse("include_prompt_logprobs", why, "MISSING_FIELD")
            request.prompt_logprobs_last_n = _last_n(prompt_logprobs_last_n)
        if target_prompt_logprobs is not None:
            targets = target_tokens(target_prompt_logprobs, "target_prompt_logprobs")
            tensors.write(request.target_prompt_logprobs, targets)

        async def make(sampler: "SamplerServiceAsyncStub") -> SampleResponse:
            samples = Samples(request.num_samples, target_prompt_logprobs)
            async for response in sampler.Sample(request, metadata=WHOLE):
                samples.add(response)
            return samples.result()

        return WaitableFuture(_loop.run(self._retrying("sample", request, make)))

    def _request(
        self, prompt: ModelInput, num_samples: int, params: SamplingParams | None
    ) -> pb.SampleRequest:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            why = f"expected SamplingParams, got {type(params).__name__}"
            raise _check.refuse("sampling_params", why)
        if params.seed is None:
            # Drawn here, so that an attempt that is repeated makes the same samples.
            params = replace(params, seed=secrets.randbits(SEED_BITS))
        path, digest = self._weights.now
        return pb.SampleRequest(
            base_model=self._base_model,
            checkpoint_path=path or "",
            checkpoint_digest=digest,
            prompt=model_input_to_pb(prompt, "prompt"),
            num_samples=_check.whole(num_samples, "num_samples", 1, INT32_MAX),
            sampling_params=sampling_params_to_pb(params),
        )

    def sample_stream(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
    ) -> Iterator[SampledTokens]:
        """Sample and get tokens as they are made; ending the iteration stops the work.

        A stream that breaks is begun again and goes on after the tokens that were given out.

        Raises:
            DataLossError: Begun again, it made other tokens than before (SAMPLE_DIFFERS): another
                Sampler computes otherwise, and the two cannot be one sample.
        """
        # Not a generator itself: that would read its arguments when the first token is asked for.
        return self._stream(self._request(prompt, num_samples, sampling_params))

    def _stream(self, request: pb.SampleRequest) -> Iterator[SampledTokens]:
        items: queue.SimpleQueue[SampledTokens | None] = queue.SimpleQueue()

        async def pump() -> None:
            given = [Given() for _ in range(request.num_samples)]

            async def make(sampler: "SamplerServiceAsyncStub") -> None:
                for sequence in given:
                    sequence.seen = 0
                async for response in sampler.Sample(request):
                    for part in map(delta_from_pb, response.deltas):
                        new = given[part.sequence_index].take(part)
                        if new is not None:
                            items.put(new)

            try:
                await self._retrying("sample", request, make)
            finally:
                items.put(None)

        future: Future[None] = _loop.run(pump())
        try:
            while (item := items.get()) is not None:
                yield item
            future.result()
        finally:
            future.cancel()

    async def _retrying(
        self,
        what: str,
        request: pb.SampleRequest | pb.ComputeLogprobsRequest,
        make: "Callable[[SamplerServiceAsyncStub], Awaitable[T]]",
    ) -> T:
        digest = request.checkpoint_digest.hex()
        work = Work(
            weights=f"{request.base_model} {request.checkpoint_path} {digest}",
            tokens=tensors.decode(request.prompt.chunks[0].tokens),
            sequences=request.num_samples if isinstance(request, pb.SampleRequest) else 1,
        )
        attempt = functools.partial(self._connection.on_a_sampler, work, make)
        return await self._connection.retrying(what, attempt, service=SAMPLER)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> WaitableFuture[list[float | None]]:
        """Logprob of each prompt token given those before it; None at position 0.

        Args:
            prompt: P tokens.
            prompt_logprobs_last_n: Only the last so many, 1 to P - 1; the others are None. None:
                all.
        """
        path, digest = self._weights.now
        request = pb.ComputeLogprobsRequest(
            base_model=self._base_model,
            checkpoint_path=path or "",
            checkpoint_digest=digest,
            prompt=model_input_to_pb(prompt, "prompt"),
        )
        if prompt_logprobs_last_n is not None:
            request.prompt_logprobs_last_n = _last_n(prompt_logprobs_last_n)

        async def make(sampler: "SamplerServiceAsyncStub") -> list[float | None]:
            response = await sampler.ComputeLogprobs(request)
            return nan_to_none(tensors.decode(response.prompt_logprobs.logprobs))

        return WaitableFuture(_loop.run(self._retrying("compute_logprobs", request, make)))

    def get_base_model(self) -> str:
        """Name of the base model."""
        return self._base_model

    async def get_base_model_async(self) -> str:
        """`get_base_model` for coroutines."""
        return self._base_model

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer. Needs transformers; downloads once."""
        if self._tokenizer is None:
            fetch = fetch_tokenizer(self._connection, self._base_model)
            self._tokenizer = load_tokenizer(_loop.run(fetch).result())
        return self._tokenizer


def _rebuild(
    settings: Mapping[str, Any],
    base_model: str,
    model_path: str | None,
    digest: bytes,
    api_key: str | None = None,
) -> SamplingClient:
    connection = Connection(**settings, shown=shown_of(api_key))
    return SamplingClient(connection, base_model, Weights(connection, model_path, digest))


class SamplingClientFuture(ClientFuture[SamplingClient], SamplingClient):  # type: ignore[misc]
    """A future that is used as the client, too; pickled, it is one."""


def _last_n(count: object) -> int:
    return _check.whole(count, "prompt_logprobs_last_n", 1, INT32_MAX)
