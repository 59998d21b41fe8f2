"""Sends copies of models' states to the Training server while the ranks go on with other work.

Where a copy has a deposit, its files are left there instead, for the Checkpoint server to take.
Weights for a Sampler, for which somebody waits, do not wait for a snapshot, which is three times as
large and for which nobody does. Nor does it go on at once: to read the weights, load them and make
a first token takes all processors of a small machine for a moment.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
REST_S = 0.2
"""How long what is not urgent rests after what was."""
RESTS_S_MAX = 1.0
"""How long one copy rests in all, however much passes it."""

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
    """Writes and sends copies of states on a thread of its own, one after the other, but that what
    is urgent passes what is not, between two pieces of that.

    Args:
        rest_s: See `REST_S`.
    """

    def __init__(self, rest_s: float = REST_S) -> None:
        self._rest_s = rest_s
        self._rests_s = 0.0
        """How long the copy that is being sent has to rest at most, from now on."""
        self._room = threading.BoundedSemaphore(COPIES_MAX)
        self._urgent: deque[_Copy] = deque()
        self._others: deque[_Copy] = deque()
        self._comes = threading.Condition()
        """Told of each that comes to either."""
        self._thread: threading.Thread | None = None

    def take(
        self,
        command_id: int,
        copy: Callable[[], ModelState],
        reply: Callable[[pb.AttachRequest], None],
        later: Later,
        deposit: str = "",
        *,
        urgent: bool = False,
    ) -> None:
        """Copy a state, say so, and let the thread send it.

        This waits while there are `COPIES_MAX` copies. A copy whose stream ended is dropped.

        Args:
            command_id: Of the command that asked for it.
            copy: Copies the state.
            reply: Sends a message at once.
            later: Takes the pieces, and `done` or `failed` at last.
            deposit: The folder to leave the files in, where it is there; empty: none is.
            urgent: Whether it goes before what is not.

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
        copies = self._urgent if urgent else self._others
        with self._comes:
            copies.append(_Copy(command_id, state, later, deposit))
            self._comes.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="state-sender", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._comes:
                self._comes.wait_for(lambda: self._urgent or self._others)
            if self._urgent:
                self._send_urgent()
            else:
                self._rests_s = RESTS_S_MAX
                self._send(self._others.popleft(), self._let_pass)
                self._room.release()  # here nothing holds the copy any more

    def _send_urgent(self) -> None:
        self._send(self._urgent.popleft(), _nobody)
        self._room.release()

    def _let_pass(self) -> None:
        """Send what is urgent, if anything is, and rest; but the other gets on, if slowly."""
        while self._urgent:
            self._send_urgent()
            self._rest()

    def _rest(self) -> None:
        """Wait a moment, or until something is urgent."""
        begun_s = time.monotonic()
        with self._comes:
            self._comes.wait_for(lambda: self._urgent, max(0.0, min(self._rest_s, self._rests_s)))
        self._rests_s -= time.monotonic() - begun_s

    def _send(self, copy: _Copy, between: Callable[[], None]) -> None:
        try:
            deposited = leave_state(copy.state, copy.deposit, between) if copy.deposit else None
            if deposited is None:
                send_state(copy.command_id, copy.state, copy.later, between)
            else:
                done = done_with(copy.state)
                done.deposited.extend(deposited)
                copy.later(pb.AttachRequest(command_id=copy.command_id, done=done))
        except Exception:
            _log.exception("a state could not be written")
            copy.later(pb.AttachRequest(command_id=copy.command_id, failed=failed(Internal())))


def _nobody() -> None:
    """Nobody passes."""


def send_state(
    command_id: int, state: ModelState, later: Later, between: Callable[[], None] = _nobody
) -> None:
    """Send a state's files and then `done`, until the stream ends.

    Args:
        command_id: Of the command that this answers.
        state: The state, which must not change meanwhile.
        later: Sends the messages, in this order.
        between: Called before each piece.
    """
    for file_name, data in state_files.to_pieces(state, PIECE_BYTES_MAX):
        between()
        piece = pb.StatePiece(file_name=file_name, data=data)
        if not later(pb.AttachRequest(command_id=command_id, piece=piece)):
            return
        progress.made()  # the next copy may have to wait for this one
    later(pb.AttachRequest(command_id=command_id, done=done_with(state)))


def leave_state(
    state: ModelState, deposit: str, between: Callable[[], None] = _nobody
) -> list[pb.DepositedFile] | None:
    """Leave a state's files in a deposit.

    Args:
        state: The state, which must not change meanwhile.
        deposit: Its folder.
        between: Called before each buffer.

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
                left[-1].size_bytes = write_all(file, _with(between, buffers))
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


def _with(between: Callable[[], None], buffers: Iterable[memoryview]) -> Iterator[memoryview]:
    for buffer in buffers:
        between()
        yield buffer
