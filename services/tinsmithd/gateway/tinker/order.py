"""Gets numbered calls through in order, each exactly once, as the Python client does (ADR 14).

The program behind the SDK gave each call its number. What is refused here, or ends without having
used its number, uses it up by a call that is refused and has no effect, or later calls would wait
for it. A number that never comes, because an SDK failed before it sent the request, is looked for
while nothing moves, and is used up likewise, before the Training server gives up the calls that
wait for it; one that is known here to be under way is not.
"""

import asyncio
import contextlib
import heapq
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import grpc

from tinsmith.connection import USES_NUMBER, WINDOW
from tinsmith.errors import TinsmithError
from tinsmith.v1 import training_service_pb2 as pb
from tinsmithd import tracing
from tinsmithd.gateway.cluster import Cluster
from tinsmithd.gateway.problems import Problem
from tinsmithd.owners import logged_id

T = TypeVar("T")

LOOK_S = 15.0
"""A model whose calls stand still for so long is looked at, and a number that is missing in two
looks is given up. The Training server waits for it twice as long."""
_USES_NUMBER = (*USES_NUMBER, grpc.StatusCode.INTERNAL)

_log = logging.getLogger(__name__)


class _Numbers:
    """The numbers of one model that are under way here.

    Attributes:
        under_way: How many calls have each of them.
        held: Those that wait for the window.
        moved_s: When the last of them ended or came, by the loop's clock.
    """

    def __init__(self) -> None:
        self.moved_s = 0.0
        self.under_way: dict[int, int] = {}
        self.held: dict[int, asyncio.Event] = {}
        self._sorted: list[int] = []  # a heap of these numbers, and of some that have ended

    def come(self, seq_id: int) -> None:
        """A call is under way."""
        if seq_id not in self.under_way:
            heapq.heappush(self._sorted, seq_id)
            if len(self._sorted) > 2 * len(self.under_way) + WINDOW:  # most of them have ended
                self._sorted = sorted({*self.under_way, seq_id})
        self.under_way[seq_id] = self.under_way.get(seq_id, 0) + 1

    def go(self, seq_id: int) -> None:
        """A call has ended: those go on that are in the window now."""
        self.under_way[seq_id] -= 1
        if not self.under_way[seq_id]:
            del self.under_way[seq_id]
        if self.held and self.under_way:
            first = self.first
            for each in range(first, first + WINDOW):
                if (waiting := self.held.pop(each, None)) is not None:
                    waiting.set()

    @property
    def first(self) -> int:
        """The smallest number under way; there is one."""
        while self._sorted[0] not in self.under_way:
            heapq.heappop(self._sorted)
        return self._sorted[0]

    def in_window(self, seq_id: int) -> bool:
        """Whether a call may be sent."""
        return seq_id < self.first + WINDOW


class Order:
    """The numbered calls of all models that this gateway makes. Lives on one event loop.

    Args:
        cluster: Where they go.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._models: dict[str, _Numbers] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(
        self, what: str, model_id: str, seq_id: int, attempt: Callable[[], Awaitable[T]]
    ) -> T:
        """Make a numbered call until it is answered, for as long as that takes.

        Args:
            what: Names the call in logs.
            model_id: Whose order it is part of.
            seq_id: Its number.
            attempt: Sends it once; every attempt is the same call.

        Raises:
            TinsmithError: The answer, where it is a refusal; the number is used then.
        """
        with self.under_way(model_id, seq_id) as numbers:
            while not numbers.in_window(seq_id):
                await numbers.held.setdefault(seq_id, asyncio.Event()).wait()
            try:
                return await self._cluster.retrying(what, attempt, model_id=model_id)
            except TinsmithError as error:
                if not (error.reason and error.code in _USES_NUMBER):
                    self.use_up_soon(model_id, seq_id)
                raise
            except Problem:
                self.use_up_soon(model_id, seq_id)
                raise

    @contextlib.contextmanager
    def under_way(self, model_id: str, seq_id: int) -> Iterator[_Numbers]:
        """Know of a number for the body of the `with`: that somebody here sees to it."""
        numbers = self._models.get(model_id)
        if numbers is None:
            numbers = self._models[model_id] = _Numbers()
            self._spawn(self._watch(model_id, numbers))
        numbers.come(seq_id)
        numbers.moved_s = asyncio.get_running_loop().time()
        try:
            yield numbers
        finally:
            numbers.moved_s = asyncio.get_running_loop().time()
            numbers.go(seq_id)
            if not numbers.under_way and self._models.get(model_id) is numbers:
                del self._models[model_id]

    async def _watch(self, model_id: str, numbers: _Numbers) -> None:
        """Give up numbers that nobody sees to, for as long as calls of a model are under way."""
        tracing.forget()  # it is for all of them
        request = pb.GetModelRequest(model_id=model_id)
        before = 0
        while True:
            await asyncio.sleep(LOOK_S)
            if self._models.get(model_id) is not numbers:
                return
            if asyncio.get_running_loop().time() - numbers.moved_s < LOOK_S:
                before = 0
                continue
            try:
                found = await self._cluster.training.GetModel(request, timeout=LOOK_S)
            except grpc.RpcError:
                continue
            missing = found.model.next_seq_id
            first = numbers.first if numbers.under_way else missing
            if missing == before < first:
                name = logged_id(model_id)
                _log.warning("calls %d to %d of model %s never came", missing, first - 1, name)
                for number in range(missing, first):
                    await self._quietly(self.use_up(model_id, number))
            before = missing

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except TinsmithError as error:
            _log.warning("a number could not be used up: %s", error)

    def use_up_soon(self, model_id: str, seq_id: int) -> None:
        """Use a number for nothing, unless it is used, and do not wait for it."""
        self._spawn(self._quietly(self.use_up(model_id, seq_id)))

    async def use_up(self, model_id: str, seq_id: int) -> None:
        """Use a number for nothing; without effect where it is used already.

        Raises:
            TinsmithError: Nobody answers.
        """
        # A save of no kind is refused, and that uses its number.
        request = pb.SaveCheckpointRequest(model_id=model_id, seq_id=seq_id)

        async def attempt() -> None:
            await self._cluster.training.SaveCheckpoint(request)

        try:
            await self._cluster.retrying("skip", attempt, model_id=model_id)
        except TinsmithError as error:
            if error.code not in _USES_NUMBER:
                raise
