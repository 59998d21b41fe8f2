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
import re
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from tinsmithd.config import GatewaySettings
from tinsmithd.gateway.bodies import has_half_characters
from tinsmithd.gateway.callers import part, peer
from tinsmithd.gateway.problems import RETRY_S, Problem, failure_of, problem_of
from tinsmithd.gateway.tinker.kept import Answer, KeptAnswers
from tinsmithd.rpc.budget import Budget, Lease

CONTENT_BYTES_MAX = 64 * 1024
"""Largest content of a promise: what a call needs to be made again."""
PROTOBUF, JSON = "application/x-protobuf", "application/json"
_LATER = re.compile(r"[a-z]+\.([0-9]{1,4})-", re.ASCII)
"""What promises of other formats begin with. Format 1 says no number; a later one does, so that
gateways of two releases side by side, and SDKs that poll both, get on."""

_log = logging.getLogger(__name__)


def _answer_of(result: "Message | Mapping[str, Any]") -> Answer:
    """The result that a message of `tinsmith.gateway.v1` is, or what is sent as JSON."""
    if isinstance(result, Message):
        return Answer(result.SerializeToString(), PROTOBUF)
    return Answer(json.dumps(result, separators=(",", ":")).encode(), JSON)


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
        Problem: 404, it is none; 503, a gateway of a later release made it.
    """
    kind, _, packed = request_id.partition("-")
    if (later := _LATER.match(request_id)) is not None:
        why = f"request_id: a gateway of a later release made it (format {later[1]}); ask that one"
        raise Problem(503, why, field="request_id", retry_after_s=RETRY_S, is_servers=True)
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


def _name(request_id: str) -> str:
    """What a result is kept under: a promise, and who asked for it."""
    return f"{part()} {request_id}"


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
        self._stopping = stopping
        self._stopped: asyncio.Task[Any] | None = None
        self._kinds: dict[str, Make] = {}
        self._as_json: dict[str, Callable[[bytes], Mapping[str, Any]]] = {}
        self._under_way: dict[str, asyncio.Task[Answer]] = {}
        share = settings.peer_share_max
        self._places = Budget("results_under_way_max", settings.results_under_way_max, share)
        self._bytes = Budget("received_bytes_max", settings.received_bytes_max, share)
        self._answers = KeptAnswers(settings.results_bytes_max)
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
        self,
        request_id: str,
        result: "Awaitable[Message | Mapping[str, Any]] | None" = None,
        nbytes: int = 0,
    ) -> None:
        """Find a result from now on, whether or not somebody waits for it.

        Args:
            request_id: The promise.
            result: Finds it this time; None leaves it to the promise's kind.
            nbytes: What the result holds meanwhile, besides its name, which may carry a request.

        Raises:
            Problem: 404, it is no promise; 429, too many are under way, in all or of this caller.
        """
        name = _name(request_id)
        if name in self._answers or name in self._under_way:
            if asyncio.iscoroutine(result):
                result.close()
            return
        room = self._places.lease(peer()), self._bytes.lease(peer())
        try:
            for lease, amount in zip(room, (1, len(name) + nbytes), strict=True):
                lease.take(amount)
            if result is None:
                kind, content = read_promise(request_id)
                if kind not in self._kinds:
                    raise _unknown()
                result = self._kinds[kind](content)
        except Exception as error:
            _give_back(room, result)
            # 429 of what is full, also to a poll: after 503 an SDK asks again at once.
            raise (problem_of(error) or error) from None
        task = asyncio.create_task(self._find(name, result))
        self._under_way[name] = task
        task.add_done_callback(lambda _: self._gone(name, room, result))

    def counts(self) -> tuple[int, int]:
        """Results under way, and bytes of those that are kept."""
        return len(self._under_way), self._answers.nbytes

    def is_known(self, request_id: str) -> bool:
        """Whether a result is under way or here."""
        name = _name(request_id)
        return name in self._under_way or name in self._answers

    def plain(self, request_id: str, answer: Answer) -> Answer:
        """A result for a caller that takes no protobuf: as JSON, where its kind has that form."""
        read = self._as_json.get(request_id.partition("-")[0])
        if answer.media_type != PROTOBUF or read is None:
            return answer
        return _answer_of(read(answer.body))

    def pauses(self, request_id: str, why: str) -> None:
        """Say that a result under way waits for the cluster; `queue_state` of its polls has it."""
        name = _name(request_id)
        if name in self._under_way:
            self._pauses[name] = why

    def queue_state(self, request_id: str) -> Mapping[str, str]:
        """What a poll that has to come again says of the queue."""
        why = self._pauses.get(_name(request_id))
        if why is None:
            return {"queue_state": "active"}
        return {"queue_state": "paused_capacity", "queue_state_reason": why}

    def cancel(self, request_id: str) -> None:
        """Stop to find a result, if that is under way; whoever waits for it is told to ask anew."""
        task = self._under_way.get(_name(request_id))
        if task is not None:
            task.cancel()

    def when_done(self, request_id: str, tell: Callable[[Answer | None], None]) -> None:
        """Have a result's end told once it is there; None tells of one that was cancelled."""
        name = _name(request_id)
        if (answer := self._answers.get(name)) is not None or name not in self._under_way:
            tell(answer)
            return
        task = self._under_way[name]
        task.add_done_callback(lambda done: tell(None if done.cancelled() else done.result()))

    def forget(self, request_id: str) -> None:
        """Keep a result no longer: nobody will ask for it again."""
        self._answers.forget(_name(request_id))

    async def unless_stopping(self, work: Coroutine[Any, Any, object]) -> None:
        """Wait for work, or until the process is about to end."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self._end()], return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()

    def _end(self) -> "asyncio.Task[Any]":
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stopping.wait())
        return self._stopped

    async def wait(self, request_id: str, within_s: float) -> Answer | None:
        """A promise's result; None where it is not there in time, or the process is about to end.

        Raises:
            Problem: As `start`; 410, somebody cancelled it.
        """
        self.start(request_id)
        name = _name(request_id)
        if (answer := self._answers.get(name)) is not None:
            return answer
        task = self._under_way[name]
        done, _ = await asyncio.wait(
            [task, self._end()], timeout=within_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task not in done:
            return None
        if task.cancelled():
            raise Problem(410, "the request was cancelled; send it again")
        return task.result()

    def _gone(self, name: str, room: Iterable[Lease], result: object) -> None:
        self._under_way.pop(name, None)
        self._pauses.pop(name, None)
        _give_back(room, result)

    async def _find(self, name: str, result: "Awaitable[Message | Mapping[str, Any]]") -> Answer:
        try:
            answer = _answer_of(await result)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                _log.exception("a result could not be found")
                problem = Problem(500, "a fault of the gateway; its log has it", is_servers=True)
            answer = _answer_of(failure_of(problem))
        self._answers.keep(name, answer)
        return answer


def _give_back(room: Iterable[Lease], result: object) -> None:
    for lease in room:
        lease.give_back()
    if asyncio.iscoroutine(result):  # it may never have begun
        result.close()
