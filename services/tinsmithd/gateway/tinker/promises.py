"""Promises: names of results that are not there yet.

A promise says what it is the result of, so it is written down nowhere: any gateway can find its
result, at any time, by the same call to the cluster, which answers a repeat with the first answer.
What a gateway has in memory is a result that is under way, one for all who wait for it, and those
that came last.
"""

import asyncio
import base64
import binascii
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.bodies import has_half_characters
from tinsmithd.gateway.problems import RETRY_S, Problem, failure_of, problem_of

CONTENT_BYTES_MAX = 64 * 1024
"""Largest content of a promise: what a call needs to be made again."""
UNDER_WAY_MAX = 16_384
"""Results under way at once."""
PROTOBUF, JSON = "application/x-protobuf", "application/json"
_OVERHEAD_BYTES = 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A result as it is sent.

    Attributes:
        body: The bytes.
        media_type: What they are.
    """

    body: bytes
    media_type: str

    @classmethod
    def of(cls, result: "Message | Mapping[str, Any]") -> "Answer":
        """A message of `tinsmith.gateway.v1`, or what is sent as JSON."""
        if isinstance(result, Message):
            return cls(result.SerializeToString(), PROTOBUF)
        return cls(json.dumps(result, separators=(",", ":")).encode(), JSON)


def promise_id(kind: str, content: Mapping[str, Any]) -> str:
    """The name of a result.

    Args:
        kind: What sort of result: letters.
        content: What says which, as JSON: the same content, the same name.

    Raises:
        Problem: 400, the content is too large.
    """
    text = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
    if len(text) > CONTENT_BYTES_MAX:
        message = f"a request of this kind has at most {CONTENT_BYTES_MAX} bytes, not {len(text)}"
        raise Problem(400, message)
    packed = base64.urlsafe_b64encode(zlib.compress(text, 1)).rstrip(b"=").decode()
    return f"{kind}-{packed}"


def read_promise(request_id: str) -> tuple[str, dict[str, Any]]:
    """Kind and content of a promise.

    Raises:
        Problem: 404, it is none.
    """
    kind, _, packed = request_id.partition("-")
    try:
        data = base64.b64decode(packed + "=" * (-len(packed) % 4), b"-_", validate=True)
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, CONTENT_BYTES_MAX)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("cut or too large")
        content = json.loads(text)
        if not isinstance(content, dict) or has_half_characters(text, content):
            raise ValueError("no object")
    except (ValueError, RecursionError, binascii.Error, zlib.error):
        raise _unknown() from None
    return kind, content


def _unknown() -> Problem:
    return Problem(404, "request_id: there is no such request", field="request_id")


Make = Callable[[Mapping[str, Any]], Awaitable["Message | Mapping[str, Any]"]]


class Promises:
    """The results under way, and those that came last. Lives on one event loop.

    Args:
        settings: The limits.
        stopping: Set when the process is about to end.
    """

    def __init__(self, settings: GatewaySettings, stopping: asyncio.Event) -> None:
        self._settings = settings
        self._stopping = stopping
        self._stopped: asyncio.Task[Any] | None = None
        self._kinds: dict[str, Make] = {}
        self._as_json: dict[str, Callable[[bytes], Mapping[str, Any]]] = {}
        self._under_way: dict[str, asyncio.Task[Answer]] = {}
        self._under_way_bytes = 0
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._answers_bytes = 0
        self._pauses: dict[str, str] = {}

    def add_kind(
        self,
        kind: str,
        make: Make,
        as_json: "Callable[[bytes], Mapping[str, Any]] | None" = None,
    ) -> None:
        """Say how results of a kind are found.

        Args:
            kind: Letters.
            make: Finds the result of a content, for as long as that takes. It may be called several
                times, here and elsewhere, and has the same result each time. What its coroutine
                raises as a Problem, an error of the wire or of the client's is the result, a
                failure. What it raises at once is no result: the caller hears it as a status.
            as_json: Reads the bytes of a result that is a message as what is sent as JSON.
        """
        self._kinds[kind] = make
        if as_json is not None:
            self._as_json[kind] = as_json

    def start(
        self, request_id: str, result: "Awaitable[Message | Mapping[str, Any]] | None" = None
    ) -> None:
        """Find a result from now on, whether or not somebody waits for it.

        Args:
            request_id: The promise.
            result: Finds it this time; None leaves it to the promise's kind.

        Raises:
            Problem: 404, it is no promise; 503, too many are under way.
        """
        if request_id in self._answers or request_id in self._under_way:
            if asyncio.iscoroutine(result):
                result.close()
            return
        if result is None:
            kind, content = read_promise(request_id)
            if kind not in self._kinds:
                raise _unknown()
            result = self._kinds[kind](content)
        # A name may carry a whole request.
        nbytes = self._under_way_bytes + len(request_id)
        if len(self._under_way) >= UNDER_WAY_MAX or nbytes > self._settings.received_bytes_max:
            if asyncio.iscoroutine(result):
                result.close()
            raise Problem(503, "too many results are waited for", retry_after_s=RETRY_S)
        task = asyncio.create_task(self._find(request_id, result))
        self._under_way[request_id] = task
        self._under_way_bytes = nbytes
        task.add_done_callback(lambda _: self._gone(request_id))

    def is_known(self, request_id: str) -> bool:
        """Whether a result is under way or here."""
        return request_id in self._under_way or request_id in self._answers

    def plain(self, request_id: str, answer: Answer) -> Answer:
        """A result for a caller that takes no protobuf: as JSON, where its kind has that form."""
        read = self._as_json.get(request_id.partition("-")[0])
        if answer.media_type != PROTOBUF or read is None:
            return answer
        return Answer.of(read(answer.body))

    def pauses(self, request_id: str, why: str) -> None:
        """Say that a result under way waits for the cluster; `queue_state` of its polls has it."""
        if request_id in self._under_way:
            self._pauses[request_id] = why

    def queue_state(self, request_id: str) -> Mapping[str, str]:
        """What a poll that has to come again says of the queue."""
        why = self._pauses.get(request_id)
        if why is None:
            return {"queue_state": "active"}
        return {"queue_state": "paused_capacity", "queue_state_reason": why}

    def cancel(self, request_id: str) -> None:
        """Stop to find a result, if that is under way; whoever waits for it is told to ask anew."""
        task = self._under_way.get(request_id)
        if task is not None:
            task.cancel()

    async def wait(self, request_id: str, within_s: float) -> Answer | None:
        """A promise's result; None where it is not there in time, or the process is about to end.

        Raises:
            Problem: As `start`; 410, somebody cancelled it.
        """
        self.start(request_id)
        if (answer := self._answers.get(request_id)) is not None:
            self._answers.move_to_end(request_id)
            return answer
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stopping.wait())
        task = self._under_way[request_id]
        done, _ = await asyncio.wait(
            [task, self._stopped], timeout=within_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task not in done:
            return None
        if task.cancelled():
            raise Problem(410, "the request was cancelled; send it again")
        return task.result()

    def _gone(self, request_id: str) -> None:
        if self._under_way.pop(request_id, None) is not None:
            self._under_way_bytes -= len(request_id)
        self._pauses.pop(request_id, None)

    async def _find(
        self, request_id: str, result: "Awaitable[Message | Mapping[str, Any]]"
    ) -> Answer:
        try:
            answer = Answer.of(await result)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                _log.exception("a result could not be found")
                problem = Problem(500, "a fault of the gateway; its log has it", is_servers=True)
            answer = Answer.of(failure_of(problem))
        self._keep(request_id, answer)
        return answer

    def _keep(self, request_id: str, answer: Answer) -> None:
        size = len(answer.body) + len(request_id) + _OVERHEAD_BYTES
        if size > self._settings.results_bytes_max:
            return
        self._answers[request_id] = answer
        self._answers_bytes += size
        while self._answers_bytes > self._settings.results_bytes_max:
            name, gone = self._answers.popitem(last=False)
            self._answers_bytes -= len(gone.body) + len(name) + _OVERHEAD_BYTES
