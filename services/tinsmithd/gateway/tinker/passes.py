"""`forward_backward`: calls with data, each promised once no death of a gateway can lose it.

The Training server says when a call is written down (`accepted`), whether or not the calls before
it have arrived. Then its promise is its model, number and digest, and any gateway asks for the
answer with them. Its data stay here for as long as there is room: it may still end without effect,
for want of a resource, and is sent again.
"""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from tinsmith.errors import TinsmithError
from tinsmith.v1 import training_service_pb2 as pb
from tinsmithd.errors import ResourceExhausted
from tinsmithd.gateway.callers import part, peer
from tinsmithd.gateway.cluster import ComputeRequest
from tinsmithd.gateway.problems import RETRY_S, Problem, problem_of
from tinsmithd.gateway.tinker.data import output_of
from tinsmithd.gateway.tinker.json_data import output_as_json
from tinsmithd.gateway.tinker.promises import promise_id
from tinsmithd.gateway.tinker.room import INT64_MAX, Room, int_of, text_of
from tinsmithd.rpc.budget import Budget

KIND = "pass"
CALL_DIGEST = "tinsmith-call-digest-bin"
STREAMS_MAX = 96
"""Calls whose results are read from the stream that they were sent by; those of others are asked
for. A host has at most half of the places of a Training server."""
KEPT_SHARE = 0.5
"""Share of `received_bytes_max` that data of accepted calls may have."""
ASKING_MAX = 256
"""Results that are asked for at once."""
_LOST = "the call did not arrive, and the gateway that had it is gone: make it again"


class Passes:
    """The calls with data that are under way here.

    Args:
        room: The room.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        # By the caller, too: one may say the id of another one's model.
        self._under_way: dict[tuple[str, str, int], _Pass] = {}
        self._asking = asyncio.Semaphore(ASKING_MAX)
        self.streams = 0
        settings = room.settings
        self.held = Budget(
            "received_bytes_max", settings.received_bytes_max, settings.peer_share_max
        )
        room.promises.add_kind(KIND, self._again, output_as_json)

    async def send(self, model_id: str, seq_id: int, requests: Sequence[ComputeRequest]) -> str:
        """Make a call; returns its promise.

        Raises:
            Problem: It is refused; or it waits for too long, or there is no room for its data: then
                the same call may come again.
        """
        key = part(), model_id, seq_id
        requests[0].model_id, requests[0].seq_id = model_id, seq_id
        found = self._under_way.get(key)
        # One whose content is another is sent, too, and the Training server refuses it.
        if found is None or not found.is_same(requests):
            found = self._under_way[key] = _Pass(self, self._room, model_id, seq_id, requests)
            found.task.add_done_callback(functools.partial(self._ended, key, found))
        done, _ = await asyncio.wait([found.promise], timeout=self._room.settings.request_s_max)
        if not done:
            text = "too many calls wait for this model; the same call may be sent again"
            raise Problem(503, text, "QUEUE_FULL", retry_after_s=RETRY_S)
        return found.promise.result()

    def _ended(self, key: tuple[str, str, int], made: "_Pass", _: "asyncio.Task[None]") -> None:
        if self._under_way.get(key) is made:
            del self._under_way[key]

    async def _again(self, content: Mapping[str, Any]) -> Message:
        """The result of a promise that this process does not know."""
        model_id, digest = text_of(content, "m"), text_of(content, "d")
        seq_id = int_of(content, "s", least=1, most=INT64_MAX)
        try:
            with self._room.order.under_way(model_id, seq_id):
                return await self.answer(model_id, seq_id, bytes.fromhex(digest))
        except ValueError:
            raise Problem(404, "request_id: there is no such request") from None
        except TinsmithError as error:
            if error.reason != "CALL_NOT_FOUND":
                raise
            raise Problem(410, _LOST, error.reason, is_servers=True) from None

    async def answer(self, model_id: str, seq_id: int, digest: bytes) -> Message:
        """The result of a call that the Training server has.

        Raises:
            TinsmithError: The answer, where it is a refusal; CALL_NOT_FOUND where it has none.
        """
        request = pb.GetAnswerRequest(model_id=model_id, seq_id=seq_id, call_digest=digest)

        async def attempt() -> Message:
            outputs: list[Any] = []
            metrics: dict[str, float] = {}
            async for response in self._room.cluster.training.GetAnswer(request):
                case = response.WhichOneof("response")
                if case not in ("forward", "forward_backward"):
                    raise Problem(404, "request_id: there is no such request")
                found = getattr(response, case)
                outputs.extend(found.outputs)
                metrics.update(found.metrics)
            return output_of(outputs, metrics)

        async with self._asking:
            return await self._room.cluster.retrying("get_answer", attempt, model_id=model_id)


class _Pass:
    """One call.

    Attributes:
        promise: The name of its result, once it may be given.
        task: Makes it.

    Raises:
        Problem: 429, there is no room for its data, in all or of this caller's.
    """

    def __init__(
        self,
        passes: Passes,
        room: Room,
        model_id: str,
        seq_id: int,
        requests: Sequence[ComputeRequest],
    ) -> None:
        self._passes = passes
        self._room = room
        self._model_id = model_id
        self._seq_id = seq_id
        self._requests = requests
        # A call that waits keeps its data when its request has ended, so they count by themselves.
        self._held = passes.held.lease(peer())
        try:
            self._held.take(sum(each.ByteSize() for each in requests))
        except ResourceExhausted:
            text = "too many bytes of calls are under way; the same call may be sent again"
            raise Problem(429, text, "QUEUE_FULL", retry_after_s=RETRY_S) from None
        self._digest = b""
        loop = asyncio.get_running_loop()
        self._result: asyncio.Future[Message] = loop.create_future()
        self.promise: asyncio.Future[str] = loop.create_future()
        for future in (self._result, self.promise):
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.task = asyncio.create_task(self._run())

    def is_same(self, requests: Sequence[ComputeRequest]) -> bool:
        """Whether a request is this call again."""
        return list(self._requests) == list(requests)

    async def _run(self) -> None:
        what = "forward" if isinstance(self._requests[0], pb.ForwardRequest) else "forward_backward"
        try:
            result = await self._room.order.call(what, self._model_id, self._seq_id, self._attempt)
        except Exception as error:
            for future in (self.promise, self._result):
                if not future.done():
                    future.set_exception(problem_of(error) or error)
        else:
            self._give_promise()
            self._result.set_result(result)
        finally:
            self._drop_data()

    def _drop_data(self) -> None:
        self._requests = ()
        self._held.give_back()

    def _give_promise(self) -> None:
        if not self.promise.done():
            content = {"m": self._model_id, "s": self._seq_id, "d": self._digest.hex()}
            name = promise_id(KIND, content)
            self._room.promises.start(name, self._result)
            self.promise.set_result(name)

    async def _attempt(self) -> Message:
        if self._digest:  # its answer may be there by now, and no data need be sent for it
            try:
                return await self._passes.answer(self._model_id, self._seq_id, self._digest)
            except TinsmithError as error:
                if error.reason != "CALL_NOT_FOUND":
                    raise
                if not self._requests:
                    raise Problem(410, _LOST, error.reason, is_servers=True) from None
        call = self._room.cluster.compute(self._requests)
        self._passes.streams += 1
        try:
            return await self._read(call)
        finally:
            self._passes.streams -= 1
            call.cancel()

    async def _read(self, call: Any) -> Message:
        metadata = await call.initial_metadata()
        digest = next((value for key, value in metadata or () if key == CALL_DIGEST), b"")
        outputs: list[Any] = []
        metrics: dict[str, float] = {}
        async for response in call:
            if response.accepted:
                self._digest = digest
                self._give_promise()
                if self._passes.held.taken > KEPT_SHARE * self._passes.held.most:
                    self._drop_data()
                if self._passes.streams > STREAMS_MAX:
                    call.cancel()
                    return await self._passes.answer(self._model_id, self._seq_id, digest)
                continue
            outputs.extend(response.outputs)
            metrics.update(response.metrics)
        return output_of(outputs, metrics)
