"""The face of the Training service: parse, call the rules, encode. No rule lives here."""

import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1.training_service_pb2_grpc import TrainingServiceServicer
from tinsmithd import failpoints, keys
from tinsmithd.config import TrainingConfig
from tinsmithd.convert import types as convert
from tinsmithd.convert.limits import limits_to_pb, server_version
from tinsmithd.convert.tensors import check_format
from tinsmithd.convert.times import timestamp_to_pb, ttl_from_pb
from tinsmithd.domain import (
    LOSSES,
    BaseModelInfo,
    CheckpointKind,
    CheckpointPath,
    new_ephemeral_name,
)
from tinsmithd.errors import FailedPrecondition, InvalidArgument, Reason
from tinsmithd.rpc import flow
from tinsmithd.rpc.intake import refusal_of_call
from tinsmithd.rpc.paging import PAGE_SIZE_MAX, page_of, token_after
from tinsmithd.saves import SaveOptions
from tinsmithd.shards import shard_of
from tinsmithd.training.call import (
    Call,
    LoadWork,
    RefusedWork,
    SaveWork,
    StepWork,
    Work,
    repeats_bits,
)
from tinsmithd.training.journal import StoredStep
from tinsmithd.training.models import Model, Models, NewModel
from tinsmithd.training.requests import (
    ComputeRequest,
    DataLimits,
    digest_of,
    read_call,
    read_work,
)
from tinsmithd.training.responses import (
    answer_to_pb,
    computed_to_pb,
    loaded_to_pb,
    saved_to_pb,
    step_to_pb,
)

ENGINE_SECONDS = "tinsmith-engine-seconds"
CALL_DIGEST = "tinsmith-call-digest-bin"
_DURABILITY = {
    "none": pb.DURABILITY_MODE_NONE,
    "async": pb.DURABILITY_MODE_ASYNC,
    "fsync": pb.DURABILITY_MODE_FSYNC,
}

Response = TypeVar("Response", pb.ForwardResponse, pb.ForwardBackwardResponse)


class TrainingServicer(TrainingServiceServicer):
    """Serves `tinsmith.v1.TrainingService`."""

    def __init__(self, config: TrainingConfig, models: Models) -> None:
        self._config = config
        self._models = models
        names = [field.name for field in dataclasses.fields(DataLimits)]
        self._data_limits = DataLimits(**{name: getattr(config, name) for name in names})

    async def GetCapabilities(
        self, request: pb.GetCapabilitiesRequest, context: Any
    ) -> pb.GetCapabilitiesResponse:
        """Say what this cluster can do."""
        response = pb.GetCapabilitiesResponse(
            server_version=server_version(),
            limits=limits_to_pb(pb.TrainingLimits, self._config, page_size_max=PAGE_SIZE_MAX),
            loss_fns=list(LOSSES),
            durability_mode=_DURABILITY[self._config.durability],
            sampler_address=self._config.sampler_address,
            checkpoint_address=self._config.checkpoint_address,
            training_address=self._elsewhere(),
            gateway_url=self._config.gateway_url,
            owner=keys.current().account,
        )
        group = self._models.place.current
        if group is not None:
            response.base_models.append(convert.base_model_to_pb(group.info))
            response.engine = convert.engine_to_pb(group.engine)
            response.world_size = group.world_size
            exact = self._config.replay_check == "exact" and repeats_bits(group.identity)
            response.replay_check = pb.REPLAY_CHECK_EXACT if exact else pb.REPLAY_CHECK_CLOSE
        return response

    # --- models -------------------------------------------------------------------------------

    async def CreateModel(
        self, request: pb.CreateModelRequest, context: Any
    ) -> pb.CreateModelResponse:
        """Create a model."""
        self._check_here()
        model = await self._models.create(self._new_model(request))
        return pb.CreateModelResponse(model=_model_to_pb(model))

    def _new_model(self, request: pb.CreateModelRequest) -> NewModel:
        path = tuning = None
        caller = keys.current()
        if request.checkpoint_path:
            path = convert.path_from_pb(request.checkpoint_path, "checkpoint_path")
            path = path.of(caller.search)
            if given := request.WhichOneof("tuning"):
                raise InvalidArgument(given, "must be unset with checkpoint_path")
        else:
            if request.with_optimizer:
                message = "needed by with_optimizer"
                raise InvalidArgument("checkpoint_path", message, Reason.MISSING_FIELD)
            tuning = convert.tuning_from_pb(request, "", self._config.rank_max)
        content = pb.CreateModelRequest()
        content.CopyFrom(request)
        content.ClearField("request_id")
        return NewModel(
            base_model=request.base_model,
            tuning=tuning,
            path=path,
            with_optimizer=request.with_optimizer,
            user_metadata=dict(convert.metadata_from_pb(request.user_metadata, "user_metadata")),
            request_id=convert.request_id_from_pb(request.request_id, "request_id"),
            digest=digest_of(content),
            model_id=convert.model_id_from_pb(request.model_id, "model_id"),
            owner=caller.account,
            models_max=self._models.quotas.models_max,
        )

    def _elsewhere(self) -> str:
        """Where the caller's models are, if that is not here."""
        shards = self._config.shards
        if not shards or keys.current().sees_all:
            return ""
        found = shard_of(keys.current().owner, shards)
        return "" if found in self._config.own_shards else found

    def _check_here(self) -> None:
        if address := self._elsewhere():
            message = f"the models of this tenant are at {address}"
            metadata = {"training_address": address}
            raise FailedPrecondition(message, Reason.OTHER_SHARD, metadata=metadata)

    def _find(self, model_id: str) -> Model:
        """The model that the caller means.

        Raises:
            FailedPrecondition: This caller's are elsewhere (OTHER_SHARD).
            NotFound: There is none for this caller (MODEL_NOT_FOUND).
        """
        self._check_here()
        return self._models.find(keys.current(), model_id)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """Return one model."""
        return pb.GetModelResponse(model=_model_to_pb(self._find(request.model_id)))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        """Return a page of models, newest first."""
        self._check_here()
        asked = page_of(request.page_size, request.page_token)
        models, total = self._models.page(keys.current(), asked.below, asked.size + 1)
        page = models[: asked.size]
        return pb.ListModelsResponse(
            models=[_model_to_pb(model) for model in page],
            next_page_token=token_after(page[-1].number) if len(models) > asked.size else "",
            total_size=total,
        )

    async def ListSteps(self, request: pb.ListStepsRequest, context: Any) -> pb.ListStepsResponse:
        """Return a page of a model's optimizer steps, newest first."""
        asked = page_of(request.page_size, request.page_token)
        model = self._find(request.model_id)
        steps, total = await self._models.steps(model, asked.below, asked.size + 1)
        page = steps[: asked.size]
        return pb.ListStepsResponse(
            steps=[_step_to_pb(step) for step in page],
            next_page_token=token_after(page[-1].position) if len(steps) > asked.size else "",
            total_size=total,
        )

    async def DeleteModel(
        self, request: pb.DeleteModelRequest, context: Any
    ) -> pb.DeleteModelResponse:
        """Delete a model."""
        await self._models.delete(self._find(request.model_id).model_id)
        return pb.DeleteModelResponse()

    # --- calls on one model -------------------------------------------------------------------

    async def Forward(  # type: ignore[override]  # grpc.aio's form of the method
        self, request_iterator: AsyncIterator[pb.ForwardRequest], context: Any
    ) -> AsyncIterator[pb.ForwardResponse]:
        """Compute losses and logprobs."""
        async for response in self._compute(request_iterator, context, pb.ForwardResponse):
            yield response

    async def ForwardBackward(  # type: ignore[override]  # grpc.aio's form of the method
        self, request_iterator: AsyncIterator[pb.ForwardBackwardRequest], context: Any
    ) -> AsyncIterator[pb.ForwardBackwardResponse]:
        """Compute losses and logprobs and add the gradients."""
        async for response in self._compute(request_iterator, context, pb.ForwardBackwardResponse):
            yield response

    async def _compute(
        self,
        requests: AsyncIterator[ComputeRequest],
        context: Any,
        response_type: type[Response],
    ) -> AsyncIterator[Response]:
        def found(model_id: str) -> BaseModelInfo:
            model = self._find(model_id)
            self._models.quotas.check_queue(model)
            return model.info

        read = await read_call(requests, found, self._data_limits)
        model, tensor_format = self._find(read.model_id), read.tensor_format
        await self._models.wake(model)
        # To grpc a cancelled stream ends like a finished one. Answering tells them apart: it fails
        # on a call that is gone, and until it is done the cancellation has reached this task.
        # Who has this knows that the call arrived whole, and can ask for its answer.
        receipt = ((CALL_DIGEST, read.call.digest),) if read.call.seq_id else ()
        await flow.current().begin(receipt)
        failpoints.hit("recv")
        answer = self._models.submit(model, read.call)
        flow.current().handed_over(kept=True)
        acknowledge = read.call.acknowledge
        del read  # the lane has the call, and drops it before a slow reader is done
        if acknowledge and await answer.accepted():
            yield response_type(accepted=True)
        async for response in computed_to_pb(answer, tensor_format, response_type):
            yield response
        context.set_trailing_metadata(((ENGINE_SECONDS, f"{answer.engine_s:.6f}"),))

    async def OptimStep(self, request: pb.OptimStepRequest, context: Any) -> pb.OptimStepResponse:
        """Apply one optimizer step."""
        value = await self._submit(
            request,
            lambda: StepWork(convert.adam_from_pb(request.adam_params, "adam_params")),
        )
        return step_to_pb(value)

    async def SaveCheckpoint(
        self, request: pb.SaveCheckpointRequest, context: Any
    ) -> pb.SaveCheckpointResponse:
        """Save the model under a name."""
        value = await self._submit(request, lambda: SaveWork(self._save_options(request)))
        return saved_to_pb(value)

    def _save_options(self, request: pb.SaveCheckpointRequest) -> SaveOptions:
        kind = convert.kind_from_pb(request.kind, "kind")
        ttl_s = ttl_from_pb(request.ttl if request.HasField("ttl") else None, "ttl")
        if request.name or kind is CheckpointKind.TRAINING:
            name = convert.name_from_pb(request.name, "name")
        else:
            name = new_ephemeral_name()
            ttl_s = self._config.ephemeral_ttl_s if ttl_s is None else ttl_s
        return SaveOptions(
            path=CheckpointPath(request.model_id, kind, name),
            ttl_seconds=ttl_s,
            overwrite=request.overwrite,
            user_metadata=convert.metadata_from_pb(request.user_metadata, "user_metadata"),
            # A call with a number that comes again is the same call; one without is another.
            request_id=digest_of(request).hex() if request.seq_id else secrets.token_hex(32),
            ephemeral=not request.name,
            lease_id=convert.lease_id_from_pb(request.lease_id, "lease_id"),
        )

    async def LoadCheckpoint(
        self, request: pb.LoadCheckpointRequest, context: Any
    ) -> pb.LoadCheckpointResponse:
        """Replace the model's state by that of a checkpoint."""
        value = await self._submit(
            request,
            lambda: LoadWork(
                convert.path_from_pb(request.checkpoint_path, "checkpoint_path"),
                request.with_optimizer,
            ),
        )
        return loaded_to_pb(value)

    async def _submit(self, request: Any, read: Callable[[], Work]) -> Mapping[str, Any]:
        # A call that cannot be read is refused in the model's order: it uses its number.
        model = self._find(request.model_id)
        await self._models.wake(model)
        refusal = refusal_of_call()
        work = read_work(read) if refusal is None else RefusedWork(refusal)
        failpoints.hit("recv")
        numbered = request.seq_id > 0
        call = Call(request.seq_id, digest_of(request, refusal), work, acknowledge=numbered)
        answer = self._models.submit(model, call)
        if numbered and await answer.accepted():
            await flow.current().begin(((CALL_DIGEST, call.digest),))
        return await answer.value()

    async def GetAnswer(  # type: ignore[override]  # grpc.aio's form of the method
        self, request: pb.GetAnswerRequest, context: Any
    ) -> AsyncIterator[pb.GetAnswerResponse]:
        """Return the answer of a call that was sent before."""
        if (refusal := refusal_of_call()) is not None:
            raise refusal
        check_format(request.tensor_format, "tensor_format")
        if request.seq_id < 1:
            raise InvalidArgument("seq_id", f"{request.seq_id} is no call's number: below 1")
        digest = convert.digest_from_pb(request.call_digest, "call_digest")
        model = self._find(request.model_id)
        await self._models.wake(model)
        answer = self._models.answer(model, request.seq_id, digest)
        async for response in answer_to_pb(answer, request.tensor_format):
            yield response


def _step_to_pb(step: StoredStep) -> pb.Step:
    return pb.Step(
        seq_id=step.seq_id,
        step_count=step.step_count,
        create_time=timestamp_to_pb(step.time_s),
        metrics=step.metrics,
    )


def _model_to_pb(model: Model) -> pb.Model:
    state = pb.MODEL_STATE_READY
    if model.lane.lost:
        state = pb.MODEL_STATE_LOST
    elif model.lane.recovering:
        state = pb.MODEL_STATE_RECOVERING
    elif model.lane.suspended:
        state = pb.MODEL_STATE_SUSPENDED
    return pb.Model(
        model_id=model.public_id,
        owner=model.owner,
        base_model=model.info.name,
        **convert.tuning_to_pb(model.tuning),
        user_metadata=model.user_metadata,
        step_count=model.step_count,
        create_time=timestamp_to_pb(model.create_time_s),
        last_request_time=timestamp_to_pb(model.last_request_time_s),
        next_seq_id=model.lane.next_seq_id,
        pending_calls=model.lane.pending,
        state=state,
        state_message="" if state == pb.MODEL_STATE_READY else model.state_message,
    )
