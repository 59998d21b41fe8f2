"""What rank 0 says on one stream, in the order in which it goes out."""

import threading
from collections import deque
from collections.abc import Iterator

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb

RESULTS_BYTES_MAX = 1024 * 1024
"""Results are put together up to so many bytes, and those of one datum more."""


class Outgoing:
    """Messages of any thread for the thread that writes them.

    Answers go first. Pieces of states wait until there are none, one at a time: whoever makes them
    is held up meanwhile, so an answer is never behind more than one of them here, and a state is
    not in memory once more.

    Attributes:
        ended: Set when the stream is over; what is put from then on goes nowhere.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._has_room = threading.Condition(self._lock)
        self._now: deque[pb.AttachRequest] = deque()
        self._later: deque[pb.AttachRequest] = deque()

    def put(self, message: pb.AttachRequest) -> None:
        """Send a message."""
        with self._lock:
            if not self.ended.is_set():
                self._now.append(message)
                self._filled.notify()

    def put_later(self, message: pb.AttachRequest) -> bool:
        """Send a message when nothing else is waiting; returns when the one before has left.

        Returns:
            False once the stream is over.
        """
        with self._lock:
            while self._later and not self.ended.is_set():
                self._has_room.wait()
            if self.ended.is_set():
                return False
            self._later.append(message)
            self._filled.notify()
            return True

    def end(self) -> None:
        """The stream is over, or is to end after what was put so far."""
        with self._lock:
            self.ended.set()
            self._later.clear()
            self._filled.notify_all()
            self._has_room.notify_all()

    def __iter__(self) -> Iterator[pb.AttachRequest]:
        """The messages; results that wait together go out as one."""
        while (taken := self._take()) is not None:
            first, *others = taken
            for other in others:
                first.results.MergeFrom(other.results)
            yield first

    def _take(self) -> list[pb.AttachRequest] | None:
        """The next message, or neighbours of it that are results of the same command."""
        with self._lock:
            while not self._now and not self._later:
                if self.ended.is_set():
                    return None
                self._filled.wait()
            if not self._now:
                self._has_room.notify()
                return [self._later.popleft()]
            taken = [self._now.popleft()]
            size = taken[0].ByteSize()
            # Those of another command follow a message of another kind: each ends with one.
            while self._now and size < RESULTS_BYTES_MAX and _are_results(taken[0], self._now[0]):
                taken.append(self._now.popleft())
                size += taken[-1].ByteSize()
            return taken


def _are_results(*messages: pb.AttachRequest) -> bool:
    return all(message.HasField("results") for message in messages)
