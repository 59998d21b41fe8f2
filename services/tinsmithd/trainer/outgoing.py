"""What rank 0 says on one stream, in the order in which it goes out."""

import threading
import time
from collections import deque
from collections.abc import Iterator

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb

OUTPUTS_BYTES_MAX = 1024 * 1024
"""Bytes after which a message takes in no more outputs; the last one may go beyond."""
OUTPUTS_WAIT_S = 0.002
"""Seconds that outputs wait for more of them, or for the end of their command, to go out with.
Without the wait, the sending thread would take the interpreter from the computing one."""


class Outgoing:
    """Messages of any thread for the thread that writes them.

    Answers go first. Pieces of states wait until there are none, one at a time: whoever makes them
    is held up meanwhile, so an answer is never behind more than one of them here, and a state is
    not in memory once more.

    Args:
        outputs_wait_s: See `OUTPUTS_WAIT_S`.

    Attributes:
        ended: Set when the stream is over; what is put from then on goes nowhere.
    """

    def __init__(self, outputs_wait_s: float = OUTPUTS_WAIT_S) -> None:
        self._outputs_wait_s = outputs_wait_s
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
        """The messages; outputs that wait together go out as one, the last with their `done`."""
        while (taken := self._take()) is not None:
            first, *others = taken
            for other in others:
                if other.HasField("done"):
                    other.done.outputs.CopyFrom(first.outputs)
                    first = other
                else:
                    first.outputs.MergeFrom(other.outputs)
            yield first

    def _take(self) -> list[pb.AttachRequest] | None:
        """The next message; outputs with their neighbours, up to the `done` of their command."""
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
            deadline_s = time.monotonic() + self._outputs_wait_s
            while taken[-1].HasField("outputs") and size < OUTPUTS_BYTES_MAX:
                if not self._now:
                    self._filled.wait(max(0.0, deadline_s - time.monotonic()))
                # Those of another command follow a message of another kind: each ends with one.
                if not self._now or not _belongs(self._now[0], taken[-1]):
                    break
                taken.append(self._now.popleft())
                size += taken[-1].ByteSize()
            return taken


def _belongs(message: pb.AttachRequest, outputs: pb.AttachRequest) -> bool:
    return message.command_id == outputs.command_id and not message.HasField("failed")
