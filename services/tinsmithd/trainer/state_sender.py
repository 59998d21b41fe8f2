"""Sends copies of models' states to the Training server while the ranks go on with other work.

Where a copy has a deposit, its files are left there instead, for the Checkpoint server to take.
"""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb
from tinsmithd import failpoints
from tinsmithd.domain import ModelState
from tinsmithd.errors import Internal
from tinsmithd.files import write_all
from tinsmithd.state import files as state_files
from tinsmithd.trainer import progress
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
    deposit: str


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
        deposit: str = "",
    ) -> None:
        """Copy a state, say so, and let the thread send it.

        This waits while there are `COPIES_MAX` copies. A copy whose stream ended is dropped.

        Args:
            command_id: Of the command that asked for it.
            copy: Copies the state.
            reply: Sends a message at once.
            later: Takes the pieces, and `done` or `failed` at last.
            deposit: The folder to leave the files in, where it is there; empty: none is.

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
        self._copies.put(_Copy(command_id, state, later, deposit))
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
            deposited = leave_state(copy.state, copy.deposit) if copy.deposit else None
            if deposited is None:
                send_state(copy.command_id, copy.state, copy.later)
            else:
                done = done_with(copy.state)
                done.deposited.extend(deposited)
                copy.later(pb.AttachRequest(command_id=copy.command_id, done=done))
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
        progress.made()  # the next copy may have to wait for this one
    later(pb.AttachRequest(command_id=command_id, done=done_with(state)))


def leave_state(state: ModelState, deposit: str) -> list[pb.DepositedFile] | None:
    """Leave a state's files in a deposit.

    Args:
        state: The state, which must not change meanwhile.
        deposit: Its folder.

    Returns:
        The files; None where the folder is not there, as on another machine, or does not take them.
    """
    left: list[pb.DepositedFile] = []
    try:
        holder = os.open(deposit, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        for name, buffers in state_files.to_buffers(state):
            left.append(pb.DepositedFile(file_name=name))
            # It must be a new file: nothing is written through a name that leads elsewhere.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            file = os.open(name, flags, 0o600, dir_fd=holder)
            try:
                left[-1].size_bytes = write_all(file, buffers)
            finally:
                os.close(file)
            failpoints.hit("mid_deposit")
    except OSError as error:
        _log.warning("a state is sent, since it cannot be left on the disk: %s", error)
        for part in left:  # the disk may be full
            with contextlib.suppress(OSError):
                os.unlink(part.file_name, dir_fd=holder)
        return None
    finally:
        os.close(holder)
    return left
