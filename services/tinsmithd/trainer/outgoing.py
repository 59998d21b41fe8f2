"""Orders the messages of one stream to the Training server."""

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
    """Takes messages from any thread and hands them to the thread that writes.

    Answers go first. A piece of a state goes when no answer waits, and only one piece waits at a
    time: `put_later` holds its caller up. So at most one piece is ahead of an answer, and a state
    is not held in memory once more.

    Args:
        outputs_wait_s: See `OUTPUTS_WAIT_S`.

    Attributes:
        ended: Set when the stream is over; messages that are put from then on are dropped.
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
        """Send a message when nothing else waits; returns when the one before it has left.

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
        """End the stream after what was put so far."""
        with self._lock:
            self.ended.set()
            self._later.clear()
            self._filled.notify_all()
            self._has_room.notify_all()

    def __iter__(self) -> Iterator[pb.AttachRequest]:
        """Yield the messages; outputs that wait together are one, also with their `done`."""
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
        """Take the next message; of outputs those after it, too, up to their `done`."""
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
                # `done` or `failed` of a command stands before the outputs of the next.
                if not self._now or not _belongs(self._now[0], taken[-1]):
                    break
                taken.append(self._now.popleft())
                size += taken[-1].ByteSize()
            return taken


def _belongs(message: pb.AttachRequest, outputs: pb.AttachRequest) -> bool:
    return message.command_id == outputs.command_id and not message.HasField("failed")
