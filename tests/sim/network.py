"""The network between clients and the Training server: it delays, reorders, repeats and drops."""

import asyncio
from typing import TYPE_CHECKING, Any

from sim.server import Accepted, Request, Server, lost_connection
from tinsmithd.errors import TinsmithError
from tinsmithd.training.call import StoredAnswer

if TYPE_CHECKING:
    from sim.world import World


Message = bytes | dict[str, Any] | TinsmithError | Accepted


class Connection:
    """One request and what comes back, in order, until it breaks.

    Attributes:
        answer: Done with the answer, or with the error that ended it.
        handler: The server's task.
        server: Who works on it.
        accepted: It was said that the call is written down.
    """

    def __init__(self, network: "Network", breaks_after: int) -> None:
        self.network = network
        self.answer: asyncio.Future[StoredAnswer] = network.world.loop.create_future()
        self.handler: asyncio.Task[Any] | None = None
        self.server: Server | None = None
        self.accepted = False
        self._outputs: list[bytes] = []
        self._arrives_s = 0.0
        self._breaks_after = breaks_after

    def send(self, message: "Message") -> None:
        """Send something to the client."""
        if self._breaks_after == 0:
            self.network.world.count("replies lost")
            return
        self._breaks_after -= 1
        now_s = self.network.world.loop.time()
        # In order: timers of the same moment come in any.
        self._arrives_s = max(self._arrives_s + 1e-6, now_s + self.network.delay_s())
        self.network.at(self._arrives_s, self._arrive, message)

    def refused(self) -> None:
        """Nobody listens."""
        self.network.later(self._end, StoredAnswer(error=lost_connection()))

    def abandon(self) -> None:
        """The client goes away, and the server is told."""
        if self.server is not None and self.handler is not None:
            self.server.process.call(self.handler.cancel)

    def _arrive(self, message: "Message") -> None:
        if isinstance(message, Accepted):
            self.accepted = True
        elif isinstance(message, bytes):
            self._outputs.append(message)
        elif isinstance(message, dict):
            self._end(StoredAnswer(self._outputs, message))
        else:
            self._end(StoredAnswer(error=message))

    def _end(self, answer: StoredAnswer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


class Network:
    """See the module.

    Attributes:
        loss: How likely something gets lost.
        doubling: How likely a request arrives twice.
        slow: How likely something takes long.
    """

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rng = world.stream("network")
        self.loss = self.doubling = self.slow = 0.0

    def delay_s(self) -> float:
        """How long something takes."""
        if self.rng.random() < self.slow:
            return self.rng.uniform(0.05, 4.0)
        return self.rng.uniform(0.0005, 0.01)

    def at(self, when_s: float, function: Any, *args: Any) -> None:
        """Call something at a time."""
        self.world.loop.call_at(when_s, function, *args, context=self.world.context)

    def later(self, function: Any, *args: Any) -> None:
        """Call something once it has arrived."""
        self.at(self.world.loop.time() + self.delay_s(), function, *args)

    def send(self, request: Request) -> Connection:
        """Send a request to the server that is to be found at its address now."""
        server = self.world.server
        rng = self.rng
        breaks_after = rng.randint(0, 3) if rng.random() < self.loss else -1
        connection = Connection(self, breaks_after)
        if rng.random() < self.loss / 2:
            self.world.count("requests lost")
        else:
            self.later(self._arrive, server, request, connection)
        if rng.random() < self.doubling:
            self.world.count("requests doubled")
            self.later(self._arrive, server, request, Connection(self, 0))
        return connection

    def _arrive(self, server: Server | None, request: Request, connection: Connection) -> None:
        if server is None or not server.process.alive:
            server = self.world.server  # whoever has the address now
        if server is None:
            connection.refused()
        else:
            server.take(request, connection)
