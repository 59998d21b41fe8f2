"""`retrieve_futures`: one poll for all samples of a session, in place of one for each.

It tells which of them are done, and nobody is told that twice. That is this process's memory: a
gateway that was started since, or another one, does not know, and says so at once. So the flag by
which SDKs would ask this way stays off, and each result is waited for by its own name.
"""

import asyncio
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinsmithd.gateway.callers import part
from tinsmithd.gateway.problems import Problem
from tinsmithd.gateway.tinker.kept import Answer
from tinsmithd.gateway.tinker.promises import PROTOBUF, Promises
from tinsmithd.gateway.tinker.room import INT64_MAX, int_of, object_of, text_of
from tinsmithd.gateway.tinker.samples.weights import SamplingSession

CLONE = 10**9
"""A clone of a sampler numbers its samples from its own number times this."""
REMEMBERED_BYTES_MAX = 4 * 1024 * 1024
"""Names of samples that are remembered. Of whoever has most those of the session go first that was
used longest ago."""
SESSIONS_MAX = 10_000
TOLD_AT_ONCE_MAX = 1000
RETRIEVED_MAX = 10_000
EPOCH_BITS, COUNT_BITS = 30, 32
_OVERHEAD_BYTES = 200
_GONE = "this gateway does not know what was told of that session: ask for each result by its name"


@dataclass
class _Of:
    """The samples of one sampler, or of one clone of it.

    Attributes:
        done: What is done and was not heard yet, oldest first, each with its cursor.
        known: Samples that are under way or done.
        changed: Set when something is done.
        forgotten: Whether some of them are not remembered.
    """

    done: deque[tuple[int, Mapping[str, Any]]] = field(default_factory=deque)
    known: dict[str, int] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    forgotten: bool = False


class Completions:
    """What is done of each session's samples. Lives on one event loop.

    Args:
        promises: Where the results are.
    """

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._sessions: OrderedDict[tuple[str, str, int], _Of] = OrderedDict()
        self._bytes: Counter[str] = Counter()  # by caller
        # Whoever comes with a cursor of another process is known by it.
        self._first = self._cursor = secrets.randbits(EPOCH_BITS) << COUNT_BITS

    def note(self, session: SamplingSession, seq_id: int, request_id: str) -> None:
        """A sample is under way, or done."""
        key = (part(), session.sampler_id, seq_id // CLONE)
        found = self._sessions.setdefault(key, _Of())
        self._sessions.move_to_end(key)
        if request_id in found.known:
            return
        found.known[request_id] = len(request_id) + _OVERHEAD_BYTES
        self._bytes[part()] += found.known[request_id]
        self._make_room()

        def tell(answer: Answer | None) -> None:
            told: dict[str, Any] = {"state": "failed", "request_id": request_id}
            if answer is not None and answer.media_type == PROTOBUF:
                told["state"] = "finished"
                told["response_payload_uncompressed_size"] = len(answer.body)
            self._cursor += 1
            found.done.append((self._cursor, told))
            found.changed.set()

        self._promises.when_done(request_id, tell)

    async def poll(self, body: Mapping[str, Any], poll_s_max: float) -> Mapping[str, Any]:
        """What is done since a cursor, once something is.

        Raises:
            Problem: 400; 410, the cursor or the session is none of this process's.
        """
        target = object_of(body, "target")
        if text_of(target, "type", "sampling_session") != "sampling_session":
            raise Problem(400, "target.type: must be sampling_session", field="target.type")
        session = SamplingSession.read(text_of(target, "sampling_session_id"))
        clone = int_of(target, "cloned_sampler_id", 0, most=INT64_MAX)
        since = int_of(body, "prev_cursor", 0, most=INT64_MAX)
        within_s = min(int_of(body, "timeout", round(poll_s_max), most=INT64_MAX), poll_s_max)
        found = self._sessions.get((part(), session.sampler_id, clone))
        if found is None or found.forgotten or (since and not self._first <= since <= self._cursor):
            raise Problem(410, _GONE)
        self._forget(found, _retrieved(body))
        while found.done and found.done[0][0] <= since:
            found.done.popleft()
        if not found.done and within_s:
            found.changed.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._promises.unless_stopping(found.changed.wait())
            except TimeoutError:
                pass
        told = list(found.done)[:TOLD_AT_ONCE_MAX]
        return {
            "completions": [each for _, each in told],
            "cursor": told[-1][0] if told else max(since, self._first),
        }

    def _make_room(self) -> None:
        while len(self._sessions) > SESSIONS_MAX:
            ((whose, _),) = Counter(key[0] for key in self._sessions).most_common(1)
            self._forget_oldest(whose, self._sessions.pop)
        while self._bytes.total() > REMEMBERED_BYTES_MAX:
            ((whose, _),) = self._bytes.most_common(1)
            self._forget_oldest(whose, self._sessions.__getitem__)

    def _forget_oldest(self, whose: str, taken: Callable[[tuple[str, str, int]], _Of]) -> None:
        """Of a caller's sessions that have something."""
        of_whom = (key for key, of in self._sessions.items() if key[0] == whose and of.known)
        first = next(of_whom, None) or next(key for key in self._sessions if key[0] == whose)
        gone = taken(first)
        self._count(whose, -sum(gone.known.values()))
        gone.known.clear()
        gone.done.clear()
        gone.forgotten = True

    def _count(self, whose: str, nbytes: int) -> None:
        self._bytes[whose] += nbytes
        if not self._bytes[whose]:
            del self._bytes[whose]

    def _forget(self, found: _Of, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if (nbytes := found.known.pop(request_id, None)) is not None:
                self._count(part(), -nbytes)
                self._promises.forget(request_id)


def _retrieved(body: Mapping[str, Any]) -> Sequence[str]:
    found = body.get("retrieved_request_ids") or []
    whole = isinstance(found, list) and len(found) <= RETRIEVED_MAX
    if not whole or not all(isinstance(each, str) for each in found):
        message = f"retrieved_request_ids: must be a list of at most {RETRIEVED_MAX} texts"
        raise Problem(400, message, field="retrieved_request_ids")
    return found
