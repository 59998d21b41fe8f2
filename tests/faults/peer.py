"""A small real server that fails as it is told to, for the client to cope with."""

import asyncio
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from tinsmith import tensors
from tinsmith.v1 import checkpoint_service_pb2 as cpb
from tinsmith.v1 import sampler_service_pb2 as spb
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import (
    CheckpointServiceServicer,
    add_CheckpointServiceServicer_to_server,
)
from tinsmith.v1.sampler_service_pb2_grpc import (
    SamplerServiceServicer,
    add_SamplerServiceServicer_to_server,
)
from tinsmith.v1.training_service_pb2_grpc import (
    TrainingServiceServicer,
    add_TrainingServiceServicer_to_server,
)
from tinsmithd.reasons import RULES, Reason

Fault = Callable[[Any], Any]


async def refuse(
    context: Any,
    code: grpc.StatusCode,
    reason: str = "",
    *,
    retry_s: float | None = None,
    address: str = "",
) -> None:
    """End a call with a status as Tinsmith's servers write it."""
    said = {"training_address": address} if address else {}
    info = error_details_pb2.ErrorInfo(reason=reason, domain="tinsmith", metadata=said)
    details = [info] if reason else []
    if retry_s is None and reason and RULES[Reason(reason)].retry == "always":
        retry_s = 0.0
    if retry_s is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        message = AnyMessage()
        message.Pack(detail)
        packed.append(message)
    status = status_pb2.Status(code=code.value[0], message=reason or "no reason", details=packed)
    trailing = (("grpc-status-details-bin", status.SerializeToString()),) if packed else ()
    await context.abort(code, reason or "no reason", trailing)


class Faulty(TrainingServiceServicer, SamplerServiceServicer, CheckpointServiceServicer):
    """One model that applies calls in order; faults are (before or after effect, what to do)."""

    def __init__(self) -> None:
        self.capabilities = pb.GetCapabilitiesResponse()
        self.model = pb.Model(model_id="m", next_seq_id=1, state=pb.MODEL_STATE_READY)
        self.applied: list[tuple[int, str]] = []
        self.messages: dict[int, list[int]] = {}
        self.arrived: list[int] = []
        self.before: dict[int, list[Fault]] = {}
        self.after: dict[int, list[Fault]] = {}
        self.forgetful = False
        self.created: list[str] = []
        self.create_faults: list[Fault] = []
        self.sample_seeds: list[int] = []
        self.sample_metadata: list[dict[str, str]] = []
        self.sample_breaks = 1
        self.sample_cuts = [[1, 2], [3, 4], [5]]
        self.pieces: list[bytes | Fault] = []
        self.delete_faults: list[Fault] = []
        self.checkpoints: set[str] = set()
        self.recorded: list[bytes] = []
        self._turn = asyncio.Condition()
        self._next = 1

    async def GetCapabilities(self, request: Any, context: Any) -> pb.GetCapabilitiesResponse:
        return self.capabilities

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        if self.forgetful:
            self.model.next_seq_id += 1
        return pb.GetModelResponse(model=self.model)

    def _record(self, *requests: Any) -> None:
        """Write a call down without what a client draws by chance."""
        for request in requests:
            if hasattr(request, "request_id"):
                request.ClearField("request_id")
            if isinstance(request, pb.CreateModelRequest):
                request.ClearField("model_id")  # as random as the other
            self.recorded.append(request.SerializeToString(deterministic=True))

    async def CreateModel(self, request: Any, context: Any) -> pb.CreateModelResponse:
        self.created.append(request.request_id)
        self._record(request)
        if self.create_faults:
            await self.create_faults.pop(0)(context)
        return pb.CreateModelResponse(
            model=pb.Model(model_id="m", base_model=request.base_model, next_seq_id=1)
        )

    async def _number(self, seq_id: int, what: str, context: Any, *, valid: bool = True) -> None:
        self.arrived.append(seq_id)
        if self.before.get(seq_id):
            await self.before[seq_id].pop(0)(context)
        async with self._turn:
            await self._turn.wait_for(lambda: self._next >= seq_id)
            if self._next == seq_id:  # else a repeat: no second effect
                self._next += 1
                if valid:
                    self.applied.append((seq_id, what))
                self._turn.notify_all()
        if not valid:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "MISSING_FIELD")
        if self.after.get(seq_id):
            await self.after[seq_id].pop(0)(context)

    async def _compute(self, requests: Any, what: str, context: Any) -> Any:
        messages = [message async for message in requests]
        self._record(*messages)
        first, data = messages[0], [datum for message in messages for datum in message.data]
        self.messages[first.seq_id] = [message.ByteSize() for message in messages]
        valid = first.HasField("loss_fn") and all(d.loss_fn_inputs for d in data)
        await self._number(first.seq_id, what, context, valid=valid)
        shapes = [tensors.decode(d.loss_fn_inputs["target_tokens"]).shape for d in data]
        values = [np.full(shape, -1.0, np.float32) for shape in shapes]
        return [pb.DatumOutput(loss_fn_outputs={"logprobs": tensors.encode(v)}) for v in values]

    async def Forward(self, requests: Any, context: Any) -> AsyncIterator[pb.ForwardResponse]:
        outputs = await self._compute(requests, "forward", context)
        yield pb.ForwardResponse(outputs=outputs, metrics={"loss:sum": 0.0})

    async def ForwardBackward(
        self, requests: Any, context: Any
    ) -> AsyncIterator[pb.ForwardBackwardResponse]:
        outputs = await self._compute(requests, "forward_backward", context)
        for output in outputs:
            yield pb.ForwardBackwardResponse(outputs=[output])
        yield pb.ForwardBackwardResponse(metrics={"loss:sum": 1.0})

    async def OptimStep(self, request: Any, context: Any) -> pb.OptimStepResponse:
        self._record(request)
        await self._number(request.seq_id, "optim_step", context)
        return pb.OptimStepResponse(metrics={"step:last": 1.0})

    async def SaveCheckpoint(self, request: Any, context: Any) -> pb.SaveCheckpointResponse:
        self._record(request)
        # Without a kind it is what clients use a number up with.
        await self._number(request.seq_id, "save", context, valid=bool(request.kind))
        name = request.name or "ephemeral-1"
        return pb.SaveCheckpointResponse(checkpoint_path=f"tinsmith://m/sampler_weights/{name}")

    async def LoadCheckpoint(self, request: Any, context: Any) -> pb.LoadCheckpointResponse:
        self._record(request)
        await self._number(request.seq_id, "load", context)
        return pb.LoadCheckpointResponse(checkpoint_path=request.checkpoint_path)

    async def Sample(self, request: Any, context: Any) -> AsyncIterator[spb.SampleResponse]:
        self._record(request)
        self.sample_seeds.append(request.sampling_params.seed)
        self.sample_metadata.append(dict(context.invocation_metadata()))
        breaks = len(self.sample_seeds) <= self.sample_breaks
        # Later attempts cut the same tokens elsewhere.
        for tokens in [[1, 2, 3], [4, 5]] if breaks else self.sample_cuts:
            if breaks and tokens == [4, 5]:
                await refuse(context, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
            delta = spb.SequenceDelta(
                tokens=tensors.encode(np.array(tokens)),
                logprobs=tensors.encode(np.full(len(tokens), -0.5)),
            )
            yield spb.SampleResponse(deltas=[delta])
        # The reason comes alone, without a token.
        last = spb.SequenceDelta(
            stop_reason=spb.STOP_REASON_STOP,
            tokens=tensors.encode(np.zeros(0, np.int64)),
            logprobs=tensors.encode(np.zeros(0, np.float32)),
        )
        yield spb.SampleResponse(deltas=[last])

    async def ComputeLogprobs(self, request: Any, context: Any) -> spb.ComputeLogprobsResponse:
        self._record(request)
        logprobs = tensors.encode(np.array([-0.5], np.float32))
        return spb.ComputeLogprobsResponse(prompt_logprobs=spb.PromptLogprobs(logprobs=logprobs))

    async def ExportCheckpoint(
        self, request: Any, context: Any
    ) -> AsyncIterator[cpb.ExportCheckpointResponse]:
        pieces = list(self.pieces)
        size = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
        archive = cpb.ExportedArchive(size_bytes=size)
        archive.checkpoint.digest = b"d" * 32
        yield cpb.ExportCheckpointResponse(archive=archive)
        at = 0
        for piece in pieces:
            if isinstance(piece, bytes):
                if at >= request.offset:
                    part = cpb.ArchivePiece(offset=at, data=piece, crc32=zlib.crc32(piece))
                    yield cpb.ExportCheckpointResponse(piece=part)
                at += len(piece)
            else:
                self.pieces.remove(piece)
                await piece(context)

    async def DeleteCheckpoint(self, request: Any, context: Any) -> cpb.DeleteCheckpointResponse:
        if request.checkpoint_path not in self.checkpoints:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "CHECKPOINT_NOT_FOUND")
        self.checkpoints.remove(request.checkpoint_path)
        if self.delete_faults:
            await self.delete_faults.pop(0)(context)
        return cpb.DeleteCheckpointResponse()


class Peer:
    """A `Faulty` server on a thread of its own, which can go away and come back."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.servicer: Faulty = self.run(_made(Faulty))
        self.host, self.port = host, port
        self.start()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        """Serve; a second time on the same port."""
        self.server = self.run(self._start())

    async def _start(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_TrainingServiceServicer_to_server(self.servicer, server)
        add_SamplerServiceServicer_to_server(self.servicer, server)
        add_CheckpointServiceServicer_to_server(self.servicer, server)
        self.port = server.add_insecure_port(self.address)
        await server.start()
        return server

    def go_away(self) -> None:
        """End the server and every call that it has; what it applied stays applied."""
        self.run(self.server.stop(0))

    def stop(self) -> None:
        self.go_away()
        self.loop.call_soon_threadsafe(self.loop.stop)


async def _made(kind: Callable[[], Any]) -> Any:
    return kind()


def unavailable(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.UNAVAILABLE, "RANK_GROUP_UNAVAILABLE")


def full(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_s=0.01)


def gap(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "SEQ_ID_GAP")


def too_large(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED)


def storage_full(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL", retry_s=0.01)


def busy(context: Any) -> Any:
    """What grpc's own server says when it works on as many calls as it may."""
    return context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")


def after(seconds: float, fault: Fault) -> Fault:
    """A fault that comes late."""

    async def late(context: Any) -> None:
        await asyncio.sleep(seconds)
        await fault(context)

    return late
