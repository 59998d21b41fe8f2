"""Sends copies of models' states to the Training server while the ranks go on with other work."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd.domain import ModelState
from tinsmithd.errors import Internal
from tinsmithd.state import files as state_files
from tinsmithd.trainer.answers import done_with, failed

PIECE_BYTES_MAX = 256 * 1024
"""Bytes of a piece. An answer may have to wait for one or two pieces on the wire: with pieces of a
megabyte a state takes as long, and calls beside it take twice as long."""
COPIES_MAX = 2
"""Maximum copies in memory, the one that is being sent included; a further one waits to be made."""

Later = Callable[[pb.AttachRequest], bool]
"""Waits until nothing else is to be sent, then sends a message; False once the stream is over."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    command_id: int
    state: ModelState
    later: Later


class StateSender:
    """Writes and sends copies of states, one after the other, on a thread of its own."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(COPIES_MAX)
        self._copies: queue.SimpleQueue[_Copy] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def take(
        self,
        command_id: int,
        copy: Callable[[], ModelState],
        reply: Callable[[pb.AttachRequest], None],
        later: Later,
    ) -> None:
        """Copy a state, say so, and let the thread send it.

        This waits while there are `COPIES_MAX` copies. A copy whose stream ended is dropped.

        Args:
            command_id: Of the command that asked for it.
            copy: Copies the state.
            reply: Sends a message at once.
            later: Takes the pieces, and `done` or `failed` at last.

        Raises:
            Exception: The state could not be copied.
        """
        self._room.acquire()
        try:
            state = copy()
        except BaseException:
            self._room.release()
            raise
        reply(pb.AttachRequest(command_id=command_id, copied=pb.Copied()))
        self._copies.put(_Copy(command_id, state, later))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="state-sender", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._send_next()
            self._room.release()  # here nothing holds the copy any more

    def _send_next(self) -> None:
        copy = self._copies.get()
        try:
            send_state(copy.command_id, copy.state, copy.later)
        except Exception:
            _log.exception("a state could not be written")
            copy.later(pb.AttachRequest(command_id=copy.command_id, failed=failed(Internal())))


def send_state(command_id: int, state: ModelState, later: Later) -> None:
    """Send a state's files and then `done`, until the stream ends.

    Args:
        command_id: Of the command that this answers.
        state: The state, which must not change meanwhile.
        later: Sends the messages, in this order.
    """
    for file_name, data in state_files.to_pieces(state, PIECE_BYTES_MAX):
        piece = pb.StatePiece(file_name=file_name, data=data)
        if not later(pb.AttachRequest(command_id=command_id, piece=piece)):
            return
    later(pb.AttachRequest(command_id=command_id, done=done_with(state)))
