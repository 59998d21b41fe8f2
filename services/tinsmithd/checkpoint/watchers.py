"""Who wants to hear of checkpoints as they are committed.

What is told is a hint: a watcher that does not keep up misses the oldest of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from tinsmithd.checkpoint.catalogue import Checkpoint

UNTOLD_MAX = 64
"""Maximum number of checkpoints that wait for one watcher; the oldest leaves for one more."""

_Queue = asyncio.Queue[Checkpoint | None]


class Watchers:
    """All watchers of one server. Lives on one event loop."""

    def __init__(self) -> None:
        self._wanted: dict[_Queue, Callable[[Checkpoint], bool]] = {}
        self._closed = False

    def tell(self, committed: Checkpoint) -> None:
        """Tell those who want to hear of a checkpoint."""
        for queue, wants in self._wanted.items():
            if wants(committed):
                _put(queue, committed)

    def tell_all(self, committed: Iterable[Checkpoint]) -> None:
        """Tell of several checkpoints."""
        for checkpoint in committed:
            self.tell(checkpoint)

    def close(self) -> None:
        """Let everybody go, now and from now on."""
        self._closed = True
        for queue in self._wanted:
            _put(queue, None)

    @contextlib.contextmanager
    def watching(self, wants: Callable[[Checkpoint], bool]) -> Iterator[AsyncIterator[Checkpoint]]:
        """What is committed from now on, until `close`, for the body of the `with`."""
        queue = _Queue(UNTOLD_MAX)
        if self._closed:
            queue.put_nowait(None)
        self._wanted[queue] = wants
        try:
            yield _all(queue)
        finally:
            del self._wanted[queue]


async def _all(queue: _Queue) -> AsyncIterator[Checkpoint]:
    while (committed := await queue.get()) is not None:
        yield committed


def _put(queue: _Queue, item: Checkpoint | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(item)
