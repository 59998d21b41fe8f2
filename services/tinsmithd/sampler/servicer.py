"""The face of the Sampler service: parse, call the admission, encode. No rule lives here."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from tinsmith.v1 import sampler_service_pb2 as pb
from tinsmith.v1.sampler_service_pb2_grpc import SamplerServiceServicer
from tinsmithd import keys
from tinsmithd.config import SamplerConfig
from tinsmithd.convert import sampler as convert
from tinsmithd.convert.limits import limits_to_pb, server_version
from tinsmithd.convert.types import base_model_to_pb, digest_from_pb, engine_to_pb, path_from_pb
from tinsmithd.domain import Output, SampleRequest
from tinsmithd.errors import InvalidArgument, NotFound, Reason, Unavailable
from tinsmithd.rpc.intake import off_loop
from tinsmithd.sampler.adapters import Adapters
from tinsmithd.sampler.admission import Admission
from tinsmithd.sampler.loaded_adapters import Adapter
from tinsmithd.sampler.places import Quota
from tinsmithd.sampler.validate import RequestLimits, check_request

PIECE_BYTES_MAX = 1024 * 1024


class SamplerServicer(SamplerServiceServicer):
    """Serves `tinsmith.v1.SamplerService`; `admission` is set once the base model is loaded."""

    def __init__(self, config: SamplerConfig, adapters: Adapters) -> None:
        self._config = config
        self._adapters = adapters
        self.admission: Admission | None = None
        self._limits = RequestLimits(
            config.num_samples_max,
            config.stop_characters_max,
            config.topk_max,
            config.sample_tokens_max,
            config.alternatives_max,
        )

    def _ready(self, base_model: str) -> Admission:
        if self.admission is None:
            text = "the base model is still loading"
            raise Unavailable(text, Reason.SAMPLER_UNAVAILABLE, retry_after_s=1.0)
        name = self.admission.info.name
        if base_model and base_model != name:
            message = f"no base model {base_model!r}; this server holds {name!r}"
            raise NotFound(message, Reason.BASE_MODEL_NOT_FOUND)
        return self.admission

    async def GetCapabilities(
        self, request: pb.SamplerServiceGetCapabilitiesRequest, context: Any
    ) -> pb.SamplerServiceGetCapabilitiesResponse:
        """Say what this server can do."""
        limits = limits_to_pb(pb.SamplerLimits, self._config, piece_bytes_max=PIECE_BYTES_MAX)
        response = pb.SamplerServiceGetCapabilitiesResponse(
            server_version=server_version(),
            limits=limits,
            engine=engine_to_pb(self._config.engine),
        )
        if self.admission is not None:
            response.base_models.append(base_model_to_pb(self.admission.info))
            response.batch_invariant = self.admission.traits.batch_invariant
        return response

    async def Sample(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.SampleRequest, context: Any
    ) -> AsyncIterator[pb.SampleResponse]:
        """Sample continuations and stream their tokens."""
        admission, form = self._ready(request.base_model), request.tensor_format
        limits = self._config
        asked = convert.sample_request_from_pb(
            request, chunks_max=limits.chunks_max, stops_max=limits.stops_max
        )
        wanted = self._check(admission, asked)
        gather_s = convert.gather_s_from_metadata(context.invocation_metadata())
        async with self._run(admission, wanted, request, gather_s) as outputs:
            async for output in outputs:
                if convert.is_long(output):
                    yield await off_loop(convert.output_to_pb, output, form)
                else:
                    yield convert.output_to_pb(output, form)

    async def ComputeLogprobs(
        self, request: pb.ComputeLogprobsRequest, context: Any
    ) -> pb.ComputeLogprobsResponse:
        """Score a prompt."""
        admission, form = self._ready(request.base_model), request.tensor_format
        chunks_max = self._config.chunks_max
        asked = convert.compute_request_from_pb(request, chunks_max=chunks_max)
        wanted = self._check(admission, asked)
        response = pb.ComputeLogprobsResponse()
        async with self._run(admission, wanted, request) as outputs:
            async for output in outputs:
                made = await off_loop(convert.output_to_pb, output, form)
                response.prompt_cache_hit_tokens += made.prompt_cache_hit_tokens
                response.prompt_logprobs.MergeFrom(made.prompt_logprobs)
        return response

    async def GetTokenizer(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        """Stream the tokenizer's files."""
        files = await self._ready(request.base_model).tokenizer_files()
        for name, data in files.items():
            for start in range(0, len(data), PIECE_BYTES_MAX):
                part = data[start : start + PIECE_BYTES_MAX]
                yield pb.GetTokenizerResponse(file_name=name, data=part)

    def _check(self, admission: Admission, request: SampleRequest) -> SampleRequest:
        caller = keys.current()
        if caller.key_id:  # what one tenant sampled is none of another's business
            request = dataclasses.replace(request, cache_salt=caller.account)
        return check_request(request, admission.info, self._limits)

    def _quota(self, caller: keys.Caller) -> Quota:
        """What the caller's tenant may have of this server."""
        config = self._config
        rate = "tenant_tokens_per_minute_max"
        return Quota(
            caller.limit("tenant_samples_max", config.tenant_samples_max),
            caller.limit(rate, config.tenant_tokens_per_minute_max),
        )

    @contextlib.asynccontextmanager
    async def _run(
        self,
        admission: Admission,
        wanted: SampleRequest,
        request: pb.SampleRequest | pb.ComputeLogprobsRequest,
        gather_s: float | None = None,
    ) -> AsyncIterator[AsyncIterator[Output]]:
        """Outputs of a request, whose checkpoint is held until it ends."""
        adapter: Adapter | None = None
        digest, caller = _digest(request), keys.current()
        async with contextlib.AsyncExitStack() as stack:
            if request.checkpoint_path:
                path = path_from_pb(request.checkpoint_path, "checkpoint_path")
                path = path.of(caller.search)
                name = admission.info.name
                lease = await stack.enter_async_context(self._adapters.leases.held(path))
                adapter = await self._adapters.find(path, name, digest, admission.has, lease)
            outputs = admission.run(
                wanted, adapter, caller.account, quota=self._quota(caller), gather_s=gather_s
            )
            await stack.enter_async_context(contextlib.aclosing(outputs))  # type: ignore[type-var]
            yield outputs


def _digest(request: pb.SampleRequest | pb.ComputeLogprobsRequest) -> bytes:
    digest = digest_from_pb(request.checkpoint_digest, "checkpoint_digest") or b""
    if digest and not request.checkpoint_path:
        text = "needed by checkpoint_digest"
        raise InvalidArgument("checkpoint_path", text, Reason.MISSING_FIELD)
    return digest
