"""What comes back of one command."""

import asyncio
from collections import deque

from tinsmith.internal.v1 import trainer_link_service_pb2 as pb


class Replies:
    """What rank 0 replies to one command, in order; None when it is gone.

    Args:
        command_id: The command's number.
        begun_s: When it was given.
    """

    def __init__(self, command_id: int, begun_s: float) -> None:
        self.command_id, self.begun_s = command_id, begun_s
        self._messages: deque[pb.AttachRequest | None] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put_nowait(self, message: pb.AttachRequest | None) -> None:
        """One more came."""
        self._messages.append(message)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> pb.AttachRequest | None:
        """The next one, once it is there; for one task alone."""
        while not self._messages:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._messages.popleft()
