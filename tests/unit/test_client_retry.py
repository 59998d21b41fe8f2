"""Numbers, repeats and faults, against a small real server that fails as it is told to."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

import tinsmith
from tinsmith import _loop, _retry, tensors
from tinsmith.v1 import sampler_service_pb2 as spb
from tinsmith.v1 import training_service_pb2 as pb
from tinsmith.v1.sampler_service_pb2_grpc import (
    SamplerServiceServicer,
    add_SamplerServiceServicer_to_server,
)
from tinsmith.v1.training_service_pb2_grpc import (
    TrainingServiceServicer,
    add_TrainingServiceServicer_to_server,
)

Fault = Callable[[Any], Any]


async def refuse(
    context: Any, code: grpc.StatusCode, reason: str = "", *, retry_s: float | None = None
) -> None:
    """End a call with a status as Tinsmith's servers write it."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="tinsmith")] if reason else []
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


class Faulty(TrainingServiceServicer, SamplerServiceServicer):
    """One model that applies calls in order; faults are (before or after effect, what to do)."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, str]] = []
        self.messages: dict[int, list[int]] = {}
        self.arrived: list[int] = []
        self.before: dict[int, list[Fault]] = {}
        self.after: dict[int, list[Fault]] = {}
        self.created: list[str] = []
        self.create_faults: list[Fault] = []
        self.sample_seeds: list[int] = []
        self._turn = asyncio.Condition()
        self._next = 1

    async def GetCapabilities(self, request: Any, context: Any) -> pb.GetCapabilitiesResponse:
        return pb.GetCapabilitiesResponse()

    async def CreateModel(self, request: Any, context: Any) -> pb.CreateModelResponse:
        self.created.append(request.request_id)
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
        await self._number(request.seq_id, "optim_step", context)
        return pb.OptimStepResponse(metrics={"step:last": 1.0})

    async def Sample(self, request: Any, context: Any) -> AsyncIterator[spb.SampleResponse]:
        self.sample_seeds.append(request.sampling_params.seed)
        first_attempt = len(self.sample_seeds) == 1
        # The second attempt cuts the same tokens elsewhere.
        for tokens in [[1, 2, 3], [4, 5]] if first_attempt else [[1, 2], [3, 4], [5]]:
            if first_attempt and tokens == [4, 5]:
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


class Peer:
    """A `Faulty` server on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.address, self.server, self.servicer = asyncio.run_coroutine_threadsafe(
            self._start(), self.loop
        ).result(10)

    async def _start(self) -> tuple[str, grpc.aio.Server, Faulty]:
        server, servicer = grpc.aio.server(), Faulty()
        add_TrainingServiceServicer_to_server(servicer, server)
        add_SamplerServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return f"127.0.0.1:{port}", server, servicer

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(0), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A server without faults yet; the client waits only briefly between attempts."""
    monkeypatch.setattr(_retry, "DELAY_S_FIRST", 0.01)
    monkeypatch.setattr(_retry, "DELAY_S_MAX", 0.05)
    running = Peer()
    yield running
    running.stop()


@pytest.fixture
def trainer(peer: Peer) -> tinsmith.TrainingClient:
    """A client of the peer."""
    service = tinsmith.ServiceClient(peer.address, give_up_after_s=20.0)
    return service.create_lora_training_client("base").result(10)


def unavailable(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.UNAVAILABLE, "TRAINER_UNAVAILABLE")


def full(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retry_s=0.01)


def gap(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "SEQ_ID_GAP")


def too_large(context: Any) -> Any:
    return refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED)


def data(length: int = 3) -> list[tinsmith.Datum]:
    tokens = np.arange(length)
    inputs = {"target_tokens": tokens, "weights": np.ones(length, np.float32)}
    return [tinsmith.Datum(tinsmith.ModelInput.from_ints(tokens.tolist()), inputs)]


ADAM = tinsmith.AdamParams()


def test_calls_are_sent_without_waiting_and_count_in_order(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """All are under way at once; their numbers are the program's order."""
    futures: list[Any] = []
    for _ in range(3):
        futures.append(trainer.forward_backward(data(), "cross_entropy"))
        futures.append(trainer.optim_step(ADAM))
    for future in futures:
        future.result(10)
    steps = ["forward_backward", "optim_step"] * 3
    assert peer.servicer.applied == list(enumerate(steps, start=1))


@pytest.mark.parametrize("fault", [unavailable, full, gap])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_is_waited_out_under_the_same_number(
    peer: Peer, trainer: tinsmith.TrainingClient, fault: Fault, when: str
) -> None:
    """Whether the answer or the call was lost: it is sent again and has its effect once."""
    getattr(peer.servicer, when)[1] = [fault, fault]
    first = trainer.forward_backward(data(), "cross_entropy")
    second = trainer.optim_step(ADAM)
    assert first.result(10).metrics == {"loss:sum": 1.0}
    second.result(10)
    assert peer.servicer.arrived.count(1) == 3
    assert peer.servicer.applied == [(1, "forward_backward"), (2, "optim_step")]


def test_creating_again_carries_the_same_request_id(peer: Peer) -> None:
    """Else a lost answer would leave a second model."""
    peer.servicer.create_faults = [unavailable]
    tinsmith.ServiceClient(peer.address).create_lora_training_client("base").result(10)
    assert len(peer.servicer.created) == 2
    assert len(set(peer.servicer.created)) == 1
    assert peer.servicer.created[0]


def test_a_refusal_without_a_delay_is_final_and_leaves_no_hole(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """The server did not use the number; the client does, so that the next call can run."""
    peer.servicer.before[1] = [too_large]
    bad = trainer.forward_backward(data(), "cross_entropy")
    good = trainer.optim_step(ADAM)
    with pytest.raises(tinsmith.ResourceExhaustedError):
        bad.result(10)
    good.result(10)
    assert peer.servicer.applied == [(2, "optim_step")]


def test_an_invalid_call_uses_its_number_up(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """The client goes on with the next one."""
    bad = [tinsmith.Datum(tinsmith.ModelInput.from_ints([1]), {})]
    with pytest.raises(tinsmith.InvalidArgumentError) as refusal:
        trainer.forward_backward(bad, "cross_entropy").result(10)
    assert refusal.value.reason == "MISSING_FIELD"
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(2, "optim_step")]


def test_what_the_client_refuses_takes_no_number(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """The first call that is sent is number 1."""
    with pytest.raises(tinsmith.InvalidArgumentError):
        trainer.forward_backward([], "cross_entropy")
    with pytest.raises(tinsmith.InvalidArgumentError):
        trainer.forward_backward(data(), "no such loss")  # type: ignore[arg-type]
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "optim_step")]


def test_a_cancelled_future_leaves_no_hole(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """Nobody waits for its answer any more; it still takes effect in its place."""
    trainer.forward_backward(data(), "cross_entropy").future().cancel()
    trainer.optim_step(ADAM).result(10)
    assert peer.servicer.applied == [(1, "forward_backward"), (2, "optim_step")]


def test_futures_cancelled_before_anything_was_sent_leave_no_hole(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """Cancelled by the thread that made them, at once: every number is used all the same."""
    blocked = threading.Event()
    _loop.loop().call_soon_threadsafe(blocked.wait, 10)  # the loop cannot begin any of them
    futures = [trainer.optim_step(tinsmith.AdamParams()) for _ in range(20)]
    assert all(future.future().cancel() for future in futures)
    blocked.set()
    trainer.optim_step(tinsmith.AdamParams()).result(10)
    assert [number for number, _ in peer.servicer.applied] == list(range(1, 22))


def test_large_data_travel_in_several_messages(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """No message is much larger than 4 MiB."""
    result = trainer.forward_backward(data(100_000) * 5, "cross_entropy").result(20)
    assert len(result.loss_fn_outputs) == 5
    sizes = peer.servicer.messages[1]
    assert len(sizes) > 1
    assert max(sizes) < 4.2 * 1024 * 1024


def test_many_threads_share_one_client(peer: Peer, trainer: tinsmith.TrainingClient) -> None:
    """Every number is used once and none is missing."""
    threads = [
        threading.Thread(
            target=lambda: [trainer.optim_step(ADAM).result(20) for _ in range(10)], daemon=True
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [seq_id for seq_id, _ in peer.servicer.applied] == list(range(1, 41))


def test_a_failing_custom_loss_changes_nothing_and_the_client_goes_on(
    peer: Peer, trainer: tinsmith.TrainingClient
) -> None:
    """Its own error comes out of the future; the call behind it is not held up."""
    pytest.importorskip("torch")

    def broken(data: Any, logprobs: Any) -> Any:
        raise ZeroDivisionError("mine")

    failed = trainer.forward_backward_custom(data(), broken)
    behind = trainer.optim_step(ADAM)
    with pytest.raises(ZeroDivisionError, match="mine"):
        failed.result(10)
    behind.result(10)
    assert peer.servicer.applied == [(1, "forward"), (3, "optim_step")]


def test_giving_up_is_said_and_later_calls_do_not_overtake(peer: Peer) -> None:
    """After `give_up_after_s` the error comes out, and nothing runs out of order."""
    service = tinsmith.ServiceClient(peer.address, give_up_after_s=0.2)
    trainer = service.create_lora_training_client("base").result(10)
    peer.servicer.before[1] = [unavailable] * 1000
    with pytest.raises(tinsmith.UnavailableError):
        trainer.optim_step(ADAM).result(20)
    with pytest.raises(tinsmith.FailedPreconditionError) as refusal:
        trainer.optim_step(ADAM).result(20)
    assert refusal.value.reason == "UNDELIVERED"
    assert peer.servicer.applied == []


def test_a_broken_sample_is_drawn_again_with_the_same_seed(peer: Peer) -> None:
    """The seed is the client's, so that both attempts make the same tokens."""
    sampler = tinsmith.ServiceClient(peer.address).create_sampling_client(base_model="base")
    response = sampler.sample(tinsmith.ModelInput.from_ints([1])).result(10)
    assert response.sequences[0].tokens == [1, 2, 3, 4, 5]
    assert response.sequences[0].stop_reason == "stop"
    assert len(peer.servicer.sample_seeds) == 2
    assert len(set(peer.servicer.sample_seeds)) == 1


def test_a_broken_stream_of_samples_gives_each_token_once(peer: Peer) -> None:
    """Also where the second attempt cuts its messages elsewhere; the reason is not lost."""
    sampler = tinsmith.ServiceClient(peer.address).create_sampling_client(base_model="base")
    parts = list(sampler.sample_stream(tinsmith.ModelInput.from_ints([1])))
    assert [token for part in parts for token in part.tokens] == [1, 2, 3, 4, 5]
    assert all(len(part.tokens) == len(part.logprobs) for part in parts)
    assert [part.stop_reason for part in parts if part.stop_reason] == ["stop"]
